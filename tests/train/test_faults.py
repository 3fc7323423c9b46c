"""Kills, full disks, losses that are not finite: nothing finished is lost, and one line says what
happened."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cot2align.train import trainer
from tests.conftest import (
    cli,
    command_process,
    in_two_processes,
    interrupt,
    log_of,
    options,
    sample_rows,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[2]
MAX_STEPS = 12
LORA = {"lora_r": 2, "lora_dropout": 0.1, "learning_rate": 1e-2}
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def long_settings(distill_settings) -> dict:
    return {**distill_settings, "max_steps": MAX_STEPS, "save_steps": 2, "checkpoints": 2}


def wait_for_log(output: Path, entries: int) -> None:
    log = output / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < entries:
        time.sleep(0.002)


def killed_after(entries: int, settings: dict, launcher: tuple[str, ...] = ()) -> None:
    """Run `distill` in processes of its own, all killed once the log has so many entries."""
    words = ["-m", "cot2align.train", "distill", *options(device="cpu", **settings)]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            [sys.executable, *launcher, *words],
            cwd=ROOT,
            # As many as the unbroken run has: sums are rounded by their number.
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=nowhere,
            stderr=nowhere,
        )
        wait_for_log(settings["output"], entries)
        for running in (process, *psutil.Process(process.pid).children()):
            running.kill()
        assert process.wait() == -signal.SIGKILL


def assert_resumes(settings: dict, output: Path, unbroken: Path) -> None:
    """The run goes on from a checkpoint, and its log and weights are those of an unbroken one."""
    assert len(log_of(output)) < settings["max_steps"]
    assert list(output.glob("checkpoint-*/trainer_state.json"))
    assert cli("distill", output=output, resume="true", **settings) == 0
    assert log_of(output) == log_of(unbroken)
    for file in unbroken.glob("*.safetensors"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert not (output / "partial").exists()


@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
def test_kill(extra, long_settings, tmp_path) -> None:
    settings = {**long_settings, **extra}
    assert cli("distill", output=tmp_path / "unbroken", **settings) == 0
    output = tmp_path / "killed"
    killed_after(5, {**settings, "output": output})
    assert_resumes(settings, output, tmp_path / "unbroken")


def test_kill_of_two_processes(long_settings, tmp_path) -> None:
    """The resumed run has one process, with twice the rows: the same numbers but for rounding."""
    assert cli("distill", output=tmp_path / "unbroken", **long_settings) == 0
    output = tmp_path / "killed"
    killed_after(5, {**long_settings, "batch_size": 2, "output": output}, LAUNCHER)
    assert len(log_of(output)) < MAX_STEPS
    assert cli("distill", output=output, resume="true", **long_settings) == 0
    assert_nearly_the_same(output, tmp_path / "unbroken")


def test_resume_with_two_processes(long_settings, tmp_path) -> None:
    """What one process began, within an epoch, two go on with, half the rows each."""
    long_settings["checkpoints"] = MAX_STEPS
    assert cli("distill", output=tmp_path / "unbroken", **long_settings) == 0
    output = tmp_path / "resumed"
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-8", output / "checkpoint-8")
    divided = {"batch_size": 2, "resume": "true", "output": output, "device": "cpu"}
    in_two_processes("cot2align.train", "distill", *options(**{**long_settings, **divided}))
    assert {path.name for path in output.glob("checkpoint-*")} == {
        *("checkpoint-8", "checkpoint-10", "checkpoint-12")
    }
    assert_nearly_the_same(output, tmp_path / "unbroken")


def assert_nearly_the_same(output: Path, unbroken: Path) -> None:
    for ours, theirs in zip(log_of(output), log_of(unbroken), strict=True):
        for name in ("loss", "ce", "ot", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["step"])


def test_sigterm(long_settings, tmp_path, capsys) -> None:
    assert cli("distill", output=tmp_path / "unbroken", **long_settings) == 0
    output = tmp_path / "stopped"
    settings = {**long_settings, "save_steps": 100}

    def terminate() -> None:
        wait_for_log(output, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    # Were it not handled in the run, it would count as an interrupt, exit code 130.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    thread = threading.Thread(target=terminate)
    thread.start()
    assert cli("distill", output=output, **settings) == 143
    thread.join()
    assert signal.signal(signal.SIGTERM, before) is signal.default_int_handler
    steps = len(log_of(output))
    assert f"stopped by SIGTERM after step {steps}; --resume continues" in capsys.readouterr().out
    assert (output / f"checkpoint-{steps}" / "trainer_state.json").exists()
    assert_resumes(settings, output, tmp_path / "unbroken")


def test_sigterm_after_the_last_step(distill_settings, workspace, tmp_path, monkeypatch) -> None:
    """The training is whole and saved; the exit code keeps a study from going on."""
    evaluate = trainer.DistillTrainer.evaluate

    def terminated(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(trainer.DistillTrainer, "evaluate", terminated)
    settings = {**distill_settings, "eval": workspace.test, "max_steps": 1}
    assert cli("distill", output=tmp_path / "student", **settings) == 143
    assert (tmp_path / "student" / "model.safetensors").is_file()
    monkeypatch.undo()
    assert cli("distill", output=tmp_path / "student", resume="true", **settings) == 0


def interrupted_when(ready: Callable[[], bool], command: str, settings: dict) -> None:
    """Ctrl-C, once something is there, for a command in a process of its own."""
    process = command_process(command, *options(device="cpu", **settings))
    while not ready():
        assert process.poll() is None
        time.sleep(0.002)
    interrupt(process)


def test_interrupted_distill(long_settings, tmp_path) -> None:
    # Steps enough to be interrupted before the end also where the machine is busy.
    settings = {**long_settings, "max_steps": 60, "save_steps": 10}
    assert cli("distill", output=tmp_path / "unbroken", **settings) == 0
    output = tmp_path / "interrupted"

    def ready() -> bool:
        return (output / "checkpoint-10" / "trainer_state.json").exists()

    interrupted_when(ready, "distill", {**settings, "output": output})
    assert_resumes(settings, output, tmp_path / "unbroken")


def test_interrupted_evaluate(workspace, tmp_path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sample_rows(40))
    settings = {"model": workspace.teacher, "data": data, "max_length": 256, "seeds": 10}
    settings |= {"max_new_tokens": 40, "batch_size": 2}
    assert cli("evaluate", output=tmp_path / "unbroken", **settings) == 0
    output = tmp_path / "interrupted"
    predictions = output / "predictions.jsonl"

    def ready() -> bool:
        return predictions.exists() and predictions.read_bytes().count(b"\n") > 3

    interrupted_when(ready, "evaluate", {**settings, "output": output})
    finished = predictions.read_bytes()
    assert 3 < finished.count(b"\n") < 40
    assert not (output / "results.json").exists()
    assert cli("evaluate", output=output, resume="true", **settings) == 0
    assert set(predictions.read_bytes().splitlines()) >= set(finished.splitlines())
    for name in ("predictions.jsonl", "results.json"):
        assert (output / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_interrupted_cache(workspace, tmp_path, monkeypatch) -> None:
    # Texts enough for two files, of which the first is done.
    data = write_rows(tmp_path / "rows.jsonl", sample_rows(700))
    settings = {"teacher": workspace.teacher, "train": data, "max_length": 256, "shard_size": 1}
    settings |= {"max_prompt_length": 160, "batch_size": 4, "cache_dtype": "float32"}
    output = tmp_path / "interrupted"
    first = output / "states-00000.safetensors"

    interrupted_when(first.exists, "cache", {**settings, "output": output})
    finished = first.read_bytes()
    assert cli("cache", output=output, resume="true", **settings) == 0
    assert first.read_bytes() == finished
    assert cli("cache", output=tmp_path / "unbroken", **settings) == 0
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in (tmp_path / "unbroken").iterdir()}
    for file in output.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "unbroken" / file.name).read_bytes(), file


def test_interrupt_while_libraries_are_imported(monkeypatch) -> None:
    """Where an exception would leave half-made modules behind, and come out as any other."""
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # says what it imports
    process = command_process("evaluate", *options(model="m", data="d", output="o"))
    assert process.stderr
    assert any("import 'torch._C'" in line for line in process.stderr)
    interrupt(process)


# The student has 0.2 MB of weights, its optimizer twice that.
@pytest.mark.parametrize("limit", [100_000, 250_000], ids=["weights", "optimizer"])
def test_no_space_left(limit, long_settings, tmp_path, capsys) -> None:
    long_settings["checkpoints"] = MAX_STEPS
    assert cli("distill", output=tmp_path / "unbroken", **long_settings) == 0
    output = tmp_path / "full"
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-2", output / "checkpoint-2")
    whole = {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = cli("distill", output=output, resume="true", **long_settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: the checkpoint of step 4 cannot be written: ")
    assert {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()} == whole
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert_resumes(long_settings, output, tmp_path / "unbroken")


@pytest.fixture
def poisoned(workspace, tmp_path) -> dict:
    """A teacher that is not finite on the letter that row 7 alone has."""
    teacher = AutoModelForCausalLM.from_pretrained(workspace.teacher)
    tokenizer = AutoTokenizer.from_pretrained(workspace.teacher)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Z")] = torch.nan
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "poisoned")
    rows = sample_rows(12)
    rows[7] |= {"id": "bad row", "output": "Z Z Z"}
    return {
        "teacher": str(tmp_path / "poisoned"),
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "batch_size": 1,
        "gradient_accumulation": 4,
        "max_steps": 3,
    }


def test_a_loss_that_is_not_finite_stops(poisoned, distill_settings, tmp_path, capsys) -> None:
    settings = {**distill_settings, **poisoned}
    assert cli("distill", output=tmp_path / "out", **settings) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    steps = len(log_of(tmp_path / "out"))
    assert line.startswith(f"error: step {steps + 1}: ot, ot/cst")
    assert "not finite, rows bad row; 'on_nan: skip'" in line


def test_a_step_that_is_not_finite_is_skipped(poisoned, distill_settings, tmp_path) -> None:
    settings = {**distill_settings, **poisoned, "on_nan": "skip", "logging_steps": 1}
    assert cli("distill", output=tmp_path / "out", **settings) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    (skipped,) = [entry for entry in entries if "skipped/rows" in entry]
    assert skipped["skipped/rows"] == "bad row"
    assert "ot" in skipped["skipped/parts"].split(", ")
    # Every step has an entry; that of the skipped one holds no loss.
    due = [entry for entry in entries if "learning_rate" in entry]
    assert [entry["step"] for entry in due] == [1, 2, 3]
    assert [entry["step"] for entry in due if "loss" not in entry] == [skipped["step"]]
    for entry in log_of(tmp_path / "out"):
        assert entry["loss"] == pytest.approx((entry["ce"] + entry["ot"]) / 2)
        assert all(map(math.isfinite, entry.values()))
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_row_that_spikes_is_named(distill_settings, tmp_path) -> None:
    rows = [{"instruction": "Say yes.", "output": "yes"}] * 7
    rows.append({"id": "odd", "instruction": "Say.", "output": "q#7~Kx^Wv0@;jZ%u" * 4})
    settings = {
        **{**distill_settings, "train": write_rows(tmp_path / "rows.jsonl", rows)},
        **{"batch_size": 1, "max_steps": 40, "logging_steps": 4, "learning_rate": 3e-3},
        **{"spike_factor": 3, "alpha": 0},
    }
    assert cli("distill", output=tmp_path / "out", **settings) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    spikes = [entry for entry in map(json.loads, lines) if "spike/rows" in entry]
    assert spikes
    assert {entry["spike/rows"] for entry in spikes} == {"odd"}
    assert min(entry["spike/ce"] for entry in spikes) > 1
    assert [entry["step"] for entry in log_of(tmp_path / "out")] == [1, *range(4, 41, 4)]
