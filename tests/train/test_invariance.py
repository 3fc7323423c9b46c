"""The same global batch gives the same losses and gradients, however it is divided."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import cli, in_two_processes, log_of, options

ROOT = Path(__file__).resolve().parents[2]
# kd: (further settings, names that must be logged)
KD = {
    "none": ({}, {"ot/cst", "ot/crc", "ot/grad_norm", "ot/grad_ratio", "ot/marginal_error"}),
    "kl": ({"ot": "off", "divergence": "skewed_reverse_kl"}, {"kd"}),
    "uld": ({"ot": "off"}, {"kd"}),
    "mined": ({"ot": "off"}, {"kd/aligned", "kd/gold", "mined/aligned_share"}),
    "dskd": ({"layers": "last"}, {"kd/t2s_ce", "kd/t2s", "kd/s2t", "dskd/t2s_accuracy", "ot/cst"}),
}
ALWAYS = {"loss", "ce", "token_accuracy", "grad_norm", "grad_norm/student"}


@pytest.fixture(params=KD)
def settings(request, distill_settings, workspace, tmp_path) -> dict:
    teacher = workspace.sibling if request.param == "kl" else workspace.teacher
    maps = {"token_maps": tmp_path / "maps"} if request.param == "mined" else {}
    return {
        **distill_settings, "teacher": teacher, "kd": request.param, **KD[request.param][0], **maps
    }  # fmt: skip


@pytest.fixture
def unbroken(settings, tmp_path) -> list[dict]:
    """One process, one forward pass per step."""
    assert cli("distill", output=tmp_path / "unbroken", **settings) == 0
    log = log_of(tmp_path / "unbroken")
    assert log[0].keys() >= ALWAYS | KD[settings["kd"]][1]
    return log


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    """Every logged number; signals and errors are differences of numbers near 1."""
    assert [entry["step"] for entry in actual] == [1, 2, 3]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            cancelled = "signal" in name or name == "ot/marginal_error"
            close = {"rel": 1e-4, "abs": 2e-6} if cancelled else {"rel": 1e-5}
            assert ours[name] == pytest.approx(value, **close), (name, ours["step"])


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4)])
def test_gradient_accumulation(batch_size, accumulation, unbroken, settings, tmp_path) -> None:
    divided = {"batch_size": batch_size, "gradient_accumulation": accumulation}
    assert cli("distill", output=tmp_path / "divided", **{**settings, **divided}) == 0
    assert_same(log_of(tmp_path / "divided"), unbroken)


def test_gradient_checkpointing(unbroken, settings, tmp_path) -> None:
    again = {**settings, "gradient_checkpointing": "true"}
    assert cli("distill", output=tmp_path / "recomputed", **again) == 0
    assert_same(log_of(tmp_path / "recomputed"), unbroken)


def test_padding_free(unbroken, settings, tmp_path) -> None:
    packed = {**settings, "padding_free": "true"}
    assert cli("distill", output=tmp_path / "packed", **packed) == 0
    assert_same(log_of(tmp_path / "packed"), unbroken)


def test_two_processes(unbroken, settings, tmp_path) -> None:
    distill_in_two_processes({**settings, "output": tmp_path / "divided"})
    assert_same(log_of(tmp_path / "divided"), unbroken)


def test_two_processes_from_a_cache_without_padding(distill_settings, tmp_path) -> None:
    """Rows by length, too: the same steps for any number of processes."""
    settings = {**distill_settings, "kd": "dskd"}
    made = ("teacher", "train", "max_length", "max_prompt_length")
    cache = {name: settings[name] for name in made} | {"cache_dtype": "float32"}
    assert cli("cache", output=tmp_path / "cache", **cache) == 0
    by_length = {**settings, "group_by_length": "true"}
    assert cli("distill", output=tmp_path / "one", **by_length) == 0
    further = {"teacher_cache": tmp_path / "cache", "padding_free": "true"}
    distill_in_two_processes({**by_length, **further, "output": tmp_path / "two"})
    assert_same(log_of(tmp_path / "two"), log_of(tmp_path / "one"))


def distill_in_two_processes(settings: dict) -> None:
    """The same rows per step as one process's four."""
    divided = {**settings, "batch_size": 1, "gradient_accumulation": 2, "device": "cpu"}
    in_two_processes("cot2align.train", "distill", *options(**divided))
