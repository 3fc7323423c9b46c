"""augment: its filters, and a server on loopback that writes the rationales."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from cot2align.train import server as server_module
from cot2align.train.__main__ import main
from cot2align.train.data import PROMPT_FORMATS
from tests.conftest import cli, options, write_rows
from tests.train.loopback import Answer, Child, serve


def prompt_of(row: dict) -> str:
    return PROMPT_FORMATS["paper"].text(read_row(row), is_cot=True)


def read_row(row: dict):
    from cot2align.train.data import parse_row

    return parse_row(json.dumps(row), "row", default_id="0")


def number_in(prompt: str) -> int:
    return int(re.search(r"number (\d+)\?", prompt)[1])


def teacher(prompt: str, _: int = 0) -> str:
    """The rationale and the answer for a row of `rows`."""
    n = number_in(prompt)
    return f"Add one to {n}, which gives {n + 1}.\nTherefore, the answer is: {n + 1}"


def rows(count: int) -> list[dict]:
    return [
        {"id": f"row-{i}", "instruction": f"What follows number {i}?", "output": str(i + 1)}
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.02)


@pytest.fixture
def settings(tmp_path) -> dict:
    return {
        "model": "tiny",
        "data": write_rows(tmp_path / "rows.jsonl", rows(40)),
        "output": str(tmp_path / "out.jsonl"),
        "concurrency": 4,
        "timeout": 5,
        "retries": 1,
    }


def written(settings: dict) -> list[dict]:
    return [json.loads(line) for line in Path(settings["output"]).read_text().splitlines()]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_server_writes_every_row_in_order(api, settings, capsys) -> None:
    def answer(prompt: str, _: int) -> Answer:
        return Answer(teacher(prompt), delay=0.01 * (number_in(prompt) % 3))

    with serve(answer) as loopback:
        assert cli("augment", server=loopback.url, server_api=api, **settings) == 0
    assert written(settings) == [
        {**row, "rationale": f"Add one to {i}, which gives {i + 1}."}
        for i, row in enumerate(rows(40))
    ]
    assert sorted(loopback.prompts) == sorted(map(prompt_of, rows(40)))
    seeds = {prompt: body["seed"] for prompt, body in zip(loopback.prompts, loopback.requests)}  # noqa: B905
    assert len(set(seeds.values())) == 40
    assert loopback.requests[0]["max_tokens"] == 256
    captured = capsys.readouterr()
    assert "40 rationales for 40 rows; dropped: none" in captured.out
    assert "row/s" in captured.err
    # The same request again, whatever the concurrency.
    Path(settings["output"]).unlink()
    with serve(answer) as again:
        settings["concurrency"] = 1
        assert cli("augment", server=again.url, server_api=api, **settings) == 0
    assert seeds == {p: body["seed"] for p, body in zip(again.prompts, again.requests)}  # noqa: B905


def test_killed_and_resumed_loses_and_repeats_nothing(settings) -> None:
    """What the file holds when the command is killed is not asked for again."""
    child = Child()  # before there are threads
    enough = threading.Event()

    def answer(prompt: str, _: int) -> Answer:
        if len(loopback.requests) >= 20:
            enough.set()
            return Answer(teacher(prompt), delay=30)
        return Answer(teacher(prompt))

    with serve(answer) as loopback:
        child.run(["augment", *options(**settings, server=loopback.url)])
        assert enough.wait(60)
        while Path(settings["output"]).read_bytes().count(b"\n") < 16:
            time.sleep(0.01)
        child.kill()
    finished = written(settings)
    assert 16 <= len(finished) < 40
    with Path(settings["output"]).open("ab") as file:
        file.write('{"instruction": "torn ü'.encode()[:-1])
    with serve(teacher) as loopback:
        assert cli("augment", server=loopback.url, resume="true", **settings) == 0
        missing = [row for row in rows(40) if row["id"] not in {f["id"] for f in finished}]
        assert sorted(loopback.prompts) == sorted(map(prompt_of, missing))
        assert [row["id"] for row in written(settings)] == [row["id"] for row in rows(40)]
        assert all(row["rationale"] for row in written(settings))
    # Nothing is left to ask, so no server is needed.
    assert cli("augment", server=loopback.url, resume="true", **settings) == 0


def test_interrupted_and_resumed(settings, capsys) -> None:
    def answer(prompt: str, _: int) -> Answer:
        if len(loopback.requests) == 20:
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        return Answer(teacher(prompt), delay=30 * (len(loopback.requests) >= 20))

    with serve(answer) as loopback:
        assert cli("augment", server=loopback.url, **settings) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    finished = len(written(settings))
    assert 16 <= finished < 20
    with serve(teacher) as loopback:
        assert cli("augment", server=loopback.url, resume="true", **settings) == 0
    assert len(loopback.requests) == 40 - finished
    assert [row["id"] for row in written(settings)] == [row["id"] for row in rows(40)]


def test_how_a_server_is_asked_does_not_count(settings, refused, capsys) -> None:
    with serve(lambda p, _: Answer(status=500) if number_in(p) else teacher(p)) as loopback:
        assert cli("augment", server=loopback.url, **{**settings, "retries": 0}) == 2
    assert len(written(settings)) == 1
    capsys.readouterr()
    with serve(teacher) as other:
        line = refused(server=other.url, resume="true", model="large")
        assert "made from something else: model is tiny there and large here" in line
        assert "server_api is chat there" in refused(
            server=other.url, resume="true", server_api="completions"
        )
        changed = {**settings, "concurrency": 1, "timeout": 9, "retries": 3, "batch_size": 3}
        assert cli("augment", server=other.url, resume="true", **changed) == 0
        assert len(other.requests) == 39


def test_failed_rows_are_left_to_resume_and_refused_ones_are_marked(settings, capsys) -> None:
    def answer(prompt: str, _: int) -> Answer | str:
        status = {3: 500, 7: 400}.get(number_in(prompt), 200)
        return teacher(prompt) if status == 200 else Answer(status=status, raw=b"no")

    with serve(answer) as loopback:
        assert cli("augment", server=loopback.url, **settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 40 requests failed, the last: 500 ")
    assert len(written(settings)) == 38
    with serve(
        lambda p, _: Answer(status=400, raw=b"no") if number_in(p) == 7 else teacher(p)
    ) as s:
        assert cli("augment", server=s.url, resume="true", **settings) == 0
        assert len(s.prompts) == 2
    fields = written(settings)
    assert [row["id"] for row in fields] == [row["id"] for row in rows(40)]
    assert (fields[7]["rationale"], fields[7]["rationale_dropped"]) == ("", "refused")
    assert sum("rationale_dropped" in row for row in fields) == 1
    assert "39 rationales for 40 rows; dropped: 1 refused" in capsys.readouterr().out


def test_filters_say_why(settings, capsys) -> None:
    texts = {
        0: "",
        1: "Therefore, the answer is: 2",
        2: "one step after the other " * 9,
        3: "Short.\nTherefore, the answer is: 4",
        4: " ".join(f"word{i}" for i in range(30)) + "\nTherefore, the answer is: 5",
        5: "Count one more than five.\nTherefore, the answer is: 7",
        6: "Count one more than six.",
        7: "Count one more than seven.\nTherefore, the answer is:  8",
    }
    reasons = ["empty"] * 2 + ["repetition"] + ["length"] * 2 + ["disagreement"] * 2 + [None]
    settings["data"] = write_rows(
        Path(settings["data"]), [{**row, "rationale_dropped": "earlier"} for row in rows(8)]
    )
    limits = {"min_rationale_words": 2, "max_rationale_words": 20, "check_answer": "exact"}
    with serve(lambda prompt, _: texts[number_in(prompt)]) as loopback:
        assert cli("augment", server=loopback.url, **settings, **limits) == 0
    assert [row.get("rationale_dropped") for row in written(settings)] == reasons
    assert [row["rationale"] for row in written(settings)] == [""] * 7 + [
        "Count one more than seven."
    ]
    said = "1 rationales for 8 rows; dropped: 2 disagreement, 2 empty, 2 length, 1 repetition"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_rationale_that_was_cut_is_dropped(api, settings) -> None:
    """Not one that was cut after its answer began."""
    settings["data"] = write_rows(Path(settings["data"]), rows(3))

    def answer(prompt: str, _: int) -> Answer:
        n = number_in(prompt)
        whole = teacher(prompt)
        return Answer(whole if n else "Add one to", finish_reason="stop" if n == 1 else "length")

    with serve(answer) as loopback:
        url = {"server": loopback.url, "server_api": api}
        assert cli("augment", **url, **settings) == 0
        dropped = [row.get("rationale_dropped") for row in written(settings)]
        assert dropped == ["unfinished", None, None]
        Path(settings["output"]).unlink()
        assert cli("augment", drop_unfinished="off", **url, **settings) == 0
        assert written(settings)[0]["rationale"] == "Add one to"


def test_answers_may_agree_by_rouge(settings) -> None:
    data = [
        {"instruction": f"What follows number {i}?", "output": "the very next one"} for i in "12"
    ]
    settings["data"] = write_rows(Path(settings["data"]), data)
    answers = {1: "it is the next one", 2: "nothing at all"}

    def answer(prompt: str, _: int) -> str:
        return f"Think it over.\nTherefore, the answer is: {answers[number_in(prompt)]}"

    with serve(answer) as loopback:
        assert cli("augment", server=loopback.url, check_answer="rouge", **settings) == 0
        assert [bool(row["rationale"]) for row in written(settings)] == [True, False]
        # By default no answer is compared.
        Path(settings["output"]).unlink()
        assert cli("augment", server=loopback.url, **settings) == 0
        assert [bool(row["rationale"]) for row in written(settings)] == [True, True]


def test_key_is_sent_and_written_nowhere(settings, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    with serve(teacher) as loopback:
        assert cli("augment", server=loopback.url, api_key_env="MY_KEY", **settings) == 0
    assert {h["Authorization"] for h in loopback.headers} == {"Bearer s3cret-key"}
    assert not any("s3cret" in path.read_text() for path in tmp_path.iterdir())
    assert "s3cret" not in "".join(capfd.readouterr())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def refused(settings, capsys):
    """Run augment with some settings changed; it must be refused, and nothing written."""

    def run(**changed: object) -> str:
        output = Path(settings["output"])
        before = output.read_bytes() if output.is_file() else None
        assert main(["augment", *options(**{**settings, **changed})]) == 2
        assert (output.read_bytes() if output.is_file() else None) == before
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert not any("Traceback" in line for line in lines), lines
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"server": "127.0.0.1:80"}, "expected http://HOST:PORT/v1, got '127.0.0.1:80'"),
        ({"server": "ftp://127.0.0.1/v1"}, "expected http://HOST:PORT/v1, got 'ftp:"),
        ({"server": "http://"}, "expected http://HOST:PORT/v1, got 'http://'"),
        ({"server": "http://h:port/v1"}, "expected http://HOST:PORT/v1, got 'http://h:port/v1'"),
        ({"server": "http://h:99999/v1"}, "expected http://HOST:PORT/v1, got 'http://h:99999/v1'"),
        ({"server": "http://a..b/v1"}, "server http://a..b/v1 cannot be reached"),
        ({"server": "http://me:secret@h/v1"}, "without a password"),
        ({"server": "http://h/v1?key=secret"}, "without a password or query"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "variable NOT_SET_ANYWHERE (setting 'api_key_env')"),
        ({"api_key_env": "sk-secret-1"}, "expected the name of an environment variable"),
        ({"api_key_env": "ODD_KEY"}, "ODD_KEY holds characters that no key has"),
        ({"concurrency": 0}, "'concurrency' must be at least 1"),
        ({"server_api": "chats"}, "unknown value 'chats'; did you mean 'chat'?"),
        ({"requests_per_minute": 0}, "'requests_per_minute' must be greater than 0"),
        ({"timeout": "soon"}, "'timeout': expected number, got 'soon'"),
        ({"min_rationale_words": 9, "max_rationale_words": 5}, "'max_rationale_words' 5 is below"),
        ({"prompt_format": "chat", "server_api": "completions"}, "use 'server_api' chat"),
        ({"check_answer": "always"}, "'check_answer': unknown value 'always'"),
        ({"max_repetition": 200}, "'max_repetition' must be at most 100"),
    ],
)
def test_broken_settings_are_refused(changed, said, refused, monkeypatch) -> None:
    monkeypatch.setenv("ODD_KEY", "a\nb")
    line = refused(**{"server": "http://127.0.0.1:9/v1", **changed})
    assert said in line
    assert "secret" not in line


def test_broken_servers_are_refused(refused, tmp_path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"server {nobody}/v1 cannot be reached" in refused(server=nobody)
    with serve(teacher, models=Answer("late", delay=5)) as slow:
        assert "does not answer in 0.2 s" in refused(server=slow.url, timeout=0.2)
    for status, said in ((401, "wants a key"), (404, "knows no model 'tiny'"), (301, "refuses")):
        with serve(lambda *_, status=status: Answer(status=status, raw=b"no")) as loopback:
            assert said in refused_after_a_request(refused, loopback.url, tmp_path)


def refused_after_a_request(refused, url: str, tmp_path: Path) -> str:
    """The file is there by then, empty."""
    output = tmp_path / "later.jsonl"
    line = refused(server=url, output=output, resume="true")
    assert output.read_bytes() == b""
    return line


def test_every_prompt_refused_marks_no_row(refused, settings, tmp_path) -> None:
    settings["data"] = write_rows(tmp_path / "few.jsonl", rows(3))
    with serve(lambda *_: Answer(status=400, raw=b"no parameter seed")) as loopback:
        line = refused_after_a_request(refused, loopback.url, tmp_path)
    assert "all prompts were refused: 400" in line
    assert "no parameter seed" in line


def test_the_file_of_another_run_is_left_alone(refused, settings, tmp_path) -> None:
    with serve(teacher) as loopback:
        common = {"server": loopback.url, "resume": "true"}
        for content in (
            json.dumps({**rows(1)[0], "output": "another"}) + "\n",  # the row has changed
            json.dumps({**rows(1)[0], "id": "elsewhere"}),  # no end of line
            "my notes\n",
            (json.dumps(rows(1)[0]) + "\n") * 2,
            "\n",
        ):
            Path(settings["output"]).write_text(content)
            refused(**common)
        Path(settings["output"]).write_bytes(b'{"instruction": "\xff"}\n')
        refused(**common)
        (tmp_path / "file").write_text("")
        assert "file" in refused(**common, output=tmp_path / "file" / "out.jsonl")
        assert not loopback.requests


def test_a_full_disk_is_one_line_and_resumable(settings, capsys) -> None:
    """A limit of the file's size is refused by the system just as a full disk is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serve(teacher) as loopback:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            assert main(["augment", *options(**settings, server=loopback.url)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == f"error: {settings['output']}: File too large"
        assert Path(settings["output"]).stat().st_size == 2000
        assert main(["augment", *options(**settings, server=loopback.url, resume="true")]) == 0
    assert [row["id"] for row in written(settings)] == [row["id"] for row in rows(40)]
