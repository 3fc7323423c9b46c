"""An OpenAI-compatible server (vLLM, SGLang, TGI, transformers serve): many prompts in, their texts
out as they come.

A request that meets a timeout, a broken connection, 408, 409, 424, 425, 429, 5xx or a rubbish
answer is tried again, after `Retry-After` or a doubling wait with jitter. What then still fails is
left out and counted, and a request that the server refuses (400, 413, 422: mostly a prompt that is
too long) is counted at once. Ten failures in a row, a refused key (401, 403) or an unknown model
(404) stop the run.

The key is read from the environment variable that the settings name. It goes into the request's
header and nowhere else; where a server's error repeats it, it is blotted out.

There is no streaming, and prompts are not cut: the server has the tokenizer.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from cot2align.train.config import ServerConfig, UserError, nearest

RETRIED = (408, 409, 424, 425, 429)  # and 5xx
REFUSED = (400, 413, 422)
FAILURES_IN_A_ROW = 10
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds, without Retry-After
LONGEST_RETRY_AFTER = 600.0  # seconds


# (index of the prompt, the text, whether it came to its own end)
Receive = Callable[[int, str, bool], None]


@dataclass
class Failures:
    """Requests without an answer, index: reason; `failed` ones may succeed another time."""

    refused: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def check(self, asked: int) -> None:
        """Raises UserError where some failed."""
        if self.failed:
            last = list(self.failed.values())[-1]
            raise UserError(
                f"{len(self.failed)} of {asked} requests failed, the last: {last}; the other "
                "answers are kept, --resume asks for the missing ones"
            )


class _RequestError(Exception):
    """One request failed. wait: seconds the server asked for; None: it must not be repeated."""

    def __init__(self, reason: str, wait: float | None = 0.0):
        super().__init__(reason)
        self.wait = wait


def request_seed(*parts: Any) -> int:
    """A seed for one request, 31 bits: the same for the same parts, whatever the order of work."""
    return zlib.crc32(repr(parts).encode()) >> 1


class Server:
    """One model on a server, with the settings of its requests."""

    def __init__(
        self, url: str, model: str, config: ServerConfig, *, temperature: float, max_new_tokens: int
    ):
        """Raises UserError for an address that is none, or a key that is missing."""
        self.url = _base_url(url)
        self.config = config
        self.key = _key(config.api_key_env)
        self.body = {
            "model": model,
            "temperature": temperature,
            "top_p": 1.0,
            "max_tokens": max_new_tokens,
        }
        self.models: list[str] = []
        self._tls = httpx2.create_ssl_context()
        self._free_at = 0.0  # of the event loop's clock: when the next request may start

    def check(self) -> None:
        """Ask for the models, which costs nothing. Raises UserError for a server that does not
        answer or refuses the key; one that cannot list its models passes."""
        asyncio.run(self._check())

    def ask(self, prompts: Sequence[str], seeds: Sequence[int], receive: Receive) -> Failures:
        """Call `receive` for each prompt as its answer comes; returns those without one.

        Raises UserError where going on makes no sense; what was received is then the caller's.
        """
        return asyncio.run(self._ask(prompts, seeds, receive))

    async def _check(self) -> None:
        async with self._client() as client:
            try:
                response = await asyncio.wait_for(client.get("models"), self.config.timeout)
            except asyncio.TimeoutError:
                seconds = self.config.timeout
                raise UserError(f"server {self.url} does not answer in {seconds:g} s") from None
            except (httpx2.RequestError, UnicodeError) as error:
                # The second: a name that no host can have.
                raise UserError(f"server {self.url} cannot be reached: {_words(error)}") from None
        if response.status_code in (401, 403):
            raise self._stop(response)
        try:
            self.models = [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, TypeError, LookupError):
            self.models = []

    async def _ask(
        self, prompts: Sequence[str], seeds: Sequence[int], receive: Receive
    ) -> Failures:
        failures = Failures()
        in_a_row = 0
        waiting = iter(enumerate(zip(prompts, seeds, strict=True)))

        async def work(client: httpx2.AsyncClient) -> None:
            nonlocal in_a_row
            for index, (prompt, seed) in waiting:
                try:
                    text, ended = await self._answer(client, prompt, seed)
                except _RequestError as error:
                    if error.wait is None:
                        failures.refused[index] = str(error)
                        continue
                    failures.failed[index] = str(error)
                    in_a_row += 1
                    if in_a_row == FAILURES_IN_A_ROW:
                        raise UserError(
                            f"{in_a_row} requests in a row failed, the last: {error}"
                        ) from None
                else:
                    in_a_row = 0
                    receive(index, text, ended)

        async with self._client() as client:
            self._free_at = 0.0
            count = min(self.config.concurrency, len(prompts))
            workers = [asyncio.ensure_future(work(client)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        return failures

    async def _answer(self, client: httpx2.AsyncClient, prompt: str, seed: int) -> tuple[str, bool]:
        for attempt in range(self.config.retries + 1):
            await self._turn()
            try:
                return await self._once(client, prompt, seed)
            except _RequestError as error:
                if error.wait is None or attempt == self.config.retries:
                    raise
                if error.wait:
                    # What one request was told holds for the others as well.
                    now = asyncio.get_running_loop().time()
                    self._free_at = max(self._free_at, now + error.wait)
                else:
                    wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
                    await asyncio.sleep(wait * random.uniform(0.5, 1))
        raise AssertionError

    async def _turn(self) -> None:
        per_minute = self.config.requests_per_minute
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        self._free_at = start + (60 / per_minute if per_minute else 0)
        await asyncio.sleep(start - now)

    async def _once(self, client: httpx2.AsyncClient, prompt: str, seed: int) -> tuple[str, bool]:
        chat = self.config.server_api == "chat"
        path = "chat/completions" if chat else "completions"
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        try:
            response = await asyncio.wait_for(
                client.post(path, json={**self.body, **asked, "seed": seed}), self.config.timeout
            )
        except asyncio.TimeoutError:
            raise _RequestError(f"no answer in {self.config.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _RequestError(_words(error)) from None
        status = response.status_code
        if status in RETRIED or status >= 500:
            raise _RequestError(self._said(response), _retry_after(response))
        if status in REFUSED:
            raise _RequestError(self._said(response), wait=None)
        if status != 200:
            raise self._stop(response)
        try:
            choice = response.json()["choices"][0]
            return _text(choice, chat), choice.get("finish_reason") != "length"
        except (ValueError, TypeError, LookupError):
            raise _RequestError(f"the answer is no completion: {self._said(response)}") from None

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        return httpx2.AsyncClient(
            base_url=self.url, headers=headers, timeout=None, limits=limits, verify=self._tls
        )

    def _stop(self, response: httpx2.Response) -> UserError:
        name, status = self.config.api_key_env, response.status_code
        model = self.body["model"]
        if status in (401, 403):
            what = f"refuses the key in {name}" if name else "wants a key, see 'api_key_env'"
        elif status == 404:
            near = nearest(str(model), self.models) if self.models else ""
            what = f"knows no model {model!r}, or no {self.config.server_api}{near}"
        else:
            what = "refuses requests"
        return UserError(f"server {self.url} {what}: {self._said(response)}")

    def _said(self, response: httpx2.Response) -> str:
        text = "".join(c if c.isprintable() else " " for c in response.text)
        if self.key:
            text = text.replace(self.key, "***")
        words = f"{response.status_code} {response.reason_phrase}: {' '.join(text.split())[:200]}"
        return words.rstrip(": ")


def _text(choice: Any, chat: bool) -> str:
    text = choice["message"]["content"] if chat else choice["text"]
    if text is None:  # a model that wrote nothing but hidden reasoning
        return ""
    if not isinstance(text, str):
        raise TypeError
    return text


def _base_url(url: str) -> str:
    expected = "setting 'server': expected http://HOST:PORT/v1"
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UserError(f"{expected}, got {url!r} ({error})") from None
    if parts.userinfo or parts.query:
        raise UserError(f"{expected}, without a password or query; a key goes into 'api_key_env'")
    if parts.scheme not in ("http", "https") or not parts.host or (parts.port or 1) > 65535:
        raise UserError(f"{expected}, got {url!r}")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    if not re.fullmatch("[A-Z][A-Z0-9_]*", variable):
        # It may be the key itself, so it is not repeated.
        raise UserError(
            "setting 'api_key_env': expected the name of an environment variable, in capitals"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"environment variable {variable} (setting 'api_key_env') is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"environment variable {variable} holds characters that no key has")
    return key


def _retry_after(response: httpx2.Response) -> float:
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
