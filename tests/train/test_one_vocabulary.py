"""Pairs of one vocabulary whose texts end differently or are cut at different places; kl alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from cot2align.train.config import UserError
from cot2align.train.data import TextEncoder, encode_rows, read_rows
from cot2align.train.losses.divergences import DIVERGENCES
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.kl import kl
from cot2align.train.models import load_tokenizer
from cot2align.train.token_states import TokenStates, shared_positions
from tests.conftest import cli, log_of
from tests.train.conftest import random_states


def first(side: TokenStates, counts: list[int]) -> TokenStates:
    """A side of texts that are that long."""
    places = [
        start + i
        for start, n in zip(side.cu_responses.tolist(), counts, strict=False)
        for i in range(n)
    ]
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    kept = {name: getattr(side, name)[places] for name in ("hidden", "inputs", "targets")}
    return replace(side, **kept, cu_responses=bounds)


def test_what_both_have_is_compared() -> None:
    student, teacher = random_states(0, [3, 5, 0], 8, 6), random_states(1, [5, 4, 2], 12, 6)
    for side, given in zip(shared_positions(student, teacher), (student, teacher), strict=True):
        expected = first(given, [3, 4, 0])
        assert torch.equal(side.cu_responses, expected.cu_responses)
        for name in ("hidden", "inputs", "targets"):
            assert torch.equal(getattr(side, name), getattr(expected, name))
    sides = first(student, [3, 4, 0]), first(teacher, [3, 4, 0])
    dskd = DSKD(8, 12, one_vocabulary=True, divergence="js", temperature=2.0)
    for loss in (dskd, lambda *pair: kl(*pair, divergence="js", temperature=2.0)):
        totals = [loss(*pair).total for pair in ((student, teacher), sides)]
        assert torch.equal(*totals)
        assert torch.autograd.grad(totals[0], student.hidden)[0][-1].abs().max() == 0
    assert dskd(student, teacher).metrics["dskd/t2s_accuracy"][1] == 7


def test_the_teacher_ends_with_the_student_s_token() -> None:
    student, teacher = random_states(0, [4, 2], 8, 6), random_states(1, [4, 2], 12, 7)
    loss = {"divergence": "forward_kl", "temperature": 2.0}
    moved = replace(teacher, weights=(teacher.weights[0][[0, 4, 2, 3, 1, 5, 6]],))
    expected = kl(student, moved, **loss).total
    assert kl(student, teacher, **loss, ends=(1, 4)).total.item() == pytest.approx(expected.item())
    assert kl(student, teacher, **loss).total.item() != pytest.approx(expected.item(), rel=1e-3)
    same = kl(student, teacher, **loss, ends=(1, 1)).total
    assert torch.equal(same, kl(student, teacher, **loss).total)


@pytest.mark.parametrize("name", ["js", "skewed_forward_kl", "skewed_reverse_kl", "forward_kl"])
def test_a_token_that_both_rule_out(name) -> None:
    p, logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))

    def gradient(width: int) -> torch.Tensor:
        ruled_out = torch.full((3, width - 6), -torch.inf)
        leaf = logits.clone().requires_grad_()
        rows = (torch.cat([x, ruled_out], 1).log_softmax(-1) for x in (p, leaf))
        return torch.autograd.grad(DIVERGENCES[name](*rows).sum(), leaf)[0]

    assert torch.equal(gradient(7), gradient(6))


def test_a_teacher_in_float16_loses_no_small_gradient() -> None:
    student, teacher = random_states(0, [40, 30], 8, 6), random_states(1, [40, 30], 12, 6)
    torch.manual_seed(0)
    dskd = DSKD(8, 12, one_vocabulary=True, divergence="js", temperature=2.0)
    half = replace(
        teacher,
        hidden=teacher.hidden.detach().half(),
        weights=tuple(weight.detach().half() for weight in teacher.weights),
    )
    gradients = [
        torch.autograd.grad(dskd(student, side).total * 1e-6, dskd.s2t.weight)[0]
        for side in (teacher, half)
    ]
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("one_vocabulary", [False, True])
def test_weights_in_bfloat16_without_autocast(one_vocabulary) -> None:
    """As DeepSpeed has them."""
    sides = random_states(0, [5, 3], 8, 6), random_states(1, [5, 3], 12, 6)
    torch.manual_seed(0)
    dskd = DSKD(8, 12, one_vocabulary=one_vocabulary, divergence="js", temperature=2.0)
    exact = dskd(*sides).total.item()
    reduced = [
        replace(side, hidden=side.hidden.bfloat16(), weights=(side.weights[0].bfloat16(),))
        for side in sides
    ]
    assert dskd.bfloat16()(*reduced).total.item() == pytest.approx(exact, rel=1e-2)


@pytest.fixture
def base_and_chat(workspace, tmp_path):
    """The student's folder, and its tokenizer's with another end of sequence."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.sibling)
    tokenizer.eos_token = "\u00f5"  # the byte 0xf5, which no text has
    tokenizer.pad_token = tokenizer.eos_token
    return load_tokenizer(workspace.student), tokenizer


@pytest.fixture
def spaced(workspace):
    """One more space before the first word is another first token."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.sibling)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def encoders(tokenizers, formats: tuple[str, str]) -> list[TextEncoder]:
    limits = {"max_length": 120, "max_prompt_length": 110}
    return [
        TextEncoder(tokenizer, prompt_format=one, **limits)
        for tokenizer, one in zip(tokenizers, formats, strict=True)
    ]


def test_rows_of_one_vocabulary(base_and_chat, spaced, workspace) -> None:
    rows = read_rows(workspace.train)
    both = encoders(base_and_chat, ("paper", "raw"))
    examples, cuts = encode_rows(rows, *both, same_vocabulary=True)
    assert cuts["student"].responses > 0  # the longer prompt
    pairs = [text for example in examples for text in example.texts]
    lengths = {(len(p.student.response_ids), len(p.teacher.response_ids)) for p in pairs}
    assert any(a < b for a, b in lengths)
    assert any(a == b for a, b in lengths)

    with pytest.raises(UserError, match=r"split the response of row .* differently; kd uld and"):
        encode_rows(rows, *encoders((base_and_chat[0], spaced), ("raw", "raw")),
                    same_vocabulary=True)  # fmt: skip


def test_dskd_attends_where_one_vocabulary_is_split_by_other_rules(
    spaced, distill_settings, workspace, tmp_path, capsys
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace.sibling, teacher)
    spaced.save_pretrained(teacher)
    settings = {**distill_settings, "teacher": teacher, "max_steps": 1}
    assert cli("distill", output=tmp_path / "kl", kd="kl", **settings) == 2
    assert "differently; kd uld and mined can" in capsys.readouterr().err
    assert cli("distill", output=tmp_path / "out", kd="dskd", **settings) == 0
    assert "dskd by cross-model attention" in capsys.readouterr().out
    assert "kd.query.weight" in load_file(tmp_path / "out" / "projections.safetensors")


@pytest.mark.parametrize("kd", ["kl", "dskd"])
def test_run(kd, base_and_chat, distill_settings, workspace, tmp_path, capsys) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(workspace.sibling, teacher)
    base_and_chat[1].save_pretrained(teacher)
    settings = {**distill_settings, "teacher": teacher, "kd": kd, "ot": "off", "max_steps": 1}
    assert cli("distill", output=tmp_path / "out", **settings) == 0
    assert 0 < log_of(tmp_path / "out")[0]["kd"] < 100
    assert ("dskd with one vocabulary" in capsys.readouterr().out) == (kd == "dskd")
