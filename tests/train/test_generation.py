"""augment and evaluate: resumable, the same on every run, scored by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cot2align.train.augment import rationale_of
from cot2align.train.config import EvaluateConfig, UserError, build
from cot2align.train.data import read_rows
from cot2align.train.evaluate import answer_of, exact_match, repetition, rouge_l, run, scorer
from cot2align.train.generation import Generator
from tests.conftest import cli, options, sample_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def augment_settings(workspace, tmp_path) -> dict:
    """Forty rows in batches of two: long enough to be killed on the way."""
    rows = [{**row, "id": f"row-{i}", "extra": i} for i, row in enumerate(sample_rows(40))]
    for row in rows:
        row.pop("rationale", None)
    return {
        "model": workspace.teacher,
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "max_length": 256,
        "max_new_tokens": 40,
        "batch_size": 2,
        "drop_unfinished": "off",
    }


def test_augment_keeps_every_row_in_order(augment_settings, tmp_path, capsys) -> None:
    output = tmp_path / "out.jsonl"
    assert cli("augment", output=output, **augment_settings) == 0
    rows = read_rows(augment_settings["data"])
    augmented = read_rows(str(output))
    assert [row.id for row in augmented] == [row.id for row in rows]
    for row, source in zip(augmented, rows, strict=True):
        kept = {name: row.fields[name] for name in source.fields}
        assert kept == source.fields
        added = {"rationale"} if row.rationale else {"rationale", "rationale_dropped"}
        assert set(row.fields) == {*source.fields, *added}
    written = sum(bool(row.rationale) for row in augmented)
    assert written >= 30
    assert f"{written} rationales for 40 rows; dropped: " in capsys.readouterr().out


def test_texts_that_come_to_no_end_are_dropped(augment_settings, tmp_path) -> None:
    data = write_rows(tmp_path / "few.jsonl", sample_rows(6))
    settings = {**augment_settings, "data": data, "max_new_tokens": 4}
    for drop in ("off", "on"):
        output = tmp_path / f"{drop}.jsonl"
        assert cli("augment", output=output, **settings | {"drop_unfinished": drop}) == 0
        reasons = [row.fields.get("rationale_dropped") for row in read_rows(str(output))]
        assert (reasons.count("unfinished") >= 4) == (drop == "on")


def test_augment_killed_and_resumed_equals_the_unbroken_run(augment_settings, tmp_path) -> None:
    assert cli("augment", output=tmp_path / "unbroken.jsonl", **augment_settings) == 0
    output = tmp_path / "out.jsonl"
    words = options(output=output, device="cpu", **augment_settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "cot2align.train", "augment", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = output.read_bytes().count(b"\n")
    assert 3 <= lines < 40
    with output.open("ab") as file:
        file.write(b'{"instruction": "torn')
    assert cli("augment", output=output, **augment_settings) == 2  # not without being asked
    assert cli("augment", output=output, resume="true", **augment_settings) == 0
    assert output.read_text() == (tmp_path / "unbroken.jsonl").read_text()
    # Once more: nothing is left to do.
    assert cli("augment", output=output, resume="true", **augment_settings) == 0
    assert output.read_text() == (tmp_path / "unbroken.jsonl").read_text()


def test_augment_refuses_the_file_of_another_run(augment_settings, tmp_path, capsys) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{**sample_rows(1)[0], "id": "elsewhere"}])
    assert cli("augment", output=other, resume="true", **augment_settings) == 2
    assert "other.jsonl:1: row 'elsewhere'" in capsys.readouterr().err


def test_augment_does_not_mix_two_settings(augment_settings, workspace, tmp_path, capsys) -> None:
    copy = tmp_path / "model"
    shutil.copytree(workspace.teacher, copy)
    output = tmp_path / "out.jsonl"
    settings = {**augment_settings, "output": output, "max_new_tokens": 4, "batch_size": 20}
    settings |= {"model": copy}
    assert cli("augment", **settings) == 0
    whole = output.read_bytes()
    # As a kill leaves it.
    output.write_bytes(whole[: whole.index(b"\n") + 1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def refused(**changed: object) -> str:
        capsys.readouterr()
        assert cli("augment", **settings, **{"resume": "true"} | changed) == 2
        now = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert now == before
        return capsys.readouterr().err.strip().splitlines()[-1]

    def refused_with(**changed: object) -> str:
        kept = {name: settings.pop(name) for name in changed if name in settings}
        line = refused(**changed)
        settings.update(kept)
        return line

    for name, there, here in (
        ("seed", 10, 11),
        ("temperature", "1.0", 0.5),
        ("prompt_format", "paper", "raw"),
        ("max_new_tokens", 4, 5),
        ("check_answer", "off", "exact"),
        ("dtype", "auto", "bfloat16"),
    ):
        line = refused_with(**{name: here})
        assert f"out.jsonl is made from something else: {name} is {there} there and {here}" in line
    assert "server is false there and true here" in refused_with(server="http://127.0.0.1:9")
    rows = Path(settings["data"]).read_text().splitlines(keepends=True)
    longer = tmp_path / "longer.jsonl"
    longer.write_text("".join(rows) + rows[-1].replace("row-39", "row-40"))
    before[longer] = longer.read_bytes()
    assert "made from something else: the rows data are others" in refused_with(data=longer)
    assert "model.safetensors of the model is not that of" in refused_with(model=workspace.student)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "model.safetensors of the model is not that of" in refused()
    (copy / "model.safetensors").write_bytes(weights)
    # How it is run does not count, nor where the same model lies.
    settings |= {"batch_size": 8, "model": workspace.teacher}
    assert cli("augment", resume="true", **settings) == 0
    assert output.read_bytes().startswith(before[output])
    assert [row.id for row in read_rows(str(output))] == [f"row-{i}" for i in range(40)]
    (tmp_path / "out.jsonl.origin.yaml").unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "out.jsonl.origin.yaml, which says what it is made from, is missing" in refused()


def test_augment_only_rows_with_an_input(augment_settings, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    settings = {**augment_settings, "only_with_input": "true"}
    assert cli("augment", output=output, **settings) == 0
    assert not any(row.rationale for row in read_rows(str(output)) if not row.input)
    assert any(row.rationale for row in read_rows(str(output)) if row.input)


@pytest.mark.parametrize(
    ("text", "rationale"),
    [
        ("Two and two.\nTherefore, the answer is: 4", "Two and two."),
        ("Two.\n THEREFORE, THE ANSWER IS: 4\nTherefore, the answer is: 5", "Two."),
        ("Two and two make four.", "Two and two make four."),
        ("Therefore, the answer is: 4", ""),
    ],
)
def test_rationale_is_what_stands_before_the_answer(text, rationale) -> None:
    assert rationale_of(text) == rationale


def test_answers_and_scores() -> None:
    assert answer_of(" The sum is 4. ", is_cot=False) == "The sum is 4."
    assert answer_of("So.\nTherefore, the answer is: 3. No, the answer is: 4", is_cot=True) == "4"
    assert answer_of("I do not know.", is_cot=True) == "I do not know."
    assert exact_match("the  Sum is 4", ["5", "The sum is 4"]) == 100
    assert exact_match("the sum is 45", ["5", "The sum is 4"]) == 0
    # Two of three words on one side, two of four on the other: F = 2 * (2/3 * 1/2) / (2/3 + 1/2).
    assert rouge_l("sums were four", ["nothing", "sum is were right"]) == pytest.approx(400 / 7)


def test_repetition_is_the_share_of_sequences_seen_before() -> None:
    assert repetition("one two three") == 0
    assert repetition("a b c d e f") == 0
    assert repetition("a b c d a b c d") == pytest.approx(100 * (1 - 4 / 5))


def test_rouge_of_other_scripts_needs_another_tokenizer() -> None:
    answer, references = "今天 天气 很 好", ["今天 天气 不 好"]
    assert scorer()(answer, references) == 0
    assert scorer("words")(answer, references) == pytest.approx(75)
    assert scorer("characters")(answer, references) == pytest.approx(100 * 5 / 6)


@pytest.fixture
def generator(workspace) -> Generator:
    settings = {"data": workspace.test, "output": "unused", "device": "cpu"}
    limits = {"max_length": 256, "max_new_tokens": 24, "batch_size": 3}
    return Generator.load(build(EvaluateConfig, {"model": workspace.teacher, **settings, **limits}))


def test_batched_greedy_text_is_that_of_each_row_alone(generator, workspace) -> None:
    prompts, _ = generator.prompts(read_rows(workspace.test), is_cot=True)
    lengths = [len(prompts[i]) for batch in generator.batches(prompts) for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    alone = [generator.generate([prompt], seed=None)[0] for prompt in prompts]
    assert generator.generate(prompts, seed=None) == alone


def test_sampling_follows_its_seed(generator, workspace) -> None:
    prompts, _ = generator.prompts(read_rows(workspace.test), is_cot=False)
    first = generator.generate(prompts, seed=1)
    assert generator.generate(prompts, seed=2) != first
    assert generator.generate(prompts, seed=1) == first


def test_generation_overrules_the_defaults_of_a_model(generator, workspace) -> None:
    prompts, _ = generator.prompts(read_rows(workspace.test), is_cot=False)
    sampled = generator.generate(prompts, seed=1)
    defaults = {"top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0, "do_sample": True}
    for name, value in defaults.items():
        setattr(generator.model.generation_config, name, value)
    assert generator.generate(prompts, seed=1) == sampled


def test_evaluate(workspace, tmp_path) -> None:
    settings = {
        "model": workspace.student,
        "data": workspace.train,
        "output": str(tmp_path / "results"),
        "prompts": ["standard", "cot"],
        "seeds": [10, 20],
        "max_length": 256,
        "max_new_tokens": 16,
        "batch_size": 5,
    }
    results = run(build(EvaluateConfig, {**settings, "device": "cpu"}))
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == results
    lines = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 2 * 2 * 12
    for prompt in ("standard", "cot"):
        means = []
        for seed in (10, 20):
            run_ = [p for p in predictions if (p["prompt"], p["seed"]) == (prompt, seed)]
            assert [p["id"] for p in run_] == [str(i) for i in range(12)]
            means.append(sum(p["rouge_l"] for p in run_) / 12)
        assert results[prompt]["rouge_l"] == pytest.approx(sum(means) / 2)
        spread = abs(means[0] - means[1]) / 2**0.5
        assert results[prompt]["rouge_l_std"] == pytest.approx(spread)
        assert 5 < results[prompt]["loss"] < 8
    assert 0 < results["cot"]["length"] <= 16
    assert cli("evaluate", **{k: v for k, v in settings.items() if isinstance(v, str)}) == 2
    # A run that was killed: a line is torn, a batch is missing.
    output = tmp_path / "results"
    # And a text may hold what Python takes for the end of a line.
    first = {**json.loads(lines[0]), "text": "one\u2028two"}
    torn = [json.dumps(first, ensure_ascii=False), *lines[1:7], lines[7][:20]]
    (output / "predictions.jsonl").write_text("\n".join(torn))
    (output / "results.json").unlink()
    resumed = run(build(EvaluateConfig, {**settings, "device": "cpu", "resume": True}))
    assert resumed == results
    kept = (output / "predictions.jsonl").read_text().split("\n")[:-1]
    assert (kept[0], kept[1:]) == (torn[0], lines[1:])
    again = {**settings, "device": "cpu", "resume": True}
    before = {path: path.read_bytes() for path in output.iterdir()}
    for changed, said in (
        ({"seeds": [10]}, r"seeds is \[10, 20\] there and \[10\] here"),
        ({"model": workspace.teacher}, "model.safetensors of the model is not that of"),
        ({"prompt_format": "raw", "max_new_tokens": 8}, "prompt_format is paper .*; max_new_tok"),
        ({"data": workspace.test}, "the rows test are others; the rows train are others"),
    ):
        with pytest.raises(UserError, match=said):
            run(build(EvaluateConfig, again | changed))
        assert {path: path.read_bytes() for path in output.iterdir()} == before
    # How it is run does not count; the loss may differ by rounding.
    run(build(EvaluateConfig, again | {"batch_size": 3}))
    predicted = output / "predictions.jsonl"
    assert predicted.read_bytes() == before[predicted]
    (output / "origin.yaml").unlink()
    with pytest.raises(UserError, match=r"origin\.yaml, which says what it is made from, is miss"):
        run(build(EvaluateConfig, again))


def test_evaluate_with_a_model_that_is_none_leaves_nothing(workspace, tmp_path) -> None:
    settings = {"data": workspace.test, "output": tmp_path / "scores"}
    assert cli("evaluate", model="/nowhere", **settings) == 2
    assert not (tmp_path / "scores").exists()


def test_evaluate_on_several_sets(workspace, tmp_path) -> None:
    for name, count in (("one", 3), ("two", 4)):
        (tmp_path / "sets" / name).mkdir(parents=True)
        write_rows(tmp_path / "sets" / name / "test.jsonl", sample_rows(count))
    settings = {"model": workspace.student, "max_length": 256, "max_new_tokens": 8, "seeds": ""}
    settings |= {"data": tmp_path / "sets", "on": "one,two"}
    assert cli("evaluate", output=tmp_path / "scores", **settings) == 0
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert {name: scores["rows"] for name, scores in results["sets"].items()} == {
        "one": 3,
        "two": 4,
    }
    assert cli("evaluate", output=tmp_path / "x", **{**settings, "on": "one,three"}) == 2
    assert not (tmp_path / "x").exists()
