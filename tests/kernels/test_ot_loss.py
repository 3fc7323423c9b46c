"""The front door and its backends, against the few-line float64 implementation.

Triton's kernels run on a GPU, or interpreted in a process of their own (see `make test`).
"""

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cot2align import OTLoss, fused_ot_loss, fused_ot_loss_varlen, sinkhorn_plan
from cot2align.kernels import backends, native, ot_loss, reference
from tests.kernels import direct

# The error that float32 PyTorch itself makes is 3e-6 to 3e-5 at these settings (see the test of
# that), depending on the shape.
TOLERANCE = 3e-5

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or a GPU",
    ),
)
GRADS = ("unrolled", "implicit", "detached")


def device_of(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def loss_of(epsilon, num_iters, tol=0.0, function=fused_ot_loss, **kwargs):
    def loss(*tensors):
        x, y, *p = (t.to(device_of(kwargs.get("backend"))) for t in tensors)
        settings = {"epsilon": epsilon, "num_iters": num_iters, "tol": tol}
        return function(x[None], y[None], *p, **settings, **kwargs).cpu()

    return loss


def check(got, expected, tolerance=TOLERANCE):
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5, abs=1e-7)
    for name, have, want in zip("xyp", got[1], expected[1], strict=False):
        assert direct.relative(have, want) < tolerance, name


@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.02])
@pytest.mark.parametrize("num_iters", [1, 2, 3, 10, 100])
@pytest.mark.parametrize(("n", "m"), [(5, 7), (33, 20), (60, 150)])
def test_gradient_of_the_native_backend(n, m, num_iters, epsilon):
    tensors = direct.problem(n, m)
    expected = direct.gradients(
        lambda x, y, p: direct.ot_loss(x, y, p, epsilon, num_iters), tensors
    )
    loss = loss_of(epsilon, num_iters, backend="native")
    check(direct.gradients(loss, tensors, torch.float32), expected)


@pytest.mark.parametrize("epsilon", [1e-3, 3e-3, 1e-2, 1.0, 100.0, 1e3])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("backend", ["native", TRITON])
def test_no_less_accurate_than_float32_pytorch(backend, epsilon, grad):
    shapes = [(12, 8, 1.0), (40, 60, 3.0), (70, 30, 2.0), (20, 200, 2.0), (5, 150, 2.0)]
    num_iters = 30
    if backend == "triton":  # the interpreter is slow; other shapes are in test_triton.py
        shapes, num_iters = shapes[:2], 10
    for n, m, spread in shapes:
        tensors = direct.problem(n, m, spread=spread)
        _, expected = direct.gradients(
            loss_of(epsilon, num_iters, grad=grad, function=reference.fused_ot_loss), tensors
        )
        worst = {}
        for which in (backend, "reference"):
            loss = loss_of(epsilon, num_iters, grad=grad, backend=which)
            _, grads = direct.gradients(loss, tensors, torch.float32)
            errors = (direct.relative(g, e) for g, e in zip(grads, expected, strict=True))
            worst[which] = max(errors)
        assert worst[backend] < 4 * worst["reference"] + 1e-5, (n, m)


@pytest.mark.parametrize("isa", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("epsilon", [0.1, 0.005])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_every_instruction_set(isa, epsilon, gradient):
    x, y, p = direct.problem(37, 51)
    z = y @ p
    reached = direct.gradients(
        loss_of(epsilon, 40, grad=gradient, function=reference.fused_ot_loss), (x, z)
    )
    segments = [torch.tensor([[0, n]]) for n in (37, 51)]
    loss, iterations, _, dx, dz = native.ot_loss(
        x.float(),
        z.float(),
        *segments,
        torch.tensor([[0, 0]]),
        torch.ones(1),
        scale=1 / math.sqrt(x.shape[1]),
        epsilon=epsilon,
        num_iters=40,
        tol=0.0,
        gradient=gradient,
        need_x=True,
        need_z=True,
        isa=isa,
    )
    assert iterations.tolist() == [40]
    check((loss[0].double(), (dx.double(), dz.double())), reached, 5e-4 if epsilon < 0.01 else 3e-5)


@pytest.mark.parametrize("isa", native.INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("m", "n", "depth"), [(1, 1, 1), (7, 33, 5), (70, 40, 300), (41, 530, 259), (65, 8, 0)]
)
def test_product_of_the_native_backend(isa, m, n, depth):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, depth, generator=generator), torch.randn(depth, n, generator=generator)
    want = a.double() @ b.double()
    for left in (a, a.T.contiguous().T, a.repeat(1, 2)[:, :depth]):
        for right in (b, b.T.contiguous().T):
            got = native.matmul(left, right, isa)
            assert (got - want).norm() <= 1e-6 * want.norm()
    strided = a.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(native.matmul(strided, b, isa), native.matmul(a, b, isa))
    with pytest.raises(ValueError, match="have no product"):
        native.matmul(a, torch.ones(depth + 1, 2))
    with pytest.raises(ValueError, match=r"a must be a float32 matrix.*float64"):
        native.matmul(a.double(), b)


@pytest.mark.parametrize("spread", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("backend", [None, TRITON])
def test_saturated_softmax(backend, spread):
    # Aligned models: each student token all but certain of one teacher token.
    x = torch.eye(12, dtype=torch.float64) + 0.05 * torch.randn(
        12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    tensors = (math.sqrt(spread) * 12**0.25 * x, math.sqrt(spread) * 12**0.25 * x)
    expected = direct.gradients(loss_of(0.1, 50), tensors)
    loss = loss_of(0.1, 50, backend=backend)
    value, grads = direct.gradients(loss, tensors, torch.float32)
    assert 0 < expected[0] < 1e-3
    assert value.item() == pytest.approx(expected[0].item(), rel=2e-5)
    for have, want in zip(grads, expected[1], strict=True):
        assert direct.relative(have, want) < 1e-4


def test_large_problems_are_split_over_threads():
    # 470 x 450 outgrows a core's cache; 200 x 190 would keep the other threads waiting.
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for n, m, epsilon in [(470, 450, 0.1), (200, 190, 0.1), (200, 190, 0.004)]:
                tensors = direct.problem(n, m)
                for grad in ("unrolled", "implicit"):
                    loss = loss_of(epsilon, 5, grad=grad, function=reference.fused_ot_loss)
                    expected = direct.gradients(loss, tensors)
                    got = direct.gradients(loss_of(epsilon, 5, grad=grad), tensors, torch.float32)
                    check(got, expected, 1e-3 if epsilon < 0.01 else 3e-5)
    finally:
        torch.set_num_threads(before)


lengths = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(
    lengths,
    lengths,
    st.sampled_from([0.01, 0.1, 5.0]),
    st.sampled_from(["mean", "sum"]),
    st.randoms(use_true_random=False),
)
@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
def test_packed_pairs_are_a_loop_over_problems(backend, rows, cols, epsilon, reduction, random):
    x, y, p = direct.problem(max(1, sum(rows)), max(1, sum(cols)))
    x, y = x[: sum(rows)], y[: sum(cols)]
    count = random.randrange(7)
    pairs = [(random.randrange(len(rows)), random.randrange(len(cols))) for _ in range(count)]
    cu_x, cu_y = (torch.tensor([0, *side]).cumsum(0) for side in (rows, cols))

    def loop(x, y, p):
        total, valid = 0 * (x.sum() + y.sum() + p.sum()), 0
        for s, t in pairs:
            if rows[s] and cols[t]:
                problem = x[cu_x[s] : cu_x[s + 1]], y[cu_y[t] : cu_y[t + 1]], p
                total, valid = total + direct.ot_loss(*problem, epsilon, 4), valid + 1
        return total / max(valid, 1) if reduction == "mean" else total

    def packed(*tensors):
        return fused_ot_loss_varlen(
            *(t.to(device_of(backend)) for t in tensors),
            cu_seqlens_student=cu_x.int(),
            cu_seqlens_teacher=cu_y,
            pairs=torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2),
            epsilon=epsilon,
            num_iters=4,
            tol=0.0,
            reduction=reduction,
            backend=backend,
        ).cpu()

    expected, expected_grads = direct.gradients(loop, (x, y, p))
    value, grads = direct.gradients(packed, (x, y, p), torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for have, want in zip(grads, expected_grads, strict=True):
        # Of a single row the gradient is 0, and what is left is float32's rounding, over epsilon.
        assert (have - want).norm() <= 1e-4 * want.norm() + 6e-8 / epsilon


@pytest.mark.parametrize("backend", ["reference", TRITON])
def test_a_problem_beyond_the_bounds_is_nan(backend, monkeypatch):
    # On a device, whose values are not read. On the CPU they are, and the call is refused.
    monkeypatch.setattr(ot_loss, "_check_cu_seqlens", lambda *arguments: arguments[-1])
    x = torch.randn(9, 4, device=device_of(backend), requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 9])
    for bounds in ((5, 6), (6, 5)):
        loss = fused_ot_loss_varlen(
            x,
            x.detach(),
            cu_seqlens_student=cu_seqlens,
            cu_seqlens_teacher=cu_seqlens,
            max_seqlen_student=bounds[0],
            max_seqlen_teacher=bounds[1],
            num_iters=3,
            reduction="none",
            backend=backend,
        )
        assert loss.isnan().tolist() == [False, True]
        assert torch.autograd.grad(loss.sum(), x)[0].isfinite().all()


def test_weights_and_pairs_may_be_strided():
    x = torch.randn(9, 4, requires_grad=True)
    cu = torch.tensor([0, 4, 9])
    for backend in ("native", "reference"):
        terms = ot_loss.ot_loss_terms(
            x,
            x.detach(),
            cu_seqlens_student=cu,
            cu_seqlens_teacher=cu,
            pairs=torch.tensor([[0, 1, 1], [0, 1, 0]]).T,
            weights=torch.tensor(0.5, requires_grad=True).expand(3),
            settings=reference.OTSettings(backend=backend),
        )
        terms.total.backward()
        assert terms.total.item() == pytest.approx(0.5 * terms.loss.sum().item(), rel=1e-6)
    for wrong in ([0.5, 0, 0], "mean", None, torch.ones(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="weights must be a floating-point tensor"):
            ot_loss.ot_loss_terms(
                x,
                x.detach(),
                cu_seqlens_student=cu,
                cu_seqlens_teacher=cu,
                weights=wrong,
                settings=reference.OTSettings(),
            )


def test_float64_is_not_rounded_by_the_weights():
    x, y = (t.unflatten(0, (3, -1)) for t in direct.problem(12, 15)[:2])
    p = direct.problem(1, 1)[2]
    packed = {
        "cu_seqlens_student": torch.arange(0, 13, 4),
        "cu_seqlens_teacher": torch.arange(0, 16, 5),
    }

    def varlen(x, y, p):
        return fused_ot_loss_varlen(x.flatten(0, 1), y.flatten(0, 1), p, **packed)

    def weighted(x, y, p):
        weights = torch.full((3,), 1 / 3, dtype=torch.float64)
        how = {**packed, "weights": weights, "settings": reference.OTSettings()}
        return ot_loss.ot_loss_terms(x.flatten(0, 1), y.flatten(0, 1), p, **how).total

    expected, expected_grads = direct.gradients(fused_ot_loss, (x, y, p))
    for loss in (varlen, weighted):
        value, grads = direct.gradients(loss, (x, y, p))
        assert direct.relative(value, expected) < 1e-14
        for got, want in zip(grads, expected_grads, strict=True):
            assert direct.relative(got, want) < 1e-14


def test_weights_and_diagnostics():
    x, y, p = (t.float() for t in direct.problem(9, 11))
    cu_x, cu_y = torch.tensor([0, 4, 9]), torch.tensor([0, 0, 5, 11])
    pairs = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 2]])
    weights = torch.tensor([0.5, 2.0, 3.0, 0.0])
    common = {"cu_seqlens_student": cu_x, "cu_seqlens_teacher": cu_y, "pairs": pairs}
    each = fused_ot_loss_varlen(x, y, p, **common, tol=1e-4, reduction="none")
    for backend in ("native", "reference"):
        terms = ot_loss.ot_loss_terms(
            x,
            y,
            p,
            **common,
            weights=weights,
            settings=reference.OTSettings(tol=1e-4, backend=backend),
        )
        assert terms.total.item() == pytest.approx((weights * each).sum().item(), rel=1e-6)
        assert torch.allclose(terms.loss, each, rtol=1e-5)
        assert terms.loss[2] == terms.num_iters[2] == terms.marginal_error[2] == 0
        assert 1 <= terms.num_iters[0] < 100
        assert 0 < terms.marginal_error[0] <= 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", [None, TRITON])
def test_masked_is_cropped_for_every_reduction(backend, reduction):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 9, 8, generator=generator), torch.randn(4, 7, 6, generator=generator)
    p = torch.randn(6, 8, generator=generator)
    rows = torch.rand(4, 9, generator=generator) < 0.6
    cols = torch.rand(4, 7, generator=generator) < 0.6
    rows[2] = False
    x[~rows] = math.nan
    y[~cols] = math.inf
    leaves = [t.requires_grad_() for t in (x, y, p)]
    upstream = torch.tensor([1.0, -2.0, 5.0, 0.5]) if reduction == "none" else torch.tensor(3.0)
    to = device_of(backend)
    masks = {"student_mask": rows.to(to), "teacher_mask": cols.to(to)}
    settings = {"num_iters": 10, "tol": 0.0, "reduction": reduction, "backend": backend}
    got = fused_ot_loss(*(t.to(to) for t in leaves), **masks, **settings).cpu()
    grads = torch.autograd.grad(got, leaves, upstream)

    each = [
        direct.ot_loss(x[b][rows[b]].double(), y[b][cols[b]].double(), p.double(), 0.1, 10)
        if rows[b].any()
        else torch.zeros((), dtype=torch.float64)
        for b in range(4)
    ]
    expected = torch.stack(each)
    expected = {"mean": expected.sum() / 3, "sum": expected.sum(), "none": expected}[reduction]
    expected_grads = torch.autograd.grad(expected, leaves, upstream.double())
    assert torch.allclose(got, expected.float(), rtol=1e-5)
    for have, want in zip(grads, expected_grads, strict=True):
        assert direct.relative(have, want) < TOLERANCE


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nan_stays_in_its_problem(broken, backend, grad):
    to = device_of(backend)
    x, y = torch.randn(3, 5, 4, device=to), torch.randn(3, 6, 4, device=to)
    x[1, 2, 3] = broken
    x.requires_grad_()
    y.requires_grad_()
    loss = fused_ot_loss(x, y, reduction="none", grad=grad, backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    for tensor in (x, y):
        assert tensor.grad[[0, 2]].isfinite().all()
        assert tensor.grad[1].isnan().any()


@pytest.mark.parametrize("width", [5, 12])  # the teacher's tokens are projected, the student's
@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_stands_in_texts_of_no_problem_changes_nothing(broken, backend, width):
    tensors = [t.float().to(device_of(backend)) for t in direct.problem(12, 12, width, 8)]
    every = torch.ones(3, 4, dtype=torch.bool, device=device_of(backend))
    without = every.clone()
    without[1] = False
    cu = torch.tensor([0, 4, 8, 12])
    packed = {"cu_seqlens_student": cu, "cu_seqlens_teacher": cu}
    packed["pairs"] = torch.tensor([[0, 0], [2, 2], [0, 2]])
    how = {"num_iters": 3, "backend": backend}

    def gradients(fill):
        leaves = x, y, p = [t.clone() for t in tensors]
        x[4:8] = y[4:8] = fill
        x, y, p = (t.requires_grad_() for t in leaves)
        for mask_x, mask_y in ((every, without), (without, every)):
            masks = {"student_mask": mask_x, "teacher_mask": mask_y}
            loss = fused_ot_loss(x.view(3, 4, -1), y.view(3, 4, -1), p, **masks, **how)
            yield from torch.autograd.grad(loss, leaves)
        yield from torch.autograd.grad(fused_ot_loss_varlen(x, y, p, **packed, **how), leaves)

    for got, expected in zip(gradients(broken), gradients(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
def test_no_valid_problem_is_a_connected_zero(backend):
    to = device_of(backend)
    x, y = (torch.randn(2, n, 4, device=to, requires_grad=True) for n in (3, 5))
    mask = torch.zeros(2, 5, dtype=torch.bool, device=to)
    loss = fused_ot_loss(x, y, teacher_mask=mask, backend=backend)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not y.grad.any()


@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
def test_empty_batch_and_empty_texts(backend):
    p = torch.randn(6, 4, device=device_of(backend), requires_grad=True)
    for shape_x, shape_y in [
        ((0, 3, 4), (0, 5, 6)),
        ((2, 0, 4), (2, 5, 6)),
        ((2, 3, 4), (2, 0, 6)),
    ]:
        x, y = (torch.randn(shape, device=p.device) for shape in (shape_x, shape_y))
        loss = fused_ot_loss(x, y, p, backend=backend)
        assert sinkhorn_plan(x, y, p).plan.shape == (*shape_x[:2], shape_y[1])
        loss.backward()
        assert loss == 0
    assert not p.grad.any()


@pytest.mark.parametrize(
    ("backend", "n", "m"),
    [("native", 200, 210), pytest.param("triton", 30, 70, marks=TRITON.marks)],
)
def test_the_same_input_gives_the_same_bits(backend, n, m):
    torch.manual_seed(0)
    x, y, p = torch.randn(6, n, 16), torch.randn(6, m, 24), torch.randn(24, 16) / 5

    def loss(*tensors):
        tensors = (t.to(device_of(backend)) for t in tensors)
        return fused_ot_loss(*tensors, num_iters=20, backend=backend).cpu()

    first, again = (direct.gradients(loss, (x, y, p), torch.float32) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("backend", ["native", TRITON])
def test_nothing_is_left_unwritten(backend):
    # Deterministic mode fills new memory with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        x, y = (torch.randn(n, 8, device=device_of(backend), requires_grad=True) for n in (20, 30))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = fused_ot_loss_varlen(
                x,
                y,
                cu_seqlens_student=torch.tensor([0, 5, 5, 20]),
                cu_seqlens_teacher=torch.tensor([0, 0, 17, 30]),
                pairs=torch.tensor([[0, 2], [1, 1], [2, 0]]),
                backend=backend,
            )
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.isfinite().all()
    assert x.grad[:5].any()
    assert not x.grad[5:].any()
    assert y.grad[17:].any()
    assert not y.grad[:17].any()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_mixed_dtypes_and_autocast(backend):
    x, y, p = (t.float() for t in direct.problem(20, 30))
    x, y = x.bfloat16().requires_grad_(), y.half().requires_grad_()
    p.requires_grad_()
    _, expected = direct.gradients(
        lambda x, y, p: direct.ot_loss(x, y, p, 0.1, 20), (x.double(), y.double(), p.double())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_ot_loss(x[None], y[None], p, num_iters=20, tol=0.0, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    for leaf, want, rounding in zip((x, y, p), expected, (2**-8, 2**-10, 1e-5), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert direct.relative(leaf.grad.double(), want) < rounding


@contextlib.contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "reference", TRITON])
def test_default_dtype_and_device_change_nothing(backend, dtype):
    tensors = [t.float().to(device_of(backend)) for t in direct.problem(5, 7)]
    mask = torch.arange(7, device=device_of(backend))[None] < 6
    cu_x, cu_y = torch.tensor([0, 3, 5]), torch.tensor([0, 7, 7])
    cu_seqlens = {"cu_seqlens_student": cu_x, "cu_seqlens_teacher": cu_y}

    def losses(need):
        x, y, p = (t.clone().requires_grad_(need) for t in tensors)
        for reduction in ("mean", "none"):
            how = {"num_iters": 3, "reduction": reduction, "backend": backend}
            loss = fused_ot_loss(x[None], y[None], p, teacher_mask=mask, **how)
            yield loss
            yield fused_ot_loss_varlen(x, y, p, **cu_seqlens, **how)
        if need:
            loss.sum().backward()
            yield p.grad

    for need in (True, False):
        expected = list(losses(need))
        with defaults(dtype, "meta"):
            got = list(losses(need))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


def test_autocast_leaves_the_backward_pass_alone():
    x, y, p = (t.float() for t in direct.problem(20, 30))
    p.requires_grad_()
    (expected,) = torch.autograd.grad(fused_ot_loss(x[None], y[None], p), p)
    loss = fused_ot_loss(x[None], y[None], p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(loss, p)
    assert torch.equal(got, expected)


def tf32_state():
    """The setting that products follow, and the older ones where reading them is allowed."""
    state = [getattr(torch.backends.cuda.matmul, "fp32_precision", None)]
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            state.append(read())
        except RuntimeError:
            state.append("refused")
    return state


@pytest.fixture
def tf32_switches():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        if hasattr(backend, "fp32_precision"):
            backend.fp32_precision = "none"


def tf32_by(way):
    if way == "precision":
        torch.set_float32_matmul_precision("medium")
    elif way == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("from PyTorch 2.9 on")
    elif way == "matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("way", ["precision", "allow_tf32", "matmul", "all"])
def test_tf32_switches_are_left_as_they_were(tf32_switches, way):
    tf32_by(way)
    before = tf32_state()
    with ot_loss._full_precision():
        assert tf32_state()[0] in (None, "ieee")
    assert tf32_state() == before
    if way == "all":  # still the only one to be set
        torch.backends.fp32_precision = "ieee"
        assert tf32_state()[0] == "ieee"


def test_threads_wait_for_the_tf32_switch(tf32_switches):
    tf32_by("allow_tf32")
    before, seen = tf32_state(), []

    def product(seconds):
        with ot_loss._full_precision():
            time.sleep(seconds)
            seen.append(tf32_state()[0])

    threads = [threading.Thread(target=product, args=(0.02 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tf32_state() == before
    assert not {"tf32"} & set(seen)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_keeps_float16_gradients_in_range(backend, reduction):
    # Small teacher tokens make small gradients for the student's.
    x, y, p = (t.half().to(device_of(backend)) for t in direct.problem(20, 30))
    x, y = (x[None] * 2**10).requires_grad_(), y[None] / 2**10

    def gradient(backend):
        loss = fused_ot_loss(x, y, p, num_iters=5, reduction=reduction, backend=backend)
        return torch.autograd.grad(2**16 * loss.sum(), x)[0].double()

    assert direct.relative(gradient(backend), gradient("reference")) < 5e-3


@pytest.mark.parametrize("backend", [None, TRITON])
def test_a_projection_on_either_side_is_the_same(backend):
    # Few student tokens: X P^T is cheaper than Y P.
    for n, m in [(3, 90), (90, 3)]:
        tensors = direct.problem(n, m, 16, 40)
        expected = direct.gradients(lambda x, y, p: direct.ot_loss(x, y, p, 0.1, 10), tensors)
        loss = loss_of(0.1, 10, backend=backend)
        check(direct.gradients(loss, tensors, torch.float32), expected)


def test_frozen_sides_get_no_gradient():
    x, y, p = (t.float() for t in direct.problem(8, 9))
    p.requires_grad_()
    fused_ot_loss(x[None], y[None], p).backward()
    _, expected = direct.gradients(
        lambda x, y, p: direct.ot_loss(x, y, p, 0.1, 100), (x, y, p.detach())
    )
    assert direct.relative(p.grad.double(), expected[2]) < 1e-4
    assert x.grad is None
    with torch.no_grad():
        assert not fused_ot_loss(x[None], y[None], p).requires_grad


def test_twice_differentiable_is_refused():
    x, weight = torch.randn(1, 4, 3, requires_grad=True), torch.ones((), requires_grad=True)
    loss = weight * fused_ot_loss(x, torch.randn(1, 5, 3))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_functions_are_refused(transform):
    x, y = torch.randn(2, 1, 4, 3), torch.randn(1, 5, 3)
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda x: fused_ot_loss(x, y))(x if transform is torch.func.vmap else x[0])


def test_plan_for_looking():
    x, y, p = (t.float()[None] for t in direct.problem(6, 8))
    mask = torch.tensor([[True] * 4 + [False] * 2])
    solved = sinkhorn_plan(x, y, p[0], student_mask=mask, tol=1e-5)
    assert solved.plan.shape == solved.cost.shape == (1, 6, 8)
    assert torch.allclose(solved.plan.sum(2), torch.tensor([[0.25] * 4 + [0.0] * 2]), atol=1e-6)
    assert solved.marginal_error.item() <= 1e-5
    loss = fused_ot_loss(x, y, p[0], student_mask=mask, tol=1e-5)
    assert solved.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_module_owns_the_projection():
    module = OTLoss(8, 12, epsilon=0.2, num_iters=30, reduction="sum")
    assert module.projection.shape == (12, 8)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 6, 12)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    expected = reference.fused_ot_loss(
        x, y, module.projection, teacher_mask=mask, epsilon=0.2, num_iters=30, reduction="sum"
    )
    assert module(x, y, teacher_mask=mask).item() == pytest.approx(expected.item(), rel=1e-5)
    module(x, y).backward()
    assert module.projection.grad.any()
    with pytest.raises(ValueError, match="epsilon"):
        OTLoss(8, 12, epsilon=0.0)


@pytest.mark.parametrize("backend", ["native", TRITON])
def test_operators_pass_opcheck(backend):
    x, y, p = (t.float().to(device_of(backend)) for t in direct.problem(9, 12, 8, 8))
    segments = torch.tensor([[0, 4], [4, 5]]), torch.tensor([[0, 12], [3, 0]])
    pairs = torch.tensor([[0, 0], [1, 0], [1, 1]])
    index = torch.arange(8, -1, -1)  # of the tokens x: the last one first
    problem = (x, y, *(t.to(x.device) for t in (index, torch.arange(12), *segments, pairs)))
    how = (0.3, 0.1, 5, 0.0, backend, 5, 12, 108, False)
    torch.library.opcheck(ot_loss._matmul, (y.half(), p.half(), torch.float32))
    torch.library.opcheck(ot_loss._ot_loss, (*problem, *how))
    for needs in [(True, True), (False, True), (True, False)]:
        weights = torch.tensor([1.0, 2.0, 0.0], device=x.device)
        arguments = (*problem, weights, *how, "unrolled", *needs)
        torch.library.opcheck(ot_loss._ot_loss_gradient, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [None, TRITON])
def test_compiles_without_graph_breaks(backend, reduction):
    x, y, p = (t.float().to(device_of(backend)) for t in direct.problem(9, 12))
    mask = torch.rand(1, 12, device=x.device) < 0.7

    def loss(x, y, p):
        settings = {"teacher_mask": mask, "reduction": reduction, "backend": backend}
        return fused_ot_loss(x[None], y[None], p, **settings).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = direct.gradients(loss, (x, y, p), torch.float32)
    got = direct.gradients(compiled, (x, y, p), torch.float32)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for have, want in zip(got[1], expected[1], strict=True):
        assert direct.relative(have, want) < 1e-5


@pytest.mark.parametrize(
    ("backend", "bounded"),
    [
        *(("native", False), ("native", True), ("reference", True)),
        pytest.param("triton", True, marks=TRITON.marks),
    ],
)
def test_packed_texts_compile_without_graph_breaks(backend, bounded):
    tensors = [t.float().to(device_of(backend)) for t in direct.problem(9, 12)]
    how = {"max_seqlen_student": 5, "max_seqlen_teacher": 8} if bounded else {}
    how |= {"num_iters": 20, "tol": 0.0, "backend": backend}
    how["pairs"] = torch.tensor([[0, 0], [1, 0], [1, 1]])

    def loss(x, y, p, cu_x, cu_y):
        cu_seqlens = {"cu_seqlens_student": cu_x, "cu_seqlens_teacher": cu_y}
        return fused_ot_loss_varlen(x, y, p, **cu_seqlens, **how)

    def gradients(loss):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = loss(*leaves, torch.tensor([0, 4, 9]), torch.tensor([0, 8, 12]))
        return value, *torch.autograd.grad(value, leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for have, want in zip(gradients(compiled), gradients(loss), strict=True):
        assert direct.relative(have, want) < 1e-5


def test_lengths_are_read_where_cu_seqlens_is(monkeypatch):
    # A meta tensor has no values: reading one raises. Nor has it an autocast.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    x, cu_seqlens = torch.empty(9, 4, device="meta"), torch.tensor([0, 4, 9])
    cu_seqlens = {"cu_seqlens_student": cu_seqlens, "cu_seqlens_teacher": cu_seqlens}
    how = {"tol": 0.0, "num_iters": 1, "backend": "reference"}
    assert fused_ot_loss_varlen(x, x, **cu_seqlens, **how).shape == ()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the choice is then another")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_for_a_gpu_compiles_without_graph_breaks(dynamic):
    h200 = backends.Device("cuda", (9, 0))

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="eager")
    def chosen(tokens):
        return tokens + (backends.choose(h200, *tokens.shape).backend == "cuda")

    for size, cuda in [((64, 128), 0), ((512, 500), 1), ((65, 20), 1)]:
        assert (chosen(torch.zeros(size)) == cuda).all()


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the choice is then another")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_gpu_takes_any_number_of_teacher_tokens(capability):
    assert backends.choose(backends.Device("cuda", capability), 10, 100_000).backend == "triton"


@pytest.mark.parametrize(("version", "why"), [((3, 4), "Triton 3.4 is older"), (None, "not inst")])
def test_an_old_triton_is_refused(monkeypatch, version, why):
    h200 = backends.Device("cuda", (9, 0))
    monkeypatch.setattr(backends, "TRITON", version)
    assert backends.choose(h200, 10, 10).backend == "reference"
    for backend in ("triton", "cuda"):
        assert why in backends.refusal(backend, h200, 10, 10)
    monkeypatch.setattr(backends, "TRITON", backends.OLDEST_TRITON)
    assert backends.choose(h200, 10, 10).backend == "triton"


def test_a_gpu_of_amd_gets_the_reference(monkeypatch):
    monkeypatch.setattr(backends, "TRITON", backends.OLDEST_TRITON)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    mi300 = backends.Device("cuda", (9, 4))
    for size in (10, 500):
        assert backends.choose(mi300, size, size).backend == "reference"
        for backend in ("triton", "cuda"):
            assert "this PyTorch is built for AMD's" in backends.refusal(backend, mi300, size, size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads a peak in KiB")
def test_memory_stays_with_a_few_matrices_a_thread():
    # 40 problems of 256 x 256: the tape of 100 iterations holds 2 GiB, two matrices per thread
    # and the vectors' history 2.5 MiB.
    code = """
import resource, torch
from cot2align import fused_ot_loss
torch.set_num_threads(2)
def run(batch):
    x = torch.randn(batch, 256, 16, requires_grad=True)
    fused_ot_loss(x, torch.randn(batch, 256, 16), tol=0.0).backward()
run(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(40)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert grown < 32  # MiB


def refused(error, pattern, *tensors, function=fused_ot_loss, **kwargs):
    with pytest.raises(error, match=pattern) as caught:
        function(*tensors, **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_settings_and_tensors_are_named():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
    p = torch.randn(6, 4)
    for epsilon in (0, -1.0, math.nan, math.inf):
        refused(ValueError, "epsilon must be a positive", x, y, p, epsilon=epsilon)
    refused(TypeError, "epsilon must be a number", x, y, p, epsilon="0.1")
    refused(ValueError, "num_iters must be from 1 to .*, got 0", x, y, p, num_iters=0)
    refused(ValueError, "got 2147483648", x, y, p, num_iters=2**31)
    refused(TypeError, "num_iters must be an int", x, y, p, num_iters=1.5)
    refused(ValueError, "tol must be", x, y, p, tol=-1)
    refused(ValueError, "grad must be one of", x, y, p, grad="exact")
    refused(ValueError, "reduction must be one of", x, y, p, reduction="avg")
    refused(ValueError, "backend must be one of", x, y, p, backend="gpu")
    if not INTERPRETED:
        refused(ValueError, "backend 'triton' cannot serve cpu", x, y, p, backend="triton")
    refused(TypeError, "got float64", x.double(), y, p, backend="native")
    refused(TypeError, "student must be a tensor, got list", [1.0], y, p)
    refused(TypeError, "teacher must be float32", x, y.int(), p)
    refused(ValueError, re.escape("student must be [B, tokens, width]"), x[0], y, p)
    refused(ValueError, "teacher has width 0", x, y[..., :0], p[:0])
    refused(ValueError, "student has 2 problems", x, y[:1], p)
    refused(ValueError, "got None", x, y)
    refused(ValueError, re.escape("projection must be [6, 4]"), x, y, p.T)
    mask = torch.ones(2, 4, dtype=torch.bool)
    refused(ValueError, re.escape("student_mask must be [2, 3]"), x, y, p, student_mask=mask)
    refused(TypeError, "teacher_mask must be a bool", x, y, p, teacher_mask=torch.ones(2, 5))


def test_too_little_memory_comes_with_what_takes_it(monkeypatch):
    def fails(*_, **__):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(native._native, "ot_loss", fails)
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    pattern = r"N = 3, M = 5 tokens: .* 2 N M floats .* 2 \(N \+ M\) for each of 7 iterations"
    refused(MemoryError, pattern, x, y, num_iters=7, backend="native")


def test_bad_packing_is_named():
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    good = {
        "cu_seqlens_student": torch.tensor([0, 2, 5]),
        "cu_seqlens_teacher": torch.tensor([0, 6]),
    }

    def bad(error, pattern, **change):
        refused(error, pattern, x, y, function=fused_ot_loss_varlen, **{**good, **change})

    bad(ValueError, "pairs is None")
    for pairs in ([[0, 1]], [[-1, 0]], [[2, 0]]):
        bad(ValueError, "pairs must name", pairs=torch.tensor(pairs))
    bad(TypeError, "pairs must be an int", pairs=torch.zeros(1, 2))
    bad(ValueError, "must rise from 0 to 5", cu_seqlens_student=torch.tensor([0, 2, 4]))
    bad(ValueError, "must rise from 0 to 5", cu_seqlens_student=torch.tensor([0, 6, 5]))
    falling = torch.tensor([*range(40), 5])
    bad(ValueError, "41 values from 0 to 5, falling at index 40", cu_seqlens_student=falling)
    bad(TypeError, "cu_seqlens_teacher must be an int32", cu_seqlens_teacher=torch.tensor([0.0, 6]))
    pairs = torch.tensor([[0, 0]])
    bad(ValueError, "max_seqlen_student is 2, but", pairs=pairs, max_seqlen_student=2)
    for name in ("cu_seqlens_student", "pairs", "weights"):  # a copy to the CPU would be read early
        tensors = {"pairs": pairs, "weights": torch.ones(1), **good}
        tensors[name] = tensors[name].to("meta")
        how = {**tensors, "function": ot_loss.ot_loss_terms, "settings": reference.OTSettings()}
        refused(ValueError, f"{name} is on meta, the tokens on cpu", x, y, **how)


def test_reference_serves_without_the_native_module(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(ot_loss, "_warned", set())
    x = torch.randn(1, 3, 4)
    with pytest.warns(UserWarning, match="slow reference"):
        loss = fused_ot_loss(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_ot_loss(x, x)
    assert loss.item() == pytest.approx(reference.fused_ot_loss(x, x).item())
    refused(ValueError, "pip install", x, x, backend="native")
