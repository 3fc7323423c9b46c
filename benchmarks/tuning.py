"""`python -m benchmarks tune`: times other configurations of the Triton kernels on the GPU at hand,
and prints their tables with the fastest entries, to be pasted into the kernels' files by a person.

Nothing is tuned at run time. A configuration must pass the compile-only tests (no spills) too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import timer
from cot2align.kernels import triton_sinkhorn, triton_streamed
from cot2align.kernels.triton_sinkhorn import Block, Tile

BLOCKS = [
    Block(rows, cols, depth, warps, stages)
    for rows, cols, depth, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (16, 32, 64), (4, 8), (2, 3, 4)
    )
]


def problems(
    count: int, n: int, m: int, dim: int, dtype: torch.dtype, device: str
) -> Callable[..., object]:
    """-> a call of the Triton path on random tokens, forward and gradient."""
    x, z = (
        2 * torch.randn(count * n, dim, device=device),
        torch.randn(count * m, dim, device=device),
    )
    which = torch.arange(count, device=device)
    segments = [torch.stack((which * size, torch.full_like(which, size)), 1) for size in (n, m)]
    pairs = torch.stack((which, which), 1)
    weights = torch.full((count,), 1 / count, device=device)

    def run(num_iters: int = 100) -> object:
        return triton_sinkhorn.ot_loss(
            *(x.to(dtype), z.to(dtype), None, None, *segments, pairs, weights),
            bounds=(n, m),
            scale=dim**-0.5,
            epsilon=0.1,
            num_iters=num_iters,
            tol=0.0,
            gradient="unrolled",
            need_x=True,
            need_z=True,
        )

    return run


def fastest(
    candidates: Iterable[Any],
    use: Callable[[Any], None],
    run: Callable[[], object],
    device: str,
    repeats: int,
    what: str,
) -> tuple[Any, float]:
    """-> the candidate with the least median time, and that time in ms; those that do not compile
    for this device are left out."""
    best, least = None, math.inf
    for candidate in tqdm(list(candidates), desc=what, leave=False, disable=None):
        use(candidate)
        time = timer(run, device)
        try:
            time()
        except Exception as error:  # Triton has a class for each way not to fit
            tqdm.write(f"{what}: {candidate}: {str(error).splitlines()[0]}")
            continue
        median = torch.tensor([time() for _ in range(repeats)]).median().item()
        if median < least:
            best, least = candidate, median
    use(best)
    return best, least


def table(repeats: int, device: str = "cuda", blocks: list[Block] = BLOCKS, size: int = 512) -> str:
    """Python text: the tables of triton_sinkhorn.py and triton_streamed.py as measured here."""
    lines = ["# triton_sinkhorn.py"]
    for name in ("SIMILARITY", "PRODUCTS"):
        of = getattr(triton_sinkhorn, name)
        for dtype in of:
            run = problems(4096 // size, size, size, size, dtype, device)
            best, ms = fastest(
                blocks,
                lambda block, of=of, dtype=dtype: of.update({dtype: block}),
                lambda run=run: run(1),
                *(device, repeats, f"{name}[{dtype}]"),
            )
            lines.append(f"{name}[{dtype}] = {best}  # {ms:.3f} ms")
    tiles = list(triton_sinkhorn.TILES)
    for place, tile in enumerate(tiles):

        def use(warps: int, place: int = place, tile: Tile = tile) -> None:
            tiles[place] = tile._replace(warps=warps)
            triton_sinkhorn.TILES = tuple(tiles)

        run = problems(16384 // tile.rows, tile.rows, tile.cols, 64, torch.bfloat16, device)
        warps, ms = fastest((2, 4, 8, 16), use, run, device, repeats, str(tile))
        lines.append(f"TILES[{place}] = {tile._replace(warps=warps)}  # {ms:.3f} ms")
    lines.append("# triton_streamed.py")
    for cols in triton_streamed.TILES:
        if cols > 8 * size:
            continue
        run = problems(max(1, 2**23 // cols**2), cols, cols, 64, torch.bfloat16, device)
        rows, ms = fastest(
            [2**k for k in range(8) if 512 <= 2**k * cols <= 16384],
            lambda rows, cols=cols: triton_streamed.TILES.update({cols: rows}),
            *(run, device, repeats, f"TILES[{cols}]"),
        )
        lines.append(f"TILES[{cols}] = {rows}  # {ms:.3f} ms")
    return "\n".join(lines)
