"""augment and judge against a real server: `transformers serve` with a tiny model, on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from cot2align.train.__main__ import main
from tests.conftest import cli, options, sample_rows, write_rows

SERVING = ("fastapi", "uvicorn", "openai")  # of transformers[serving]
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SERVING),
    reason=f"needs {', '.join(SERVING)}",
)


class Served(NamedTuple):
    url: str
    model: str


@pytest.fixture(scope="module")
def served(workspace, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    model = str(shutil.copytree(workspace.teacher, folder / "teacher"))
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (Path(model) / "chat_template.jinja").write_text(template)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "transformers.cli.transformers", "serve", model),
                *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 120
            while not _answers(f"{url}/health"):
                said = (folder / "log").read_text()
                assert process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.1)
            yield Served(url, model)
        finally:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return response.status == 200
    except (URLError, TimeoutError, ConnectionError):
        return False


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_augment(api, served, tmp_path) -> None:
    rows = [{**row, "id": f"row-{i}"} for i, row in enumerate(sample_rows(6))]
    output = tmp_path / "out.jsonl"
    settings = {
        "server": served.url,
        "server_api": api,
        "model": served.model,
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "output": output,
        "max_new_tokens": 8,
        "max_repetition": 100,
        "drop_unfinished": "off",
        "retries": 0,
    }
    assert cli("augment", **settings) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert sum(bool(row["rationale"]) for row in written) >= 4


def test_judge(served, workspace, tmp_path, capsys) -> None:
    """A model of random weights says nothing that could be read as a verdict."""
    rows = [json.loads(line) for line in Path(workspace.test).read_text().splitlines()]
    for name in "ab":
        run = {"set": "test", "prompt": "standard", "seed": None, "text": f"system {name}"}
        lines = [{**run, "id": str(i), "references": r["output"]} for i, r in enumerate(rows)]
        write_rows(tmp_path / f"{name}.jsonl", lines)
    settings = {
        **{name: tmp_path / f"{name}.jsonl" for name in "ab"},
        "data": workspace.test,
        "output": tmp_path / "out",
        "server": served.url,
        "model": served.model,
        "max_new_tokens": 4,
        "retries": 0,
        "server_api": "completions",
    }
    assert main(["judge", *options(**settings)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["rows"], results["tie"], results["unparsable"]) == (4, 4, 8)
    assert "8 answers without a verdict" in capsys.readouterr().out


def test_another_model_is_refused_with_the_servers_words(served, tmp_path, capsys) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", sample_rows(2))
    settings = {"server": served.url, "data": rows, "output": tmp_path / "out.jsonl", "retries": 0}
    assert cli("augment", model="another", **settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: all prompts were refused: 400")
    assert error.endswith("requested 'another'.\"}")
