"""`check` predicts what a run takes and says what its data are like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from cot2align.train.check import CountedBytes, check, largest, shape
from cot2align.train.config import CheckConfig, build
from cot2align.train.data import collate
from cot2align.train.models import load_tokenizer
from tests.conftest import cli, log_of, sample_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def large(workspace, tmp_path_factory) -> dict[str, str]:
    """Models and rows whose training takes some 100 MB."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048}
    student = GPT2Config(n_embd=256, n_layer=3, n_head=4, n_positions=256, **sizes)
    GPT2LMHeadModel(student).save_pretrained(folder / "student")
    teacher = LlamaConfig(
        hidden_size=384, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(teacher).save_pretrained(folder / "teacher")
    for side in ("student", "teacher"):
        load_tokenizer(getattr(workspace, side)).save_pretrained(folder / side)
    return {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        # Of one length: two steps then see the largest batch.
        "train": write_rows(
            folder / "train.jsonl", [{**sample_rows(8)[7], "id": i} for i in range(8)]
        ),
    }


RUNS = {
    "sft": {"batch_size": 8, "gradient_checkpointing": True},
    "uld": {"batch_size": 4, "kd": "uld"},
    "packed": {"batch_size": 4, "padding_free": True},
    "accumulated": {"batch_size": 1, "gradient_accumulation": 2, "teacher_dtype": "bfloat16"},
}


def settings_of(name: str, large: dict, **changed) -> dict:
    """A run's, of CheckConfig."""
    settings = {
        **large, "max_length": 256, "max_prompt_length": 160, "max_steps": 2, "device": "cpu",
        **RUNS[name], **changed,
    }  # fmt: skip
    if name in ("sft", "packed"):
        settings["model"] = settings.pop("student")
        settings.pop("teacher")
    return settings


@pytest.fixture(scope="module")
def used(large, workspace, tmp_path_factory) -> dict[str, int]:
    """Bytes that the runs took, in a process of their own."""
    folder = tmp_path_factory.mktemp("runs")
    files = []
    small = {"student": workspace.student, "teacher": workspace.teacher}
    for name, settings in {
        "warm-up": settings_of("uld", {**large, **small}),
        **{name: settings_of(name, large) for name in RUNS},
    }.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**settings, "output": str(folder / name)}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.run_memory", *map(str, files)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("used ")]
    return {name: int(line.split()[1]) for name, line in zip(RUNS, lines, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_predicted(name, used, large) -> None:
    found = check(build(CheckConfig, settings_of(name, large)).checked(), steps=0)
    assert found["memory"].peak == pytest.approx(used[name], rel=0.2)


def test_counted_bytes() -> None:
    weight = torch.zeros(100, 100, requires_grad=True)
    with CountedBytes([weight]) as counted:
        a = torch.ones(50, 100) @ weight.T  # its input is saved for the backward pass
        assert counted.alive == 2 * 50 * 100 * 4
        view = a[:10].T.reshape(50, 20)
        assert counted.alive == 2 * 50 * 100 * 4 + view.untyped_storage().nbytes()
        del view
        torch.zeros(1000)
        assert counted.alive == 2 * 50 * 100 * 4
        del a
        assert counted.alive == 0
    assert counted.peak == 2 * 50 * 100 * 4 + 1000 * 4


def test_the_report(distill_settings, workspace, tmp_path, capsys) -> None:
    """Everything is named, two steps are timed, nothing is written."""
    settings = {
        **distill_settings, "kd": "mined", "token_maps": tmp_path / "maps", "max_length": 150,
        "output": tmp_path / "out", "max_prompt_length": 110,
    }  # fmt: skip
    before = sorted(Path.cwd().iterdir())
    assert cli("check", **settings) == 0
    said = capsys.readouterr().out
    student = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(workspace.student).parameters()
    )
    teacher = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(workspace.teacher).parameters()
    )
    for expected in (
        f"student{student / 1e6:.2f}million,{student / 1e6:.2f}trained",
        f"teacher{teacher / 1e6:.2f}million,0.00trained",
        f"projections{48 * 32 / 1e6:.2f}million",
        "12rows,8witharationale",
        "studenttextscuttofit:",
        "vocabularies",
        "responsetokenspercharacter:",
        "ofthestudent'sresponsetokens",
        "peak,at",
        "dryrun:stepsof",
        "suggested:batch_size4,gradient_accumulation1",
    ):
        assert expected in said.replace(" ", ""), expected
    assert sorted(Path.cwd().iterdir()) == before
    assert not (tmp_path / "out").exists()


def test_check_finds_what_the_run_logs(distill_settings, tmp_path) -> None:
    """The aligned share, the shared tokens and the tokens per character are the run's."""
    settings = {**distill_settings, "kd": "mined", "token_maps": str(tmp_path / "maps")}
    settings |= {"batch_size": 12, "device": "cpu", "max_steps": 1}
    found = check(build(CheckConfig, settings).checked(), steps=0)
    assert (
        cli(
            "distill",
            output=tmp_path / "run",
            **{k: v for k, v in settings.items() if k != "device"},
        )
        == 0
    )
    (entry,) = log_of(tmp_path / "run")
    assert found["alignment"] == pytest.approx(entry["mined/aligned_share"], rel=1e-6)
    vocabulary = found["vocabulary"]
    assert 90 < vocabulary["shared"] < vocabulary["teacher"] < vocabulary["student"]
    # More pieces, fewer tokens.
    assert 0 < vocabulary["student_rate"] < vocabulary["teacher_rate"] < 1


def test_a_cache_takes_the_teachers_place(distill_settings, workspace, tmp_path) -> None:
    made = {k: distill_settings[k] for k in ("teacher", "train", "max_length", "max_prompt_length")}
    assert cli("cache", output=tmp_path / "cache", **made) == 0
    settings = {**distill_settings, "device": "cpu"}
    live, cached = (
        check(build(CheckConfig, {**settings, **more}).checked(), steps=1)
        for more in ({}, {"teacher_cache": str(tmp_path / "cache")})
    )
    assert cached["parameters"]["teacher"][0] < live["parameters"]["teacher"][0]
    assert cached["memory"].items["teacher run"] < live["memory"].items["teacher run"]
    assert cached["memory"].peak < live["memory"].peak


def test_adapters(distill_settings) -> None:
    """Few weights are trained: little of gradients and averages, in the same order of a run."""
    settings = {**distill_settings, "device": "cpu"}
    full, adapters = (
        check(build(CheckConfig, {**settings, **more}).checked(), steps=1)
        for more in ({}, {"lora_r": 2})
    )
    trained = {name: count for name, (_, count) in adapters["parameters"].items()}
    assert 0 < trained["student"] < full["parameters"]["student"][1] / 5
    bytes_trained = 4 * (trained["student"] + trained["projections"])
    assert adapters["memory"].items["gradients"] == bytes_trained
    assert adapters["memory"].items["optimizer"] == 2 * bytes_trained
    assert len(adapters["dry_run"]) == 1


def test_suggestions_and_refusals(distill_settings, capsys) -> None:
    config = build(CheckConfig, {**distill_settings, "device": "cpu"}).checked()
    one, two = (check(config, steps=0, processes=n)["memory"] for n in (1, 2))
    assert two.items["gradients"] == 2 * one.items["gradients"]
    assert two.peak == one.peak + one.items["gradients"]
    assert cli("check", train="x") == 2
    assert "either model, or student and teacher" in capsys.readouterr().err
    assert cli("check", **{**distill_settings, "method": "dskd"}) == 2
    assert "and no recipe is given" in capsys.readouterr().err
    assert cli("check", **{**distill_settings, "layers": "middle"}) == 2
    assert "unknown layer 'middle'" in capsys.readouterr().err
    assert cli("check", **{**distill_settings, "kd": "kl"}) == 2
    nowhere = {"eval": distill_settings["train"], "generate_rows": 1, "generate_data": "nowhere"}
    for changed, said in (
        ({"ot_backend": "triton"}, "setting 'ot_backend': backend 'triton' cannot serve cpu"),
        ({"eval": "nowhere"}, "data file nowhere: No such file"),
        ({**nowhere, "max_new_tokens": 8}, "data file nowhere: No such file"),
    ):
        capsys.readouterr()
        assert cli("check", **{**distill_settings, **changed}) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["padded", "packed", "joined"])
def test_the_largest_batch(layout, two_tokenizers) -> None:
    examples = two_tokenizers.examples
    assert shape(largest(examples, 1, layout)).rows == 2
    whole = shape(largest(examples, len(examples), layout), layout)
    batch = collate(examples, layout=layout)
    assert (whole.rows, whole.width) == batch["student"]["input_ids"].shape
    assert (whole.teacher_rows, whole.teacher_width) == batch["teacher"]["input_ids"].shape
    assert whole.length == two_tokenizers.batch["student"]["input_ids"].shape[1]
    assert whole.teacher_length == two_tokenizers.batch["teacher"]["input_ids"].shape[1]
    assert whole.responses == whole.tokens == len(batch["student"]["targets"])
