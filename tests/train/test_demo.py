"""The demo: its problems are right and held out, and a miniature of the chain runs end to end."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from cot2align.train import demo
from cot2align.train.config import UserError, build
from cot2align.train.data import read_rows
from cot2align.train.trainer import METRICS_FILE

GAINED = {"buys", "finds", "gets", "picks"}
LOST = {"drops", "gives", "loses", "sells"}
ROWS = (4000, 300)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    generator = random.Random(3)
    return {
        name: [demo.tell(problem, generator) for problem in chosen]
        for name, chosen in zip(("train", "test"), demo.problems(3, *ROWS), strict=True)
    }


def solve(story: str) -> tuple[int, str, list[int]]:
    """Answer, item and numbers of an instruction, read from its words alone."""
    first, *sentences, question = story.split(". ")
    _, _, start, item = first.split()
    numbers = [int(start)]
    value = int(start)
    for sentence in sentences:
        words = sentence.split()
        assert words[0] in ("She", "He")
        assert words[1] in GAINED | LOST
        (number,) = re.findall(r"\d+", sentence)
        numbers.append(int(number))
        value += int(number) if words[1] in GAINED else -int(number)
    assert question == f"How many {item} are left?"
    return value, item, numbers


def test_answers_and_rationales_are_right(splits: dict[str, list[dict[str, str]]]) -> None:
    for row in splits["train"] + splits["test"]:
        value, item, numbers = solve(row["instruction"])
        assert row["output"] == f"{value} {item}"
        steps = re.findall(r"Now (\d+) (plus|minus) (\d+) is (\d+)\.", row["rationale"])
        assert [int(step[2]) for step in steps] == numbers[1:]
        at = numbers[0]
        for before, sign, number, after in steps:
            assert int(before) == at
            at = at + int(number) if sign == "plus" else at - int(number)
            assert int(after) == at
            assert 1 <= at <= demo.HIGHEST
        assert at == value


def test_no_test_numbers_in_training(splits: dict[str, list[dict[str, str]]]) -> None:
    first_three = {
        name: {tuple(solve(row["instruction"])[2][:3]) for row in rows}
        for name, rows in splits.items()
    }
    assert not first_three["train"] & first_three["test"]


def test_every_single_step_of_the_test_is_in_training(
    splits: dict[str, list[dict[str, str]]],
) -> None:
    steps = {
        name: {step for row in rows for step in re.findall(r"\d+ \w+ \d+ is", row["rationale"])}
        for name, rows in splits.items()
    }
    assert steps["test"] <= steps["train"]


def test_thousands_of_different_problems(splits: dict[str, list[dict[str, str]]]) -> None:
    train, test = demo.problems(3, *ROWS)
    assert (len(train), len(test)) == ROWS
    assert len(set(train) | set(test)) == sum(ROWS)
    assert {len(problem.changes) for problem in train} == {2, 3}
    assert len({row["instruction"] for row in splits["train"]}) == ROWS[0]


def test_problems_are_their_seed() -> None:
    assert demo.problems(5, 200, 20) == demo.problems(5, 200, 20)
    assert demo.problems(5, 200, 20) != demo.problems(6, 200, 20)
    (problem, *_), _ = demo.problems(5, 200, 20)
    assert demo.tell(problem, random.Random(1)) == demo.tell(problem, random.Random(1))


def test_the_largest_demo_has_enough_problems() -> None:
    limits = {f.name: f.metadata["at_most"] for f in demo.DemoConfig.__dataclass_fields__.values()}
    train, test = demo.problems(0, limits["train_rows"], limits["test_rows"])
    assert len(train) == limits["train_rows"]
    assert len(test) == limits["test_rows"]


SMALL = {"train_rows": 60, "test_rows": 6, "steps": 3, "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    demo.run(build(demo.DemoConfig, SMALL | {"output": str(folder)}))
    return folder


def test_chain(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(results["models"]) == set(demo.MODELS)
    report = (finished / "report.md").read_text()
    for name, title in demo.MODELS.items():
        assert f"| {title} " in report
        for prompt in ("standard", "cot"):
            assert results["models"][name][prompt]["loss"] > 0
            assert 0 <= results["models"][name][prompt]["exact_match"] <= 100
    assert results["distillation"]["last"]["step"] == SMALL["steps"]
    assert all(row.rationale for row in read_rows(str(finished / "train.jsonl")))


def test_tokenizers_differ_and_keep_the_text(finished: Path) -> None:
    rows = read_rows(str(finished / "test.jsonl"))
    texts = [f"{row.instruction}\nSteps:\n{row.response(True)}" for row in rows]
    counts = {}
    for name in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(finished / "models" / name)
        ids = tokenizer(texts)["input_ids"]
        assert [tokenizer.decode(row) for row in ids] == texts
        assert tokenizer.unk_token_id is None or all(tokenizer.unk_token_id not in i for i in ids)
        counts[name] = [len(row) for row in ids]
    assert counts["teacher"] != counts["student"]


def test_students_begin_alike(finished: Path) -> None:
    begins = {
        name: yaml.safe_load((finished / "configs" / f"{name}.yaml").read_text())
        for name in ("student-standard", "student-both", "student-distilled")
    }
    assert len({c.get("model") or c["student"] for c in begins.values()}) == 1
    for key in ("max_steps", "batch_size", "learning_rate", "seed"):
        assert len({c[key] for c in begins.values()}) == 1


def test_continues_where_it_stopped(finished: Path) -> None:
    before = {name: (finished / name / METRICS_FILE).read_bytes() for name in demo.MODELS}
    report = (finished / "report.md").read_text()
    seconds = json.loads((finished / "seconds.json").read_text())
    del seconds["student-both"], seconds["evaluate-student-both"]
    (finished / "seconds.json").write_text(json.dumps(seconds))
    (finished / "student-both" / "model.safetensors").unlink()
    demo.run(build(demo.DemoConfig, SMALL | {"output": str(finished)}))
    assert (finished / "student-both" / "model.safetensors").is_file()
    for name, metrics in before.items():
        if name != "student-both":
            assert (finished / name / METRICS_FILE).read_bytes() == metrics

    def scores(text: str) -> list[list[str]]:
        return [line.split("|")[1:-2] for line in text.splitlines() if line.startswith("|")]

    assert scores((finished / "report.md").read_text()) == scores(report)


def test_refuses_a_folder_in_use(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other settings"):
        demo.run(build(demo.DemoConfig, SMALL | {"output": str(finished), "steps": 4}))
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not empty"):
        demo.run(build(demo.DemoConfig, SMALL | {"output": str(tmp_path)}))
    with pytest.raises(UserError, match="is a file"):
        demo.run(build(demo.DemoConfig, SMALL | {"output": str(tmp_path / "mine.txt")}))
