"""The compiled CPU kernels of csrc/, on tensors.

The extension takes addresses and trusts them, so everything is checked here. It is built by `pip
install`; where it is missing, `missing()` says why and what to do.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_native: Any
try:
    _native = importlib.import_module("cot2align.kernels._native")
except ModuleNotFoundError as error:
    if error.name != "cot2align.kernels._native":
        raise
    _native = None

# The builds of the kernel that this CPU can run, the default first.
INSTRUCTION_SETS: list[str] = [] if _native is None else _native.instruction_sets()


def missing() -> str | None:
    """None where the compiled kernels are there, else one sentence."""
    if _native is not None:
        return None
    root = Path(__file__).parents[2]
    if (root / "setup.py").exists():
        return f"the native module is not built in {root}: run `pip install -e .` there"
    return (
        "cot2align was installed without its native part: "
        "reinstall with COT2ALIGN_NATIVE=1 and a C++ compiler"
    )


def _cpus() -> int:
    """The CPUs of this process: more threads than these would wait for each other."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads() -> int:
    return min(torch.get_num_threads(), _cpus())


def matmul(a: Tensor, b: Tensor, isa: str | None = None) -> Tensor:
    """a @ b for float32 matrices on the CPU; a transposed one is not copied.

    Raises ValueError for tensors that the kernel cannot take and RuntimeError where it was not
    built.
    """
    if _native is None:
        raise RuntimeError(missing())
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.dim() != 2:
            raise ValueError(
                f"{name} must be a float32 matrix on the CPU, got a {tensor.dtype} tensor of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} have no product")
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    c = a.new_empty(a.shape[0], b.shape[1])
    _native.matmul(
        *(a.shape[0], b.shape[1], a.shape[1]),
        *(a.data_ptr(), a.stride(), b.data_ptr(), b.stride(), c.data_ptr()),
        num_threads=_threads(),
        isa=isa or INSTRUCTION_SETS[0],
    )
    return c


def ot_loss(
    x: Tensor,  # [tokens_x, dim] float32
    z: Tensor,  # [tokens_z, dim] float32
    segments_x: Tensor,  # [segments, 2] int64: first token, number of tokens
    segments_z: Tensor,
    pairs: Tensor,  # [problems, 2] int64
    weights: Tensor,  # [problems] float32
    *,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
    gradient: str,  # "none" | "unrolled" | "implicit" | "detached"
    need_x: bool = False,
    need_z: bool = False,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, num_iters, marginal_error [problems]; the gradients of sum(weights * loss) for x
    and z, else [0].

    Raises ValueError for tensors that the kernel cannot take and RuntimeError where it was not
    built.
    """
    if _native is None:
        raise RuntimeError(missing())
    floats = {"x": x, "z": z, "weights": weights}
    integers = {"segments_x": segments_x, "segments_z": segments_z, "pairs": pairs}
    for dtype, group in ((torch.float32, floats), (torch.int64, integers)):
        for name, tensor in group.items():
            if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
                layout = "contiguous" if tensor.is_contiguous() else "strided"
                raise ValueError(
                    f"{name} must be a contiguous {dtype} tensor on the CPU, "
                    f"got a {layout} {tensor.dtype} one on {tensor.device}"
                )
    if x.dim() != 2 or z.dim() != 2 or x.shape[1] != z.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and z {tuple(z.shape)} must be [tokens, dim]")
    if pairs.shape != (len(weights), 2):
        raise ValueError(f"pairs must be [{len(weights)}, 2], got {tuple(pairs.shape)}")
    for name, segments, tokens in (("segments_x", segments_x, x), ("segments_z", segments_z, z)):
        if segments.dim() != 2 or segments.shape[1] != 2:
            raise ValueError(f"{name} must be [segments, 2], got {tuple(segments.shape)}")
        if len(segments) and (segments.min() < 0 or segments.sum(1).max() > len(tokens)):
            raise ValueError(f"{name} leaves the {len(tokens)} tokens that there are")
    if len(pairs) and (
        pairs.min() < 0
        or pairs[:, 0].max() >= len(segments_x)
        or pairs[:, 1].max() >= len(segments_z)
    ):
        raise ValueError("pairs names a segment that is not there")
    if isa is not None and isa not in INSTRUCTION_SETS:
        raise ValueError(f"isa must be one of {', '.join(INSTRUCTION_SETS)}, got {isa!r}")

    loss, marginal_error = x.new_empty(len(pairs)), x.new_empty(len(pairs))
    iterations = x.new_empty(len(pairs), dtype=torch.int32)
    dx = torch.empty_like(x) if need_x and gradient != "none" else x.new_empty(0)
    dz = torch.empty_like(z) if need_z and gradient != "none" else z.new_empty(0)
    try:
        _native.ot_loss(
            x.data_ptr(),
            z.data_ptr(),
            segments_x.data_ptr(),
            segments_z.data_ptr(),
            pairs.data_ptr(),
            weights.data_ptr(),
            tokens_x=len(x),
            tokens_z=len(z),
            count_x=len(segments_x),
            count_z=len(segments_z),
            count=len(pairs),
            dim=x.shape[1],
            scale=scale,
            epsilon=epsilon,
            tol=tol,
            num_iters=num_iters,
            gradient=gradient if need_x or need_z else "none",
            num_threads=_threads(),
            loss=loss.data_ptr(),
            iterations=iterations.data_ptr(),
            marginal_error=marginal_error.data_ptr(),
            dx=dx.data_ptr(),
            dz=dz.data_ptr(),
            isa=isa or INSTRUCTION_SETS[0],
        )
    except MemoryError:
        n, m = segments_x[pairs[:, 0], 1].max(), segments_z[pairs[:, 1], 1].max()
        raise MemoryError(
            f"no memory for problems of up to N = {n}, M = {m} tokens: one takes 2 N M floats or "
            f"more, and its unrolled gradient 2 (N + M) for each of {num_iters} iterations"
        ) from None
    return loss, iterations, marginal_error, dx, dz
