"""judge: both orders, ties, resume, and inputs that do not belong together."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from cot2align.train import server as server_module
from cot2align.train.__main__ import main
from cot2align.train.judge import tally, verdict_of
from tests.conftest import options, write_rows
from tests.train.loopback import Answer, Child, serve

COUNT = 24


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.02)


def predictions(name: str, quality: dict[int, int]) -> list[dict]:
    """As evaluate writes them; a text says how good it is."""
    return [
        {
            "set": "test",
            "prompt": prompt,
            "seed": seed,
            "id": f"row-{i}",
            "text": f"{name}: quality {quality.get(i, 5)} of {prompt}/{seed}",
            "answer": "an answer",
            "references": [f"reference {i}", "another"],
            "rouge_l": 50.0,
            "exact_match": 0.0,
        }
        for prompt in ("standard", "cot")
        for seed in (10, 20)
        for i in range(COUNT)
    ]


@pytest.fixture
def settings(tmp_path) -> dict:
    """a is better on four rows, b on two."""
    data = [
        {"id": f"row-{i}", "instruction": f"Do {i}.", "output": [f"reference {i}", "another"]}
        for i in range(COUNT)
    ]
    for name, quality in (("a", {0: 7, 1: 8, 2: 9, 3: 7}), ("b", {4: 9, 5: 7})):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "predictions.jsonl", predictions(name, quality))
    return {
        "a": str(tmp_path / "a"),
        "b": str(tmp_path / "b" / "predictions.jsonl"),
        "data": write_rows(tmp_path / "data.jsonl", data),
        "output": str(tmp_path / "out"),
        "model": "tiny",
        "concurrency": 4,
        "timeout": 5,
        "retries": 1,
    }


def qualities(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"quality (\d+)", prompt)]


def fair(prompt: str, _: int = 0) -> str:
    first, second = qualities(prompt)
    return f"Compared.\nVerdict: {'A' if first > second else 'B' if second > first else 'Tied'}"


def judge(loopback, settings: dict, **changed: object) -> int:
    return main(["judge", *options(**{"server": loopback.url, **settings, **changed})])


def results_of(settings: dict) -> dict:
    return json.loads((Path(settings["output"]) / "results.json").read_text())


def test_a_fair_judge(settings, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    with serve(fair) as loopback:
        assert judge(loopback, settings, api_key_env="MY_KEY") == 0
    results = results_of(settings)
    expected = {"rows": 24, "win": 4, "tie": 18, "loss": 2, "disagreements": 0}
    assert results == {
        **expected,
        **{"a": "a", "b": "b", "judge": "tiny", "prompt": "standard", "prediction_seed": 10},
        **{"unparsable": 0, "refused": 0},
    }
    assert len(loopback.requests) == 48
    assert {body["temperature"] for body in loopback.requests} == {0.1}
    assert all("standard/10" in prompt for prompt in loopback.prompts)
    about_row_7 = next(prompt for prompt in loopback.prompts if "Do 7.\n" in prompt)
    for criterion in ("Helpfulness", "Relevance", "Accuracy", "Quality of reasoning"):
        assert criterion in about_row_7
    assert "reference 7\n\nor:\n\nanother" in about_row_7
    captured = capsys.readouterr()
    assert "24 rows to compare, fewer than 100" in captured.out
    assert "a against b, 24 rows: 4 wins, 18 ties, 2 losses -> " in captured.out
    folder = Path(settings["output"])
    assert "| 4 (17 %) | 18 (75 %) | 2 (8 %) | 24 |" in (folder / "results.md").read_text()
    pytest.importorskip("matplotlib")
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    files = {"config.yaml", "results.json", "results.md", "results.png", "verdicts.jsonl"}
    assert {path.name for path in folder.iterdir()} == files
    assert not any(b"s3cret" in path.read_bytes() for path in folder.iterdir())
    assert "s3cret" not in captured.out + captured.err
    # The settings that were written are read by the same command, which has nothing left to ask.
    assert main(["judge", "--config", str(folder / "config.yaml"), "--resume"]) == 0
    assert results_of(settings) == results


def test_a_judge_that_favours_a_place_makes_ties(settings) -> None:
    with serve(lambda *_: "I like it.\n\n Verdict: A \n") as loopback:
        assert judge(loopback, settings) == 0
    results = results_of(settings)
    assert (results["win"], results["tie"], results["loss"]) == (0, 24, 0)
    assert results["disagreements"] == 24


def test_answers_without_a_verdict_are_ties_and_counted(settings, capsys) -> None:
    def answer(prompt: str, _: int) -> Answer | str:
        if "Do 0.\n" in prompt:
            return "Both are fine, so: Verdict: A"
        if "Do 1.\n" in prompt:
            return Answer(status=400, raw=b"content filter")
        return fair(prompt)

    with serve(answer) as loopback:
        assert judge(loopback, settings) == 0
    results = results_of(settings)
    assert (results["win"], results["tie"], results["loss"]) == (2, 20, 2)
    assert (results["unparsable"], results["refused"]) == (2, 2)
    assert "2 answers without a verdict and 2 refused requests" in capsys.readouterr().out


def test_another_prompt_seed_and_number_of_rows(settings) -> None:
    with open(settings["b"], "a") as file:
        file.writelines(json.dumps({**p, "set": "dolly"}) + "\n" for p in predictions("c", {}))
    settings["set"] = "test"
    with serve(fair) as loopback:
        assert judge(loopback, settings, prompt="cot", prediction_seed=20, rows=6) == 0
        assert all("cot/20" in prompt for prompt in loopback.prompts)
        few = set(loopback.prompts)
        assert len(few) == len(loopback.requests) == 12
        # More rows add to these.
        more = {"prompt": "cot", "prediction_seed": 20, "rows": 9, "resume": "true"}
        assert judge(loopback, settings, **more) == 0
        assert len(loopback.requests) == len(set(loopback.prompts)) == 18
    assert results_of(settings)["rows"] == 9


def verdict_keys(settings: dict) -> list[tuple[str, str]]:
    lines = (Path(settings["output"]) / "verdicts.jsonl").read_text().splitlines()
    return [(fields["id"], fields["order"]) for fields in map(json.loads, lines)]


def test_killed_and_resumed_repeats_no_request(settings) -> None:
    child = Child()  # before there are threads
    enough = threading.Event()

    def answer(prompt: str, _: int) -> Answer:
        if len(loopback.requests) >= 20:
            enough.set()
            return Answer(fair(prompt), delay=30)
        return Answer(fair(prompt))

    verdicts = Path(settings["output"]) / "verdicts.jsonl"
    with serve(answer) as loopback:
        child.run(["judge", *options(**settings, server=loopback.url)])
        assert enough.wait(60)
        while verdicts.read_bytes().count(b"\n") < 16:
            time.sleep(0.01)
        child.kill()
    finished = verdict_keys(settings)
    with verdicts.open("ab") as file:
        file.write(b'{"id": "row-')
    with serve(fair) as loopback:
        assert judge(loopback, settings) == 2  # not without being asked
        assert not loopback.requests
        assert judge(loopback, settings, resume="true") == 0
    assert len(loopback.requests) == 48 - len(finished)
    assert sorted(verdict_keys(settings)) == sorted(
        (f"row-{i}", order) for i in range(COUNT) for order in ("AB", "BA")
    )
    results = results_of(settings)
    assert (results["win"], results["tie"], results["loss"]) == (4, 18, 2)


def test_interrupted(settings, capsys) -> None:
    def answer(prompt: str, _: int) -> Answer:
        if len(loopback.requests) == 20:
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        return Answer(fair(prompt), delay=30 * (len(loopback.requests) >= 20))

    with serve(answer) as loopback:
        assert judge(loopback, settings) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert 16 <= len(verdict_keys(settings)) < 20


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A is better.\nVerdict: A", "a"),
        ("Verdict: B\n", "b"),
        ("Verdict: A\nNo.\nVerdict: Tied", "tied"),
        ("Verdict: A\nThat is all.", None),
        ("Verdict: a", None),
        ("verdict: A", None),
        ("Verdict: A or B", None),
        ("Verdict: A Verdict: B", None),
        ("A", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_verdicts_are_read_strictly(text, verdict) -> None:
    assert verdict_of(text, "AB") == verdict
    assert verdict_of(text, "BA") == {"a": "b", "b": "a"}.get(verdict, verdict)


def test_tally_by_hand() -> None:
    rows = [("a", "a"), ("b", "b"), ("a", "b"), ("a", "tied"), ("tied", "tied"), ("a", None)]
    expected = {"rows": 6, "win": 1, "tie": 4, "loss": 1, "disagreements": 2}
    assert tally(rows) == expected


@pytest.fixture
def refused(settings, capsys):
    """Run judge with some settings changed; it must be refused, and nothing asked or written."""

    def run(**changed: object) -> str:
        capsys.readouterr()
        output = Path(settings["output"])
        before = {path: path.read_bytes() for path in output.glob("*")}
        with serve(fair) as loopback:
            assert judge(loopback, settings, **changed) == 2
        assert not loopback.requests
        assert {path: path.read_bytes() for path in output.glob("*")} == before
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines
        assert len(lines) == 1
        return lines[0]

    return run


def changed_predictions(change) -> list[dict]:
    lines = predictions("b", {})
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p[3].update(references=["other"]), "row 'row-3' is not, or with other refer"),
        (lambda p: p[3].update(id="row-99"), "row 'row-99' is not, or with other references"),
        (lambda p: p.pop(3), "1 are in one of them only, such as 'row-3'"),
        (lambda p: p.insert(3, p[3]), "p.jsonl:5: row 'row-3' comes twice under one prompt and"),
        (lambda p: p[3].pop("text"), "p.jsonl:4: expected a prediction with set, prompt"),
        (lambda p: p[3].update(text=7), "p.jsonl:4: fields 'id' and 'text': expected text"),
        (lambda p: p[3].update(seed=[1]), "p.jsonl:4: expected a prediction with set, prompt"),
        (lambda p: p.__delitem__(slice(0, 48)), "no predictions of prompt standard, seed 10; it"),
        (lambda p: p.clear(), "p.jsonl: no rows"),
        (
            lambda p: p[3].update(set="dolly"),
            "are of several sets, choose one with 'set': dolly",
        ),
    ],
)
def test_predictions_that_do_not_match_are_refused(change, said, refused, tmp_path) -> None:
    path = write_rows(tmp_path / "p.jsonl", changed_predictions(change))
    assert said in refused(b=path)


def test_other_broken_inputs_are_refused(refused, settings, tmp_path) -> None:
    assert "predictions nowhere: No such file" in refused(a="nowhere")
    assert "predictions.jsonl: No such file" in refused(a=tmp_path)
    assert "data file nowhere: No such file" in refused(data="nowhere")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "stan')
    assert "torn.jsonl:1: broken JSON" in refused(a=tmp_path / "torn.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    assert "predictions" in refused(a=tmp_path / "latin.jsonl")
    assert "it has: standard/10, standard/20, cot/10, cot/20" in refused(prediction_seed=30)
    assert "no rows; its sets: test" in refused(set="dolly")
    assert "'prompt': unknown value 'std'" in refused(prompt="std")
    assert "'rows' must be at least 1" in refused(rows=0)
    assert "variable NOT_SET_ANYWHERE" in refused(api_key_env="NOT_SET_ANYWHERE")
    assert "cannot be reached" in refused(server="http://127.0.0.1:9")
    assert "expected http://HOST:PORT/v1" in refused(server="localhost")
    assert "is a file, expected a folder" in refused(output=settings["data"])
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(output=tmp_path / "file" / "out")


def test_the_folder_of_another_run_is_left_alone(refused, settings, tmp_path) -> None:
    output = Path(settings["output"])
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "is not empty; choose another, or --resume" in refused()
    assert "holds files of something else" in refused(resume="true")
    (output / "notes.txt").unlink()
    with serve(fair) as loopback:
        assert judge(loopback, settings, rows=4) == 0
    changes = ({"model": "large"}, {"temperature": 1}, {"prompt": "cot"}, {"seed": 11})
    for changed in changes:
        assert "no verdict of this run" in refused(resume="true", rows=4, **changed)
    (output / "verdicts.jsonl").write_text("my notes\n")
    assert "verdicts.jsonl:1: no verdict of this run" in refused(resume="true")
    (output / "verdicts.jsonl").write_bytes(b"\xff\n")
    assert "verdicts.jsonl" in refused(resume="true")
