"""The streaming solver, from packed S to loss and dS, against float64.

Its arithmetic runs on a GPU, or here in the interpreter:
    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_streamed.py
Without that variable the same file compiles every kernel for GPUs that need not be there;
COMPILE_ALL=1 does so for every tile on every GPU.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cot2align.kernels import reference, triton_streamed

sys.path.insert(0, str(Path(__file__).parent))
from direct import gradients, ot_loss_of, relative

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


WAYS = ["one_launch", "one_program", "many_programs"]
all_ways = pytest.mark.parametrize("programs", WAYS, indirect=True)


wide_rows = pytest.mark.parametrize("programs", ["wide_rows"], indirect=True)


@pytest.fixture(params=["one_launch", "many_programs"])
def programs(request, monkeypatch):
    """Ways to iterate, whatever the size. one_program: the steps of one_launch, a launch
    each; many_programs: one per block of rows; wide_rows: the same, as
    if no tile held a row."""
    many = request.param in ("many_programs", "wide_rows")
    if request.param == "wide_rows":
        monkeypatch.setattr(triton_streamed, "TILES", {})
        monkeypatch.setattr(triton_streamed, "WIDE", (16, 8))
    monkeypatch.setattr(triton_streamed, "WHOLE", math.inf if request.param == "one_launch" else 0)
    monkeypatch.setattr(triton_streamed, "MANY", math.inf if many else 0)
    monkeypatch.setattr(triton_streamed, "SMALL", 0)
    return request.param


def random(n: int, m: int, spread: float = 3.0):
    """S [n, m], float32."""
    return spread * torch.randn(n, m, generator=torch.Generator().manual_seed(100 * n + m))


def solve(
    matrices,
    epsilon,
    num_iters,
    tol=0.0,
    gradient="unrolled",
    *,
    weights=None,
    floor=(0, 0),
    bounds=None,
):
    """Losses, iterations, column errors, and the matrices after: dS. Outputs begin as zeros."""
    shapes = torch.tensor([s.shape for s in matrices], dtype=torch.int32)
    strides = [(s.shape[1] + 3) // 4 * 4 for s in matrices]
    sizes = [s.shape[0] * stride for s, stride in zip(matrices, strides, strict=True)]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    packed = torch.full((sum(sizes),), math.nan)

    def views(flat):
        parts = flat.split(sizes)
        return [
            part.view(s.shape[0], stride)[:, : s.shape[1]]
            for part, s, stride in zip(parts, matrices, strides, strict=True)
        ]

    for view, s in zip(views(packed), matrices, strict=True):
        view.copy_(s)
    count = len(matrices)
    packed = packed.to(DEVICE)
    loss, error = torch.zeros(2, count, device=DEVICE)
    iterations = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    triton_streamed.solve(
        packed,
        shapes.to(DEVICE),
        offsets[:-1].to(DEVICE),
        shapes.prod(1).argsort(descending=True).int().to(DEVICE),
        torch.ones(count, device=DEVICE) if weights is None else weights.to(DEVICE),
        bounds=bounds or tuple(shapes.amax(0).tolist()),
        floor=floor,
        epsilon=epsilon,
        num_iters=num_iters,
        tol=tol,
        gradient=gradient,
        loss=loss,
        iterations=iterations,
        marginal_error=error,
    )
    return loss.cpu(), iterations.cpu(), error.cpu(), views(packed.cpu())


def oracle(s, epsilon, num_iters, dtype=torch.float64):
    """Loss and dS, computed in `dtype`."""
    value, (slope,) = gradients(lambda t: ot_loss_of(t, epsilon, num_iters), [s], dtype)
    return value, slope


def reference_solve(s, **settings):
    """reference.solve of the tokens whose S this is."""
    s = s.double()
    identity = torch.eye(s.shape[1], dtype=torch.float64)
    x = s * math.sqrt(s.shape[1])
    return reference.solve(
        x[None], identity[None], None, None, None, reference.OTSettings(**settings)
    )


def assert_as_good_as_autograd(s, loss, slope, epsilon, num_iters):
    """At most 4 times the error of float32 autograd. That of its loss, a single number, may happen
    to be small: at least what rounding exponents of 1 / epsilon leaves in a mean over S's entries.
    """
    expected_loss, expected = oracle(s, epsilon, num_iters)
    loss32, slope32 = oracle(s, epsilon, num_iters, torch.float32)
    rounding = torch.finfo(torch.float32).eps
    error, error32 = (abs(value - expected_loss) / expected_loss for value in (loss, loss32))
    assert error <= 4 * max(error32, rounding * max(1, 1 / (epsilon * math.sqrt(s.numel()))))
    assert relative(slope.double(), expected) <= 4 * max(relative(slope32, expected), rounding)


@runs
@pytest.mark.parametrize("num_iters", [1, 2, 3, 20])
@pytest.mark.parametrize("epsilon", [1e3, 10, 0.1, 0.02, 0.005, 1e-3])
def test_value_and_gradient(programs, epsilon, num_iters):
    s = random(37 if num_iters < 20 else 20, 21)  # blocks of rows: 2 or 1
    (loss,), (iterations,), _, (slope,) = solve([s], epsilon, num_iters)
    assert iterations == num_iters
    assert_as_good_as_autograd(s, loss, slope, epsilon, num_iters)


@runs
@pytest.mark.parametrize("m", [129, 600, 2049])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_widths(programs, epsilon, m):
    s = random(3, m)
    (loss,), _, _, (slope,) = solve([s], epsilon, 2)
    assert_as_good_as_autograd(s, loss, slope, epsilon, 2)


@runs
@wide_rows
@pytest.mark.parametrize(("epsilon", "num_iters"), [(1e3, 1), (0.1, 2), (1e-3, 2)])
def test_rows_wider_than_a_tile(programs, epsilon, num_iters):
    matrices = [random(18, 12), random(0, 4), random(8, 4)]  # two blocks of rows and columns
    loss, iterations, _, slopes = solve(matrices, epsilon, num_iters, floor=(8, 8))
    assert iterations.tolist() == [num_iters, 0, 0]
    assert_as_good_as_autograd(matrices[0], loss[0], slopes[0], epsilon, num_iters)
    assert torch.equal(slopes[2], matrices[2])


@runs
@wide_rows
@pytest.mark.parametrize("gradient", ["implicit", "detached"])
def test_other_gradients_of_rows_wider_than_a_tile(programs, gradient):
    check_before_convergence(random(18, 10), 0.1, gradient)


@runs
@wide_rows
def test_rows_wider_than_a_tile_that_stop_or_saturate(programs):
    calm, broken = random(5, 10, 0.5), random(4, 9)
    broken[3, 8] = math.nan
    sharp = random(9, 9, 1.0) + 25 * torch.eye(9).flip(1)
    loss, iterations, _, slopes = solve([calm, broken, sharp], 0.1, 3, tol=1e-2)
    stops = reference_solve(calm, epsilon=0.1, num_iters=3, tol=1e-2).num_iters
    assert iterations[0] == stops < 3
    assert loss[1].isnan()
    assert slopes[1].isnan().all()
    expected_loss, expected = oracle(sharp, 0.1, int(iterations[2]))
    assert abs(loss[2] - expected_loss) <= 1e-5 * expected_loss
    assert relative(slopes[2].double(), expected) <= 1e-5


@runs
def test_more_than_4096_columns(monkeypatch):
    monkeypatch.setattr(triton_streamed, "BLOCK", 1024)  # fewer programs to interpret
    s = random(3, 4100)
    (loss,), _, _, (slope,) = solve([s], 0.1, 2)
    assert_as_good_as_autograd(s, loss, slope, 0.1, 2)


@runs
@all_ways
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_more_parts_than_are_read_at_once(programs, epsilon, monkeypatch):
    monkeypatch.setattr(triton_streamed, "PARTS", 2)
    s = random(130, 6)
    (loss,), _, _, (slope,) = solve([s], epsilon, 2)
    assert_as_good_as_autograd(s, loss, slope, epsilon, 2)


@runs
@all_ways
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_ragged(programs, epsilon):
    shapes = [(3, 5), (0, 4), (33, 7), (1, 6), (4, 0), (5, 1), (1, 1), (64, 2)]
    matrices = [random(*shape) for shape in shapes]
    weights = torch.arange(1.0, 9.0)
    loss, iterations, error, slopes = solve(matrices, epsilon, 3, weights=weights, bounds=(70, 9))
    for q, s in enumerate(matrices):
        if s.numel() == 0:
            assert loss[q] == iterations[q] == error[q] == 0
            continue
        expected_loss, expected = oracle(s, epsilon, 3)
        torch.testing.assert_close(loss[q].double(), expected_loss, rtol=1e-5, atol=1e-7)
        expected *= weights[q]
        torch.testing.assert_close(slopes[q].double(), expected, rtol=1e-4, atol=1e-6)


@runs
def test_all_empty():
    loss, *_ = solve([random(0, 3), random(0, 0)], 0.1, 3)
    assert loss.tolist() == [0, 0]


@runs
def test_floor(programs):
    """Problems within it are another launch's: their S and outputs stay as they are."""
    matrices = [random(8, 8), random(9, 8), random(8, 9), random(3, 2)]
    loss, iterations, error, after = solve(matrices, 0.1, 2, floor=(8, 8))
    for q in (0, 3):
        assert loss[q] == iterations[q] == error[q] == 0
        assert torch.equal(after[q], matrices[q])
    for q in (1, 2):
        assert_as_good_as_autograd(matrices[q], loss[q], after[q], 0.1, 2)


@runs
@pytest.mark.parametrize("epsilon", [1, 0.1, 0.01])
def test_saturated_softmax(programs, epsilon):
    """Every p is 0 or 1 in float32, or all but; a permutation's plan costs next to nothing."""
    s = random(12, 12, 1.0)
    s[torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(0))] += 25
    loss, _, _, (slope,) = solve([s], epsilon, 5)
    expected_loss, expected = oracle(s, epsilon, 5)
    assert abs(loss[0] - expected_loss) <= 1e-5 * expected_loss
    assert relative(slope.double(), expected) <= 1e-5


@runs
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("epsilon", [0.1, 0.012])
def test_stops_like_the_reference(programs, epsilon, tol):
    matrices = [random(6, 5, 0.0), random(8, 6), random(35, 5)]
    loss, iterations, error, slopes = solve(matrices, epsilon, 12, tol)
    assert iterations[0] == 1
    for q, s in enumerate(matrices):
        expected = reference_solve(s, epsilon=epsilon, num_iters=12, tol=tol)
        assert iterations[q] == expected.num_iters[0]
        assert (error[q] <= tol) == (expected.marginal_error[0] <= tol)
        torch.testing.assert_close(
            error[q].double(), expected.marginal_error[0], rtol=1e-3, atol=1e-5
        )
        if q > 0:  # the gradient of equal costs is 0
            assert_as_good_as_autograd(s, loss[q], slopes[q], epsilon, int(iterations[q]))


@runs
@pytest.mark.parametrize(
    ("bad", "epsilon"), [(math.nan, 0.1), (math.inf, 0.1), (-math.inf, 0.1), (math.nan, 0.01)]
)
def test_nan_stays_in_its_problem(programs, bad, epsilon):
    matrices = [random(6, 5), random(34, 5), random(7, 5)]
    spoilt = [s.clone() for s in matrices]
    spoilt[1][33, 2] = bad
    loss, iterations, _, slopes = solve(spoilt, epsilon, 2, tol=1e-6)
    assert loss[1].isnan()
    assert slopes[1].isnan().all()
    assert iterations[1] == 2
    expected_loss, _, _, expected = solve(matrices, epsilon, 2, tol=1e-6)
    for q in (0, 2):
        assert torch.equal(loss[q], expected_loss[q])
        assert torch.equal(slopes[q], expected[q])


@runs
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_same_bits(programs, epsilon):
    matrices = [random(70, 9), random(5, 8)]
    first = solve(matrices, epsilon, 3)
    again = solve(matrices, epsilon, 3)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[3], again[3], strict=True))


@runs
@pytest.mark.parametrize(("epsilon", "spread"), [(0.3, 1.0), (0.1, 1.0), (0.015, 0.3)])
def test_implicit_is_unrolled_at_convergence(programs, epsilon, spread):
    s = random(34, 4, spread)
    (loss,), _, (error,), (slope,) = solve([s], epsilon, 60, 1e-5, "implicit")
    assert error <= 1e-5
    expected_loss, expected = oracle(s, epsilon, 500)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    assert relative(slope.double(), expected) <= 1e-4


def check_before_convergence(s, epsilon, gradient):
    """What the reference gives for the plan of 3 iterations, marginals and all."""
    loss, _, _, (slope,) = solve([s], epsilon, 3, gradient=gradient)
    leaf = s.double().requires_grad_()
    expected_loss = reference_solve(leaf, epsilon=epsilon, num_iters=3, tol=0.0, grad=gradient).loss
    (expected,) = torch.autograd.grad(expected_loss, leaf)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    assert relative(slope.double(), expected) <= (1e-5 if epsilon >= 0.1 else 1e-4)


@runs
@pytest.mark.parametrize("gradient", ["implicit", "detached"])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_implicit_and_detached_before_convergence(programs, epsilon, gradient):
    check_before_convergence(random(36, 5), epsilon, gradient)


@runs
def test_no_gradient(programs):
    matrices = [random(36, 5), random(4, 7)]
    for tol in (0.0, 1e-3):
        loss, iterations, error, _ = solve(matrices, 0.1, 6, tol, "none")
        expected = solve(matrices, 0.1, 6, tol)
        assert torch.equal(loss, expected[0])
        assert torch.equal(iterations, expected[1])
        assert torch.equal(error, expected[2])


@runs
@all_ways
@pytest.mark.parametrize(
    ("gradient", "counts"),
    [("none", (1, 4, 13)), ("unrolled", (1, 6, 22)), ("implicit", (1, 6, 15))],
)
def test_launches(programs, gradient, counts):
    """One launch for all, or for all iterations, or two for each and for the last column error."""
    triton_streamed.launches.clear()
    solve([random(5, 6), random(4, 3)], 0.1, 4, gradient=gradient)
    assert triton_streamed.launches.total() == counts[WAYS.index(programs)]


POINTERS = {
    **dict.fromkeys(("shapes", "order", "iterations"), "*i32"),
    **dict.fromkeys(("similarity", "weights", "rows", "cols", "x", "y"), "*fp32"),
    **dict.fromkeys(("partial", "masses", "losses", "errors", "loss"), "*fp32"),
    **{"offsets": "*i64", "w": "*fp64", "vectors": "*fp64", "marginal_error": "*fp32"},
    **dict.fromkeys(("tol", "sharpness"), "fp32"),
}
GRADIENTS = {
    "finish_kernel": ["none", "unrolled", "implicit"],
    "gradient_kernel": ["detached", "unrolled", "implicit"],
    "whole_kernel": ["none", "detached", "unrolled", "implicit"],
}
SIZES = [(90, 512), (100, 4096), (90, 8192)]
if os.environ.get("COMPILE_ALL") == "1":
    SIZES = [
        (gpu, cols) for gpu in (80, 86, 89, 90, 100, 120) for cols in (*triton_streamed.TILES, 8192)
    ]


def kernels(cols):
    """The names of those that `solve` launches for problems of so many columns."""
    every = [name for name in vars(triton_streamed) if name.endswith("_kernel")]
    if cols in triton_streamed.TILES:
        return [name for name in every if not name.startswith("_wide")]
    narrow = ("_iterate_kernel", "_reverse_kernel", "_whole_kernel")
    return [name for name in every if "_wide" + name not in every and name not in narrow]


@compiles
@pytest.mark.parametrize(
    ("capability", "cols", "name"), [(*size, name) for size in SIZES for name in kernels(size[1])]
)
def test_compiles_without_spills(capability, cols, name):
    from tests.kernels.compiled import SHARED_MEMORY, compile

    kernel = getattr(triton_streamed, name)
    for gradient in GRADIENTS.get(name.removeprefix("_wide").removeprefix("_"), [None]):
        for logarithmic in (False, True) if cols in triton_streamed.TILES else (True,):
            constants = triton_streamed.constants(cols, logarithmic, gradient)
            resources = triton_streamed.resources(kernel, gradient)
            used = {arg: constants[arg] for arg in kernel.arg_names if arg in constants}
            signature = {
                arg: POINTERS.get(arg, "i32") for arg in kernel.arg_names if arg not in used
            }
            how = (capability, resources["num_warps"], 3, {"width_n"}, resources["maxnreg"])
            binary = compile(kernel, signature, used, *how)
            assert binary.spills == 0, (gradient, logarithmic, binary.spills)
            assert binary.shared <= SHARED_MEMORY[capability]
