"""The OT loss and its gradient from S, for problems of any number of rows, streamed from memory.

For a problem with N rows and M columns (p = softmax of S's rows, C = 1 - p, A = -C / epsilon),
column potentials g first, row potentials f second, k = 1..K:

    g_k = log(1/M) - LSE_i(A + f_{k-1})        f_k = log(1/N) - LSE_j(A + g_k)         f_0 = 0
    T'_k = exp(A + f_{k-1} + g_k)              T_k = exp(A + f_k + g_k)                L = <T_K, C>

and backwards, with every plan divided by its own column (T') or row (T) sums:

    gbar_K = column sums of T_K * (C - rowmean),    rowmean = row means of C under T_K
    y_k = gbar_k / colsum(T'_k)
    x_{k-1} = T'_k y_k / rowsum(T_{k-1})            gbar_{k-1} = T_{k-1}^T x_{k-1}
    dL/dA = T_K * (C - rowmean) - sum_k T'_k * y_k + sum_{k<K} T_k * x_k
    dL/dp = -T_K + dL/dA / epsilon             dS = p * (dL/dp - rowsum(p * dL/dp))

S is replaced by p once and then only read: a program holds whole rows in registers, so that one
read gives a row its new potential and its part of the next column sums. Vectors and their history,
2 K (N + M) floats (M rounded up to a tile), are the only other memory. Two regimes (LOG): while
1/epsilon <= 64 the potentials are kept as u = exp(f), v = exp(g); above, they are logarithms, a
row's sum is taken relative to its largest entry, and a column's potential is corrected by the
column sums of the last plan, which lie between 1/(N M) and 1.

Rows wider than any tile are read in blocks of columns, and twice for what is once here: first for
the row's sums, then for its part of the columns'. Always on logarithms.

Small problems are solved side by side in one launch, a program each; many larger ones with a launch
for all iterations; few large ones by many programs each, with two launches an iteration. Sums over
programs are taken in a fixed order and nothing is read by the host.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

launches: Counter[str] = Counter()  # by kernel


@triton.jit
def _problem(shapes, order, small_n, small_m):
    """This program's problem: index, rows, columns; whether it is solved here."""
    q = tl.load(order + tl.program_id(0)).to(tl.int64)
    n = tl.load(shapes + 2 * q)
    m = tl.load(shapes + 2 * q + 1)
    here = (n > 0) & (m > 0) & ((n > small_n) | (m > small_m))
    return q, n, m, here


@triton.jit
def _matrix(similarity, offsets, q):
    return similarity + tl.multiple_of(tl.load(offsets + q), 4)


@triton.jit
def _entries(matrix, first, j, end, m, R: tl.constexpr):
    """R rows from `first` on: indices, addresses, mask, which spares the padding to 16 bytes."""
    stride = (m + 3) // 4 * 4
    block = tl.arange(0, R)
    at = matrix + stride.to(tl.int64) * first + (block[:, None] * stride + j[None, :])
    return first + block, at, (first + block < end)[:, None] & (j < stride)[None, :]


@triton.jit
def _cost(kept):
    """C from p, whose entry at a row's argmax is kept as its cost, sign bit set: 1 - p cancels."""
    return tl.where(kept.to(tl.int32, bitcast=True) < 0, -kept, 1 - kept)


@triton.jit
def _plan(cost, row, col, sharpness, LOG: tl.constexpr):
    return (
        tl.exp(row[:, None] + col[None, :] - sharpness * cost)
        if LOG
        else tl.exp(-sharpness * cost) * (row[:, None] * col[None, :])
    )


@triton.jit
def _scale(potential, factor, LOG: tl.constexpr):
    return potential + tl.log(factor) if LOG else potential * factor


@triton.jit
def _nothing(LOG: tl.constexpr):
    """The potential of a row or column that is not there."""
    return float("-inf") if LOG else 0.0


@triton.jit
def _load_parts(partial, first, parts, j, nothing, COLS: tl.constexpr, PARTS: tl.constexpr):
    part = first + tl.arange(0, PARTS)
    at = partial + part[:, None] * COLS + j[None, :]
    return tl.load(at, mask=(part < parts)[:, None], other=nothing)


@triton.jit
def _sum_parts(partial, parts, j, COLS: tl.constexpr, PARTS: tl.constexpr):
    """Column sums of [parts, COLS]."""
    total = tl.zeros([PARTS, j.shape[0]], tl.float32)
    for first in range(0, parts, PARTS):
        total += _load_parts(partial, first, parts, j, 0.0, COLS, PARTS)
    return tl.sum(total, 0)


@triton.jit
def _first_col(
    partial, parts, j, m, COLS: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """g_1 from the parts' column sums of E, in logarithms where LOG."""
    if LOG:
        tops = tl.full([PARTS, j.shape[0]], float("-inf"), tl.float32)
        for first in range(0, parts, PARTS):
            part = _load_parts(partial, first, parts, j, float("-inf"), COLS, PARTS)
            tops = tl.maximum(tops, part)
        top = tl.max(tops, 0)
        sums = tl.zeros([PARTS, j.shape[0]], tl.float32)
        for first in range(0, parts, PARTS):
            part = _load_parts(partial, first, parts, j, float("-inf"), COLS, PARTS)
            sums += tl.exp(part - top[None, :])
        col = -top - tl.log(m * tl.sum(sums, 0))
    else:
        col = 1 / (m * _sum_parts(partial, parts, j, COLS, PARTS))
    return tl.where(j < m, col, _nothing(LOG))


@triton.jit
def _next_col(col, total, j, m, LOG: tl.constexpr):
    """(g_{k+1}, column error) from g_k and the plan's column sums."""
    b = 1.0 / m
    error = tl.sum(tl.where(j < m, tl.abs(total - b), 0), 0)
    return tl.where(j < m, _scale(col, b / total, LOG), _nothing(LOG)), error


@triton.jit
def _sweep(
    matrix, rows, col, begin, end, n, m, j, sharpness,
    R: tl.constexpr, LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes f_k of the rows [begin, end) from g_k, returns their part of T_k's column sums."""
    total = tl.zeros([R, j.shape[0]], tl.float32)
    for first in tl.range(begin, end, R, num_stages=STAGES):
        i, at, mask = _entries(matrix, first, j, end, m, R)
        cost = _cost(tl.load(at, mask=mask, other=0))
        row = -tl.max(col[None, :] - sharpness * cost, 1) if LOG else tl.full([R], 1, tl.float32)
        plan = _plan(cost, row, col, sharpness, LOG)
        factor = 1 / (n * tl.sum(plan, 1))
        tl.store(rows + i, _scale(row, factor, LOG), mask=i < end)
        total += plan * tl.where(i < end, factor, 0)[:, None]
    return tl.sum(total, 0)


@triton.jit
def _reverse_sweep(
    matrix, row_now, row_before, x, col, col_before, y, begin, end, m, j, sharpness,
    R: tl.constexpr, LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From y_k writes x_{k-1} of the rows [begin, end), returns their parts of gbar_{k-1} and,
    where LOG, of the column sums of T'_{k-1}: there the potentials' rounding moves them from 1/M.

    row_now: f_{k-1}, row_before: f_{k-2}, col: g_k, col_before: g_{k-1}.
    """
    gbar = tl.zeros([R, j.shape[0]], tl.float32)
    masses = tl.zeros([R, j.shape[0]], tl.float32)
    for first in tl.range(begin, end, R, num_stages=STAGES):
        i, at, mask = _entries(matrix, first, j, end, m, R)
        cost = _cost(tl.load(at, mask=mask, other=0))
        row = tl.load(row_now + i, mask=i < end, other=_nothing(LOG))
        dot = tl.sum(_plan(cost, row, col, sharpness, LOG) * y[None, :], 1)
        plan = _plan(cost, row, col_before, sharpness, LOG)
        x_now = tl.where(i < end, dot / tl.sum(plan, 1), 0)
        tl.store(x + i, x_now, mask=i < end)
        gbar += plan * x_now[:, None]
        if LOG:
            before = tl.load(row_before + i, mask=i < end, other=_nothing(LOG))
            masses += _plan(cost, before, col_before, sharpness, LOG)
    return tl.sum(gbar, 0), tl.sum(masses, 0)


@triton.jit
def _adjoint_col(gbar, masses, j, m, LOG: tl.constexpr):
    """y_k."""
    return tl.where(j < m, gbar / masses if LOG else gbar * m, 0)


# ---- launches over blocks of `chunk` rows of all problems: grid (problems, parts)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _softmax_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, partial, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """S -> p; f_0; each part's column sums of E (their logarithms where LOG)."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    if begin == 0:
        tl.store(iterations + q, 0)
    matrix = _matrix(similarity, offsets, q)
    j = tl.arange(0, COLS)
    total = tl.zeros([R, COLS], tl.float32)
    top = tl.full([R, COLS], float("-inf"), tl.float32)
    for first in range(begin, end, R):
        i, at, mask = _entries(matrix, first, j, end, m, R)
        s = tl.where((j < m)[None, :], tl.load(at, mask=mask, other=0), float("-inf"))
        largest = tl.max(s, 1)[:, None]
        first_largest = tl.min(tl.where(s == largest, j[None, :], COLS), 1)
        at_argmax = j[None, :] == first_largest[:, None]
        exponential = tl.where(at_argmax, 0, tl.exp(s - largest))
        # Infinity minus itself: NaN or infinity anywhere makes the row NaN.
        finite = tl.where((j < m)[None, :], s - s, 0)
        rest = tl.sum(exponential + finite, 1)[:, None]
        # A product, since unary minus would make rest = 0 a positive zero.
        kept = tl.where(at_argmax, rest * (-1 / (1 + rest)), exponential * (1 / (1 + rest)))
        tl.store(at, kept, mask=mask)
        tl.store(
            rows + q * slots * width_n + i, tl.full([R], 0 if LOG else 1, tl.float32), mask=i < end
        )
        exponent = -sharpness * _cost(kept)
        if LOG:
            top = tl.maximum(top, tl.where((i < end)[:, None], exponent, float("-inf")))
        else:
            total += tl.where((i < end)[:, None], tl.exp(exponent), 0)
    sums = tl.sum(total, 0)
    if LOG:
        col_top = tl.max(top, 0)
        tl.debug_barrier()  # p is read back by other threads
        for first in range(begin, end, R):
            i, at, mask = _entries(matrix, first, j, end, m, R)
            exponent = -sharpness * _cost(tl.load(at, mask=mask, other=0)) - col_top[None, :]
            total += tl.where((i < end)[:, None], tl.exp(exponent), 0)
        sums = col_top + tl.log(tl.sum(total, 0))
    part = q * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + part * COLS + j, sums)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _finish_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, partial, masses, losses, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Each part's share of the loss; for "unrolled" of gbar_K and, where LOG, of the column sums of
    T'_K; for "implicit" of those of T_K.
    """
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    matrix = _matrix(similarity, offsets, q)
    j = tl.arange(0, COLS)
    last = tl.load(iterations + q) % slots
    rows += (q * slots + last) * width_n
    col = tl.load(cols + (q * slots + last) * COLS + j)
    loss = tl.zeros([R], tl.float32)
    gbar = tl.zeros([R, COLS], tl.float32)
    mass = tl.zeros([R, COLS], tl.float32)
    for first in range(begin, end, R):
        i, at, mask = _entries(matrix, first, j, end, m, R)
        cost = _cost(tl.load(at, mask=mask, other=0))
        row = tl.load(rows + i, mask=i < end, other=_nothing(LOG))
        plan = _plan(cost, row, col, sharpness, LOG)
        total = tl.where(i < end, tl.sum(plan, 1), 1)
        mean = tl.sum(plan * cost, 1) / total
        loss += tl.where(i < end, mean, 0)
        if GRADIENT == "unrolled":
            factor = tl.where(i < end, 1 / (n * total), 0)
            gbar += plan * factor[:, None] * (cost - mean[:, None])
            if LOG:
                before = tl.load(rows - width_n + i, mask=i < end, other=_nothing(LOG))
                mass += _plan(cost, before, col, sharpness, LOG)
        elif GRADIENT == "implicit":
            mass += plan
    part = q * tl.num_programs(1) + tl.program_id(1)
    tl.store(losses + part, tl.sum(loss, 0) / n)
    if GRADIENT == "unrolled":
        tl.store(partial + part * COLS + j, tl.sum(gbar, 0))
    if GRADIENT == "unrolled" or GRADIENT == "implicit":
        tl.store(masses + part * COLS + j, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk"])
def _loss_kernel(
    shapes, order, small_n, small_m, chunk, max_parts, losses, loss,
    PARTS: tl.constexpr,
):  # fmt: skip
    q, n, _, here = _problem(shapes, order, small_n, small_m)
    if not here:
        return
    total = _sum_parts(losses + q * max_parts, tl.cdiv(n, chunk), tl.arange(0, 1), 1, PARTS)
    tl.store(loss + q + tl.arange(0, 1), total)


@triton.jit
def _add_history(
    bend, cost, col, rows, cols, x, y, i, j, end, last, width_n, sharpness,
    COLS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """bend + sum_{k<K} T_k * x_k - sum_k T'_k * y_k, from g_K."""
    sums = tl.zeros(cost.shape, tl.float32)
    for step in range(last):
        k = last - step
        y_now = tl.load(y + k * COLS + j)
        row = tl.load(rows + (k - 1) * width_n + i, mask=i < end, other=_nothing(LOG))
        if LOG:
            bend -= _plan(cost, row, col, sharpness, LOG) * y_now[None, :]
        else:
            sums -= row[:, None] * (col * y_now)[None, :]
        if k > 1:
            col = tl.load(cols + (k - 1) * COLS + j)
            x_now = tl.load(x + (k - 1) * width_n + i, mask=i < end, other=0)
            if LOG:
                bend += _plan(cost, row, col, sharpness, LOG) * x_now[:, None]
            else:
                sums += (row * x_now)[:, None] * col[None, :]
    return bend if LOG else bend + tl.exp(-sharpness * cost) * sums


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _gradient_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, x, y, w, weights, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """p -> weight * dL/dS."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    matrix = _matrix(similarity, offsets, q)
    j = tl.arange(0, COLS)
    weight = tl.load(weights + q)
    last = (tl.load(iterations + q) % slots).to(tl.int64)
    rows += q * slots * width_n
    cols += q * slots * COLS
    if GRADIENT == "unrolled":
        x += q * slots * width_n
        y += q * slots * COLS
    for first in range(begin, end, R):
        i, at, mask = _entries(matrix, first, j, end, m, R)
        kept = tl.load(at, mask=mask, other=0)
        cost = _cost(kept)
        row = tl.load(rows + last * width_n + i, mask=i < end, other=_nothing(LOG))
        col = tl.load(cols + last * COLS + j)
        plan = _plan(cost, row, col, sharpness, LOG)
        total = tl.where(i < end, tl.sum(plan, 1), 1)
        plan *= (1 / (n * total))[:, None]
        slope = -plan
        if GRADIENT == "implicit":
            # dL/dA = T * (C - z - w), z = row means of C - w; in double, since the sum cancels.
            free = cost.to(tl.float64) - tl.load(w + q * COLS + j)[None, :]
            plan64 = plan.to(tl.float64)
            z = tl.sum(plan64 * free, 1) / tl.where(i < end, tl.sum(plan64, 1), 1)
            slope += sharpness * (plan64 * (free - z[:, None])).to(tl.float32)
        if GRADIENT == "unrolled":
            mean = tl.sum(plan * cost, 1) * n
            bend = plan * (cost - mean[:, None])
            bend = _add_history(
                bend, cost, col, rows, cols, x, y, i, j, end, last, width_n, sharpness, COLS, LOG
            )  # fmt: skip
            slope += sharpness * bend
        # The softmax backward, relative to the argmax, whose p is all but 1 where it saturates.
        at_argmax = kept.to(tl.int32, bitcast=True) < 0
        slope -= tl.sum(tl.where(at_argmax, slope, 0), 1)[:, None]
        p = tl.where(at_argmax, 1 + kept, kept)
        slope -= tl.sum(p * slope, 1)[:, None]
        tl.store(at, weight * p * slope, mask=mask)


# ---- many problems: all iterations by one program, grid (problems,)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts", "num_iters"])
def _iterate_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
    rows, cols, partial, iterations, marginal_error, num_iters, tol, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    if not here:
        return
    matrix = _matrix(similarity, offsets, q)
    j = tl.arange(0, COLS)
    parts = tl.cdiv(n, chunk)
    next_col = _first_col(partial + q * max_parts * COLS, parts, j, m, COLS, R, LOG)
    k = 0
    running = True
    error = 0.0
    while running:
        k += 1
        col = next_col
        slot = q * slots + k % slots
        tl.store(cols + slot * COLS + j, col)
        total = _sweep(
            matrix, rows + slot * width_n, col, 0, n, n, m, j, sharpness, R, LOG, STAGES
        )  # fmt: skip
        next_col, error = _next_col(col, total, j, m, LOG)
        running = (k < num_iters) & ~(error <= tol)
    tl.store(iterations + q, k)
    tl.store(marginal_error + q, error)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts"])
def _reverse_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
    rows, cols, x, y, partial, masses, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    if not here:
        return
    matrix = _matrix(similarity, offsets, q)
    j = tl.arange(0, COLS)
    parts = tl.cdiv(n, chunk)
    k = tl.load(iterations + q)
    rows += (q * slots + k) * width_n
    cols += (q * slots + k) * COLS
    x += (q * slots + k) * width_n
    y += (q * slots + k) * COLS
    gbar = _sum_parts(partial + q * max_parts * COLS, parts, j, COLS, R)
    mass = gbar
    if LOG:
        mass = _sum_parts(masses + q * max_parts * COLS, parts, j, COLS, R)
    col = tl.load(cols + j)
    while k > 1:
        y_now = _adjoint_col(gbar, mass, j, m, LOG)
        tl.store(y + j, y_now)
        rows -= width_n
        cols -= COLS
        x -= width_n
        y -= COLS
        col_before = tl.load(cols + j)
        gbar, mass = _reverse_sweep(
            matrix, rows, rows - width_n, x, col, col_before, y_now, 0, n, m, j, sharpness,
            R, LOG, STAGES,
        )  # fmt: skip
        col = col_before
        k -= 1
    tl.store(y + j, _adjoint_col(gbar, mass, j, m, LOG))


@triton.jit
def _schur(
    matrix, rows, col, d, n, m, j, sharpness, R: tl.constexpr, LOG: tl.constexpr,
    COST: tl.constexpr,
):  # fmt: skip
    """Column sums of T * (D - rowmean), rowmean_i the mean of D_i under T_i; D = C where COST, else
    each row of it is d: then (diag(c) - T^T diag(1/r) T) d, exactly 0 for constants.
    """
    total = tl.zeros([R, j.shape[0]], tl.float64)
    for first in range(0, n, R):
        i, at, mask = _entries(matrix, first, j, n, m, R)
        cost = _cost(tl.load(at, mask=mask, other=0))
        row = tl.load(rows + i, mask=i < n, other=_nothing(LOG))
        plan = _plan(cost, row, col, sharpness, LOG).to(tl.float64)
        value = cost.to(tl.float64) if COST else tl.broadcast_to(d[None, :], cost.shape)
        mean = tl.sum(plan * value, 1) / tl.where(i < n, tl.sum(plan, 1), 1)
        total += plan * (value - mean[:, None])
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts"])
def _fixed_point_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
    rows, cols, masses, w, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients for w, preconditioned by the plan's column sums c, in double: the system
    is singular along the constants and nearly so wherever the plan falls into blocks. The number of
    steps is not known to the host, hence one program a problem, however large.
    """
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    if not here:
        return
    matrix = _matrix(similarity, offsets, q)
    slot = q * slots + tl.load(iterations + q) % slots
    rows += slot * width_n
    j = tl.arange(0, COLS)
    col = tl.load(cols + slot * COLS + j)
    c = _sum_parts(masses + q * max_parts * COLS, tl.cdiv(n, chunk), j, COLS, R)
    inverse = tl.where(c > 0, 1 / c, 0)
    residual = _schur(matrix, rows, col, c, n, m, j, sharpness, R, LOG, True)
    # Solvable only without a component along the constants.
    residual -= c * (tl.sum(residual, 0) / tl.sum(c, 0))
    direction = inverse * residual
    norm = tl.sum(residual * direction, 0)
    enough = 1e-24 * norm
    w += q * COLS + j
    tl.store(w, tl.zeros([COLS], tl.float64))
    step = 0
    while (norm > enough) & (step < 2 * m + 50):
        product = _schur(matrix, rows, col, direction, n, m, j, sharpness, R, LOG, False)
        curvature = tl.sum(direction * product, 0)
        length = tl.where(curvature > 0, norm / curvature, 0)
        tl.debug_barrier()
        tl.store(w, tl.load(w) + length * direction)
        residual -= length * product
        next_norm = tl.where(curvature > 0, tl.sum(inverse * residual * residual, 0), 0)
        direction = inverse * residual + (next_norm / norm) * direction
        norm = next_norm
        step += 1


# ---- small problems: all of it by one program, grid (problems,)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts", "num_iters"])
def _whole_kernel(
    similarity, shapes, offsets, order, weights, small_n, small_m, chunk, width_n, slots, max_parts,
    rows, cols, x, y, w, partial, masses, losses, loss, iterations, marginal_error,
    num_iters, tol, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr,
    STAGES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """The kernels above one after the other: what one writes, others of its threads read next."""
    _softmax_kernel(
        similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
        rows, partial, iterations, sharpness, COLS, R, LOG,
    )  # fmt: skip
    tl.debug_barrier()
    _iterate_kernel(
        similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
        rows, cols, partial, iterations, marginal_error, num_iters, tol, sharpness,
        COLS, R, LOG, STAGES,
    )  # fmt: skip
    tl.debug_barrier()
    _finish_kernel(
        similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
        rows, cols, partial, masses, losses, iterations, sharpness, COLS, R, LOG, GRADIENT,
    )  # fmt: skip
    tl.debug_barrier()
    _loss_kernel(shapes, order, small_n, small_m, chunk, max_parts, losses, loss, PARTS)
    if GRADIENT == "unrolled":
        _reverse_kernel(
            similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
            rows, cols, x, y, partial, masses, iterations, sharpness, COLS, R, LOG, STAGES,
        )  # fmt: skip
        tl.debug_barrier()
    elif GRADIENT == "implicit":
        _fixed_point_kernel(
            similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
            rows, cols, masses, w, iterations, sharpness, COLS, R, LOG,
        )  # fmt: skip
        tl.debug_barrier()
    if GRADIENT != "none":
        _gradient_kernel(
            similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
            rows, cols, x, y, w, weights, iterations, sharpness, COLS, R, LOG, GRADIENT,
        )  # fmt: skip


# ---- rows wider than a tile, in blocks of WIDTH columns: LOG, vectors of all columns in memory


@triton.jit
def _block(matrix, first, left, end, m, R: tl.constexpr, WIDTH: tl.constexpr):
    """The columns from `left` on, and the entries of R rows there."""
    j = left + tl.arange(0, WIDTH)
    _, at, mask = _entries(matrix, first, j, end, m, R)
    return j, tl.load(at, mask=mask, other=0)


@triton.jit
def _add(at, value, begun):
    """Adds to what this program wrote there before, if it has begun."""
    if begun:
        tl.debug_barrier()
        value += tl.load(at)
    tl.store(at, value)


@triton.jit
def _wide_sweep(
    matrix, rows, cols, partial, begin, end, n, m, sharpness, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_sweep`, whose column sums are left in `partial`."""
    for first in range(begin, end, R):
        i = first + tl.arange(0, R)
        top = tl.full([R], float("-inf"), tl.float32)
        total = tl.zeros([R], tl.float32)
        for left in range(0, m, WIDTH):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            exponent = tl.load(cols + j)[None, :] - sharpness * _cost(kept)
            before = top
            top = tl.maximum(top, tl.max(exponent, 1))
            total = total * tl.exp(before - top) + tl.sum(tl.exp(exponent - top[:, None]), 1)
        factor = 1 / (n * total)
        tl.store(rows + i, tl.log(factor) - top, mask=i < end)
        factor = tl.where(i < end, factor, 0)
        for left in range(0, m, WIDTH):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            plan = _plan(_cost(kept), -top, tl.load(cols + j), sharpness, True)
            _add(partial + j, tl.sum(plan * factor[:, None], 0), first > begin)


@triton.jit
def _wide_reverse_sweep(
    matrix, row_now, row_before, x, col, col_before, y, partial, masses, begin, end, m, sharpness,
    R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_reverse_sweep`, whose sums are left in `partial` and `masses`."""
    for first in range(begin, end, R):
        i = first + tl.arange(0, R)
        now = tl.load(row_now + i, mask=i < end, other=_nothing(True))
        before = tl.load(row_before + i, mask=i < end, other=_nothing(True))
        dot = tl.zeros([R], tl.float32)
        mass = tl.zeros([R], tl.float32)
        for left in range(0, m, WIDTH):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            cost = _cost(kept)
            plan = _plan(cost, now, tl.load(col + j), sharpness, True)
            dot += tl.sum(plan * tl.load(y + j)[None, :], 1)
            mass += tl.sum(_plan(cost, now, tl.load(col_before + j), sharpness, True), 1)
        x_now = tl.where(i < end, dot / mass, 0)
        tl.store(x + i, x_now, mask=i < end)
        for left in range(0, m, WIDTH):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            cost = _cost(kept)
            by = tl.load(col_before + j)
            plan = _plan(cost, now, by, sharpness, True)
            _add(partial + j, tl.sum(plan * x_now[:, None], 0), first > begin)
            _add(masses + j, tl.sum(_plan(cost, before, by, sharpness, True), 0), first > begin)


@triton.jit
def _value(cost, vector, j, FORM: tl.constexpr):
    """In double: C, C - the vector of the columns, or that vector in each row."""
    value = cost.to(tl.float64)
    if FORM == "vector":
        value = tl.broadcast_to(tl.load(vector + j)[None, :], cost.shape)
    elif FORM == "difference":
        value -= tl.load(vector + j)[None, :]
    return value


@triton.jit
def _wide_means(
    matrix, row, cols, vector, first, end, m, sharpness,
    R: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Row sums of T, and the means of `_value` under it."""
    total = tl.zeros([R], tl.float64)
    weighted = tl.zeros([R], tl.float64)
    for left in range(0, m, WIDTH):
        j, kept = _block(matrix, first, left, end, m, R, WIDTH)
        cost = _cost(kept)
        plan = _plan(cost, row, tl.load(cols + j), sharpness, True).to(tl.float64)
        total += tl.sum(plan, 1)
        weighted += tl.sum(plan * _value(cost, vector, j, FORM), 1)
    total = tl.where(first + tl.arange(0, R) < end, total, 1)
    return total, weighted / total


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _wide_softmax_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, partial, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_softmax_kernel`."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    if begin == 0:
        tl.store(iterations + q, 0)
    matrix = _matrix(similarity, offsets, q)
    for first in range(begin, end, R):
        i = first + tl.arange(0, R)
        top = tl.full([R], float("-inf"), tl.float32)
        argmax = tl.zeros([R], tl.int32)
        for left in range(0, m, WIDTH):
            j, s = _block(matrix, first, left, end, m, R, WIDTH)
            s = tl.where((j < m)[None, :], s, float("-inf"))
            largest = tl.max(s, 1)
            first_largest = tl.min(tl.where(s == largest[:, None], j[None, :], COLS), 1)
            argmax = tl.where(largest > top, first_largest, argmax)
            top = tl.maximum(top, largest)
        rest = tl.zeros([R], tl.float32)
        for left in range(0, m, WIDTH):
            j, s = _block(matrix, first, left, end, m, R, WIDTH)
            others = (j < m)[None, :] & (j[None, :] != argmax[:, None])
            rest += tl.sum(tl.where(others, tl.exp(s - top[:, None]), 0), 1)
            rest += tl.sum(tl.where((j < m)[None, :], s - s, 0), 1)
        for left in range(0, m, WIDTH):
            j, s = _block(matrix, first, left, end, m, R, WIDTH)
            exponential = tl.where((j < m)[None, :], tl.exp(s - top[:, None]), 0)
            at_argmax = j[None, :] == argmax[:, None]
            kept = tl.where(at_argmax, rest[:, None] * -1.0, exponential) / (1 + rest)[:, None]
            _, at, mask = _entries(matrix, first, j, end, m, R)
            tl.store(at, kept, mask=mask)
        tl.store(rows + q * slots * width_n + i, tl.zeros([R], tl.float32), mask=i < end)
    tl.debug_barrier()  # p is read back by other threads
    part = q * tl.num_programs(1) + tl.program_id(1)
    for left in range(0, m, WIDTH):
        top = tl.full([R, WIDTH], float("-inf"), tl.float32)
        for first in range(begin, end, R):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            inside = (first + tl.arange(0, R) < end)[:, None]
            top = tl.maximum(top, tl.where(inside, -sharpness * _cost(kept), float("-inf")))
        col_top = tl.max(top, 0)
        total = tl.zeros([R, WIDTH], tl.float32)
        for first in range(begin, end, R):
            j, kept = _block(matrix, first, left, end, m, R, WIDTH)
            exponent = -sharpness * _cost(kept) - col_top[None, :]
            inside = (first + tl.arange(0, R) < end)[:, None]
            total += tl.where(inside, tl.exp(exponent), 0)
        j = left + tl.arange(0, WIDTH)
        tl.store(partial + part * COLS + j, col_top + tl.log(tl.sum(total, 0)))


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _wide_finish_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, partial, masses, losses, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """`_finish_kernel`."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    matrix = _matrix(similarity, offsets, q)
    last = tl.load(iterations + q) % slots
    rows += (q * slots + last) * width_n
    cols += (q * slots + last) * COLS
    part = q * tl.num_programs(1) + tl.program_id(1)
    partial += part * COLS
    masses += part * COLS
    loss = tl.zeros([R], tl.float64)
    for first in range(begin, end, R):
        i = first + tl.arange(0, R)
        row = tl.load(rows + i, mask=i < end, other=_nothing(True))
        total, mean = _wide_means(
            matrix, row, cols, cols, first, end, m, sharpness, R, WIDTH, "cost"
        )  # fmt: skip
        loss += tl.where(i < end, mean, 0)
        if GRADIENT == "unrolled":
            before = tl.load(rows - width_n + i, mask=i < end, other=_nothing(True))
            for left in range(0, m, WIDTH):
                j, kept = _block(matrix, first, left, end, m, R, WIDTH)
                cost = _cost(kept)
                col = tl.load(cols + j)
                plan = _plan(cost, row, col, sharpness, True) / (n * total)[:, None]
                gbar = (plan * (cost - mean[:, None])).to(tl.float32)
                _add(partial + j, tl.sum(gbar, 0), first > begin)
                mass = _plan(cost, before, col, sharpness, True)
                _add(masses + j, tl.sum(mass, 0), first > begin)
        elif GRADIENT == "implicit":
            for left in range(0, m, WIDTH):
                j, kept = _block(matrix, first, left, end, m, R, WIDTH)
                plan = _plan(_cost(kept), row, tl.load(cols + j), sharpness, True)
                _add(masses + j, tl.sum(plan, 0), first > begin)
    tl.store(losses + part, (tl.sum(loss, 0) / n).to(tl.float32))


@triton.jit
def _wide_slope(
    matrix, rows, cols, x, y, w, row, total, mean, first, left, n, m, end, last, width_n, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Of a block: entries, dL/dp from the row sums and means of `_wide_means`; addresses, mask."""
    i = first + tl.arange(0, R)
    j, kept = _block(matrix, first, left, end, m, R, WIDTH)
    cost = _cost(kept)
    col = tl.load(cols + last * COLS + j)
    plan = _plan(cost, row, col, sharpness, True) / (n * total)[:, None]
    slope = (-plan).to(tl.float32)
    if GRADIENT == "implicit":
        free = _value(cost, w, j, "difference")
        slope += sharpness * (plan * (free - mean[:, None])).to(tl.float32)
    elif GRADIENT == "unrolled":
        bend = (plan * (cost - mean[:, None])).to(tl.float32)
        bend = _add_history(
            bend, cost, col, rows, cols, x, y, i, j, end, last, width_n, sharpness, COLS, True
        )  # fmt: skip
        slope += sharpness * bend
    _, at, mask = _entries(matrix, first, j, end, m, R)
    return kept, slope, at, mask


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots"])
def _wide_gradient_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, x, y, w, weights, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """`_gradient_kernel`."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    if not here or begin >= n:
        return
    end = tl.minimum(begin + chunk, n)
    matrix = _matrix(similarity, offsets, q)
    weight = tl.load(weights + q)
    last = (tl.load(iterations + q) % slots).to(tl.int64)
    rows += q * slots * width_n
    cols += q * slots * COLS
    if GRADIENT == "unrolled":
        x += q * slots * width_n
        y += q * slots * COLS
    if GRADIENT == "implicit":
        w += q * COLS
    for first in range(begin, end, R):
        i = first + tl.arange(0, R)
        row = tl.load(rows + last * width_n + i, mask=i < end, other=_nothing(True))
        total, mean = _wide_means(
            matrix, row, cols + last * COLS, w, first, end, m, sharpness, R, WIDTH,
            "difference" if GRADIENT == "implicit" else "cost",
        )  # fmt: skip
        # The softmax backward, relative to the argmax, whose p is all but 1 where it saturates.
        at_peak = tl.zeros([R], tl.float32)
        dot = tl.zeros([R], tl.float32)
        rest = tl.zeros([R], tl.float32)
        for left in range(0, m, WIDTH):
            kept, slope, at, mask = _wide_slope(
                matrix, rows, cols, x, y, w, row, total, mean, first, left, n, m, end, last,
                width_n, sharpness, COLS, R, WIDTH, GRADIENT,
            )  # fmt: skip
            at_argmax = kept.to(tl.int32, bitcast=True) < 0
            others = tl.where(at_argmax, 0, kept)
            at_peak += tl.sum(tl.where(at_argmax, slope, 0), 1)
            dot += tl.sum(others * slope, 1)
            rest += tl.sum(others, 1)
        expected = dot - at_peak * rest
        for left in range(0, m, WIDTH):
            kept, slope, at, mask = _wide_slope(
                matrix, rows, cols, x, y, w, row, total, mean, first, left, n, m, end, last,
                width_n, sharpness, COLS, R, WIDTH, GRADIENT,
            )  # fmt: skip
            p = tl.where(kept.to(tl.int32, bitcast=True) < 0, 1 + kept, kept)
            slope = slope - at_peak[:, None] - expected[:, None]
            tl.store(at, weight * p * slope, mask=mask)


@triton.jit
def _wide_schur(
    matrix, rows, cols, vector, result, n, m, sharpness,
    R: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """`_schur` into `result`."""
    for first in range(0, n, R):
        i = first + tl.arange(0, R)
        row = tl.load(rows + i, mask=i < n, other=_nothing(True))
        _, mean = _wide_means(matrix, row, cols, vector, first, n, m, sharpness, R, WIDTH, FORM)
        for left in range(0, m, WIDTH):
            j, kept = _block(matrix, first, left, n, m, R, WIDTH)
            cost = _cost(kept)
            plan = _plan(cost, row, tl.load(cols + j), sharpness, True).to(tl.float64)
            value = _value(cost, vector, j, FORM) - mean[:, None]
            _add(result + j, tl.sum(plan * value, 0), first > 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts"])
def _wide_fixed_point_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots, max_parts,
    rows, cols, masses, w, vectors, iterations, sharpness,
    COLS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_fixed_point_kernel`."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    if not here:
        return
    matrix = _matrix(similarity, offsets, q)
    slot = q * slots + tl.load(iterations + q) % slots
    rows += slot * width_n
    cols += slot * COLS
    masses += q * max_parts * COLS
    w += q * COLS
    inverse = vectors + q * 4 * COLS  # of c
    residual = inverse + COLS
    direction = residual + COLS
    product = direction + COLS
    _wide_schur(matrix, rows, cols, w, residual, n, m, sharpness, R, WIDTH, "cost")
    excess = tl.zeros([WIDTH], tl.float64)
    mass = tl.zeros([WIDTH], tl.float64)
    for left in range(0, m, WIDTH):
        j = left + tl.arange(0, WIDTH)
        excess += tl.load(residual + j)
        mass += _sum_parts(masses, tl.cdiv(n, chunk), j, COLS, R)
    # Solvable only without a component along the constants.
    ratio = tl.sum(excess, 0) / tl.sum(mass, 0)
    norms = tl.zeros([WIDTH], tl.float64)
    tl.debug_barrier()
    for left in range(0, m, WIDTH):
        j = left + tl.arange(0, WIDTH)
        c = _sum_parts(masses, tl.cdiv(n, chunk), j, COLS, R).to(tl.float64)
        by = tl.where(c > 0, 1 / c, 0)
        left_over = tl.load(residual + j) - c * ratio
        tl.store(inverse + j, by)
        tl.store(residual + j, left_over)
        tl.store(direction + j, by * left_over)
        tl.store(w + j, tl.zeros([WIDTH], tl.float64))
        norms += by * left_over * left_over
    norm = tl.sum(norms, 0)
    enough = 1e-24 * norm
    step = 0
    while (norm > enough) & (step < 2 * m + 50):
        tl.debug_barrier()
        _wide_schur(matrix, rows, cols, direction, product, n, m, sharpness, R, WIDTH, "vector")
        curvatures = tl.zeros([WIDTH], tl.float64)
        for left in range(0, m, WIDTH):
            j = left + tl.arange(0, WIDTH)
            curvatures += tl.load(direction + j) * tl.load(product + j)
        curvature = tl.sum(curvatures, 0)
        length = tl.where(curvature > 0, norm / curvature, 0)
        norms = tl.zeros([WIDTH], tl.float64)
        for left in range(0, m, WIDTH):
            j = left + tl.arange(0, WIDTH)
            tl.store(w + j, tl.load(w + j) + length * tl.load(direction + j))
            left_over = tl.load(residual + j) - length * tl.load(product + j)
            tl.store(residual + j, left_over)
            norms += tl.load(inverse + j) * left_over * left_over
        next_norm = tl.where(curvature > 0, tl.sum(norms, 0), 0)
        tl.debug_barrier()
        for left in range(0, m, WIDTH):
            j = left + tl.arange(0, WIDTH)
            downhill = tl.load(inverse + j) * tl.load(residual + j)
            tl.store(direction + j, downhill + next_norm / norm * tl.load(direction + j))
        norm = next_norm
        step += 1


# ---- few problems: two launches an iteration, over blocks of columns and of rows


@triton.jit(
    do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts", "k", "num_iters"]
)
def _cols_kernel(
    shapes, order, small_n, small_m, chunk, slots, max_parts,
    cols, partial, errors, iterations, k, num_iters,
    COLS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """The column error of iteration k - 1 and g_k."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if not here or tl.load(iterations + q) > 0:
        return
    partial += q * max_parts * COLS
    parts = tl.cdiv(n, chunk)
    cols += q * slots * COLS + j
    if k == 1:
        col = _first_col(partial, parts, j, m, COLS, PARTS, LOG)
    else:
        total = _sum_parts(partial, parts, j, COLS, PARTS)
        before = tl.load(cols + (k - 1) % slots * COLS)
        col, error = _next_col(before, total, j, m, LOG)
        tl.store(errors + q * (COLS // BLOCK) + tl.program_id(1), error)
    if k <= num_iters:
        tl.store(cols + k % slots * COLS, col)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "k", "num_iters"])
def _rows_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, partial, errors, iterations, marginal_error, k, num_iters, tol, sharpness,
    COLS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Ends a problem that converged in iteration k - 1, or k - 1 = num_iters; else f_k."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    # Set by this same launch or an earlier one, it means the same: no one else has to see it yet.
    if not here or begin >= n or tl.load(iterations + q) > 0:
        return
    if k > 1:
        error = tl.sum(tl.load(errors + q * (COLS // BLOCK) + tl.arange(0, COLS // BLOCK)), 0)
        if (error <= tol) | (k > num_iters):
            if begin == 0:
                tl.store(iterations + q, k - 1)
                tl.store(marginal_error + q, error)
            return
    matrix = _matrix(similarity, offsets, q)
    end = tl.minimum(begin + chunk, n)
    slot = q * slots + k % slots
    rows += slot * width_n
    cols += slot * COLS
    partial += (q * tl.num_programs(1) + tl.program_id(1)) * COLS
    if WIDTH < COLS:
        _wide_sweep(matrix, rows, cols, partial, begin, end, n, m, sharpness, R, WIDTH)
    else:
        j = tl.arange(0, COLS)
        col = tl.load(cols + j)
        total = _sweep(matrix, rows, col, begin, end, n, m, j, sharpness, R, LOG, STAGES)
        tl.store(partial + j, total)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "max_parts", "step"])
def _reverse_cols_kernel(
    shapes, order, small_n, small_m, chunk, slots, max_parts,
    y, partial, masses, iterations, step,
    COLS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """y_k, k = iterations - step."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    k = tl.load(iterations + q) - step
    if not here or k < 1:
        return
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts = tl.cdiv(n, chunk)
    gbar = _sum_parts(partial + q * max_parts * COLS, parts, j, COLS, PARTS)
    mass = gbar
    if LOG:
        mass = _sum_parts(masses + q * max_parts * COLS, parts, j, COLS, PARTS)
    y_now = _adjoint_col(gbar, mass, j, m, LOG)
    tl.store(y + (q * slots + k) * COLS + j, y_now)


@triton.jit(do_not_specialize=["small_n", "small_m", "chunk", "slots", "step"])
def _reverse_rows_kernel(
    similarity, shapes, offsets, order, small_n, small_m, chunk, width_n, slots,
    rows, cols, x, y, partial, masses, iterations, step, sharpness,
    COLS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, LOG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x_{k-1}, k = iterations - step."""
    q, n, m, here = _problem(shapes, order, small_n, small_m)
    begin = tl.program_id(1) * chunk
    k = tl.load(iterations + q) - step
    if not here or begin >= n or k < 2:
        return
    matrix = _matrix(similarity, offsets, q)
    end = tl.minimum(begin + chunk, n)
    now = q * slots + k - 1
    rows += now * width_n
    cols += now * COLS
    x += now * width_n
    y += (now + 1) * COLS
    part = q * tl.num_programs(1) + tl.program_id(1)
    partial += part * COLS
    masses += part * COLS
    if WIDTH < COLS:
        _wide_reverse_sweep(
            matrix, rows, rows - width_n, x, cols + COLS, cols, y, partial, masses,
            begin, end, m, sharpness, R, WIDTH,
        )  # fmt: skip
    else:
        j = tl.arange(0, COLS)
        gbar, mass = _reverse_sweep(
            matrix, rows, rows - width_n, x, tl.load(cols + COLS + j), tl.load(cols + j),
            tl.load(y + j), begin, end, m, j, sharpness, R, LOG, STAGES,
        )  # fmt: skip
        tl.store(partial + j, gbar)
        if LOG:
            tl.store(masses + j, mass)


# ---- configurations

# Columns of the tile that holds whole rows: its rows. 8 entries for a thread of 16 warps, at most
# 128 registers.
TILES = {128: 32, 256: 16, 512: 8, 1024: 4, 2048: 2, 4096: 1}
WIDE = (4, 1024)  # rows and columns of the tiles of wider problems
STAGES = 3  # tiles on their way from memory while one is worked on
BLOCK = 128  # columns that a program of the column launches adds up
PARTS = 32  # partial sums that it reads at a time
# Blocks of rows over all problems: two for each of an H200's 132 multiprocessors.
PROGRAMS = 264
# Up to this size one launch does it all: the launches would take longer than their work.
WHOLE = 2**14
# A program streams some 0.1 TB/s, all together 3 TB/s, and two launches cost 20 microseconds
# (estimates): a program for each problem is faster from this many problems, or up to this size.
MANY, SMALL = 32, 2**19
# 1/epsilon up to which products of E's and the potentials' entries stay in float32's range.
LARGEST_SHARPNESS = 64


def resources(kernel: Any, gradient: str | None) -> dict[str, int]:
    """Warps, and all the registers that a thread can have: ptxas would rather spill a few than not
    fit a second program. Doubles take two registers each: fewer threads.
    """
    doubles = (_fixed_point_kernel, _wide_fixed_point_kernel)
    if kernel in doubles or (kernel is _whole_kernel and gradient == "implicit"):
        return {"num_warps": 8, "maxnreg": 255}
    return {"num_warps": 16, "maxnreg": 128}


def columns(max_m: int) -> int:
    """COLS for problems of up to so many columns: the width of a tile, or of several."""
    fitting = [cols for cols in TILES if cols >= max_m]
    return min(fitting) if fitting else max(triton.next_power_of_2(max_m), 2 * WIDE[1], BLOCK)


def constants(cols: int, logarithmic: bool, gradient: str | None) -> dict[str, Any]:
    """What the kernels are compiled for, by argument."""
    rows, width = (TILES[cols], cols) if cols in TILES else WIDE
    return {
        "COLS": cols,
        "WIDTH": width,
        "R": rows,
        "LOG": logarithmic,
        "GRADIENT": gradient,
        "STAGES": STAGES,
        "BLOCK": BLOCK,
        "PARTS": PARTS,
    }


def solve(
    similarity: Tensor,
    shapes: Tensor,
    offsets: Tensor,
    order: Tensor,
    weights: Tensor,
    *,
    bounds: tuple[int, int],
    floor: tuple[int, int],
    epsilon: float,
    num_iters: int,
    tol: float,
    gradient: str,
    loss: Tensor,
    iterations: Tensor,
    marginal_error: Tensor,
) -> None:
    """Solves Q problems in place: writes their entries of `loss`, `iterations`, `marginal_error`.

    similarity: float32, flat: row i of problem q at offsets[q] + i * stride, stride = its columns
        rounded up to a multiple of 4; becomes weights[q] * dL_q/dS, or scratch for "none".
    shapes: int32 [Q, 2], rows and columns; offsets: int64 [Q], multiples of 4; order: int32 [Q],
        problems by size, largest first; weights: float32 [Q]; loss, marginal_error: float32 [Q];
        iterations: int32 [Q].
    bounds: no problem has more rows or columns; configuration and scratch depend on these and Q.
    floor: problems within these rows and columns are skipped, as are those without rows or columns:
        nothing is written for either, so the outputs come filled with zeros.
    gradient: "none", "unrolled", "implicit" or "detached".
    """
    max_n, max_m = bounds
    problems = order.numel()
    if problems == 0 or max_n == 0 or max_m == 0:
        return
    tile = columns(max_m)
    wide = tile not in TILES
    settings = constants(tile, wide or 1 / epsilon > LARGEST_SHARPNESS, gradient)
    whole = max_n * max_m <= WHOLE and not wide
    rows_each = max_n if whole else triton.cdiv(max_n * problems, PROGRAMS)
    chunk = triton.cdiv(rows_each, settings["R"]) * settings["R"]
    parts = triton.cdiv(max_n, chunk)
    blocks = tile // BLOCK
    width_n = triton.cdiv(max_n, 16) * 16
    one_program_each = (problems >= MANY or max_n * max_m <= SMALL) and not wide
    unrolled, implicit = gradient == "unrolled", gradient == "implicit"
    slots = num_iters + 1 if unrolled else 2  # iteration k is in slot k % slots

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=similarity.device)

    rows, cols = scratch(problems, slots, width_n), scratch(problems, slots, tile)
    values: dict[str, Any] = {
        "similarity": similarity,
        "shapes": shapes,
        "offsets": offsets,
        "order": order,
        "weights": weights,
        "small_n": floor[0],
        "small_m": floor[1],
        "chunk": chunk,
        "width_n": width_n,
        "slots": slots,
        "max_parts": parts,
        "rows": rows,
        "cols": cols,
        "x": torch.empty_like(rows) if unrolled else None,
        "y": torch.empty_like(cols) if unrolled else None,
        "w": scratch(problems, tile, dtype=torch.float64) if implicit else None,
        "vectors": scratch(problems, 4, tile, dtype=torch.float64) if implicit and wide else None,
        "partial": scratch(problems, parts, tile),
        "masses": scratch(problems, parts, tile),
        "losses": scratch(problems, parts),
        "errors": scratch(problems, blocks),
        "loss": loss,
        "iterations": iterations,
        "marginal_error": marginal_error,
        "num_iters": num_iters,
        "tol": float(tol) if tol > 0 else -1.0,
        "sharpness": 1 / epsilon,
    }

    def launch(kernel: Any, *grid: int, **more: int) -> None:
        launches[kernel.fn.__name__] += 1
        known = {**values, **settings, **more}
        arguments = {name: known[name] for name in kernel.arg_names}
        kernel[grid](**arguments, **resources(kernel, gradient))

    with torch.cuda.device_of(similarity):
        if whole:
            launch(_whole_kernel, problems)
            return
        launch(_wide_softmax_kernel if wide else _softmax_kernel, problems, parts)
        if one_program_each:
            launch(_iterate_kernel, problems)
        else:
            for k in range(1, num_iters + 2):
                launch(_cols_kernel, problems, blocks, k=k)
                launch(_rows_kernel, problems, parts, k=k)
        launch(_wide_finish_kernel if wide else _finish_kernel, problems, parts)
        launch(_loss_kernel, problems)
        if gradient == "none":
            return
        if unrolled and one_program_each:
            launch(_reverse_kernel, problems)
        elif unrolled:
            for step in range(num_iters):
                launch(_reverse_cols_kernel, problems, blocks, step=step)
                launch(_reverse_rows_kernel, problems, parts, step=step)
        elif implicit:
            launch(_wide_fixed_point_kernel if wide else _fixed_point_kernel, problems)
        launch(_wide_gradient_kernel if wide else _gradient_kernel, problems, parts)
