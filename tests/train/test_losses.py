"""Every loss against a few direct lines in float64, from the models' own outputs."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from cot2align.kernels.ot_loss import OTSettings
from cot2align.kernels.reference import fused_ot_loss, solve
from cot2align.train import token_states as token_states_module
from cot2align.train.data import collate
from cot2align.train.distiller import Distiller
from cot2align.train.losses.cross_cot import CrossCoT, text_pairs
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.losses.divergences import DIVERGENCES
from cot2align.train.losses.kl import kl
from cot2align.train.token_states import TokenStates, token_states
from tests.train.conftest import LAYERS, Pair, random_states


def states_of(*texts: Tensor) -> TokenStates:
    """States of texts [n, d], the same at both layers."""
    tokens = torch.cat(texts)
    states = random_states(0, [len(text) for text in texts], tokens.shape[1], 5)
    return dataclasses.replace(states, hidden=tokens, layers={"embed": tokens, "last": tokens})


# Kinds of pairs: name, whether the student's text is a chain of thought, whether the teacher's is.
KINDS = (
    ("std-std", False, False),
    ("cot-cot", True, True),
    ("std-cot", False, True),
    ("cot-std", True, False),
)


def assert_same_gradients(
    actual: Tensor, expected: Tensor, leaves, exact_leaves=None, tolerance: float = 1e-5
) -> None:
    """Of two losses, each with respect to its own leaves, or to the same ones."""
    leaves = list(leaves)
    ours = torch.autograd.grad(actual, leaves)
    theirs = torch.autograd.grad(expected, exact_leaves or leaves)
    for gradient, exact in zip(ours, theirs, strict=True):
        assert (gradient - exact).norm() <= tolerance * exact.norm()
        assert exact.norm() > 0


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_packed_states_are_those_of_each_text_alone(side, tokens, workspace) -> None:
    pair = Pair(workspace.student, workspace.teacher, workspace.train, tokens)
    states, texts = pair.states(side), pair.per_text(side, tokens)
    for layer in LAYERS:
        expected = torch.cat([text[layer] for text in texts])
        torch.testing.assert_close(states.layers[layer].double(), expected, rtol=1e-4, atol=1e-5)
    assert states.cu_seqlens.diff().tolist() == [len(text["last"]) for text in texts]
    assert states.targets.tolist() == torch.cat([text["targets"] for text in texts]).tolist()
    expected = torch.cat([text["logits"] for text in texts])
    logits = states.head(states.hidden, *states.weights)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    assert states.vocabulary == logits.shape[1]


def test_cross_entropy(two_tokenizers) -> None:
    texts = two_tokenizers.per_text("student")
    expected = sum(
        -text["logits"].log_softmax(-1)[range(len(text["targets"])), text["targets"]].sum()
        for text in texts
    )
    actual, correct = cross_entropy(two_tokenizers.states("student"))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(actual, expected, two_tokenizers.models["student"].parameters())
    hits = [text["logits"].argmax(-1) == text["targets"] for text in texts]
    assert correct.item() == torch.cat(hits).sum()


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 5e-3)])
def test_chunks_change_nothing(bf16, tolerance, one_tokenizer, monkeypatch) -> None:
    pair = one_tokenizer

    @torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    def losses_and_gradients() -> list[Tensor]:
        student, teacher = pair.states("student"), pair.states("teacher")
        terms = [
            cross_entropy(student)[0],
            kl(student, teacher, divergence="js", temperature=2.0).total,
        ]
        parameters = list(pair.models["student"].parameters())
        # Twice through the same graph, as the gradient diagnostics do.
        torch.autograd.grad(sum(terms), student.hidden, retain_graph=True)
        return [*terms, *torch.autograd.grad(sum(terms), parameters)]

    whole = losses_and_gradients()
    made = []
    head = token_states_module.lm_logits
    monkeypatch.setattr(
        token_states_module, "lm_logits", lambda m, h, *w: made.append(len(h)) or head(m, h, *w)
    )
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", 800 * 7)
    chunked = losses_and_gradients()
    assert max(made) == 14
    for ours, theirs in zip(chunked, whole, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def direct_divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """[V], [V] -> scalar, by the definitions."""

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if name == "forward_kl":
        return divergence(p, q)
    if name == "reverse_kl":
        return divergence(q, p)
    if name == "js":
        return (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2
    if name == "skewed_forward_kl":
        return divergence(p, 0.1 * p + 0.9 * q)
    if name == "skewed_reverse_kl":
        return divergence(q, 0.9 * q + 0.1 * p)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < 0.5).sum()) + 1
    gap = (p - q).detach().abs()[order]
    head = gap[:size].sum() / gap.sum()
    return head * divergence(p, q) + (1 - head) * divergence(q, p)


@pytest.fixture(scope="module")
def wide_student(workspace) -> Pair:
    """The student's head has the padding."""
    return Pair(workspace.sibling, workspace.student, workspace.train)


@pytest.mark.parametrize("pair_name", ["one_tokenizer", "wide_student"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_kl(name, pair_name, request) -> None:
    pair = request.getfixturevalue(pair_name)
    total = torch.zeros((), dtype=torch.float64)
    width = min(model.config.vocab_size for model in pair.models.values())
    students, teachers = pair.per_text("student"), pair.per_text("teacher")
    for ours, theirs in zip(students, teachers, strict=True):
        q = (ours["logits"][:, :width] / 2).softmax(-1)
        p = (theirs["logits"][:, :width] / 2).softmax(-1).detach()
        total = total + sum(direct_divergence(name, a, b) for a, b in zip(p, q, strict=True))
    states = pair.states("student"), pair.states("teacher")
    actual = kl(*states, divergence=name, temperature=2.0).total
    assert actual.item() == pytest.approx(total.item(), rel=1e-5)
    assert_same_gradients(actual, total, pair.models["student"].parameters())


# The student's head is the narrower one, then the wider one.
@pytest.mark.parametrize("widths", [(11, 14), (14, 11)])
@pytest.mark.parametrize("chunk", [10**6, 100])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_of_kl(name, chunk, widths, monkeypatch) -> None:
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", chunk)
    student, teacher = (random_states(i, [5, 1, 7], 8 + i, widths[i]) for i in range(2))
    hidden, weight = in_double(student)
    actual = kl(student, teacher, divergence=name, temperature=1.5).total
    q = ((hidden @ weight.T)[:, :11] / 1.5).softmax(-1)
    p = ((teacher.hidden.double() @ teacher.weights[0].double().T)[:, :11] / 1.5).softmax(-1)
    expected = sum(direct_divergence(name, a, b) for a, b in zip(p.detach(), q, strict=True))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(actual, expected, [student.hidden, *student.weights], (hidden, weight))


@pytest.mark.parametrize("chunk", [10**6, 50])
def test_value_and_gradient_of_the_cross_entropy(chunk, monkeypatch) -> None:
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", chunk)
    student = random_states(0, [5, 1, 7], 8, 11)
    hidden, weight = in_double(student)
    probability = (hidden @ weight.T).softmax(-1)[range(13), student.targets]
    expected = -probability.log().sum()
    actual, _ = cross_entropy(student)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(actual, expected, [student.hidden, *student.weights], (hidden, weight))


def in_double(states: TokenStates) -> tuple[Tensor, Tensor]:
    """Hidden states and head, as leaves of their own."""
    hidden, weight = (
        t.detach().double().requires_grad_() for t in (states.hidden, *states.weights)
    )
    return hidden, weight


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_have_exact_gradients_and_vanish_at_equality(name) -> None:
    torch.manual_seed(0)
    p = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def of_logits(x: Tensor) -> Tensor:
        return DIVERGENCES[name](p, x.log_softmax(-1))

    if name != "adaptive_kl":  # its weight is a constant of the gradient, not of the value
        assert torch.autograd.gradcheck(of_logits, logits)
    assert DIVERGENCES[name](p, p).abs().max() < 1e-12
    # A teacher that rules a token out exactly.
    sure = torch.tensor([[0.0, -math.inf]], requires_grad=False)
    even = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    if name not in ("reverse_kl", "adaptive_kl"):
        value = DIVERGENCES[name](sure, even)
        (gradient,) = torch.autograd.grad(value.sum(), even)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def direct_cross_cot(pair: Pair, cross_cot: CrossCoT, students, teachers) -> dict[str, Tensor]:
    """Sums over rows of the OT losses by term, layer by layer, by the float64 reference."""
    totals = {"cst": torch.zeros((), dtype=torch.float64), "crc": torch.zeros(()).double()}
    projections = [p.double() for p in cross_cot.projections]
    settings = cross_cot.settings
    texts = {}
    kinds = zip(pair.batch["text_rows"], pair.batch["text_is_cot"], strict=True)
    for index, (row, is_cot) in enumerate(kinds):
        texts[row, is_cot] = index
    for row in range(pair.batch["num_rows"]):
        formats = [c for c in (False, True) if (row, c) in texts]
        for ours in formats:
            for theirs in formats:
                for number, layer in enumerate(cross_cot.layers):
                    x = students[texts[row, ours]][layer]
                    y = teachers[texts[row, theirs]][layer]
                    if cross_cot.norm == "rms":
                        x = x / x.square().mean(-1, keepdim=True).sqrt()
                        y = y / y.square().mean(-1, keepdim=True).sqrt()
                    loss = fused_ot_loss(
                        x[None],
                        y[None],
                        projections[number if len(projections) > 1 else 0],
                        epsilon=settings.epsilon,
                        num_iters=settings.num_iters,
                        tol=settings.tol,
                    )
                    name = "cst" if ours == theirs else "crc"
                    totals[name] = totals[name] + loss
    return totals


@pytest.mark.parametrize(
    ("terms", "norm", "per_layer"),
    [
        (("cst", "crc"), "none", False),
        (("cst",), "rms", True),
        (("crc",), "rms", False),
    ],
)
def test_cross_cot(terms, norm, per_layer, two_tokenizers) -> None:
    pair = two_tokenizers
    torch.manual_seed(3)
    cross_cot = CrossCoT(
        32,
        48,
        terms=terms,
        layers=LAYERS,
        norm=norm,
        per_layer=per_layer,
        settings=OTSettings(epsilon=0.1, num_iters=20, tol=0.0),
    )
    student, teacher = pair.states("student"), pair.states("teacher")
    batch = pair.batch
    actual = cross_cot(student, teacher, batch["text_rows"], batch["text_is_cot"], 7)
    students, teachers = pair.per_text("student"), pair.per_text("teacher")
    direct = direct_cross_cot(pair, cross_cot, students, teachers)
    expected = sum(direct[name] for name in terms) / 7
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("cst", "crc"):
        value = direct[name].item() / 7 if name in terms else 0.0
        assert actual.parts[f"ot/{name}"].item() == pytest.approx(value, rel=1e-5)

    parameters = [*cross_cot.parameters(), pair.models["student"].get_input_embeddings().weight]
    assert_same_gradients(actual.total, expected, parameters)


@pytest.mark.parametrize(("norm", "scale"), [("none", 3.0), ("rms", 6**0.5)])
def test_orthogonal_tokens_equal_to_the_teachers_in_any_order(norm, scale) -> None:
    """N tokens at right angles: by symmetry each one's own share of the plan is that of the
    others times exp((C_other - C_own) / epsilon)."""
    n, epsilon, rows = 6, 0.1, 5
    generator = torch.Generator().manual_seed(0)
    texts = [3 * torch.eye(n)[torch.randperm(n, generator=generator)] for _ in range(4)]
    cross_cot = CrossCoT(
        n, n, terms=("cst", "crc"), layers=("embed", "last"), norm=norm, per_layer=False,
        settings=OTSettings(epsilon=epsilon, num_iters=50, tol=0.0),
    )  # fmt: skip
    torch.nn.init.eye_(cross_cot.projections[0])
    student, teacher = states_of(*texts[:2]), states_of(*texts[2:])
    actual = cross_cot(student, teacher, [0, 0], [False, True], rows)
    own = math.exp(scale**2 / n**0.5)
    own_cost, other_cost = 1 - own / (own + n - 1), 1 - 1 / (own + n - 1)
    others = (n - 1) * math.exp((own_cost - other_cost) / epsilon)
    loss = (own_cost + others * other_cost) / (1 + others)
    for name in ("ot/cst", "ot/crc"):
        assert actual.parts[name].item() == pytest.approx(2 * 2 * loss / rows, rel=1e-5)
    assert actual.total.item() == pytest.approx(2 * 4 * loss / rows, rel=1e-5)


@pytest.mark.parametrize("case", ["one student token", "equal teacher tokens"])
def test_nothing_to_align_costs_1_less_1_over_m(case) -> None:
    """Every plan costs the same: no signal, whatever the tokens are."""
    generator = torch.Generator().manual_seed(0)
    n, m = (1, 7) if case == "one student token" else (4, 7)
    student = states_of(torch.randn(n, 8, generator=generator))
    tokens = torch.randn(m, 8, generator=generator)
    teacher = states_of(tokens if n == 1 else tokens[:1].expand(m, 8))
    cross_cot = CrossCoT(
        8, 8, terms=("cst",), layers=("embed", "last"), norm="none", per_layer=False,
        settings=OTSettings(num_iters=50, tol=0.0),
    )  # fmt: skip
    actual = cross_cot(student, teacher, [0], [False], 3)
    assert actual.total.item() == pytest.approx(2 * (1 - 1 / m) / 3, rel=1e-6)
    for layer in ("embed", "last"):
        signal, count = actual.metrics[f"ot/signal/{layer}/std-std"].tolist()
        assert count == 1
        assert abs(signal) < 1e-6
    (gradient,) = torch.autograd.grad(actual.total, cross_cot.projections[0])
    assert gradient.norm() < 1e-6


@pytest.mark.parametrize("iterations", [2, 20])
def test_signals(iterations, two_tokenizers) -> None:
    pair = two_tokenizers
    settings = OTSettings(epsilon=0.1, num_iters=iterations, tol=0.0)
    cross_cot = CrossCoT(
        32, 48, terms=("cst", "crc"), layers=("embed", "last"), norm="rms", per_layer=False,
        settings=settings,
    )  # fmt: skip
    batch = pair.batch
    metrics = cross_cot(
        pair.states("student"), pair.states("teacher"), batch["text_rows"], batch["text_is_cot"], 5
    ).metrics
    students, teachers = pair.per_text("student"), pair.per_text("teacher")
    texts = list(zip(batch["text_rows"], batch["text_is_cot"], strict=True))
    projection = cross_cot.projections[0].double()
    errors = []
    for layer, (kind, ours, theirs) in product(cross_cot.layers, KINDS):
        signals, shares = [], []
        for (row, is_cot), student in zip(texts, students, strict=True):
            if is_cot != ours or (row, theirs) not in texts:
                continue
            x, y = student[layer], teachers[texts.index((row, theirs))][layer]
            n, m = len(x), len(y)
            x, y = (z / z.square().mean(-1, keepdim=True).sqrt() for z in (x, y))
            solved = solve(x[None], y[None], projection, None, None, settings)
            signals.append((1 - 1 / m - solved.loss).item())
            shares.append(signals[-1] / (min(1, n / m) - 1 / m))
            errors.append(solved.marginal_error.item())
        for name, values in (("signal", signals), ("relative_signal", shares)):
            total, count = metrics[f"ot/{name}/{layer}/{kind}"].tolist()
            assert count == len(values)
            assert total / count == pytest.approx(sum(values) / count, rel=1e-3, abs=1e-6)
    assert metrics["ot/iterations"].tolist() == [iterations * 28.0, 28.0]
    total, count = metrics["ot/marginal_error"].tolist()
    assert count == len(errors) == 28
    assert total == pytest.approx(sum(errors), rel=1e-5, abs=1e-5)


def test_pairs_of_rows_with_and_without_a_rationale() -> None:
    rows, is_cot = [0, 1, 1], [False, False, True]
    std_std, cot_cot, std_cot, cot_std = range(4)
    same = [((0, 0), std_std), ((1, 1), std_std), ((2, 2), cot_cot)]
    crossed = [((1, 2), std_cot), ((2, 1), cot_std)]
    assert sorted(text_pairs(rows, is_cot, ("cst",))) == sorted(same)
    assert sorted(text_pairs(rows, is_cot, ("crc",))) == sorted(crossed)
    assert len(text_pairs(rows, is_cot, ("cst", "crc"))) == 5


def test_no_pair_at_all_is_a_connected_zero(two_tokenizers) -> None:
    pair = two_tokenizers
    settings = OTSettings(num_iters=5)
    cross_cot = CrossCoT(
        32, 48, terms=("crc",), layers=("last",), norm="none", per_layer=False, settings=settings
    )
    batch = collate(pair.examples[:1])  # its only row has no rationale
    student = token_states(pair.models["student"], batch["student"], ("last",))
    teacher = token_states(pair.models["teacher"], batch["teacher"], ("last",))
    result = cross_cot(student, teacher, batch["text_rows"], batch["text_is_cot"], 1)
    assert result.total.item() == 0
    (gradient,) = torch.autograd.grad(result.total, cross_cot.parameters())
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_crossed_pairs_need_no_other_row_of_the_teacher(tokens, two_tokenizers) -> None:
    pair = two_tokenizers
    torch.manual_seed(0)
    cross_cot = CrossCoT(
        32, 48, terms=("crc",), layers=("embed", "last"), norm="rms", per_layer=False,
        settings=OTSettings(num_iters=20, tol=0.0),
    )  # fmt: skip

    def loss_and_gradient(crossed: bool) -> list[Tensor]:
        batch = collate(pair.examples, tokens, crossed=crossed)
        sides = [
            token_states(pair.models[side], batch[side], LAYERS) for side in ("student", "teacher")
        ]
        assert len(sides[1].cu_seqlens) == len(batch["text_rows"]) + 1
        result = cross_cot(*sides, batch["text_rows"], batch["text_is_cot"], 5)
        signal = result.metrics["ot/signal/last/cot-std"]
        return [result.total, signal, *torch.autograd.grad(result.total, cross_cot.parameters())]

    for ours, whole in zip(loss_and_gradient(True), loss_and_gradient(False), strict=True):
        assert (ours - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("term", ["ce", "kl", "ot"])
def test_padding_and_the_order_of_rows_change_nothing(term, one_tokenizer) -> None:
    pair = one_tokenizer
    torch.manual_seed(0)
    cross_cot = CrossCoT(
        32, 48, terms=("cst", "crc"), layers=("embed", "last"), norm="rms", per_layer=True,
        settings=OTSettings(num_iters=20, tol=0.0),
    )  # fmt: skip

    def total(examples, tokens: str = "response") -> float:
        batch = collate(examples, tokens)
        student, teacher = (
            token_states(pair.models[side], batch[side], LAYERS) for side in ("student", "teacher")
        )
        if term == "ce":
            return cross_entropy(student)[0].item()
        if term == "kl":
            return kl(student, teacher, divergence="adaptive_kl", temperature=2.0).total.item()
        return cross_cot(student, teacher, batch["text_rows"], batch["text_is_cot"], 1).total.item()

    whole = total(pair.examples)
    assert total(pair.examples[::-1]) == pytest.approx(whole, rel=1e-5)
    assert sum(total([example]) for example in pair.examples) == pytest.approx(whole, rel=1e-5)
    if term != "ot":  # which aligns all positions then
        assert total(pair.examples, "all") == pytest.approx(whole, rel=1e-5)


def test_objective_is_equation_16(one_tokenizer) -> None:
    pair = one_tokenizer
    cross_cot = CrossCoT(
        32, 48, terms=("cst", "crc"), layers=("last",), norm="none", per_layer=False,
        settings=OTSettings(num_iters=5, tol=0.0),
    )  # fmt: skip
    distiller = Distiller(
        pair.models["student"],
        pair.models["teacher"],
        alpha=0.3,
        ot_weight=0.25,
        cross_cot=cross_cot,
        kd=partial(kl, divergence="forward_kl", temperature=2.0),
    )
    output = distiller(**pair.batch)
    parts = output["parts"]
    student, teacher = pair.states("student"), pair.states("teacher")
    tokens = pair.batch["num_tokens"]
    assert parts["ce"].item() == pytest.approx(cross_entropy(student)[0].item() / tokens)
    expected_kd = distiller.kd(student, teacher).total / tokens
    assert parts["kd"].item() == pytest.approx(expected_kd.item())
    assert parts["ot"].item() == pytest.approx((parts["ot/cst"] + parts["ot/crc"]).item())
    expected = 0.7 * parts["ce"] + 0.3 * (0.25 * parts["ot"] + parts["kd"])
    assert output["loss"].item() == pytest.approx(expected.item())
    output["loss"].backward()
    assert all(p.grad is None for p in pair.models["teacher"].parameters())
    assert all(p.grad is not None for p in distiller.student.parameters())
    assert distiller.train().teacher.training is False
    assert distiller.student.training is True
