"""The OT loss on a GPU: similarity, small problems in one launch, the gradients' products.

The operation is that of csrc/sinkhorn.cpp, formulas there. A problem that a tile of `TILES` holds
is served by one program of `_fused`, from its tokens to dL/dS, with its matrices in registers:

    S = scale X Z^T -> p = softmax of the rows -> E = exp((p - 1) / epsilon) -> K iterations, with
    a stop of its own -> loss -> reverse iterations -> dS = weight dL/dS

The u and v of each iteration go to memory for the way back. That is one launch up to 64 x 128,
without a gradient up to 128 x 128 where 1/epsilon <= 64. Larger problems get S from `_similarity`
and dS, in its place, from a core (kernels/triton_streamed.py or cuda_sinkhorn.py): two launches
where the core makes one.
`_products` then makes dX = scale dS Z and dZ = scale dS^T X, each row by one program that sums over
the row's problems in their order: no atomics, the same input gives the same bits.

Which kernels run, and with which configuration, depends on bounds that the host knows: no value is
read from the device. All launches cover all problems; a program whose problem is another launch's
returns at once. TRITON_INTERPRET=1, set before the import, runs all of it on CPU tensors.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cot2align.kernels.backends import gradient_dtype

INTERPRETED: bool = triton.knobs.runtime.interpret

# 1/epsilon up to which products of E's, u's and v's entries fit in float32.
LARGEST_EXPONENT = 64.0

NEVER = tl.constexpr(-1e30)  # a logarithm of nothing that stays finite under addition


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    # The interpreter's bfloat16 has no arithmetic.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _places(index, first, tokens, count):
    """Where these of the text's `count` tokens stand."""
    places = first + tokens
    if index is not None:
        places = tl.load(index + places, mask=tokens < count, other=0)
    return places


@triton.jit
def _similarity_block(
    x, z, index_x, index_z, first_x, first_z, rows, cols, n, m, dim,
    DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """X Z^T of the problem's tokens `rows` and `cols`, [rows, cols] float32; 0 outside (n, m)."""
    depth = tl.arange(0, DEPTH)
    x_rows = x + _places(index_x, first_x, rows, n)[:, None] * dim + depth[None, :]
    z_rows = z + _places(index_z, first_z, cols, m)[:, None] * dim + depth[None, :]
    total = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for k in range(0, dim, DEPTH):
        inside = depth[None, :] < dim - k
        a = tl.load(x_rows + k, mask=(rows < n)[:, None] & inside, other=0.0)
        b = tl.load(z_rows + k, mask=(cols < m)[:, None] & inside, other=0.0)
        total = _dot(a, tl.trans(b), total, UPCAST)
    return total


@triton.jit
def _matrix(matrices, offsets, q):
    return matrices + tl.multiple_of(tl.load(offsets + q), 4)


@triton.jit
def _entries(matrix, rows, cols, n, m):
    """Addresses and mask of a matrix [n, m] whose rows begin every 16 bytes, padding included."""
    stride = (m + 3) // 4 * 4
    at = matrix + rows[:, None] * stride.to(tl.int64) + cols[None, :]
    return at, (rows < n)[:, None] & (cols < stride)[None, :]


@triton.jit
def _reload(matrix, offsets, q, rows, cols, n, m):
    """Entries that this program has stored; the barrier also keeps two loads from becoming one."""
    tl.debug_barrier()
    at, valid = _entries(_matrix(matrix, offsets, q), rows, cols, n, m)
    return tl.load(at, mask=valid, other=0.0)


@triton.jit
def _is_argmax(kept):
    return kept.to(tl.int32, bitcast=True) < 0


@triton.jit
def _cost(kept):
    """1 - p, which cancels at the row's argmax: there the cost itself is kept, sign bit set."""
    return tl.where(_is_argmax(kept), -kept, 1.0 - kept)


@triton.jit
def _exponential(C, row, col, epsilon, LOG: tl.constexpr):
    """E, positive everywhere; its logarithm where LOG, `NEVER` for what is not there."""
    E = C * (-1.0 / epsilon)
    return tl.where(row[:, None] & col[None, :], E, NEVER) if LOG else tl.exp(E)


@triton.jit
def _plan(E, u, v, LOG: tl.constexpr):
    if LOG:
        return tl.exp(E + u[:, None] + v[None, :])
    return u[:, None] * E * v[None, :]


@triton.jit
def _column_sums(E, u, v, LOG: tl.constexpr):
    """E^T u; on logarithms the plan's column sums."""
    if LOG:
        return tl.sum(_plan(E, u, v, LOG), 0)
    return tl.sum(E * u[:, None], 0)


@triton.jit
def _reverse(E, C, u, v, u_0, history, rows, cols, n, m, k, epsilon, LOG: tl.constexpr):
    """dL/dp through the iterations: back through k - 1 of them, then the first."""
    row, col = rows < n, cols < m
    stride = rows.shape[0] + cols.shape[0]
    u_at, v_at = history + rows, history + rows.shape[0] + cols
    T = _plan(E, u, v, LOG)
    mean = tl.where(row, tl.sum(T * C, 1) / tl.sum(T, 1), 0.0)
    gbar = tl.sum(T * (C - mean[:, None]), 0)
    # -epsilon dL/dp, over E where that is not a logarithm. First what depends on the last plan.
    total = (T if LOG else u[:, None] * v[None, :]) * (mean[:, None] - C + epsilon)
    tl.debug_barrier()  # the history was written by other threads
    if LOG:
        while k > 0:
            u = tl.load(u_at + (k - 2) * stride, mask=k > 1, other=0.0)
            T = _plan(E, u, v, LOG)
            T = T * tl.where(col, gbar / tl.sum(T, 0), 0.0)[None, :]
            total += T
            fbar = -tl.sum(T, 1)
            k -= 1
            if k > 0:
                v = tl.load(v_at + (k - 1) * stride)
                T = _plan(E, u, v, LOG)
                T = T * tl.where(row, fbar / tl.sum(T, 1), 0.0)[:, None]
                total += T
                gbar = -tl.sum(T, 0)
        return total / -epsilon
    y = gbar * v * m
    while k > 1:
        k -= 1
        u, v = tl.load(u_at + (k - 1) * stride), tl.load(v_at + (k - 1) * stride)
        total += u[:, None] * y[None, :]
        x = -u * tl.sum(E * y[None, :], 1) * u * n
        total += x[:, None] * v[None, :]
        y = -v * tl.sum(E * x[:, None], 0) * v * m
    total += u_0[:, None] * y[None, :]
    return E * total / -epsilon


@triton.jit
def _fixed_point(T, C, limit):
    """z of [diag(r) T; T^T diag(c)] [z; w] = [W 1; W^T 1], r and c the sums of the plan.

    Conjugate gradients on what is left for r^1/2 z, (I - B B^T) with B = T / (r c)^1/2: singular
    for constant z, and nearly so wherever the plan falls into blocks, hence double. Vectors of the
    rows, since a tile has fewer rows than columns: they take registers too.
    """
    T = T.to(tl.float64)
    r, c = tl.sum(T, 1), tl.sum(T, 0)
    mean = tl.where(c > 0, tl.sum(T * C, 0) / c, 0.0)
    residual = tl.sum(T * (C - mean[None, :]), 1)
    # Rounding's component along the constants must not reach the iteration.
    residual -= tl.sum(residual, 0) / tl.sum(r, 0) * r
    by_row = tl.where(r > 0, 1 / tl.sqrt(r), 0.0)
    B = T * by_row[:, None] * tl.where(c > 0, 1 / tl.sqrt(c), 0.0)[None, :]
    residual *= by_row
    norm = tl.sum(residual * residual, 0)
    enough = 1e-24 * norm
    direction = residual
    z = residual * 0.0
    while (limit > 0) & (norm > enough):
        product = tl.sum(B * direction[:, None], 0)
        product = direction - tl.sum(B * product[None, :], 1)
        curvature = tl.sum(direction * product, 0)
        step = tl.where(curvature > 0, norm / curvature, 0.0)
        z += step * direction
        residual -= step * product
        before = norm
        norm = tl.where(curvature > 0, tl.sum(residual * residual, 0), 0.0)
        direction = residual + norm / before * direction
        limit -= 1
    return z * by_row


@triton.jit(do_not_specialize=["num_iters", "floor_n", "floor_m"])
def _fused(
    x,  # [tokens_x, dim]
    z,  # [tokens_z, dim]
    index_x,  # int64: where each of the texts' tokens stands in x; None: in their order
    index_z,
    firsts,  # int64 [Q, 2]: the problem's first tokens
    shapes,  # int32 [Q, 2]: n, m
    offsets,  # int64 [Q]
    order,  # int32 [Q]
    weights,  # [Q]
    gradient,  # dS of problem q at offsets[q], rows of m rounded up to 4
    history,  # [Q, num_iters, ROWS + COLS]: u, v after each iteration
    loss,
    iterations,
    marginal_error,
    dim,
    scale,
    epsilon,
    num_iters,
    tol,  # < 0: never stop
    floor_n,
    floor_m,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOG: tl.constexpr,  # u, v and E are logarithms
    GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    q = tl.load(order + tl.program_id(0)).to(tl.int64)
    n, m = tl.load(shapes + 2 * q), tl.load(shapes + 2 * q + 1)
    if (n == 0) | (m == 0) | (n > ROWS) | (m > COLS) | ((n <= floor_n) & (m <= floor_m)):
        return
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    row, col = rows < n, cols < m
    first_x, first_z = tl.load(firsts + 2 * q), tl.load(firsts + 2 * q + 1)

    S = _similarity_block(
        x, z, index_x, index_z, first_x, first_z, rows, cols, n, m, dim, DEPTH, UPCAST
    )
    # A branch: a layout pass for Blackwell (Triton 3.7) follows a product's users up to the next
    # branch, and fails at a sum of a sum.
    if scale != 1.0:
        S *= scale
    broken = tl.sum(S * 0.0, 1)  # NaN where an entry is not finite, for the maximum passes over it
    S = tl.where(col[None, :], S, float("-inf"))
    top, argmax = tl.max(S, 1, return_indices=True)
    at_argmax = cols[None, :] == argmax[:, None]
    p = tl.exp(S - (top + broken)[:, None])
    rest = tl.sum(tl.where(at_argmax, 0.0, p), 1)
    # Times -1, since Triton's minus gives no negative zero.
    kept = tl.where(at_argmax, (rest * -1.0)[:, None], p) / (1.0 + rest)[:, None]
    if GRADIENT == "implicit":
        # Through memory, here and before each further use: a thread holds fewer columns of what it
        # loads than of a product, and p leaves its registers to the doubles.
        at, valid = _entries(_matrix(gradient, offsets, q), rows, cols, n, m)
        tl.store(at, kept, mask=valid)
        kept = _reload(gradient, offsets, q, rows, cols, n, m)
    E = _exponential(_cost(kept), row, col, epsilon, LOG)

    a, b = 1.0 / n.to(tl.float32), 1.0 / m.to(tl.float32)
    if LOG:
        # The first iteration needs the largest exponents. After it no sum of the plan is below
        # a * b, and an iteration adds to f and g what its own sums lack.
        largest = tl.max(E, 0)
        v = tl.log(b / tl.sum(tl.exp(E - largest[None, :]), 0)) - largest
        v = tl.where(col, v, 0.0)
        largest = tl.max(E + v[None, :], 1)
        u = tl.log(a / tl.sum(tl.exp(E + v[None, :] - largest[:, None]), 1)) - largest
        u = tl.where(row, u, 0.0)
        u_0 = tl.zeros([ROWS], tl.float32)
        sums = tl.where(col, b, 1.0)
    else:
        u = row.to(tl.float32)
        v = col.to(tl.float32)
        u_0 = u
        sums = _column_sums(E, u, v, LOG)

    history += q * num_iters * (ROWS + COLS)
    k = 0
    error = float("inf")
    while (k < num_iters) & ((error <= tol) == 0):
        if LOG:
            v = tl.where(col, v + tl.log(b / sums), 0.0)
            u = tl.where(row, u + tl.log(a / tl.sum(_plan(E, u, v, LOG), 1)), 0.0)
        else:
            v = tl.where(col, b / sums, 0.0)
            u = tl.where(row, a / tl.sum(E * v[None, :], 1), 0.0)
        if GRADIENT == "unrolled":
            tl.store(history + k * (ROWS + COLS) + rows, u)
            tl.store(history + k * (ROWS + COLS) + ROWS + cols, v)
        sums = _column_sums(E, u, v, LOG)
        masses = sums if LOG else sums * v
        error = tl.sum(tl.where(col, tl.abs(masses - b), 0.0), 0)
        k += 1

    if GRADIENT == "implicit":
        kept = _reload(gradient, offsets, q, rows, cols, n, m)
        E = _exponential(_cost(kept), row, col, epsilon, LOG)
    T = _plan(E, u, v, LOG)
    C = _cost(kept)
    tl.store(loss + q, tl.sum(tl.sum(T * C, 1), 0))
    tl.store(iterations + q, k)
    tl.store(marginal_error + q, error)
    if GRADIENT != "none":
        if GRADIENT == "unrolled":
            slope = _reverse(E, C, u, v, u_0, history, rows, cols, n, m, k, epsilon, LOG)
        elif GRADIENT == "implicit":
            z = _fixed_point(T, C, 2 * n + 50)
            kept = _reload(gradient, offsets, q, rows, cols, n, m)
            C = _cost(kept)
            T = _plan(_exponential(C, row, col, epsilon, LOG), u, v, LOG).to(tl.float64)
            free = C - z[:, None]
            w = tl.where(col, tl.sum(T * free, 0) / tl.sum(T, 0), 0.0)
            slope = (T * ((free - w[None, :]) / epsilon - 1.0)).to(tl.float32)
        else:
            slope = -T
        # Relative to the argmax, whose own p is all but 1 where the softmax saturates.
        at_argmax = _is_argmax(kept)
        slope -= tl.sum(tl.where(at_argmax, slope, 0.0), 1)[:, None]
        p = tl.where(at_argmax, 1.0 + kept, kept)
        slope -= tl.sum(p * slope, 1)[:, None]
        at, valid = _entries(_matrix(gradient, offsets, q), rows, cols, n, m)
        tl.store(at, tl.load(weights + q) * p * slope, mask=valid)


@triton.jit(do_not_specialize=["floor_n", "floor_m", "tiles_n", "tiles_m"])
def _similarity(
    x,
    z,
    index_x,
    index_z,
    firsts,
    shapes,
    offsets,
    order,
    similarity,  # S of problem q at offsets[q], rows of m rounded up to 4
    dim,
    scale,
    floor_n,
    floor_m,
    tiles_n,
    tiles_m,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    q = tl.load(order + program // (tiles_n * tiles_m)).to(tl.int64)
    n, m = tl.load(shapes + 2 * q), tl.load(shapes + 2 * q + 1)
    first_row = program // tiles_m % tiles_n * ROWS
    first_col = program % tiles_m * COLS
    if (first_row >= n) | (first_col >= m) | ((n <= floor_n) & (m <= floor_m)):
        return
    rows, cols = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    first_x, first_z = tl.load(firsts + 2 * q), tl.load(firsts + 2 * q + 1)
    S = _similarity_block(
        x, z, index_x, index_z, first_x, first_z, rows, cols, n, m, dim, DEPTH, UPCAST
    )
    at, valid = _entries(_matrix(similarity, offsets, q), rows, cols, n, m)
    tl.store(at, scale * S, mask=valid)


@triton.jit(do_not_specialize=["tiles", "widths"])
def _products(
    gradient,  # dS of problem q at offsets[q], rows of m rounded up to 4
    right,  # [tokens, dim]: z where the output is dx, x where it is dz
    output,  # [tokens, dim]
    index_right,
    index_output,
    segments,  # int64 [segments, 2] of the output: first token, number of tokens
    starts,  # int64 [segments + 1]: where the segment's problems begin in `problems`
    problems,  # int64 [Q], by segment
    firsts,
    shapes,
    offsets,
    dim,
    scale,
    tiles,  # of a segment
    widths,  # tiles of dim
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # dS^T, for dz
    RESCALE: tl.constexpr,  # dS leaves the range of float16
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    segment = (program // (tiles * widths)).to(tl.int64)
    first, count = tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)
    rows = program // widths % tiles * ROWS + tl.arange(0, ROWS)
    width = program % widths * WIDTH + tl.arange(0, WIDTH)
    if program // widths % tiles * ROWS >= count:
        return
    depth = tl.arange(0, DEPTH)
    side = 0 if TRANSPOSED else 1
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(tl.load(starts + segment), tl.load(starts + segment + 1)):
        q = tl.load(problems + i)
        n, m = tl.load(shapes + 2 * q), tl.load(shapes + 2 * q + 1)
        limit, inner = (m, n) if TRANSPOSED else (n, m)
        dS = _matrix(gradient, offsets, q)
        first_right = tl.load(firsts + 2 * q + side)
        for k in range(0, inner, DEPTH):
            at = k + depth
            if TRANSPOSED:
                block, inside = _entries(dS, at, rows, n, m)
                block, inside = tl.trans(block), tl.trans(inside)
            else:
                block, inside = _entries(dS, rows, at, n, m)
            a = tl.load(block, mask=inside, other=0.0)
            a = tl.where((rows < limit)[:, None] & (at < inner)[None, :], a, 0.0)
            at_right = _places(index_right, first_right, at, inner)
            b = tl.load(
                right + at_right[:, None] * dim + width[None, :],
                mask=(at < inner)[:, None] & (width < dim)[None, :],
                other=0.0,
            )
            if RESCALE:
                largest = tl.maximum(tl.max(tl.max(tl.abs(a), 1), 0), 1e-30)
                power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(
                    tl.float32, bitcast=True
                )
                product = tl.zeros([ROWS, WIDTH], tl.float32)
                a = (a * (1.0 / power)).to(b.dtype)
                total += power * _dot(a, b, product, UPCAST)
            else:
                total = _dot(a.to(b.dtype), b, total, UPCAST)
    to = output + _places(index_output, first, rows, count)[:, None] * dim + width[None, :]
    mask = (rows < count)[:, None] & (width < dim)[None, :]
    tl.store(to, (scale * total).to(output.dtype.element_ty), mask=mask)


# ---- configurations: fixed, so that the same input gives the same bits


def registers(warps: int) -> int:
    """Of a thread, at most. Without a limit ptxas spills some to fit two programs at once."""
    return min(255, 65536 // (32 * warps))


class Tile(NamedTuple):
    """Problems of at most `rows` x `cols` in one program of `warps`."""

    rows: int
    cols: int
    warps: int


class Block(NamedTuple):
    """A block of a matrix product and the steps of its inner loop."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# As large as the registers allow without spills (tests/kernels/test_triton.py).
TILES = (Tile(32, 32, 2), Tile(64, 64, 8), Tile(64, 128, 16))


def tiles_for(gradient: str, logarithmic: bool, capability: int) -> tuple[Tile, ...]:
    """The tiles of `_fused`, each within the next, on a GPU of this major capability."""
    if gradient == "none" and not logarithmic:
        return (*TILES, Tile(128, 128, 8 if capability == 9 else 16))
    if gradient == "implicit":  # doubles need more registers in fewer threads
        return (*TILES[:2], TILES[2]._replace(warps=8))
    return TILES


STAGES = 3
DEPTH = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
SIMILARITY = {
    torch.float32: Block(64, 64, 16, 4, 3),
    torch.float16: Block(128, 128, 32, 8, 3),
    torch.bfloat16: Block(128, 128, 32, 8, 3),
}
PRODUCTS = {
    torch.float32: Block(64, 64, 16, 4, 3),
    torch.float16: Block(64, 128, 32, 4, 3),
    torch.bfloat16: Block(64, 128, 32, 4, 3),
}


def products_for(dtype: torch.dtype, capability: int) -> Block:
    """The blocks of `_products` on a GPU of this major capability."""
    block = PRODUCTS[dtype]
    return block._replace(warps=8) if capability >= 12 else block  # where 4 warps spill


CORES = {"triton": "triton_streamed", "cuda": "cuda_sinkhorn"}

launches: Counter[str] = Counter()  # by kernel, since the import


def _launch(kernel: Any, programs: int, *arguments: Any, **configuration: Any) -> None:
    if programs > 0:
        launches[kernel.fn.__name__] += 1
        kernel[(programs,)](*arguments, **configuration)


def ot_loss(
    x: Tensor,  # [tokens_x, dim] float32, float16 or bfloat16
    z: Tensor,  # [tokens_z, dim] of x's dtype
    index_x: Tensor | None,  # [tokens_x] int64, a permutation: where the texts' tokens stand in x
    index_z: Tensor | None,  # None: in their order
    segments_x: Tensor,  # [segments, 2] int64: first token, number of tokens
    segments_z: Tensor,
    pairs: Tensor,  # [problems, 2] int64
    weights: Tensor,  # [problems] float32
    *,
    bounds: tuple[int, int],
    entries: int | None = None,
    uniform: bool = False,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
    gradient: str,  # "none" | "unrolled" | "implicit" | "detached"
    need_x: bool = False,
    need_z: bool = False,
    core: str = "triton",
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, num_iters, marginal_error [problems]; the gradients of sum(weights * loss) for x
    and z, in their `gradient_dtype`, else [0].

    bounds: numbers of student and teacher tokens that no problem exceeds; one that does gets loss
        NaN and no gradient.
    entries: the sum of n * (m rounded up to a multiple of 4), where the host knows it.
    uniform: all problems are as large as the bounds.
    core: who solves what no tile holds, "triton" or "cuda".
    fused: False leaves all problems to the core.

    Raises ValueError for tensors that do not fit together, and what the core raises.
    """
    tensors = {"x": x, "z": z, "pairs": pairs, "weights": weights}
    for name, index in (("index_x", index_x), ("index_z", index_z)):
        if index is not None:
            tensors[name] = index
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(f"{name} must be contiguous on {x.device}, is on {tensor.device}")
    if x.dtype not in DEPTH or z.dtype != x.dtype:
        raise ValueError(f"x and z must have one dtype of 16 or 32 bits, got {x.dtype}, {z.dtype}")
    if weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32, got {weights.dtype}")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError("Triton's kernels take CPU tensors only under TRITON_INTERPRET=1")
    if not (need_x or need_z):
        gradient = "none"
    count, dim = len(pairs), x.shape[1]
    max_n, max_m = bounds

    (first_x, n), (first_z, m) = segments_x[pairs[:, 0]].T, segments_z[pairs[:, 1]].T
    exceeds = (n > max_n) | (m > max_m)
    loss = weights.new_zeros(count).masked_fill(exceeds, torch.nan)
    iterations, marginal_error = torch.zeros_like(loss, dtype=torch.int32), torch.zeros_like(loss)
    firsts = torch.stack((first_x, first_z), 1)
    shapes = torch.stack((n, m), 1).masked_fill(exceeds[:, None], 0).int()
    sizes = shapes[:, 0].long() * _padded(shapes[:, 1])
    offsets = sizes.cumsum(0) - sizes
    order = sizes.argsort(descending=True, stable=True).int()

    logarithmic = 1 / epsilon > LARGEST_EXPONENT
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    tiles = tiles_for(gradient, logarithmic, capability) if fused else ()
    fitting = [i for i, tile in enumerate(tiles) if max_n <= tile.rows and max_m <= tile.cols]
    launched = tiles[: fitting[0] + 1] if fitting else tiles
    if uniform:
        launched = launched[-1:] if fitting else ()
    if entries is None:
        entries = count * max_n * _padded(max_m)
    matrix = loss.new_empty(0 if fitting and gradient == "none" else entries)
    steps = count * num_iters if gradient == "unrolled" else 0
    history = loss.new_empty(steps * max((t.rows + t.cols for t in launched), default=0))
    upcast = INTERPRETED and x.dtype == torch.bfloat16
    outputs = (loss, iterations, marginal_error)
    with torch.cuda.device_of(x):
        floor = Tile(0, 0, 0)
        for tile in launched:
            _launch(
                _fused,
                count,
                *(x, z, index_x, index_z, firsts, shapes, offsets, order),
                *(weights, matrix, history, *outputs),
                *(dim, scale, epsilon, num_iters, tol or -1.0, floor.rows, floor.cols),
                ROWS=tile.rows,
                COLS=tile.cols,
                DEPTH=DEPTH[x.dtype],
                LOG=logarithmic,
                GRADIENT=gradient,
                UPCAST=upcast,
                num_warps=tile.warps,
                num_stages=STAGES,
                maxnreg=registers(tile.warps),
            )
            floor = tile
        if not fitting:
            block = SIMILARITY[x.dtype]
            tiles_n, tiles_m = triton.cdiv(max_n, block.rows), triton.cdiv(max_m, block.cols)
            _launch(
                _similarity,
                count * tiles_n * tiles_m,
                *(x, z, index_x, index_z, firsts, shapes, offsets, order, matrix),
                *(dim, scale, floor.rows, floor.cols, tiles_n, tiles_m),
                ROWS=block.rows,
                COLS=block.cols,
                DEPTH=block.depth,
                UPCAST=upcast,
                num_warps=block.warps,
                num_stages=block.stages,
                maxnreg=registers(block.warps),
            )
            importlib.import_module(f"cot2align.kernels.{CORES[core]}").solve(
                *(matrix, shapes, offsets, order, weights),
                bounds=bounds,
                floor=(floor.rows, floor.cols),
                epsilon=epsilon,
                num_iters=num_iters,
                tol=tol,
                gradient=gradient,
                loss=loss,
                iterations=iterations,
                marginal_error=marginal_error,
            )
        problems = (firsts, shapes, offsets)
        dx = dz = x.new_empty(0, dtype=gradient_dtype(x.dtype))
        if gradient != "none" and need_x:
            sides = (z, x, index_z, index_x)
            dx = _product(
                *(matrix, *sides, segments_x, pairs[:, 0], problems),
                *(max_n, scale, False, capability),
            )
        if gradient != "none" and need_z:
            sides = (x, z, index_x, index_z)
            dz = _product(
                *(matrix, *sides, segments_z, pairs[:, 1], problems),
                *(max_m, scale, True, capability),
            )
    return loss, iterations, marginal_error, dx, dz


def _padded(columns: Any) -> Any:
    """The stride of a matrix: rows of 16 bytes."""
    return (columns + 3) // 4 * 4


def _product(
    gradient: Tensor,
    right: Tensor,
    like: Tensor,
    index_right: Tensor | None,
    index_like: Tensor | None,
    segments: Tensor,
    segment_of: Tensor,  # [problems]
    problems: tuple[Tensor, Tensor, Tensor],
    longest: int,
    scale: float,
    transposed: bool,
    capability: int,
) -> Tensor:
    """The gradient of the tokens `like`; 0 for those of no problem."""
    output = torch.zeros_like(like, dtype=gradient_dtype(like.dtype))
    by_segment = segment_of.argsort(stable=True)
    bins = torch.arange(len(segments) + 1, device=like.device)
    starts = torch.searchsorted(segment_of[by_segment], bins)
    block, dim = products_for(like.dtype, capability), like.shape[1]
    tiles, widths = triton.cdiv(longest, block.rows), triton.cdiv(dim, block.cols)
    _launch(
        _products,
        len(segments) * tiles * widths,
        *(gradient, right, output, index_right, index_like),
        *(segments, starts, by_segment, *problems),
        *(dim, scale, tiles, widths),
        ROWS=block.rows,
        WIDTH=block.cols,
        DEPTH=block.depth,
        TRANSPOSED=transposed,
        RESCALE=like.dtype == torch.float16,
        UPCAST=INTERPRETED and like.dtype == torch.bfloat16,
        num_warps=block.warps,
        num_stages=block.stages,
        maxnreg=registers(block.warps),
    )
    return output
