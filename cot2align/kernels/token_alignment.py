"""Token alignment for MinED: the nearest token of another vocabulary, and time warping.

A token is the bytes that it stands for, the distance between two is Levenshtein's. The work is done
by csrc/token_alignment.cpp; the same in plain Python, hundreds of times slower, serves where the
native module was not built.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from cot2align.kernels.native import _native, missing

_CHUNK = 512


def nearest_tokens(
    queries: Sequence[bytes],
    tokens: Sequence[bytes],
    progress: Callable[[int], object] = lambda done: None,
) -> list[int]:
    """For each query the position of the token with the least edit distance, of several the first.

    progress: is told how many further queries are done. Raises ValueError where there are no
    tokens.
    """
    if not tokens:
        raise ValueError("tokens is empty, expected at least one")
    index = None
    if _native is None:
        _warn_of_python()
    else:
        index = _native.TokenIndex(list(tokens))
    found: list[int] = []
    for start in range(0, len(queries), _CHUNK):
        chunk = list(queries[start : start + _CHUNK])
        if index is None:
            found += [_nearest(query, tokens) for query in chunk]
        else:
            found += index.nearest(chunk, num_threads=torch.get_num_threads())
        progress(len(chunk))
    return found


def align_tokens(x: Sequence[bytes], y: Sequence[bytes]) -> list[int]:
    """For each token of x the only token of y that it is matched with, -1 where there are several.

    The match is the cheapest monotone path through the table of edit distances (dynamic time
    warping); of equally cheap steps, from the end, the diagonal goes first, then the one along x.
    """
    if _native is not None:
        return _native.align_tokens(list(x), list(y))
    _warn_of_python()
    distance = functools.cache(_distance)
    unreachable = math.inf
    paths = [[0.0] + [unreachable] * len(y)]
    for a in x:
        above, row = paths[-1], [unreachable]
        for j, b in enumerate(y):
            row.append(distance(a, b) + min(above[j], above[j + 1], row[j]))
        paths.append(row)
    partners: list[list[int]] = [[] for _ in x]
    i, j = len(x), len(y)
    while i and j:
        partners[i - 1].append(j - 1)
        steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(steps, key=lambda step: paths[step[0]][step[1]])
    return [found[0] if len(found) == 1 else -1 for found in partners]


def _nearest(query: bytes, tokens: Sequence[bytes]) -> int:
    best, position = sys.maxsize, -1
    for candidate, token in enumerate(tokens):
        if abs(len(token) - len(query)) < best and (d := _distance(query, token)) < best:
            best, position = d, candidate
    return position


def _distance(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, byte in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            changed = diagonal + (byte != other)
            diagonal = row[j]
            row[j] = min(changed, row[j] + 1, row[j - 1] + 1)
    return row[-1]


@functools.cache
def _warn_of_python() -> None:
    warnings.warn(f"cot2align: plain Python aligns the tokens: {missing()}", stacklevel=3)
