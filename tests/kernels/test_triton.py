"""The Triton backend: tiles, launches, 16-bit tokens; and every kernel compiled for six GPUs.

Run on a GPU, or interpreted in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/kernels -k triton

Compiling needs neither; COMPILE_ALL=1 compiles every configuration (minutes).
"""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

from cot2align import fused_ot_loss, fused_ot_loss_varlen
from cot2align.kernels import backends, native, reference, triton_streamed
from cot2align.kernels import triton_sinkhorn as sinkhorn
from tests.kernels import direct

INTERPRETED = sinkhorn.INTERPRETED
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


def packed(lengths_x, lengths_z, pairs, width=6, spread=3.0):
    """The tensors of `ot_loss`, float32 on the CPU; the weights are 1, 2, ..."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(sum(ns), width, generator=generator) for ns in (lengths_x, lengths_z))
    segments = [
        torch.tensor([(sum(ns[:i]), n) for i, n in enumerate(ns)]) for ns in (lengths_x, lengths_z)
    ]
    return spread * x, z, *segments, torch.tensor(pairs), torch.arange(1.0, len(pairs) + 1)


def solve(
    tensors,
    dtype=torch.float32,
    bounds=None,
    entries=None,
    solver=None,
    indices=(None, None),
    **settings,
):
    """The solver's five outputs on the CPU; without `entries`, as if the host knew no length."""
    x, z, segments_x, segments_z, *_ = tensors
    how = {"scale": 0.4, "epsilon": 0.1, "num_iters": 4, "tol": 0.0, "gradient": "unrolled"}
    how |= {"need_x": True, "need_z": True, **settings}
    if solver is native.ot_loss:
        return solver(*tensors, **how)
    on_device = [
        t if t is None else t.to(DEVICE) for t in (x.to(dtype), z.to(dtype), *indices, *tensors[2:])
    ]
    if bounds is None:
        bounds = int(segments_x[:, 1].max()), int(segments_z[:, 1].max())
    sinkhorn.launches.clear()
    return [t.cpu() for t in sinkhorn.ot_loss(*on_device, bounds=bounds, entries=entries, **how)]


def expected(tensors, epsilon=0.1, num_iters=4):
    """loss, dx, dz in float64, by autograd through the few-line implementation."""
    x, z, segments_x, segments_z, pairs, weights = tensors
    x, z = x.double().requires_grad_(), z.double().requires_grad_()
    losses = []
    for s, t in pairs.tolist():
        (i, n), (j, m) = segments_x[s].tolist(), segments_z[t].tolist()
        similarity = 0.4 * x[i : i + n] @ z[j : j + m].T
        empty = 0 * (x.sum() + z.sum())
        losses.append(direct.ot_loss_of(similarity, epsilon, num_iters) if n and m else empty)
    loss = torch.stack(losses)
    return loss.detach(), *torch.autograd.grad(weights.double() @ loss, (x, z))


def check(got, want, tolerance=3e-5):
    loss, _, _, dx, dz = got
    torch.testing.assert_close(loss.double(), want[0], rtol=tolerance, atol=1e-7)
    for have, exact in ((dx, want[1]), (dz, want[2])):
        # Of a single row or column the gradient is 0, and what is left is rounding.
        assert (have.double() - exact).norm() <= tolerance * exact.norm() + 1e-6


@runs
@pytest.mark.parametrize("epsilon", [0.1, 0.008])
@pytest.mark.parametrize(
    ("n", "m", "tiles"),
    [
        *((1, 1, 1), (1, 32, 1), (32, 1, 1), (31, 33, 2), (33, 31, 2), (64, 64, 2)),
        *((63, 65, 3), (64, 128, 3), (65, 20, None), (7, 129, None)),
    ],
)
def test_borders_of_the_tiles(n, m, tiles, epsilon):
    tensors = packed([n], [m], [(0, 0)])
    got = solve(tensors, epsilon=epsilon)
    assert sinkhorn.launches["_fused"] == (tiles or len(sinkhorn.TILES))
    assert sinkhorn.launches["_similarity"] == (tiles is None)
    assert sinkhorn.launches["_products"] == 2
    check(got, expected(tensors, epsilon), 3e-5 if epsilon == 0.1 else 5e-4)


@runs
@pytest.mark.parametrize("grad", reference.GRADS)
@pytest.mark.parametrize(("n", "m", "kernel"), [(20, 66, "_fused"), (65, 128, "_similarity")])
def test_launches_for_problems_of_one_size(n, m, kernel, grad):
    """Up to 64 x 128 in one launch, up to 128 x 128 in two; two more for the products."""
    x, y = torch.randn(2, n, 8, device=DEVICE, requires_grad=True), torch.randn(2, m, 8)
    y, masked = y.to(DEVICE), torch.ones(2, n, dtype=torch.bool, device=DEVICE)
    counts = []
    for mask in (None, masked):
        sinkhorn.launches.clear()
        triton_streamed.launches.clear()
        how = {"num_iters": 2, "grad": grad, "backend": "triton"}
        fused_ot_loss(x, y, student_mask=mask, **how).backward()
        assert triton_streamed.launches.total() == (kernel == "_similarity")
        counts.append(dict(sinkhorn.launches))
    assert counts[0] == {kernel: 1, "_products": 1}
    assert counts[1]["_fused"] > 1  # any size may be behind a mask


@runs
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached", "none"])
def test_all_sizes_in_one_call(gradient):
    lengths = [20, 0, 45, 70, 3], [9, 40, 130, 0]
    pairs = [(0, 0), (0, 1), (2, 2), (3, 0), (4, 2), (1, 1), (2, 3), (0, 0)]  # segment 3: in none
    tensors = packed(*lengths, pairs)
    settings = {"gradient": gradient, "tol": 1e-3, "num_iters": 4}
    got = solve(tensors, **settings)
    want = solve(tensors, solver=native.ot_loss, **settings)
    assert got[1].tolist() == want[1].tolist()
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2], want[2], rtol=1e-3, atol=1e-6)
    for have, exact in zip(got[3:], want[3:], strict=True):
        assert (have - exact).norm() <= 2e-5 * exact.norm()
    rows, cols = (tensors[i][tensors[4][:, i - 2], 1] for i in (2, 3))
    entries = int(rows @ ((cols + 3) // 4 * 4))
    for a, b in zip(got, solve(tensors, entries=entries, **settings), strict=True):
        assert torch.equal(a, b)


@runs
@pytest.mark.parametrize("longest", [20, 70])
def test_tokens_may_stand_in_any_order(longest):
    tensors = packed([longest, 8], [17, 30], [(0, 0), (1, 1), (0, 1)])
    want = solve(tensors)
    for moved in ((True, False), (False, True), (True, True)):
        sides = zip(tensors[:2], moved, strict=True)
        indices = [torch.randperm(len(t)) if move else None for t, move in sides]
        there = list(tensors)
        for side, index in enumerate(indices):
            if index is not None:
                there[side] = torch.empty_like(tensors[side]).index_copy(0, index, tensors[side])
        got = solve(there, indices=indices)
        for side, index in enumerate(indices, 3):
            if index is not None:
                got[side] = got[side][index]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(30, 20), (70, 20)])
def test_16_bit_tokens(dtype, n, m):
    x, z, *rest, _ = packed([n], [m], [(0, 0)])
    x, z = x.to(dtype).float(), z.to(dtype).float()
    weight = torch.tensor([1e-3])  # dS is small for float16
    got = solve((x, 32 * z, *rest, weight), dtype, scale=0.4 / 32)
    loss, dx, dz = expected((x, z, *rest, weight))
    assert got[3].dtype == got[4].dtype == backends.gradient_dtype(dtype)
    assert abs(got[0] - loss) <= 1e-5 * loss  # S is not rounded to 16 bits
    kind = torch.finfo(dtype)
    for have, exact in ((got[3], dx), (32 * got[4].float(), dz)):
        smallest = 32 * kind.tiny * kind.eps * math.sqrt(exact.numel())
        assert (have.double() - exact).norm() <= kind.eps * exact.norm() + smallest


@runs
def test_implicit_is_unrolled_at_convergence():
    tensors = packed([12, 40], [10, 30], [(0, 0), (1, 1)], spread=1.0)
    for epsilon in (1.0, 0.2):
        unrolled, implicit = (
            solve(tensors, num_iters=60, epsilon=epsilon, gradient=gradient)
            for gradient in ("unrolled", "implicit")
        )
        for a, b in zip(unrolled[3:], implicit[3:], strict=True):
            assert direct.relative(a, b) < 1e-5


@runs
@pytest.mark.parametrize("gradient", ["implicit", "detached"])
def test_other_gradients_on_logarithms(gradient):
    tensors = packed([20, 40], [30, 70], [(0, 0), (1, 1)])
    settings = {"gradient": gradient, "epsilon": 0.012}
    got, want = (solve(tensors, solver=solver, **settings) for solver in (None, native.ot_loss))
    assert sinkhorn.launches["_fused"] == 3
    for have, exact in zip(got[3:], want[3:], strict=True):
        assert direct.relative(have, exact) <= 1e-4


@runs
@pytest.mark.parametrize("epsilon", [0.1, 0.012])
def test_stops_as_the_reference_does(epsilon):
    tensors = packed([20, 35], [12, 30], [(0, 0), (1, 1), (0, 1)])
    got = solve(tensors, num_iters=15, tol=1e-2, epsilon=epsilon, gradient="none")
    for q, (s, t) in enumerate(tensors[4].tolist()):
        (i, n), (j, m) = tensors[2][s].tolist(), tensors[3][t].tolist()
        x, z = tensors[0][None, i : i + n].double(), tensors[1][None, j : j + m].double()
        x = 0.4 * math.sqrt(x.shape[2]) * x
        settings = reference.OTSettings(epsilon, 15, 1e-2)
        want = reference.solve(x, z, None, None, None, settings)
        assert got[1][q] == want.num_iters
        assert got[2][q].item() == pytest.approx(want.marginal_error.item(), rel=1e-3, abs=1e-5)


@runs
def test_a_problem_beyond_the_bounds_is_nan_and_harms_no_other():
    tensors = packed([5, 9], [6, 7], [(0, 0), (1, 1)])
    got = solve(tensors, bounds=(5, 7))
    alone = solve((*tensors[:4], tensors[4][:1], tensors[5][:1]))
    assert got[0].isnan().tolist() == [False, True]
    assert got[0][0] == alone[0][0]
    assert torch.equal(got[3], alone[3])


@runs
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU PyTorch itself can watch")
@pytest.mark.parametrize("bounds", [(30, 30), (500, 500)])
def test_nothing_is_read_from_the_device(bounds, monkeypatch):
    """A meta tensor has no values: reading one raises."""

    launched = []
    monkeypatch.setattr(sinkhorn, "_launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(triton_streamed, "solve", lambda *_, **__: launched.append("solve"))
    tensors = [t.to("meta") for t in packed([20, 30], [25, 10], [(0, 0), (1, 1)])]
    how = {"scale": 1.0, "epsilon": 0.1, "num_iters": 5, "tol": 0.0, "gradient": "unrolled"}
    how |= {"need_x": True, "need_z": True}
    sinkhorn.ot_loss(*tensors[:2], None, None, *tensors[2:], bounds=bounds, **how)
    assert ("solve" in launched) == (bounds == (500, 500))


@runs
@pytest.mark.skipif(INTERPRETED, reason="the interpreter works on the host")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("longest", [30, 200, 700])
def test_no_synchronisation(longest, reduction):
    """Of both public functions, forward and backward; the lengths are known to the host."""
    x = torch.randn(2, longest, 8, device="cuda", requires_grad=True)
    y, projection = torch.randn(2, 25, 6, device="cuda"), torch.randn(6, 8, device="cuda")
    projection.requires_grad_()
    mask = torch.rand(2, 25, device="cuda") < 0.5
    weight = torch.ones((), device="cuda") if reduction == "mean" else torch.ones(2, device="cuda")
    cu_x, cu_y = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (longest, 25))
    on_device = {"cu_seqlens_student": cu_x.cuda(), "cu_seqlens_teacher": cu_y.cuda()}
    on_device |= {"max_seqlen_student": longest, "max_seqlen_teacher": 25}

    def run():
        packed = x.flatten(0, 1), y.flatten(0, 1), projection
        how = {"num_iters": 5, "tol": 1e-3, "reduction": reduction}
        fused_ot_loss(x, y, projection, teacher_mask=mask, **how).backward(weight)
        for lengths in (on_device, {"cu_seqlens_student": cu_x, "cu_seqlens_teacher": cu_y}):
            fused_ot_loss_varlen(*packed, **lengths, **how).backward(weight)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- compiled, not run

TYPES = {
    **dict.fromkeys(("shapes", "order", "iterations"), "*i32"),
    **dict.fromkeys(("firsts", "offsets", "segments", "starts", "problems"), "*i64"),
    **dict.fromkeys(("index_x", "index_z", "index_right", "index_output"), "*i64"),
    **dict.fromkeys(("weights", "gradient", "history", "loss", "marginal_error"), "*fp32"),
    **dict.fromkeys(("scale", "epsilon", "tol"), "fp32"),
    "similarity": "*fp32",
}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


IN_ORDER = dict.fromkeys(("index_x", "index_z", "index_right", "index_output"))


def configurations(capability):
    """What `ot_loss` may launch: kernel, dtype, constants, (warps, stages, limits)."""
    for dtype in NAMES:
        for gradient in ("none", "unrolled", "implicit", "detached"):
            for logarithmic in (False, True):
                tiles = sinkhorn.tiles_for(gradient, logarithmic, capability // 10)
                for tile in tiles:
                    constants = {
                        **{"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": sinkhorn.DEPTH[dtype]},
                        **{"LOG": logarithmic, "GRADIENT": gradient, "UPCAST": False},
                    }
                    how = (tile.warps, sinkhorn.STAGES, ("dim",), sinkhorn.registers(tile.warps))
                    yield sinkhorn._fused, dtype, constants | IN_ORDER, how
                    if tile == tiles[-1] and dtype == torch.bfloat16:
                        yield sinkhorn._fused, dtype, constants, how
        block = sinkhorn.SIMILARITY[dtype]
        how = (block.warps, block.stages, ("dim",), sinkhorn.registers(block.warps))
        constants = {"ROWS": block.rows, "COLS": block.cols, "DEPTH": block.depth, "UPCAST": False}
        for some in (constants, constants | IN_ORDER):
            yield sinkhorn._similarity, dtype, some, how
        block = sinkhorn.products_for(dtype, capability // 10)
        how = (block.warps, block.stages, ("dim",), sinkhorn.registers(block.warps))
        for transposed in (False, True):
            constants = {
                **{"ROWS": block.rows, "WIDTH": block.cols, "DEPTH": block.depth},
                **{"TRANSPOSED": transposed, "RESCALE": dtype == torch.float16, "UPCAST": False},
            }
            for some in (constants, constants | IN_ORDER):
                yield sinkhorn._products, dtype, some, how


def chosen(capability):
    """Of all of them: for sm_90 the largest tiles in bfloat16 and the products, else fewer; where
    there is less shared memory, what takes most of it, and the products of sm_120."""
    every = list(configurations(capability))
    if os.environ.get("COMPILE_ALL") == "1":
        return every
    kept = []
    for kernel, dtype, constants, how in every:
        gradient, cols = constants.get("GRADIENT"), constants.get("COLS")
        if capability in (86, 89, 120):
            keep = dtype != torch.float32 and "index_x" in constants and constants["ROWS"] == 128
            keep |= capability == 120 and kernel is sinkhorn._products and dtype == torch.float16
        elif kernel is sinkhorn._fused:
            tiles = sinkhorn.tiles_for(gradient, constants["LOG"], capability // 10)
            keep = (
                (dtype == torch.bfloat16 and cols == tiles[-1].cols)
                and (gradient == "unrolled" or (capability == 90 and gradient == "implicit"))
                and ("index_x" in constants) == (capability != 80)
            )
        else:
            keep = capability == 90 and not constants.get("TRANSPOSED") and "index_x" in constants
        if keep:
            kept.append((kernel, dtype, constants, how))
    return kept


@compiles
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles_without_spills(capability):
    from tests.kernels.compiled import SHARED_MEMORY, compile

    for kernel, dtype, constants, how in chosen(capability):
        tokens = dict.fromkeys(("x", "z", "right"), f"*{NAMES[dtype]}")
        types = {**TYPES, **tokens, "output": f"*{NAMES[backends.gradient_dtype(dtype)]}"}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {
            name: types.get(name, "i32") for name in kernel.arg_names if name not in constants
        }
        binary = compile(kernel, signature, constants, capability, *how)
        what = (kernel.fn.__name__, dtype, constants, binary.registers)
        assert binary.spills == 0, what
        assert binary.shared <= SHARED_MEMORY[capability], what
        if dtype != torch.float32:
            assert any(name in binary.ptx for name in ("mma.sync", "wgmma", "tcgen05")), what
