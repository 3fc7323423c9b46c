"""Runs end to end: what is logged, saved, resumed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cot2align.train.__main__ import main
from cot2align.train.config import DistillConfig, SFTConfig, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import build_distiller
from cot2align.train.models import load_tokenizer
from cot2align.train.trainer import DistillTrainer, run, training_arguments
from tests.conftest import cli, log_of


@pytest.fixture(scope="module")
def distilled(workspace, tmp_path_factory) -> Path:
    """A run of six steps with everything on."""
    output = tmp_path_factory.mktemp("distilled") / "run"
    settings = {
        "student": workspace.student,
        "teacher": workspace.sibling,
        "train": workspace.train,
        "eval": workspace.train,
        "max_length": 256,
        "max_prompt_length": 160,
        "batch_size": 4,
        "max_steps": 7,
        "logging_steps": 3,
        "save_steps": 100,
        "learning_rate": 5e-3,
        "kd": "kl",
        "divergence": "skewed_reverse_kl",
        "projection": "per-layer",
        "ot_norm": "rms",
        "layers": "embed,last,1",
        "tokens": "all",
    }
    assert cli("distill", output=output, **settings) == 0
    return output


def test_the_folder_is_a_plain_model(distilled) -> None:
    model = AutoModelForCausalLM.from_pretrained(distilled)
    tokenizer = AutoTokenizer.from_pretrained(distilled)
    ids = tokenizer("What is the sum", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    projections = load_file(distilled / "projections.safetensors")
    assert [tuple(p.shape) for p in projections.values()] == [(48, 32)] * 3
    names = {path.name for path in distilled.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoint-7"} <= names
    pickles = [path.name for path in distilled.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert pickles == []


def test_the_teacher_is_not_saved(distilled) -> None:
    saved = load_file(distilled / "checkpoint-7" / "model.safetensors")
    student = AutoModelForCausalLM.from_pretrained(distilled)
    assert set(saved) <= set(student.state_dict())


def test_log(distilled) -> None:
    log = log_of(distilled)
    assert log[-1]["token_accuracy"] > 0
    # The first, every third, and the last.
    assert [entry["step"] for entry in log] == [1, 3, 6, 7]
    assert [entry.get("rows_per_step") for entry in log] == [4, None, None, None]
    for entry in log:
        total = 0.5 * entry["ce"] + 0.5 * (entry["ot"] + entry["kd"])
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["ot"] == pytest.approx(entry["ot/cst"] + entry["ot/crc"], rel=1e-5)
        assert 0 <= entry["token_accuracy"] < 1
        norms = [entry[f"grad_norm/{part}"] for part in ("student", "projections")]
        assert min(norms) > 0
        assert math.hypot(*norms) == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["ot/grad_norm"] > 0
        assert entry["ot/grad_ratio"] > 0
        for layer in ("embed", "last", "1"):
            for kind in ("std-std", "cot-cot", "std-cot", "cot-std"):
                assert 0 < entry[f"ot/relative_signal/{layer}/{kind}"] < 1
    assert log[-1]["ce"] < log[0]["ce"] - 0.5


def test_evaluation_loss_is_a_mean_over_all_tokens_and_rows(distilled, workspace) -> None:
    lines = (distilled / "metrics.jsonl").read_text().splitlines()
    logged = [entry for entry in map(json.loads, lines) if "eval_loss" in entry]
    assert len(logged) == 1
    settings = {"device": "cpu", "max_length": 256, "max_prompt_length": 160}
    config = build(
        SFTConfig,
        {"model": str(distilled), "train": workspace.train, "output": "unused", **settings},
    )
    tokenizer = load_tokenizer(config.model)
    examples, _ = encode_rows(read_rows(config.train), TextEncoder.of(config, tokenizer))
    with torch.no_grad():
        whole = build_distiller(config, tokenizer)(**collate(examples))
    assert logged[0]["eval_ce"] == pytest.approx(whole["loss"].item(), rel=1e-5)
    parts = logged[0]["eval_ot"] + logged[0]["eval_kd"]
    assert logged[0]["eval_loss"] == pytest.approx(0.5 * logged[0]["eval_ce"] + 0.5 * parts)


def test_resumed_run_is_the_unbroken_one(distill_settings, tmp_path) -> None:
    rhythm = {"max_steps": 7, "save_steps": 3, "checkpoints": 3, "logging_steps": 2}
    settings = {**distill_settings, **rhythm}
    assert cli("distill", output=tmp_path / "unbroken", **settings) == 0
    log = log_of(tmp_path / "unbroken")

    broken = tmp_path / "broken"
    assert cli("distill", output=broken, **settings) == 0
    # As if killed while it wrote step 6, in the middle of the second epoch.
    shutil.rmtree(broken / "checkpoint-7")
    (broken / "checkpoint-6" / "trainer_state.json").unlink()
    for name in ("model.safetensors", "projections.safetensors"):
        (broken / name).unlink()
    assert cli("distill", output=broken, **settings) == 2  # not without being asked
    assert cli("distill", output=broken, resume="true", **settings) == 0

    resumed = log_of(broken)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 6, 7]
    for ours, theirs in zip(resumed, log, strict=True):
        assert ours == theirs
    for name in ("model.safetensors", "projections.safetensors"):
        assert (broken / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_resume_of_another_run_is_refused(distilled, workspace, tmp_path, capsys) -> None:
    """All that differs is named; what changes only how a run goes on may be other."""
    run_folder = tmp_path / "run"
    shutil.copytree(distilled, run_folder)
    whole = yaml.safe_load((run_folder / "config.yaml").read_text())
    file = tmp_path / "config.yaml"

    def resumed(**changed) -> str:
        settings = {**whole, "output": str(run_folder), "resume": True, **changed}
        file.write_text(yaml.safe_dump(settings))
        code = main(["distill", str(file)])
        error = capsys.readouterr().err
        assert code == (2 if error.startswith("error: ") else 0)
        return error.strip()

    moved = shutil.copy(workspace.train, tmp_path / "rows.jsonl")
    assert "error: " not in resumed(batch_size=2, gradient_accumulation=2, train=str(moved))
    assert "error: " not in resumed(eval=workspace.test)  # it decides on nothing
    changed = {"learning_rate": 1e-3, "alpha": 0.25, "teacher": workspace.teacher}
    assert resumed(**changed).endswith(
        "checkpoint-7 cannot be continued: learning_rate is 0.005 there and 0.001 here; "
        f"teacher is {workspace.sibling} there and {workspace.teacher} here; "
        "alpha is 0.5 there and 0.25 here; choose another output"
    )
    assert "train is " in resumed(train=workspace.test)
    assert "a step has 4 rows there and 2 here" in resumed(batch_size=2)
    sft = {"model": workspace.student, "train": workspace.train, "output": run_folder}
    assert cli("sft", resume="true", **sft) == 2
    assert "it is a run of distill" in capsys.readouterr().err


def test_resume_without_a_checkpoint_begins(distill_settings, tmp_path) -> None:
    settings = {**distill_settings, "max_steps": 1, "output": tmp_path / "new", "resume": "true"}
    assert cli("distill", **settings) == 0


def test_optimizer_groups(distill_settings) -> None:
    rates = {"learning_rate": 1e-4, "projection_learning_rate": 2e-3, "weight_decay": 0.1}
    settings = {**distill_settings, **rates, "output": "unused", "device": "cpu"}
    config = build(DistillConfig, settings)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    trainer = DistillTrainer(
        distiller, training_arguments(config), config, tokenizers[0], train_dataset=[]
    )
    decayed, undecayed, projections = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in (decayed, undecayed, projections)] == [0.1, 0, 0.1]
    assert [group["lr"] for group in (decayed, undecayed, projections)] == [1e-4, 1e-4, 2e-3]
    assert [tuple(p.shape) for p in projections["params"]] == [(48, 32)]
    student = list(distiller.student.parameters())
    assert len(decayed["params"]) + len(undecayed["params"]) == len(student)
    assert all(p.dim() == 1 for p in undecayed["params"])


@pytest.mark.parametrize("texts", ["standard", "cot", "both"])
def test_sft(texts, workspace, tmp_path, capsys) -> None:
    config = build(
        SFTConfig,
        {
            "model": workspace.teacher,
            "train": workspace.train,
            "output": str(tmp_path / "tuned"),
            "texts": texts,
            "max_length": 256,
            "max_prompt_length": 160,
            "batch_size": 6,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "device": "cpu",
        },
    )
    result = run(config)
    entries = [entry for entry in result["log"] if "loss" in entry]
    assert result["steps"] == 8
    assert entries[-1]["loss"] == entries[-1]["ce"] < entries[0]["loss"] - 0.5
    assert "8 steps in" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config.model_type == "llama"
    assert not (tmp_path / "tuned" / "projections.safetensors").exists()


def test_bf16_runs_and_stays_close(distill_settings, tmp_path) -> None:
    assert cli("distill", output=tmp_path / "full", **distill_settings) == 0
    mixed = {**distill_settings, "bf16": "true", "teacher_dtype": "bfloat16"}
    assert cli("distill", output=tmp_path / "mixed", **mixed) == 0
    full, mixed = log_of(tmp_path / "full"), log_of(tmp_path / "mixed")
    for ours, theirs in zip(mixed, full, strict=True):
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-2)
        assert ours["ot"] == pytest.approx(theirs["ot"], rel=1e-2)
    saved = load_file(tmp_path / "mixed" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_distillation_without_ot(distill_settings, workspace, tmp_path) -> None:
    settings = {**distill_settings, "teacher": workspace.sibling, "kd": "kl", "ot": "off"}
    assert cli("distill", output=tmp_path / "kl", **settings) == 0
    (first, *_) = log_of(tmp_path / "kl")
    assert first["loss"] == pytest.approx(0.5 * first["ce"] + 0.5 * first["kd"])
    assert not [name for name in first if name.startswith("ot")]
    assert not (tmp_path / "kl" / "projections.safetensors").exists()


def test_evaluation_generates_and_the_best_weights_are_kept(workspace, tmp_path, capsys) -> None:
    settings = {
        "model": workspace.student,
        "train": workspace.train,
        "eval": workspace.test,
        "max_length": 256,
        "max_prompt_length": 160,
        "max_steps": 3,
        "eval_steps": 1,
        "save_steps": 1,
        # So far that the later steps are worse than the first.
        "learning_rate": 0.3,
        "schedule": "constant_with_warmup",
        "generate_rows": 3,
        "max_new_tokens": 8,
    }
    for measure, sign in (("loss", 1), ("rougeL", -1)):
        output = tmp_path / measure
        assert cli("sft", output=output, keep_best=measure, checkpoints=3, **settings) == 0
        entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        values = {e["step"]: sign * e[f"eval_{measure}"] for e in entries if "eval_loss" in e}
        assert set(values) == {1, 2, 3}
        best = min(values, key=lambda step: (values[step], step))
        assert f"kept the weights of step {best}" in capsys.readouterr().out
        kept, saved = (
            load_file(folder / "model.safetensors")
            for folder in (output, output / f"checkpoint-{best}")
        )
        assert all(torch.equal(kept[name], saved[name]) for name in saved)
        assert not (output / "best").exists()
        # A run that had ended, and goes on: nothing is left to do.
        assert cli("sft", output=output, keep_best=measure, resume="true", **settings) == 0
        again = load_file(output / "model.safetensors")
        assert all(torch.equal(again[name], saved[name]) for name in saved)
        samples = (output / "samples" / "step-3.md").read_text().splitlines()
        assert len(samples) == 2 + 2 + 3
        assert all(0 <= e["eval_exact_match"] <= 100 for e in entries if "eval_loss" in e)
    output = tmp_path / "two"
    data = f"{workspace.test},{workspace.train}"
    assert cli("sft", output=output, generate_data=data, **{**settings, "max_steps": 1}) == 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    (entry,) = [entry for line in lines if "eval_loss" in (entry := json.loads(line))]
    sets = [entry[name] for name in entry if name.startswith("eval_rougeL/")]
    assert len(sets) == 2
    assert entry["eval_rougeL"] == pytest.approx(sum(sets) / 2)
    assert cli("sft", output=tmp_path / "x", keep_best="rougeL", **{**settings, "generate_rows": 0})
    assert "nothing to score" in capsys.readouterr().err
