"""The client against a real HTTP server that fails, is slow, limits rates and sends rubbish."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from email.utils import formatdate
from time import monotonic, time

import pytest

from cot2align.train import server as server_module
from cot2align.train.config import ServerConfig, UserError
from cot2align.train.server import Failures, Server, request_seed
from tests.train.loopback import Answer, Loopback, serve

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.02)


@dataclass
class Asked:
    texts: dict[int, str]
    failures: Failures


def ask(loopback: Loopback, prompts=PROMPTS, model="tiny", **settings) -> Asked:
    config = ServerConfig(**{"timeout": 5.0, "retries": 3, **settings})
    server = Server(loopback.url, model, config, temperature=0.5, max_new_tokens=7)
    server.check()
    texts: dict[int, str] = {}

    def receive(index: int, text: str, ended: bool) -> None:
        texts[index] = text

    return Asked(texts, server.ask(prompts, range(len(prompts)), receive))


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_each_prompt_gets_its_own_answer_and_each_request_its_seed(api) -> None:
    with serve(lambda prompt, _: prompt.upper()) as loopback:
        asked = ask(loopback, server_api=api, concurrency=4)
    assert asked.texts == {i: prompt.upper() for i, prompt in enumerate(PROMPTS)}
    assert asked.failures == Failures()
    path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
    for body in loopback.requests:
        prompt = body["prompt"] if api == "completions" else body["messages"][0]["content"]
        assert body["seed"] == PROMPTS.index(prompt)
        assert (body["path"], body["model"], body["temperature"]) == (path, "tiny", 0.5)
        assert (body["max_tokens"], body["top_p"]) == (7, 1.0)
    assert 0 <= request_seed(10, "x") == request_seed(10, "x") < 2**31
    assert request_seed(10, "x") != request_seed(11, "x")


def test_concurrency_is_reached_and_never_exceeded() -> None:
    with serve(lambda *_: Answer("x", delay=0.1)) as loopback:
        ask(loopback, concurrency=3)
    assert loopback.most_at_once == 3


RUBBISH = {
    "status 500": lambda: Answer(status=500, raw=b"oops"),
    "status 503": lambda: Answer(status=503, raw=b"{}"),
    "status 429": lambda: Answer(status=429, raw=b"slow down"),
    "no answer in time": lambda: Answer("late", delay=0.6),
    "hang up": lambda: Answer(hang_up=True),
    "half a body": lambda: Answer(raw=b'{"cho', headers={"Content-Length": "500"}),
    "not JSON": lambda: Answer(raw=b"<html>hello</html>"),
    "a list": lambda: Answer(raw=b"[1, 2]"),
    "no choices": lambda: Answer(raw=b'{"choices": []}'),
    "no text": lambda: Answer(raw=b'{"choices": [{"message": {}}]}'),
    "a number": lambda: Answer(raw=b'{"choices": [{"message": {"content": 7}}]}'),
    "broken gzip": lambda: Answer(raw=b"not gzip", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_what_goes_wrong_once_is_tried_again(kind) -> None:
    def answer(prompt: str, before: int) -> Answer | str:
        return RUBBISH[kind]() if before == 0 and prompt == "prompt 3" else prompt

    with serve(answer) as loopback:
        asked = ask(loopback, timeout=0.3)
    assert asked.texts == dict(enumerate(PROMPTS))
    assert len(loopback.requests) == len(PROMPTS) + 1


@pytest.mark.parametrize("kind", RUBBISH)
def test_what_stays_wrong_is_counted_and_the_others_are_kept(kind) -> None:
    with serve(lambda prompt, _: RUBBISH[kind]() if prompt == "prompt 3" else prompt) as loopback:
        asked = ask(loopback, timeout=0.3, retries=1)
    assert asked.texts == {i: prompt for i, prompt in enumerate(PROMPTS) if i != 3}
    assert list(asked.failures.failed) == [3]
    assert len(loopback.requests) == len(PROMPTS) + 1
    with pytest.raises(UserError, match=r"1 of 12 requests failed, the last: .*--resume"):
        asked.failures.check(len(PROMPTS))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_not_repeated(status) -> None:
    refusal = Answer(status=status, raw=b'{"error": {"message": "maximum context length"}}')
    with serve(lambda prompt, _: refusal if prompt == "prompt 3" else prompt) as loopback:
        asked = ask(loopback)
    assert len(loopback.requests) == len(PROMPTS)
    assert "maximum context length" in asked.failures.refused[3]
    assert not asked.failures.failed


def test_many_refused_prompts_do_not_stop_the_others() -> None:
    """A data set may hold its long rows side by side."""
    refusal = Answer(status=400, raw=b"too long")
    with serve(lambda prompt, _: prompt if prompt == "prompt 11" else refusal) as loopback:
        asked = ask(loopback, concurrency=1)
    assert asked.texts == {11: "prompt 11"}
    assert list(asked.failures.refused) == list(range(11))


# Two at a time: the last success may come after nine failures, which then begin again, and one
# request is under way at the end.
@pytest.mark.parametrize(("concurrency", "at_most"), [(1, 15), (2, 5 + 9 + 10 + 1)])
def test_ten_failures_in_a_row_stop_the_run(concurrency, at_most) -> None:
    def answer(prompt: str, _: int) -> Answer | str:
        return prompt if int(prompt.split()[1]) < 5 else Answer(status=500, raw=b"dead")

    with (
        serve(answer) as loopback,
        pytest.raises(UserError, match=r"10 requests in a row failed, the last: 500 .*dead"),
    ):
        ask(loopback, [f"prompt {i}" for i in range(60)], concurrency=concurrency, retries=0)
    assert 15 <= len(loopback.requests) <= at_most


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_workers(form) -> None:
    def answer(prompt: str, before: int) -> Answer | str:
        if prompt != "prompt 0" or before:
            return Answer(prompt, delay=0.02)
        after = "1" if form == "seconds" else formatdate(time() + 2, usegmt=True)
        return Answer(status=429, raw=b"", headers={"Retry-After": after})

    with serve(answer) as loopback:
        asked = ask(loopback, concurrency=2)
    assert len(asked.texts) == len(PROMPTS)
    pauses = [b - a for a, b in zip(loopback.times, loopback.times[1:], strict=False)]
    assert max(pauses) > 0.8
    assert loopback.prompts.index("prompt 0", 1) > 0
    # At most what was under way then came before the pause.
    assert pauses.index(max(pauses)) <= 2


def test_rate_limit_holds_for_retries_as_well() -> None:
    with serve(lambda p, before: Answer(status=500) if not before else p) as loopback:
        asked = ask(loopback, PROMPTS[:4], requests_per_minute=1200, concurrency=8)
    assert len(asked.texts) == 4
    assert len(loopback.times) == 8
    assert loopback.times[-1] - loopback.times[0] >= 7 * 0.05 - 0.03


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_at_once_and_is_never_shown(status, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    echo = Answer(status=status, raw=b'{"error": "s3cret-key is not a key"}')
    with serve(lambda *_: echo) as loopback, pytest.raises(UserError) as caught:
        ask(loopback, api_key_env="MY_KEY", concurrency=1)
    assert len(loopback.requests) == 1
    assert loopback.headers[0]["Authorization"] == "Bearer s3cret-key"
    assert "refuses the key in MY_KEY" in str(caught.value)
    assert "*** is not a key" in str(caught.value)
    assert "s3cret-key" not in str(caught.value)
    with serve(lambda *_: "x", models=echo) as loopback, pytest.raises(UserError) as caught:
        ask(loopback, api_key_env="MY_KEY")
    assert not loopback.requests
    assert "s3cret-key" not in str(caught.value)


def test_without_a_key_no_header_is_sent(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
    with serve(lambda prompt, _: prompt) as loopback:
        ask(loopback)
    assert not any("Authorization" in headers for headers in loopback.headers)


def test_unknown_model_is_named_with_the_nearest() -> None:
    missing = Answer(status=404, raw=b'{"error": "no such model"}')
    with serve(lambda *_: missing) as loopback, pytest.raises(UserError) as caught:
        ask(loopback, model="tinny", concurrency=1)
    assert len(loopback.requests) == 1
    assert "knows no model 'tinny', or no chat; did you mean 'tiny'?: 404" in str(caught.value)


def test_a_server_that_cannot_list_its_models_is_used() -> None:
    for models in (Answer(status=404, raw=b""), Answer(raw=b"<html>"), Answer(status=503, raw=b"")):
        with serve(lambda prompt, _: prompt, models=models) as loopback:
            assert ask(loopback, PROMPTS[:1]).texts == {0: PROMPTS[0]}


def test_a_failing_receiver_stops_the_run() -> None:
    def receive(index: int, text: str, ended: bool) -> None:
        raise OSError(28, "No space left on device")

    with serve(lambda prompt, _: prompt) as loopback:
        config = ServerConfig(concurrency=2)
        server = Server(loopback.url, "tiny", config, temperature=1.0, max_new_tokens=7)
        with pytest.raises(OSError, match="No space left"):
            server.ask(PROMPTS, range(len(PROMPTS)), receive)
    assert len(loopback.requests) <= 4


def test_interrupt_does_not_wait_for_slow_answers() -> None:
    with serve(lambda *_: Answer("x", delay=3)) as loopback:
        timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
        start = monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ask(loopback)
        assert monotonic() - start < 2.5
