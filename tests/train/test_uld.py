"""ULD against its definition, text by text in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cot2align.train import token_states as token_states_module
from cot2align.train.data import collate
from cot2align.train.losses.uld import uld
from cot2align.train.token_states import token_states
from tests.conftest import cli, log_of
from tests.train.conftest import random_states


def direct_uld(students: list[Tensor], teachers: list[Tensor], temperature: float) -> Tensor:
    """Lists of logits [N, V], [M, W] -> the sum over texts."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(students, teachers, strict=True):
        for a, b in zip(ours, theirs, strict=False):
            q = (a / temperature).softmax(0).sort(descending=True).values.tolist()
            p = (b / temperature).softmax(0).sort(descending=True).values.tolist()
            p, q = (x + [0.0] * (max(len(p), len(q)) - len(x)) for x in (p, q))
            total += sum(abs(x - y) for x, y in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("pair_name", ["two_tokenizers", "one_tokenizer"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value(pair_name, temperature, request) -> None:
    pair = request.getfixturevalue(pair_name)
    texts = [[text["logits"] for text in pair.per_text(side)] for side in ("student", "teacher")]
    lengths = [[len(logits) for logits in side] for side in texts]
    assert pair_name == "one_tokenizer" or any(n != m for n, m in zip(*lengths, strict=True))
    expected = direct_uld(*texts, temperature)
    actual = uld(pair.states("student"), pair.states("teacher"), temperature=temperature).total
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [10**6, 100])
def test_gradient(chunk, monkeypatch) -> None:
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", chunk)
    lengths = [5, 1, 7], [3, 4, 7]
    student, teacher = random_states(0, lengths[0], 8, 11), random_states(1, lengths[1], 6, 19)
    (actual,) = torch.autograd.grad(uld(student, teacher, temperature=1.5).total, student.hidden)
    hidden = student.hidden.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    ours = (
        student.head(hidden, *student.weights).div(1.5).softmax(-1).sort(-1, descending=True).values
    )
    theirs = teacher.head(teacher.hidden.detach().double(), *teacher.weights).div(1.5).softmax(-1)
    theirs = theirs.sort(-1, descending=True).values
    for n, m, begin, other in zip(*lengths, (0, 5, 6), (0, 3, 7), strict=True):
        for k in range(min(n, m)):
            padded = torch.cat([ours[begin + k], torch.zeros(8)])
            expected = expected + (padded - theirs[other + k]).abs().sum()
    (exact,) = torch.autograd.grad(expected, hidden)
    assert (actual - exact).norm() <= 1e-5 * exact.norm()
    # The second text's student has one token, the first text's teacher three.
    assert actual.norm(dim=1).gt(0).tolist() == [True] * 3 + [False] * 2 + [True] * 8


def test_a_vocabulary_of_50k_against_152k() -> None:
    student, teacher = random_states(0, [2, 1], 8, 50257), random_states(1, [1, 2], 6, 151936)
    total = uld(student, teacher, temperature=1.0).total
    (actual,) = torch.autograd.grad(total, student.hidden)
    hidden = student.hidden.detach().double().requires_grad_()
    logits = student.head(hidden, *student.weights)
    others = teacher.head(teacher.hidden.detach().double(), *teacher.weights)
    q = logits[[0, 2]].softmax(-1).sort(descending=True).values
    p = others[[0, 1]].softmax(-1).sort(descending=True).values
    expected = (p - torch.nn.functional.pad(q, (0, 151936 - 50257))).abs().sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    (exact,) = torch.autograd.grad(expected, hidden)
    assert (actual - exact).norm() <= 1e-5 * exact.norm()


def test_equal_models_are_at_zero() -> None:
    states = random_states(0, [4, 2], 8, 11)
    total = uld(states, states, temperature=1.0).total
    assert total.item() == 0
    # A certain teacher against a uniform student of V tokens: 2 - 2 / V.
    sure = dataclasses.replace(states, head=lambda h, _: torch.eye(11)[[3] * len(h)] * 1e4)
    even = dataclasses.replace(states, head=lambda h, _: h[:, :4] * 0, vocabulary=4)
    total = uld(even, sure, temperature=1.0).total
    assert total.item() == pytest.approx(6 * (2 - 2 / 4))


def test_padding_and_the_order_of_rows_change_nothing(two_tokenizers) -> None:
    pair = two_tokenizers

    def total(batch) -> float:
        sides = [token_states(pair.models[side], batch[side]) for side in ("student", "teacher")]
        return uld(*sides, temperature=1.0).total.item()

    whole = total(pair.batch)
    assert total(collate(pair.examples[::-1])) == pytest.approx(whole, rel=1e-5)
    assert total(collate(pair.examples, "all")) == pytest.approx(whole, rel=1e-5)
    alone = sum(total(collate([example])) for example in pair.examples)
    assert alone == pytest.approx(whole, rel=1e-5)


def test_run(distill_settings, tmp_path) -> None:
    settings = {**distill_settings, "kd": "uld", "ot": "off"}
    assert cli("distill", output=tmp_path / "whole", **settings) == 0
    divided = {**settings, "batch_size": 2, "gradient_accumulation": 2}
    assert cli("distill", output=tmp_path / "divided", **divided) == 0
    for ours, theirs in zip(log_of(tmp_path / "divided"), log_of(tmp_path / "whole"), strict=True):
        assert ours["kd"] == pytest.approx(theirs["kd"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["loss"] == pytest.approx(0.5 * (ours["ce"] + ours["kd"]))
