"""Broken data at every command that reads it: one line that names the file and what is wrong, exit
code 2, and every file as it was before."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

# While their files may be read, see others_folder.
from cot2align.train import augment, evaluate, prepare, trainer  # noqa: F401
from cot2align.train.__main__ import main
from cot2align.train.data import read_rows
from tests.conftest import options, write_rows

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "The sum is 3."}
LINE = json.dumps(GOOD).encode() + b"\n"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_fifo()
    }


@pytest.fixture
def error_of(capsys):
    """Run a command that must be refused; returns its error line."""

    def run(command: str, **settings) -> str:
        assert main([command, *options(**settings)]) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, error
        assert "Traceback" not in error
        return lines[0]

    return run


@pytest.fixture
def refused(tmp_path, error_of):
    """The same, and no file may have changed."""

    def run(command: str, **settings) -> str:
        before = tree(tmp_path)
        line = error_of(command, **settings)
        assert tree(tmp_path) == before
        return line

    return run


@pytest.fixture
def read_by(refused, workspace, tmp_path):
    """Refused: a command that reads the data file `path`."""
    (tmp_path / "precious.txt").write_text("mine")

    def run(command: str, path: object) -> str:
        output = {"output": tmp_path / "output"}
        model = {"model": workspace.student, "device": "cpu"}
        if command == "prepare":
            return refused(command, source=path, **output)
        if command == "sft":
            return refused(command, train=workspace.train, eval=path, **model, **output)
        if command == "distill":
            models = {"student": workspace.student, "teacher": workspace.teacher}
            return refused(command, train=path, **models, device="cpu", **output)
        return refused(command, data=path, **model, **output)

    return run


COMMANDS = ("prepare", "sft", "distill", "augment", "evaluate")
ROWS = {
    "truncated": (LINE + LINE[:25], ":2: broken JSON: Unterminated string"),
    "truncated in a character": (LINE + '{"instruction": "é'.encode()[:-1], ": not UTF-8 (line 2"),
    "UTF-16": (LINE.decode().encode("utf-16"), ": UTF-16, expected UTF-8"),
    "UTF-16 without its mark": (LINE.decode().encode("utf-16-be"), ": a NUL byte"),
    "Latin-1": (
        LINE + '{"instruction": "café"}'.encode("latin-1"),
        ": not UTF-8 (line 2, byte 0xe9",
    ),
    "NUL bytes": (LINE + b"\0" * 100, ": a NUL byte, so not a text (line 2"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00", ": a NUL byte"),
    "empty": (b"", ": no rows"),
    "blank lines": (b"\n \n\r\n", ": no rows"),
    "only a byte order mark": (b"\xef\xbb\xbf", ": no rows"),
    "CSV": (b"instruction,output\na,b\n", ":1: broken JSON: Expecting value (column 1)"),
    "a list over lines": (b"[\n" + LINE + b"]\n", ":1: broken JSON"),
    "a list": (b"[" + LINE.strip() + b"]\n", ":1: expected a JSON object, got list"),
    "a number": (LINE + b"17\n", ":2: expected a JSON object, got int"),
    "null": (b"null\n", ":1: expected a JSON object, got NoneType"),
    "two objects in a line": (LINE.strip() + LINE, ":1: broken JSON: Extra data"),
    "other columns": (b'{"question": "a", "answer": "b"}\n', ":1: field 'instruction' is missing"),
    "no output": (LINE + b'{"instruction": "a"}\n', ":2: field 'output' is missing"),
    "a number for an output": (
        LINE + json.dumps({**GOOD, "output": 3}).encode(),
        ":2: field 'output': expected text, got int",
    ),
    "NaN for an output": (
        LINE + b'{"instruction": "a", "output": NaN}',
        ":2: field 'output': expected text, got float",
    ),
    "a number among outputs": (
        LINE + json.dumps({**GOOD, "output": ["3", 3]}).encode(),
        ":2: field 'output': expected text, got int",
    ),
    "an object for an input": (
        LINE + json.dumps({**GOOD, "input": {}}).encode(),
        ":2: field 'input': expected text, got dict",
    ),
    "a rationale that is a list": (
        json.dumps({**GOOD, "rationale": ["a"]}).encode(),
        ":1: field 'rationale': expected text, got list",
    ),
    "an id twice": (b'{"id": 7, %b{"id": "7", %b' % (LINE[1:], LINE[1:]), ":2: id '7' is also"),
    "an id that is a list": (b'{"id": [1], ' + LINE[1:], ":1: field 'id': expected text or an int"),
    "half a surrogate pair": (
        LINE.replace(b"Add", rb"\ud83d Add"),
        ":1: field 'instruction' has half of a surrogate pair",
    ),
    "brackets without end": (LINE + b"[" * 100_000, ":2: broken JSON: too many brackets"),
    "a number without end": (b'{"id": %b}' % (b"1" * 5000), ":1: broken JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ROWS)
def test_broken_rows(name: str, command: str, read_by, tmp_path) -> None:
    content, said = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert str(path) + said in read_by(command, path)


@pytest.mark.parametrize("command", COMMANDS)
def test_places_without_rows(command: str, read_by, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(LINE)
    for path, said in (
        (tmp_path / "folder", "no file that ends" if command == "prepare" else "Is a directory"),
        (tmp_path / "nowhere.jsonl", "o such file"),
        (tmp_path / "file" / "rows.jsonl", "o such file" if command == "prepare" else "Not a dir"),
    ):
        line = read_by(command, path)
        assert str(path) in line
        assert said in line


@pytest.fixture
def others_folder():
    """A folder that belongs to another user, who lets this one look, but not write."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        Path(name, "rows.jsonl").write_bytes(LINE)
        Path(name, "secret.jsonl").write_bytes(LINE)
        Path(name, "secret.jsonl").chmod(0)
        Path(name).chmod(0o555)
        if is_root:
            os.seteuid(65534)
        yield Path(name)
        if is_root:
            os.seteuid(0)
        Path(name).chmod(0o755)


@pytest.mark.parametrize("command", COMMANDS)
def test_file_that_may_not_be_read(command: str, error_of, others_folder) -> None:
    path = others_folder / "secret.jsonl"
    settings = {
        "prepare": {"source": path},
        "sft": {"model": "m", "train": path},
        "distill": {"student": "s", "teacher": "t", "train": path},
    }.get(command, {"model": "m", "data": path})
    line = error_of(command, **settings, output=others_folder / "o")
    assert line == f"error: data file {path}: Permission denied"


def test_folder_that_may_not_be_written(error_of, others_folder) -> None:
    rows, output = others_folder / "rows.jsonl", others_folder / "o"
    line = error_of("prepare", source=rows, test_rows=0, validation_rows=0, output=output)
    assert line == f"error: {output} cannot be written: Permission denied"


OTHER_FORMATS = {
    "rows.csv": [
        (b'instruction,output\na,"b\n', ":2: broken CSV"),
        (b"instruction,output\na,b\na\n", ":3: 1 fields, but the first line names 2"),
        (b"instruction,output\na,b,c\n", ":2: 3 fields, but the first line names 2"),
        (b"output,output\na,b\n", ":1: a column twice"),
        (b"instruction,output\n", ": no rows"),
        (b"question,answer\na,b\n", ":2: field 'instruction' is missing; found 'question'"),
        ("instruction,output\né,b\n".encode("latin-1"), ": not UTF-8 (line 2"),
    ],
    "rows.json": [
        (b'[{"instruction": "a", "output": "b"},\n{"instr', "broken JSON: Unterminated string"),
        (b'{"data": [{"instruction": "a", "output": "b"}]}', ":1: field 'instruction' is missing"),
        (b'"text"', ": expected a list, got str"),
        (b"[]", ": no rows"),
        (b'[["a", "b"]]', ": item 0: expected a JSON object, got list"),
    ],
    "rows.parquet": [(b"PAR1 and then nothing", "parquet")],
    "rows.txt": [(LINE, ": unknown suffix '.txt' (known: .jsonl, .json, .csv, .parquet)")],
}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [(n, *case) for n, cases in OTHER_FORMATS.items() for case in cases],
)
def test_other_formats_that_are_broken(name, content, said, read_by, tmp_path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    line = read_by("prepare", path)
    assert str(path) in line
    assert said in line


PUBLISHED = {
    "dolly": ({"instruction": "a", "answer": "b"}, "expected the fields 'instruction', 'context'"),
    "alpaca": ({"instruction": "a", "output": "b"}, "found 'instruction', 'output'"),
    "sni": ({"prompt": "a"}, "or 'prompt', 'completion'; found 'prompt'"),
    "dialogsum": ({"dialogue": "a", "summary1": "b"}, "'summary1', 'topic1'; found 'dialogue'"),
}


@pytest.mark.parametrize("source", PUBLISHED)
def test_files_of_another_data_set(source: str, refused, workspace, tmp_path) -> None:
    record, said = PUBLISHED[source]
    files = write_rows(tmp_path / "train.jsonl", [record])
    settings = {"files": files, "tokenizer": workspace.student, "output": tmp_path / "o"}
    line = refused("prepare", source=source, **settings)
    assert f"{files}:1: " in line
    assert said in line


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (None, "task001_a.json: No such file"),
        ('{"Definition": ["a"], "Instances": 3}', "expected 'Definition' and a list 'Instances'"),
        ('{"Definition": [1], "Instances": []}', "field 'Definition': expected text, got int"),
        ('{"Definition": ["a"], "Instances": ["b"]}', "instance 0: expected a JSON object"),
        ('{"Definition": ["a"], "Instances": [{"input": "b"}]}', "instance 0: expected the fields"),
        ('{"Definition": ["a"], "Inst', "task001_a.json: broken JSON"),
    ],
)
def test_broken_task_files(task: str | None, said: str, refused, tmp_path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for split in ("train", "test"):
        names = "task001_a\n" if split == "train" else ""
        (tmp_path / "splits" / "default" / f"{split}_tasks.txt").write_text(names)
    if task is not None:
        (tmp_path / "tasks" / "task001_a.json").write_text(task)
    line = refused("prepare", source="sni", files=tmp_path, output=tmp_path / "o")
    assert str(tmp_path / "tasks") in line
    assert said in line


def test_one_broken_file_among_others(refused, tmp_path) -> None:
    write_rows(tmp_path / "train.jsonl", [GOOD] * 3)
    (tmp_path / "test.jsonl").write_bytes(LINE + b"{")
    line = refused("prepare", source=tmp_path, output=tmp_path / "o")
    assert f"{tmp_path / 'test.jsonl'}:2: broken JSON" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"validation_rows": 2, "test_rows": 1}, "no training row is left of 3; asked for: valid"),
        ({"min_words": 5}, "no training row is left by the filters"),
        ({"files": "x"}, "'files' is given, but source"),
        ({"references": "all"}, "only source dialogsum has further ones"),
        ({"input_field": "context"}, ":1: field 'context' is missing; found 'instruction'"),
        ({"seed": -1}, "'seed' must be at least 0"),
        ({"tokenizer": "/nowhere", "max_prompt_tokens": 9}, "tokenizer of '/nowhere' cannot be"),
        ({"source": "doly"}, "no such file, nor a data set; did you mean 'dolly'?"),
        ({"source": "sni", "input_field": "x"}, "source sni has fields of its own"),
        ({"source": "sni", "references": "all"}, "source sni has only its own"),
    ],
)
def test_settings_that_cannot_be(settings, said, refused, tmp_path) -> None:
    rows = [{**GOOD, "input": str(i)} for i in range(3)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    line = refused("prepare", **{"source": source, "output": tmp_path / "o", **settings})
    assert said in line


def test_without_the_package_for_the_hub(refused, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = refused("prepare", source="alpaca", output=tmp_path / "o")
    assert "comes from the hub (tatsu-lab/alpaca), which needs the package datasets" in line
    assert "--source alpaca --files PATH" in line


def test_an_output_in_use_is_left_as_it_is(refused, tmp_path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [GOOD])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "train.jsonl").write_text("mine")
    assert "is not empty; choose another" in refused(
        "prepare", source=source, output=tmp_path / "o"
    )
    assert "is a file, expected a folder" in refused("prepare", source=source, output=source)
    below = tmp_path / "rows.jsonl" / "o"
    assert f"{below} cannot be written: Not a dir" in refused(
        "prepare", source=source, output=below
    )


def test_marks_and_line_ends_that_are_read(tmp_path) -> None:
    rows = [{**GOOD, "instruction": f"Sag „{i}“.\u2028Gut."} for i in range(3)]
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "other.jsonl").write_bytes(content.encode("utf-8-sig"))
    assert read_rows(str(tmp_path / "other.jsonl")) == read_rows(plain)


@pytest.fixture
def disk_full():
    """Run something while no file may grow over a limit in bytes, as on a disk that fills up."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run(limit: int, command):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            return command()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    return run


def test_disk_full_in_prepare(disk_full, error_of, tmp_path) -> None:
    rows = [{**GOOD, "input": str(i)} for i in range(50)]
    settings = {"source": write_rows(tmp_path / "rows.jsonl", rows), "output": tmp_path / "output"}
    line = disk_full(2000, lambda: error_of("prepare", **settings))
    path = tmp_path / "output" / "train.jsonl.partial"
    assert line == f"error: {path} cannot be written: File too large"
    assert list((tmp_path / "output").iterdir()) == []
    # With room it works, since nothing was left over.
    assert main(["prepare", *options(**settings)]) == 0


@pytest.mark.parametrize("limit", [100, 20_000, 190_000])
def test_disk_full_in_training(limit, disk_full, error_of, workspace, tmp_path) -> None:
    """At the log, the weights, and the optimizer's state."""
    output = tmp_path / "output"
    settings = {"model": workspace.student, "train": workspace.train, "output": output}
    settings |= {"max_steps": 1, "max_length": 256, "max_prompt_length": 160, "device": "cpu"}
    line = disk_full(limit, lambda: error_of("sft", **settings))
    assert str(output) in line or "the checkpoint of step 1 cannot be written: " in line
    assert "File too large" in line or "is the disk full?" in line


@pytest.mark.parametrize("place", ["reading", "writing"])
def test_interrupt(place: str, tmp_path, capsys) -> None:
    """Ctrl-C while the command waits for a named pipe: its source, or the second file it writes."""
    source = tmp_path / "rows.jsonl"
    output = tmp_path / "output"
    output.mkdir()
    pipe = source if place == "reading" else output / "test.jsonl.partial"
    if place == "writing":
        write_rows(source, [{**GOOD, "input": str(i)} for i in range(50)])
    os.mkfifo(pipe)

    def interrupt() -> None:
        if place == "reading":
            with pipe.open("wb", buffering=0) as file:
                file.write(LINE)
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)
        else:
            while not (output / "train.jsonl.partial").exists():
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["prepare", *options(source=source, output=output)]) == 130
    thread.join()
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert list(output.iterdir()) == []
