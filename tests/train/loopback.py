"""A real HTTP server on loopback that speaks the OpenAI API, or fails in the ways servers fail."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cot2align.train.__main__ import main


@dataclass
class Answer:
    """What one request gets; a `text` is wrapped as a completion, a `raw` body is sent as it is."""

    text: str = ""
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds
    hang_up: bool = False  # instead of an answer
    finish_reason: str = "stop"


@dataclass
class Loopback:
    """Where it listens, and the requests for completions that it got, in order."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds, monotonic
    most_at_once: int = 0

    @property
    def prompts(self) -> list[str]:
        return [
            body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            for body in self.requests
        ]


class Child:
    """The command line in a process of its own, which imports nothing anew; it is to be killed."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        receiver, self._sender = context.Pipe(duplex=False)
        self.process = context.Process(target=lambda: main(receiver.recv()), daemon=True)
        self.process.start()

    def run(self, argv: list[str]) -> None:
        self._sender.send(argv)

    def kill(self) -> None:
        """kill -9, and wait for it."""
        assert self.process.is_alive()
        self.process.kill()
        self.process.join()


@contextmanager
def serve(
    answer: Callable[[str, int], Answer | str], models: Answer | None = None
) -> Iterator[Loopback]:
    """answer(prompt, how often it was asked before) decides; `models` is said to GET /v1/models."""
    lock = threading.Lock()
    asked: dict[str, int] = {}
    under_way = 0
    listing = json.dumps({"data": [{"id": "tiny"}, {"id": "large"}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            said = models or Answer(raw=listing)
            time.sleep(said.delay)
            self._send(said)

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                loopback.requests.append({**body, "path": self.path})
                loopback.headers.append(dict(self.headers))
                loopback.times.append(time.monotonic())
                prompt = loopback.prompts[-1]
                before = asked.get(prompt, 0)
                asked[prompt] = before + 1
                under_way += 1
                loopback.most_at_once = max(loopback.most_at_once, under_way)
            said = answer(prompt, before)
            said = Answer(said) if isinstance(said, str) else said
            time.sleep(said.delay)
            with lock:
                under_way -= 1
            if said.raw is None:
                chat = self.path.endswith("/chat/completions")
                content = {"role": "assistant", "content": said.text}
                choice = {"message": content} if chat else {"text": said.text}
                choice["finish_reason"] = said.finish_reason
                said.raw = json.dumps({"choices": [choice]}).encode()
            self._send(said)

        def _send(self, said: Answer) -> None:
            if said.hang_up:
                self.close_connection = True
                return
            try:
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said.raw or b"")))
                self.end_headers()
                self.wfile.write(said.raw or b"")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has had enough

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        loopback = Loopback(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield loopback
        finally:
            server.shutdown()
            thread.join()
