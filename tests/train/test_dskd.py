"""DSKD against its definition, text by text in float64."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cot2align.train import token_states as token_states_module
from cot2align.train.config import DistillConfig, UserError, build
from cot2align.train.data import collate
from cot2align.train.distiller import build_distiller, kd_loss
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.losses.dskd import DSKD
from cot2align.train.models import load_tokenizer
from cot2align.train.token_states import TokenStates, token_states
from tests.conftest import cli, log_of
from tests.train.conftest import Pair, random_states

Module = Callable[[Tensor], Tensor]


def direct_kl(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    """[n, V], [n, V] -> [n]."""
    p, q = ((logits / temperature).softmax(-1) for logits in (p_logits, q_logits))
    return (p * (p / q).log()).sum(-1)


def embeddings(states: TokenStates, text: slice) -> tuple[Tensor, Tensor]:
    """Float64 constants [n, d] of a text's inputs and of its targets."""
    inputs, targets = states.embed(states.inputs[text]), states.embed(states.targets[text])
    return inputs.detach().double(), targets.detach().double()


def direct_dskd(
    dskd: DSKD, student: TokenStates, teacher: TokenStates, hidden: Tensor
) -> dict[str, Tensor]:
    """Float64 sums over texts, from the definitions; `hidden`: the student's states, float64."""
    modules: dict[str, Module] = {
        name: lambda x, m=m: x @ m.weight.double().T + m.bias.double()
        for name, m in dskd.named_children()
    }
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("ce", "t2s", "s2t", "correct")}
    bounds = [states.cu_responses.tolist() for states in (student, teacher)]
    for text in range(len(bounds[0]) - 1):
        ours = slice(bounds[0][text], bounds[0][text + 1])
        theirs = slice(bounds[1][text], bounds[1][text + 1])
        h, H = hidden[ours], teacher.hidden.detach().double()[theirs]
        target = student.targets[ours]
        if dskd.query is None:
            z, r = modules["t2s"](H), modules["s2t"](h)
        else:
            e_in, e_target = embeddings(student, ours)
            E_in, E_target = embeddings(teacher, theirs)
            query = modules["query"](torch.cat([e_in, e_target], -1))
            key = torch.cat([E_in, E_target], -1)
            key = key / key.std()
            scores = query @ key.T / math.sqrt(key.shape[1])
            value = modules["t2s"](H / H.std() + E_target / E_target.std())
            z = scores.softmax(1) @ value
            r = scores.T.softmax(1) @ modules["s2t"](h)
        W_s, W_t = student.weights[0].double(), teacher.weights[0].detach().double()
        z, r = z @ W_s.detach().T, r @ W_t.T
        sums["ce"] = sums["ce"] - z.log_softmax(-1)[range(len(target)), target].sum()
        correct = z.argmax(-1) == target
        distance = direct_kl(z.detach(), h @ W_s.T, dskd.temperature)
        counted = distance if dskd.query is None else distance[correct]
        sums["t2s"] = sums["t2s"] + counted.sum()
        sums["s2t"] = sums["s2t"] + direct_kl(H @ W_t.T, r, dskd.temperature).sum()
        sums["correct"] = sums["correct"] + correct.sum()
    return sums


@pytest.mark.parametrize("chunk", [10**6, 150])
@pytest.mark.parametrize("one_vocabulary", [False, True])
def test_values_and_gradients(one_vocabulary, chunk, monkeypatch) -> None:
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", chunk)
    torch.manual_seed(0)
    lengths = [5, 1, 7], [5, 1, 7] if one_vocabulary else [4, 9, 2]
    student = random_states(0, lengths[0], 8, 5)
    teacher = random_states(1, lengths[1], 12, 5 if one_vocabulary else 11)
    dskd = DSKD(8, 12, one_vocabulary=one_vocabulary, divergence="forward_kl", temperature=2.0)
    actual = dskd(student, teacher)
    hidden = student.hidden.detach().double().requires_grad_()
    expected = direct_dskd(dskd, student, teacher, hidden)
    for name, part in (("kd/t2s_ce", "ce"), ("kd/t2s", "t2s"), ("kd/s2t", "s2t")):
        assert actual.parts[name].item() == pytest.approx(expected[part].item(), rel=1e-5)
    total = expected["ce"] + expected["t2s"] + expected["s2t"]
    assert actual.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert actual.metrics["dskd/t2s_accuracy"].tolist() == [expected["correct"].item(), 13]
    assert 0 < expected["correct"] < 13

    weight = student.weights[0]
    ours = torch.autograd.grad(actual.total, [student.hidden, weight, *dskd.parameters()])
    theirs = torch.autograd.grad(total, [hidden, weight, *dskd.parameters()])
    for gradient, exact in zip(ours, theirs, strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()
        assert exact.norm() > 0


def test_start_from_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    student, other = torch.randn(2, 30, 8, generator=generator)
    dskd = DSKD(8, 12, one_vocabulary=False, divergence="js", temperature=2.0)
    # A teacher's head that a student's reaches exactly, with a part that none reaches.
    t2s = torch.randn(8, 12, generator=generator)
    unreachable = other - student @ torch.linalg.lstsq(student, other).solution
    dskd.start_from_heads(student, student @ t2s + unreachable @ t2s)
    torch.testing.assert_close(dskd.t2s.weight.detach(), t2s, rtol=1e-4, atol=1e-4)
    assert dskd.t2s.bias.abs().max() == 0
    # Fewer tokens than dimensions: the smallest of the solutions, as the pseudo-inverse gives.
    dskd.start_from_heads(student[:5], other[:5, :1].expand(5, 12))
    expected = student[:5].pinverse() @ other[:5, :1].expand(5, 12)
    torch.testing.assert_close(dskd.t2s.weight.detach(), expected, rtol=1e-4, atol=1e-4)


def test_pseudo_inverse_start_of_a_run(distill_settings, workspace) -> None:
    given = {"teacher": workspace.sibling, "kd": "dskd", "t2s_init": "pseudo-inverse"}
    config = build(DistillConfig, {**distill_settings, **given, "output": "unused"})
    tokenizers = [load_tokenizer(name) for name in (config.student, config.teacher)]
    distiller = build_distiller(config, *tokenizers)
    student, teacher = (
        model.get_output_embeddings().weight.detach()[: len(tokenizers[0])]
        for model in (distiller.student, distiller.teacher)
    )
    expected = student.double().pinverse() @ teacher.double()
    torch.testing.assert_close(distiller.kd.t2s.weight.detach(), expected.float())


def test_pseudo_inverse_start_of_a_run_with_two_vocabularies(distill_settings) -> None:
    """From the heads' rows of the tokens that both tokenizers have."""
    given = {"kd": "dskd", "t2s_init": "pseudo-inverse", "output": "unused"}
    config = build(DistillConfig, {**distill_settings, **given})
    tokenizers = [load_tokenizer(name) for name in (config.student, config.teacher)]
    distiller = build_distiller(config, *tokenizers)
    ours = {tokenizers[0].decode([i]): i for i in range(len(tokenizers[0]))}
    # Its vocabulary has both kinds of space, of which the first counts.
    pieces = sorted(tokenizers[1].get_vocab().items(), key=lambda item: -item[1])
    theirs = {token.replace("\u2581", " "): i for token, i in pieces}
    # The end of a text is the only special token that both have, by other names.
    ours["</s>"] = ours.pop("<|endoftext|>")
    shared = sorted(ours.keys() & theirs.keys())
    assert 100 < len(shared) < len(theirs)
    heads = [m.get_output_embeddings().weight for m in (distiller.student, distiller.teacher)]
    student, teacher = (
        head.detach().double()[[ids[token] for token in shared]]
        for head, ids in zip(heads, (ours, theirs), strict=True)
    )
    expected = student.pinverse() @ teacher
    torch.testing.assert_close(distiller.kd.t2s.weight.detach(), expected.float())
    assert distiller.kd.t2s.bias.abs().max() == 0


@pytest.mark.parametrize("pair_name", ["two_tokenizers", "one_tokenizer"])
def test_models(pair_name, request) -> None:
    pair = request.getfixturevalue(pair_name)
    torch.manual_seed(0)
    one_vocabulary = pair_name == "one_tokenizer"
    dskd = DSKD(32, 48, one_vocabulary=one_vocabulary, divergence="forward_kl", temperature=2.0)
    student, teacher = pair.states("student"), pair.states("teacher")
    actual = dskd(student, teacher).total
    expected = direct_dskd(
        dskd, in_double(pair, "student"), in_double(pair, "teacher"), student.hidden.double()
    )
    total = expected["ce"] + expected["t2s"] + expected["s2t"]
    assert actual.item() == pytest.approx(total.item(), rel=1e-5)
    parameters = [*pair.models["student"].parameters(), *dskd.parameters()]
    ours = torch.autograd.grad(actual, parameters, retain_graph=True)
    theirs = torch.autograd.grad(total, parameters)
    for gradient, exact in zip(ours, theirs, strict=True):
        assert (gradient - exact).norm() <= 2e-5 * exact.norm()


def in_double(pair: Pair, side: str) -> TokenStates:
    """The states that the definition needs, with the inputs read from the texts."""
    texts = [getattr(text, side) for example in pair.examples for text in example.texts]
    inputs = [i for text in texts for i in text.ids[text.prompt_length - 1 : -1]]
    model = pair.models[side]
    return dataclasses.replace(
        pair.states(side),
        inputs=torch.tensor(inputs),
        embed=model.get_input_embeddings().weight.__getitem__,
    )


def test_a_teacher_equal_to_the_student() -> None:
    states = random_states(0, [4, 2], 8, 11)
    dskd = DSKD(8, 8, one_vocabulary=True, divergence="js", temperature=2.0)
    for projector in (dskd.t2s, dskd.s2t):
        nn.init.eye_(projector.weight)
        nn.init.zeros_(projector.bias)
    parts = dskd(states, states).parts
    assert abs(parts["kd/t2s"]) < 1e-5
    assert abs(parts["kd/s2t"]) < 1e-5
    ce = cross_entropy(states)[0]
    assert parts["kd/t2s_ce"].item() == pytest.approx(ce.item(), rel=1e-5)


def test_attention_to_a_teacher_equal_to_the_student() -> None:
    """Every token finds itself: both spaces have the model's own logits."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4, 2, 5]
    states = random_states(0, lengths, 8, 11)
    # States in the first dimensions, embeddings in the others: t2s tells them apart, and undoes
    # the division by the standard deviation. No input comes twice, and all embeddings have one
    # length: every token is the nearest to itself.
    hidden, table = torch.zeros(11, 8), torch.zeros(11, 8)
    for ours, some in zip(
        hidden.split(lengths), states.hidden.detach().split(lengths), strict=True
    ):
        ours[:, :4] = some[:, :4]
        ours /= ours.std() / 3
    table[:, 4:] = nn.functional.normalize(torch.randn(11, 4, generator=generator), dim=1)
    targets = states.targets.clone()
    targets[::2] = (hidden @ states.weights[0].T).argmax(-1)[::2]
    states = dataclasses.replace(
        states, hidden=hidden, inputs=torch.arange(11), targets=targets, embed=table.__getitem__
    )
    dskd = DSKD(8, 8, one_vocabulary=False, divergence="forward_kl", temperature=2.0)
    with torch.no_grad():
        dskd.query.weight.copy_(1e4 * torch.eye(16))
        dskd.s2t.weight.copy_(torch.eye(8))
        dskd.t2s.weight.copy_(torch.diag(torch.tensor([3.0] * 4 + [0.0] * 4)))
        for projector in dskd.children():
            projector.bias.zero_()
    loss = dskd(states, states)
    ce, correct = cross_entropy(states)
    assert abs(loss.parts["kd/t2s"]) < 1e-5
    assert abs(loss.parts["kd/s2t"]) < 1e-5
    assert loss.parts["kd/t2s_ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert loss.metrics["dskd/t2s_accuracy"].tolist() == [correct.item(), 11]
    assert 6 <= correct < 11


@pytest.mark.parametrize("pair_name", ["two_tokenizers", "one_tokenizer"])
def test_padding_and_the_order_of_rows_change_nothing(pair_name, request) -> None:
    pair = request.getfixturevalue(pair_name)
    torch.manual_seed(0)
    one_vocabulary = pair_name == "one_tokenizer"
    dskd = DSKD(32, 48, one_vocabulary=one_vocabulary, divergence="reverse_kl", temperature=2.0)

    def total(batch) -> float:
        sides = [token_states(pair.models[side], batch[side]) for side in ("student", "teacher")]
        return dskd(*sides).total.item()

    whole = total(pair.batch)
    assert total(collate(pair.examples[::-1])) == pytest.approx(whole, rel=1e-5)
    assert total(collate(pair.examples, "all")) == pytest.approx(whole, rel=1e-5)
    alone = sum(total(collate([example])) for example in pair.examples)
    assert alone == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("teacher", ["teacher", "sibling"])
def test_run(teacher, distill_settings, workspace, tmp_path) -> None:
    model = {"teacher": getattr(workspace, teacher)}
    settings = {**distill_settings, **model, "kd": "dskd", "layers": "last"}
    assert cli("distill", output=tmp_path / "whole", **settings) == 0
    divided = {**settings, "batch_size": 2, "gradient_accumulation": 2}
    assert cli("distill", output=tmp_path / "divided", **divided) == 0
    whole = log_of(tmp_path / "whole")
    for ours, theirs in zip(log_of(tmp_path / "divided"), whole, strict=True):
        assert ours["kd"] == pytest.approx(ours["kd/t2s_ce"] + ours["kd/t2s"] + ours["kd/s2t"])
        assert ours["loss"] == pytest.approx(0.5 * (ours["ce"] + ours["kd"] + ours["ot"]))
        assert 0 <= ours["dskd/t2s_accuracy"] <= 1
        for name in ("kd", "kd/t2s_ce", "kd/t2s", "kd/s2t", "dskd/t2s_accuracy", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    saved = load_file(tmp_path / "whole" / "projections.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    query = {"kd.query.weight": (96, 64), "kd.query.bias": (96,)}
    assert shapes == {
        "projections.0": (48, 32),
        "kd.t2s.weight": (32, 48),
        "kd.t2s.bias": (32,),
        "kd.s2t.weight": (48, 32),
        "kd.s2t.bias": (48,),
        **(query if teacher == "teacher" else {}),
    }


def test_resumed_run_is_the_unbroken_one(distill_settings, workspace, tmp_path) -> None:
    steps = {"max_steps": 4, "save_steps": 2, "checkpoints": 2}
    sibling = {"teacher": workspace.sibling, "kd": "dskd", "ot": "off", "output": tmp_path / "out"}
    assert cli("distill", **{**distill_settings, **sibling, **steps}) == 0
    projections = tmp_path / "out" / "projections.safetensors"
    unbroken = projections.read_bytes()
    assert set(load_file(projections)) == {
        "kd.t2s.weight", "kd.t2s.bias", "kd.s2t.weight", "kd.s2t.bias"
    }  # fmt: skip
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    projections.unlink()
    assert cli("distill", **{**distill_settings, **sibling, **steps}, resume="true") == 0
    assert projections.read_bytes() == unbroken


def test_embeddings_narrower_than_the_states_are_refused(two_tokenizers) -> None:
    config = DistillConfig(train="t", output="o", student="s", teacher="t", kd="dskd")
    models = SimpleNamespace(**two_tokenizers.models)
    narrow = SimpleNamespace(
        config=models.teacher.config, get_input_embeddings=lambda: nn.Embedding(3, 47)
    )
    with pytest.raises(UserError, match="kd dskd needs embeddings as wide as the hidden states"):
        kd_loss(config, models.student, narrow, same_tokens=False, ends=(0, 0))
