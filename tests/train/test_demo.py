"""The demo: its problems are right and held out, and a miniature of the chain runs end to end."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cot2align.train import arithmetic, demo
from cot2align.train.config import UserError, build
from cot2align.train.data import PROMPT_FORMATS, read_rows

GAINED = {"buys", "finds", "gets", "picks"}
LOST = {"drops", "gives", "loses", "sells"}
ROWS = (4000, 300)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    generator = random.Random(3)
    return {
        name: [arithmetic.tell(problem, generator) for problem in chosen]
        for name, chosen in zip(("train", "test"), arithmetic.problems(3, *ROWS), strict=True)
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
            assert 1 <= at <= arithmetic.HIGHEST
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
    train, test = arithmetic.problems(3, *ROWS)
    assert (len(train), len(test)) == ROWS
    assert len(set(train) | set(test)) == sum(ROWS)
    assert {len(problem.changes) for problem in train} == {2, 3}
    assert len({row["instruction"] for row in splits["train"]}) == ROWS[0]


def test_problems_are_their_seed() -> None:
    counts = {"train": 200, "validation": 5, "test": 20}
    rows = arithmetic.rows(5, counts)
    assert {name: len(chosen) for name, chosen in rows.items()} == counts
    assert arithmetic.rows(5, counts) == rows
    assert arithmetic.rows(6, counts) != rows


def test_the_largest_demo_has_enough_problems() -> None:
    fields = demo.DemoConfig.__dataclass_fields__
    train, test = (fields[name].metadata["at_most"] for name in ("train_rows", "test_rows"))
    rows = arithmetic.rows(0, {"train": train, "validation": 100, "test": test})
    assert (len(rows["train"]), len(rows["test"])) == (train, test)


SMALL = {"train_rows": 60, "test_rows": 6, "steps": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, demo.run(build(demo.DemoConfig, SMALL | {"output": str(folder)}))


def test_chain(finished: tuple[Path, dict]) -> None:
    folder, results = finished
    assert set(results["models"]) == {"teacher", "standard", "both", "distilled"}
    report = (folder / "report.md").read_text()
    for model in results["models"].values():
        assert f"| {model['title']} " in report
        (run,) = model["seeds"].values()
        for scores in run["scores"]["test"].values():
            assert scores["loss"] > 0
            assert 0 <= scores["exact_match"] <= 100
        assert run["settings"]["max_steps"] == SMALL["steps"]
    assert all(row.rationale for row in read_rows(str(folder / "data" / "train.jsonl")))


def test_tokenizers_differ_and_keep_the_text(finished: tuple[Path, dict]) -> None:
    folder, _ = finished
    rows = read_rows(str(folder / "data" / "test.jsonl"))
    texts = [PROMPT_FORMATS["raw"].text(row, True) + row.response(True) for row in rows]
    counts = {}
    for name in ("new-teacher", "new-student"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        ids = tokenizer(texts)["input_ids"]
        assert [tokenizer.decode(row) for row in ids] == texts
        assert tokenizer.unk_token_id is None or all(tokenizer.unk_token_id not in i for i in ids)
        counts[name] = [len(row) for row in ids]
    assert counts["new-teacher"] != counts["new-student"]


def test_students_begin_alike(finished: tuple[Path, dict]) -> None:
    _, results = finished
    (runs,) = zip(*(results["models"][n]["seeds"].values() for n in STUDENTS), strict=True)
    begins = [run["settings"] for run in runs]
    assert len({begin.get("model") or begin["student"] for begin in begins}) == 1
    for key in ("max_steps", "batch_size", "learning_rate", "seed", "train"):
        assert len({begin[key] for begin in begins}) == 1


STUDENTS = ("standard", "both", "distilled")


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not empty"):
        demo.run(build(demo.DemoConfig, SMALL | {"output": str(tmp_path)}))
    with pytest.raises(UserError, match="is a file"):
        demo.run(build(demo.DemoConfig, SMALL | {"output": str(tmp_path / "mine.txt")}))
