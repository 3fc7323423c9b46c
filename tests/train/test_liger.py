"""Liger's cross entropy against ours:

TRITON_INTERPRET=1 python -m pytest tests/train/test_liger.py
"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("liger_kernel")

from cot2align.train import distiller
from cot2align.train.config import UserError
from cot2align.train.losses.cross_entropy import cross_entropy, liger_cross_entropy
from cot2align.train.token_states import token_states
from tests.conftest import cli, log_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@interpreted
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient(bias, one_tokenizer) -> None:
    model, batch = deepcopy(one_tokenizer.models["student"]), one_tokenizer.batch["student"]
    if bias:
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features))
    fused = liger_cross_entropy(model)
    results = []
    for loss in (cross_entropy, fused):
        states = token_states(model, batch)
        total, correct = loss(states)
        gradients = torch.autograd.grad(total * 0.01, [states.hidden, *states.weights])
        results.append([total, correct, *gradients])
        with torch.no_grad():
            assert loss(states)[0] == total
    assert len(results[0]) == 4 + bias
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * ours.norm()
    nothing = replace(states, hidden=states.hidden[:0], targets=states.targets[:0])
    assert [value.item() for value in fused(nothing)] == [0, 0]


@interpreted
@pytest.mark.parametrize("command", ["sft", "distill"])
def test_run(command, distill_settings, tmp_path, monkeypatch) -> None:
    """Steps 1, 4 and 5 are logged; those of `distill` measure gradients, for which it is not
    used."""
    steps = {"max_steps": 5, "logging_steps": 4}
    settings = {**distill_settings, **steps, "kd": "uld"}
    if command == "sft":
        names = ("train", "max_length", "max_prompt_length", "batch_size", "prompt_format")
        settings = {name: settings[name] for name in names if name in settings}
        settings |= {"model": distill_settings["student"], **steps}
    calls = []
    made = distiller.liger_cross_entropy

    def counted(model):
        fused = made(model)
        return lambda states: calls.append(len(states.targets)) or fused(states)

    monkeypatch.setattr(distiller, "liger_cross_entropy", counted)
    for liger in ("on", "off"):
        assert cli(command, output=tmp_path / liger, liger=liger, **settings) == 0
    assert len(calls) == (5 if command == "sft" else 2)
    ours, theirs = (log_of(tmp_path / name) for name in ("off", "on"))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for expected, actual in zip(ours, theirs, strict=True):
        for name in {"loss", "ce", "kd", "token_accuracy", "ot/grad_ratio"} & expected.keys():
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), name


@interpreted
def test_a_head_with_an_adapter_is_refused(distill_settings, tmp_path, capsys) -> None:
    settings = {**distill_settings, "lora_r": 2, "target_modules": "lm_head,c_attn"}
    settings["student"] = untied(distill_settings["student"], tmp_path / "untied")
    assert cli("distill", output=tmp_path / "out", liger="on", **settings) == 2
    assert "error: setting 'liger': the head of" in capsys.readouterr().err


def untied(name: str, folder: Path) -> str:
    """A copy of the model whose head is a matrix of its own."""
    model = AutoModelForCausalLM.from_pretrained(name, tie_word_embeddings=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["logits_scaling", "final_logit_softcapping"])
def test_other_heads_are_refused(name, one_tokenizer, monkeypatch) -> None:
    model = one_tokenizer.models["student"]
    monkeypatch.setattr(model.config, name, 8.0, raising=False)
    with pytest.raises(UserError, match="'liger': the head of GPT2LMHeadModel is not a matrix"):
        liger_cross_entropy(model)


@pytest.mark.skipif(INTERPRETED, reason="needs no GPU then")
def test_refused_before_anything_is_loaded(distill_settings, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(distiller, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert cli("distill", liger="on", **distill_settings, output=tmp_path / "out") == 2
    assert "error: setting 'liger': its kernels need a GPU" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers", raising=False)
    assert cli("distill", liger="on", **distill_settings, output=tmp_path / "out") == 2
    assert "liger-kernel comes with the extra 'liger'" in capsys.readouterr().err
