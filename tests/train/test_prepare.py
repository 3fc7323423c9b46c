"""`prepare` on rows in the formats in which the four data sets are published, made here; on a file
of one's own; and, where COT2ALIGN_TEST_DATA names a folder with them, on DialogSum's own files."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
from pathlib import Path

import pytest

from cot2align.train import config as config_module
from cot2align.train.__main__ import main
from cot2align.train.config import PrepareConfig
from cot2align.train.data import read_rows
from tests.conftest import options, write_rows


def prepare(**settings) -> dict:
    """Run the command, which must succeed; returns its report and the rows of each split."""
    assert main(["prepare", *options(**settings)]) == 0
    folder = Path(settings["output"])
    report = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
    for split in ("train", "validation", "test"):
        file = folder / f"{split}.jsonl"
        # As training and evaluation will read it.
        report[split] = [row.fields for row in read_rows(str(file))] if file.exists() else []
        assert report["rows"][split] == len(report[split])
    return report


def words(count: int, what: str = "word") -> str:
    return " ".join([what] * count)


def alpaca_records(count: int) -> list[dict]:
    """As published; of each five, one has no input and one an answer of 10 words."""
    return [
        {
            "instruction": f"Do number {i}.",
            "input": "" if i % 5 == 1 else f"It is {i}.",
            "output": words(10 if i % 5 == 2 else 11),
            "text": "Below is an instruction ...",
        }
        for i in range(count)
    ]


def dialogsum_records(split: str, count: int) -> list[dict]:
    """As published: fname, dialogue, and summary and topic, or three of each in the test file."""
    records = []
    for i in range(count):
        record = {"fname": f"{split}_{i}", "dialogue": f"#Person1#: Hi, {i}?\n#Person2#: Yes. "}
        for number in ("1", "2", "3") if split == "test" else ("",):
            record[f"summary{number}"] = f"They greet, {split} {i}{number}."
            record[f"topic{number}"] = f"topic {i}{number}"
        records.append(record)
    return records


def test_every_setting_has_a_help_and_the_resolved_config_reads_back(tmp_path) -> None:
    config = config_module.build(PrepareConfig, {"source": "dolly", "output": "o"})
    assert all(f.metadata["help"] for f in PrepareConfig.__dataclass_fields__.values())
    (tmp_path / "c.yaml").write_text(config_module.to_yaml(config))
    assert config_module.from_sources(PrepareConfig, str(tmp_path / "c.yaml"), {}) == config


def test_dolly_keeps_prompts_of_at_most_256_tokens(workspace, tmp_path, capsys) -> None:
    from transformers import AutoTokenizer

    def prompt(count: int) -> str:
        return (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\nAdd.\n\n### Input:\n{words(count, '7')}\n\n### Response:\n"
        )

    tokenizer = AutoTokenizer.from_pretrained(workspace.student)
    longest = max(n for n in range(300) if len(tokenizer(prompt(n))["input_ids"]) <= 256)
    records = [
        {
            "instruction": "Add.",
            "context": words(longest + i % 2, "7"),
            "response": f"{i}",
            "category": "closed_qa",
        }
        for i in range(40)
    ]
    records.append({**records[0], "response": " "})
    files = write_rows(tmp_path / "databricks-dolly-15k.jsonl", records)
    report = prepare(
        source="dolly", files=files, tokenizer=workspace.student, output=tmp_path / "o"
    )
    assert report["dropped"]["train"] == {"no answer": 1, "prompt over 256 tokens": 20}
    # Too few for the paper's counts: a tenth each.
    assert report["rows"] == {"train": 16, "validation": 2, "test": 2}
    assert report["shared_prompts"] == {"validation": 2, "test": 2}
    ids = {row["id"] for split in ("train", "validation", "test") for row in report[split]}
    assert ids == {f"dolly-train-{i}" for i in range(0, 40, 2)}
    table = capsys.readouterr().out
    assert "train             41  1 no answer, 20 prompt over 256 tokens" in table
    assert "test               2           500  cut from train, seed 42" in table
    assert "2 prompts of test are also in train" in table


def test_dolly_as_minillm_processed_it_keeps_its_splits(workspace, tmp_path) -> None:
    for name, count in (("train", 6), ("valid", 3), ("test", 2)):
        rows = [
            {"instruction": f"{name} {i}", "input": "", "output": "x", "prompt": "..."}
            for i in range(count)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    report = prepare(
        source="dolly", files=tmp_path, tokenizer=workspace.student, output=tmp_path / "o"
    )
    assert report["rows"] == {"train": 6, "validation": 3, "test": 2}
    assert [row["instruction"] for row in report["validation"]] == ["valid 0", "valid 1", "valid 2"]
    assert report["test"][1] == {
        "id": "dolly-test-1",
        "instruction": "test 1",
        "input": "",
        "output": "x",
    }


def test_alpaca_has_the_splits_of_the_authors_code(tmp_path) -> None:
    """Filter, shuffle with seed 42, the last 500 to test, the 500 before them to validation; with
    as many rows as the paper keeps, its three counts come out."""
    records = alpaca_records(18994)
    (tmp_path / "alpaca_data.json").write_text(json.dumps(records))
    report = prepare(
        source="alpaca", files=tmp_path / "alpaca_data.json", output=tmp_path / "output"
    )
    assert report["rows"] == report["paper"] == {"train": 10396, "validation": 500, "test": 500}
    assert report["dropped"]["train"] == {"no input": 3799, "answer under 11 words": 3799}
    kept = [r for r in records if r["input"] and len(r["output"].split()) >= 11]
    random.seed(42)
    random.shuffle(kept)
    expected = {"train": kept[:-1000], "validation": kept[-1000:-500], "test": kept[-500:]}
    for split, rows in expected.items():
        assert [r["instruction"] for r in report[split]] == [r["instruction"] for r in rows]
    assert not any(report["shared_prompts"].values())


def test_same_rows_from_every_format(tmp_path) -> None:
    records = alpaca_records(60)
    write_rows(tmp_path / "a.jsonl", records)
    write_rows(tmp_path / "lines.json", records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(records[0]))
        table.writeheader()
        table.writerows(records)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    (tmp_path / "crlf.jsonl").write_bytes(content.replace(b"\n", b"\r\n"))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "c.csv").read_bytes())
    files = ["a.jsonl", "lines.json", "b.json", "c.csv", "bom.jsonl", "crlf.jsonl", "bom.csv"]
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
        files.append("d.parquet")
    (tmp_path / "no_suffix").write_bytes(content)
    written = set()
    for name in [*files, "no_suffix"]:
        output = tmp_path / f"{name}-rows"
        settings = {} if "." in name else {"format": "jsonl"}
        report = prepare(source="alpaca", files=tmp_path / name, output=output, **settings)
        assert report["rows"] == {"train": 30, "validation": 3, "test": 3}
        written.add(b"".join((output / f"{s}.jsonl").read_bytes() for s in ("train", "test")))
    assert len(written) == 1


def test_sni_as_prompts_and_completions(tmp_path) -> None:
    def record(
        i: int, answer: int, context: str = "Input: one\n\ntwo", definition: int = 4
    ) -> dict:
        prompt = f"{words(definition, f'do{i}')}\n\nSecond part.\n\n{context}\n\nOutput:"
        return {"prompt": prompt, "completion": f" {words(answer)}\n"}

    folder = tmp_path / "super_natural_instructions"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    train = [record(i, 6) for i in range(20)]
    train += [record(20, 5), record(21, 6, context="Input:"), record(22, 6, context="")]
    test = [record(0, 11), record(1, 10), record(2, 11, definition=174), record(3, 11, "Input:\n")]
    write_rows(folder / "train" / "0000.jsonl", train)
    write_rows(folder / "test" / "0000.jsonl", test)
    report = prepare(source="sni", files=tmp_path, output=tmp_path / "o")
    assert report["dropped"] == {
        "train": {"answer under 6 words": 1, "no input": 2},
        "test": {"answer under 11 words": 1, "instruction over 175 words": 1, "no input": 1},
    }
    assert report["rows"] == {"train": 18, "validation": 2, "test": 1}
    assert report["test"] == [
        {
            "id": "sni-test-0",
            "instruction": "do0 do0 do0 do0\n\nSecond part.",
            "input": "one\n\ntwo",
            "output": words(11),
        }
    ]


def test_sni_as_task_files(tmp_path) -> None:
    """The repository of the tasks: of each at most rows_per_task, in training a sample."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for split, tasks in (("train", ["task001_a", "task002_b"]), ("test", ["task003_c"])):
        names = "".join(f"{task}\n" for task in tasks)
        (tmp_path / "splits" / "default" / f"{split}_tasks.txt").write_text(names)
        for task in tasks:
            instances = [
                {"id": f"{task}-{i}", "input": f"{i}", "output": [words(11), words(12)]}
                for i in range(40)
            ]
            content = {"Definition": [f"Do {task}."], "Positive Examples": []}
            content["Instances"] = instances
            (tmp_path / "tasks" / f"{task}.json").write_text(json.dumps(content))
    (tmp_path / "tasks" / "task004_excluded.json").write_text("not read")
    report = prepare(source="sni", files=tmp_path, rows_per_task=30, output=tmp_path / "o")
    assert report["read"] == {"train": 60, "test": 30}
    assert report["rows"] == {"train": 54, "validation": 6, "test": 30}
    assert [row["id"] for row in report["test"]] == [f"task003_c-{i}" for i in range(30)]
    assert report["test"][0]["instruction"] == "Do task003_c."
    assert report["test"][0]["output"] == [words(11), words(12)]
    assert {row["output"] for row in report["train"]} == {words(11)}
    taken = {row["id"] for row in report["train"] + report["validation"]}
    assert taken != {f"{task}-{i}" for task in ("task001_a", "task002_b") for i in range(30)}
    assert set(report["hashes"]) == {f"tasks/task00{n}.json" for n in ("1_a", "2_b", "3_c")}


def test_dialogsum_as_published_and_as_on_the_hub(tmp_path) -> None:
    """One record with three summaries, or three records: the same three rows."""
    github, hub = tmp_path / "github", tmp_path / "hub"
    github.mkdir()
    hub.mkdir()
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        records = dialogsum_records(split, 4)
        write_rows(github / f"dialogsum.{split}.jsonl", records)
        with (hub / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "dialogue", "summary", "topic"])
            for record in records:
                for number in ("1", "2", "3") if split == "test" else ("",):
                    row_id = record["fname"] + (f"_{number}" if number else "")
                    texts = [record[f"{field}{number}"] for field in ("summary", "topic")]
                    table.writerow([row_id, record["dialogue"], *texts])
    # A file that no split is named after.
    (hub / "holdout.csv").write_text("id,dialogue\n")
    report = prepare(source="dialogsum", files=github, output=tmp_path / "o1")
    other = prepare(source="dialogsum", files=hub, output=tmp_path / "o2")
    assert report["rows"] == {"train": 4, "validation": 4, "test": 12}
    for split in ("train", "validation", "test"):
        assert report[split] == other[split]
    assert report["test"][4] == {
        "id": "test_1_2",
        "instruction": "Generate a summary of the dialogue, focusing specifically on the provided "
        "topic: topic 12.",
        "input": "#Person1#: Hi, 1?\n#Person2#: Yes.",
        "output": "They greet, test 12.",
        "topic": "topic 12",
    }
    every = prepare(source="dialogsum", files=hub, references="all", output=tmp_path / "o3")
    assert every["train"] == report["train"]
    assert [row["instruction"] for row in every["test"]] == [
        row["instruction"] for row in report["test"]
    ]
    assert every["test"][4]["output"] == [f"They greet, test 1{n}." for n in "213"]
    assert every["test"][4]["topics"] == ["topic 12", "topic 11", "topic 13"]


@pytest.mark.skipif(
    "COT2ALIGN_TEST_DATA" not in os.environ,
    reason="COT2ALIGN_TEST_DATA names no folder with dialogsum.dev.jsonl, dialogsum.test.jsonl",
)
def test_dialogsums_own_files(tmp_path) -> None:
    folder = Path(os.environ["COT2ALIGN_TEST_DATA"])
    report = prepare(source="dialogsum", files=folder, output=tmp_path / "o")
    assert (report["rows"]["validation"], report["rows"]["test"]) == (500, 1500)
    published = [json.loads(line) for line in (folder / "dialogsum.test.jsonl").open()]
    for i, record in enumerate(published):
        for number in (1, 2, 3):
            row = report["test"][3 * i + number - 1]
            assert row["id"] == f"{record['fname']}_{number}"
            assert row["output"] == record[f"summary{number}"].strip()
            assert row["instruction"].endswith(f"topic: {record[f'topic{number}'].strip()}.")
            assert row["input"] == record["dialogue"].strip()


def test_own_rows_under_own_names(tmp_path, capsys) -> None:
    rows = [
        {"id": i, "question": f"What is {i}?", "answer": words(1 + i % 4), "why": "So." * (i % 2)}
        for i in range(100)
    ]
    rows += [{**rows[0], "id": "again"}, {**rows[1], "id": "empty", "answer": "  "}]
    source = write_rows(tmp_path / "quiz.jsonl", rows)
    settings = {
        "source": source,
        "instruction_field": "question",
        "output_field": "answer",
        "rationale_field": "why",
        "max_words": 3,
    }
    report = prepare(**settings, output=tmp_path / "o")
    assert report["dropped"]["train"] == {
        "answer over 3 words": 25,
        "no answer": 1,
        "duplicate": 1,
    }
    assert report["rows"] == {"train": 61, "validation": 7, "test": 7}
    every = report["train"] + report["validation"] + report["test"]
    assert sorted(int(row["id"]) for row in every) == [i for i in range(100) if i % 4 != 3]
    for row in every:
        original = rows[int(row["id"])]
        assert row["instruction"] == original["question"]
        assert row.get("rationale", "") == original["why"]
    assert "1 no answer, 1 duplicate" in capsys.readouterr().out.replace(
        "25 answer over 3 words, ", ""
    )
    # The same again, bit for bit; another seed, other splits; sizes as asked.
    assert prepare(**settings, output=tmp_path / "o2")["test"] == report["test"]
    assert prepare(**settings, seed=1, output=tmp_path / "o3")["test"] != report["test"]
    asked = {"validation_rows": 0, "test_rows": 20, "train_rows": 30}
    again = prepare(**settings, **asked, duplicates="keep", output=tmp_path / "o4")
    assert again["rows"] == {"train": 30, "validation": 0, "test": 20}
    assert "duplicate" not in again["dropped"]["train"]
    assert not (tmp_path / "o4" / "validation.jsonl").exists()


def test_own_folder_with_references_and_the_filters_that_settings_add(workspace, tmp_path) -> None:
    long = {"instruction": "Add.", "input": words(300, "7"), "output": "7 or so"}
    write_rows(tmp_path / "train.jsonl", [long, {**long, "input": ""}, {**long, "output": "7"}])
    write_rows(tmp_path / "test.jsonl", [{**long, "input": "1", "output": ["7 or so", "seven"]}])
    report = prepare(
        source=tmp_path,
        min_words=2,
        max_prompt_tokens=200,
        tokenizer=workspace.student,
        validation_rows=0,
        output=tmp_path / "o",
    )
    assert report["dropped"]["train"] == {"answer under 2 words": 1, "prompt over 200 tokens": 1}
    assert report["train"] == [{"id": "own-train-1", **long, "input": ""}]
    assert report["test"][0]["output"] == ["7 or so", "seven"]
    # An output folder is itself a source.
    again = prepare(source=tmp_path / "o", validation_rows=0, output=tmp_path / "o2")
    assert (again["train"], again["test"]) == (report["train"], report["test"])
