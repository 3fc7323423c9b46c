"""csrc/sinkhorn.cu without a GPU: the kernel on emulated blocks of two warps, and compiled.

The emulation (cuda_emulation.h) runs the very source, so it covers the arithmetic and the barriers;
the launch itself only runs where a GPU with clusters is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cot2align.kernels import cuda_sinkhorn, native
from tests.kernels import direct

GRADIENTS = cuda_sinkhorn.GRADIENTS
POISON = 7.0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernel as a function of Python, compiled by the C++ compiler."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    source = Path(__file__).with_name("emulated_sinkhorn.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).emulated_sinkhorn
    numbers = [ctypes.c_int] * 5 + [ctypes.c_double, ctypes.c_float] + [ctypes.c_int] * 3
    function.argtypes = [ctypes.c_void_p] * 5 + numbers + [ctypes.c_uint] + [ctypes.c_void_p] * 3
    return function


class Packed:
    """Similarities [n, m] the way the kernel wants them, NaN between them."""

    def __init__(self, similarities: list[Tensor]):
        self.shapes = torch.tensor([s.shape for s in similarities], dtype=torch.int32)
        strides = (self.shapes[:, 1] + 3) // 4 * 4
        ends = (self.shapes[:, 0] * strides + 4).cumsum(0)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
        self.order = self.shapes.prod(1).argsort(descending=True).int()
        self.weights = torch.arange(1, len(similarities) + 1, dtype=torch.float32)
        self.flat = torch.full((int(ends[-1]),), math.nan)
        self.views = []
        for (n, m), start, stride in zip(
            self.shapes.tolist(), self.offsets.tolist(), strides.tolist(), strict=True
        ):
            rows = self.flat[start : start + n * stride].view(n, stride)
            self.views.append(rows[:, :m])
        for view, similarity in zip(self.views, similarities, strict=True):
            view.copy_(similarity)

    def solve(
        self, kernel, epsilon, num_iters, *, tol=0.0, gradient="unrolled", cluster=2, seed=0,
        floor=(0, 0),
    ):  # fmt: skip
        count = len(self.weights)
        self.loss, self.error = torch.full((2, count), POISON)
        self.iterations = torch.full((count,), int(POISON), dtype=torch.int32)
        inputs = (self.flat, self.shapes, self.offsets, self.order, self.weights)
        outputs = (self.loss, self.iterations, self.error)
        bounds = self.shapes.max(0).values.tolist()
        finished = kernel(
            *(t.data_ptr() for t in inputs), count, *bounds, *floor, epsilon, tol, num_iters,
            GRADIENTS.index(gradient), cluster, seed, *(t.data_ptr() for t in outputs),
        )  # fmt: skip
        assert finished, "threads are left waiting for each other"
        return self

    def gradients(self) -> list[Tensor]:
        return [view / w for view, w in zip(self.views, self.weights, strict=True)]


def similarity(n: int, m: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * n + m)
    return spread * torch.randn(n, m, generator=generator)


def exact(similarity: Tensor, epsilon: float, num_iters: int) -> tuple[float, Tensor]:
    """Loss and dL/dS in float64."""
    value, (gradient,) = direct.gradients(
        lambda s: direct.ot_loss_of(s, epsilon, num_iters), [similarity]
    )
    return value.item(), gradient


# What float's rounding of the potentials, 1/epsilon of them, leaves of the gradient. At 1e3 the
# plan is all but constant and the gradient what is left of its differences.
TOLERANCES = {1e3: 1e-3, 1.0: 2e-6, 0.1: 2e-6, 1 / 64: 3e-5, 1 / 65: 1e-4, 0.01: 1e-4, 1e-3: 1e-3}


@pytest.mark.parametrize(("num_iters", "cluster"), [(1, 2), (2, 4), (3, 1), (12, 1), (12, 4)])
@pytest.mark.parametrize("epsilon", TOLERANCES)
def test_unrolled_gradient(emulated, epsilon, num_iters, cluster):
    # More rows than registers hold, fewer than blocks, two strips of columns, one row or column.
    shapes = [(21, 13), (3, 30), (13, 130), (1, 9), (6, 1)]
    problems = [similarity(n, m) for n, m in shapes]
    packed = Packed(problems).solve(emulated, epsilon, num_iters, cluster=cluster)
    assert packed.iterations.tolist() == [num_iters] * len(shapes)
    for shape, s, loss, gradient in zip(
        shapes, problems, packed.loss, packed.gradients(), strict=True
    ):
        value, expected = exact(s, epsilon, num_iters)
        assert loss.item() == pytest.approx(value, rel=1e-6 + 1e-7 / epsilon, abs=1e-7), shape
        if 1 in shape:  # the plan does not depend on the cost: 0, or a softmax of one
            assert (gradient - expected).abs().max() < 1e-6, shape
        else:
            assert direct.relative(gradient.double(), expected) < TOLERANCES[epsilon], shape


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_more_iterations_than_a_stage_of_the_history_holds(emulated, epsilon):
    s = similarity(9, 40)
    packed = Packed([s]).solve(emulated, epsilon, 60, gradient="unrolled")
    assert direct.relative(packed.gradients()[0].double(), exact(s, epsilon, 60)[1]) < 1e-4


@pytest.mark.parametrize(("epsilon", "cluster"), [(1.0, 4), (0.1, 1), (0.015, 2)])
def test_implicit_gradient_is_that_of_the_limit(emulated, epsilon, cluster):
    problems = [similarity(n, m, spread=0.5) for n, m in [(21, 13), (7, 140)]]
    packed = Packed(problems)
    packed.solve(emulated, epsilon, 300, tol=1e-6, gradient="implicit", cluster=cluster)
    for s, loss, gradient in zip(problems, packed.loss, packed.gradients(), strict=True):
        value, expected = exact(s, epsilon, 2000)
        assert loss.item() == pytest.approx(value, rel=1e-5)
        assert direct.relative(gradient.double(), expected) < 1e-4


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_detached_gradient_holds_the_plan_fixed(emulated, epsilon):
    s = similarity(10, 17)
    packed = Packed([s]).solve(emulated, epsilon, 10, gradient="detached")
    leaf = s.double().requires_grad_()
    cost = 1 - leaf.softmax(1)
    kernel = -cost.detach() / epsilon
    f = torch.zeros(10, dtype=torch.float64)
    for _ in range(10):
        g = -math.log(17) - (f[:, None] + kernel).logsumexp(0)
        f = -math.log(10) - (g + kernel).logsumexp(1)
    ((f[:, None] + g + kernel).exp() * cost).sum().backward()
    assert direct.relative(packed.gradients()[0].double(), leaf.grad) < 1e-5


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_saturated_softmax(emulated, epsilon, gradient):
    """Students that pick their teacher's token: p is 1 to rounding, the cost is what is left."""
    s = similarity(12, 12) + 30 * torch.eye(12)
    packed = Packed([s]).solve(emulated, epsilon, 5, gradient=gradient)
    value, expected = exact(s, epsilon, 5)
    assert packed.loss.item() == pytest.approx(value, rel=1e-5)
    if gradient == "none":
        assert torch.equal(packed.views[0], s)
    elif gradient == "unrolled":
        assert direct.relative(packed.gradients()[0].double(), expected) < 1e-4
    else:
        assert packed.views[0].isfinite().all()


@pytest.mark.parametrize("epsilon", [0.1, 0.015])
def test_stops_at_the_first_iteration_within_tol(emulated, epsilon):
    s = similarity(20, 14, spread=0.5)
    full = Packed([s]).solve(emulated, epsilon, 40, tol=1e-4)
    count = int(full.iterations)
    assert 1 < count < 40
    assert full.error.item() <= 1e-4
    before = Packed([s]).solve(emulated, epsilon, count - 1, tol=1e-4)
    assert before.error.item() > 1e-4
    assert direct.relative(full.gradients()[0].double(), exact(s, epsilon, count)[1]) < 1e-4


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_stays_in_its_problem(emulated, bad, epsilon, gradient):
    good, broken = similarity(8, 10), similarity(9, 11)
    broken[4, 5] = bad
    alone = Packed([good]).solve(emulated, epsilon, 4, gradient=gradient)
    both = Packed([good, broken]).solve(emulated, epsilon, 4, gradient=gradient)
    assert both.loss[1].isnan()
    assert both.views[1].isnan().all()
    assert both.loss[0] == alone.loss[0]
    assert torch.equal(both.views[0], alone.views[0])


def test_skips_what_is_empty_or_below_the_floor(emulated):
    shapes = [(8, 12), (0, 5), (5, 0), (4, 4), (4, 9)]
    problems = [similarity(n, m) for n, m in shapes]
    packed = Packed(problems).solve(emulated, 0.1, 3, floor=(4, 8))
    assert (packed.loss == POISON).tolist() == [False, True, True, True, False]
    assert (packed.iterations == POISON).tolist() == [False, True, True, True, False]
    assert torch.equal(packed.views[3], problems[3])
    assert not torch.equal(packed.views[4], problems[4])


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_no_result_depends_on_the_order_of_the_threads(emulated, epsilon, gradient):
    runs = [
        Packed([similarity(19, 33)]).solve(
            emulated, epsilon, 8, gradient=gradient, cluster=4, seed=seed
        )
        for seed in range(4)
    ]
    for run in runs[1:]:
        assert torch.equal(run.loss, runs[0].loss)
        assert torch.equal(run.views[0], runs[0].views[0])


built = native.missing() is None and native._native.build_info()["cuda"]


def _cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


@pytest.mark.skipif(not built, reason="built without CUDA")
@pytest.mark.skipif(_cuobjdump() is None, reason="no cuobjdump")
def test_built_without_spills():
    """All six kernels, for each architecture that has clusters."""
    command = [_cuobjdump(), "--dump-resource-usage", native._native.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = r"sinkhorn_cluster\w+:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    kernels = [tuple(map(int, found)) for found in re.findall(usage, text)]
    with_clusters = [kernel for kernel in kernels if kernel[0] > 64]  # elsewhere the body is empty
    assert len(with_clusters) > 0
    assert len(with_clusters) % 6 == 0
    assert {(stack, local) for _, stack, _, local in with_clusters} == {(0, 0)}


@pytest.mark.skipif(not built, reason="built without CUDA")
def test_fits():
    assert cuda_sinkhorn.fits(640, 640, (9, 0)) is None
    assert "does not fit" in str(cuda_sinkhorn.fits(1000, 1000, (9, 0)))
    assert "8.0" in str(cuda_sinkhorn.fits(64, 64, (8, 0)))
    assert "12.0" in str(cuda_sinkhorn.fits(64, 64, (12, 0)))


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0", (10, 3), True),
        ("10.3", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("9.0", (10, 0), False),
        ("9.0+PTX", (10, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0+PTX", (9, 0), False),  # without clusters there is no kernel
    ],
)
def test_which_devices_an_architecture_runs_on(arch, capability, runs):
    assert cuda_sinkhorn.runs(arch, capability) is runs


@pytest.mark.skipif(not built, reason="built without CUDA")
def test_wrapper_names_what_is_wrong():
    packed = Packed([similarity(8, 8)])
    tensors = (packed.flat, packed.shapes, packed.offsets, packed.order, packed.weights)
    outputs = {
        "loss": torch.zeros(1),
        "iterations": torch.zeros(1, dtype=torch.int32),
        "marginal_error": torch.zeros(1),
    }
    settings = {"bounds": (8, 8), "epsilon": 0.1, "num_iters": 3, "tol": 0.0, "gradient": "none"}
    with pytest.raises(ValueError, match="similarity must be on a CUDA device, got cpu"):
        cuda_sinkhorn.solve(*tensors, **settings, **outputs)
    with pytest.raises(ValueError, match="iterations must be a contiguous"):
        cuda_sinkhorn.solve(*tensors, **settings, **outputs | {"iterations": torch.zeros(1)})


def _has_clusters() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


@pytest.mark.skipif(not (built and _has_clusters()), reason="no GPU with clusters")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("size", [(100, 200), (256, 256), (300, 300), (512, 512), (640, 640)])
def test_on_a_gpu(size, epsilon, gradient):
    problems = [similarity(size[0] - i, size[1] - 3 * i) for i in range(3)]
    packed = Packed(problems)
    inputs = (packed.flat, packed.shapes, packed.offsets, packed.order, packed.weights)
    flat, *rest = (t.cuda() for t in inputs)
    loss, error = torch.zeros(2, 3, device="cuda")
    iterations = torch.zeros(3, dtype=torch.int32, device="cuda")
    cuda_sinkhorn.solve(
        flat,
        *rest,
        bounds=size,
        epsilon=epsilon,
        num_iters=20,
        tol=0.0,
        gradient=gradient,
        loss=loss,
        iterations=iterations,
        marginal_error=error,
    )
    packed.flat.copy_(flat.cpu())
    assert iterations.tolist() == [20] * 3
    for s, value, view, gradient_ in zip(
        problems, loss.tolist(), packed.views, packed.gradients(), strict=True
    ):
        expected, slope = exact(s, epsilon, 20)
        assert value == pytest.approx(expected, rel=1e-5)
        if gradient == "none":
            assert torch.equal(view, s)
        elif gradient == "unrolled":
            assert direct.relative(gradient_.double(), slope) < TOLERANCES[epsilon]
