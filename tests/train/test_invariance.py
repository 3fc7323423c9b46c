"""The same global batch gives the same losses and gradients, however it is divided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import cli, log_of, options

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("loss", "grad_norm", "ce", "ot", "ot/cst", "ot/crc", "ot/grad_norm", "ot/grad_ratio")


@pytest.fixture
def unbroken(distill_settings, tmp_path) -> list[dict]:
    """One process, one forward pass per step."""
    assert cli("distill", output=tmp_path / "unbroken", **distill_settings) == 0
    return log_of(tmp_path / "unbroken")


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    assert [entry["step"] for entry in actual] == [1, 2, 3]
    signals = [name for name in expected[0] if name.startswith(("ot/signal", "ot/relative"))]
    assert len(signals) == 16
    for ours, theirs in zip(actual, expected, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (name, ours["step"])
        for name in signals:
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4)])
def test_gradient_accumulation(
    batch_size, accumulation, unbroken, distill_settings, tmp_path
) -> None:
    divided = {"batch_size": batch_size, "gradient_accumulation": accumulation}
    assert cli("distill", output=tmp_path / "divided", **{**distill_settings, **divided}) == 0
    assert_same(log_of(tmp_path / "divided"), unbroken)


def test_gradient_checkpointing(unbroken, distill_settings, tmp_path) -> None:
    settings = {**distill_settings, "gradient_checkpointing": "true"}
    assert cli("distill", output=tmp_path / "recomputed", **settings) == 0
    assert_same(log_of(tmp_path / "recomputed"), unbroken)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_two_processes(batch_size, accumulation, unbroken, distill_settings, tmp_path) -> None:
    divided = {
        **distill_settings,
        "batch_size": batch_size,
        "gradient_accumulation": accumulation,
        "output": tmp_path / "divided",
        "device": "cpu",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "cot2align.train", "distill", *options(**divided)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same(log_of(tmp_path / "divided"), unbroken)
