"""Which backend serves a problem: candidates in order of preference, and why each is passed over.

    device      size                              order
    cpu         any                               native, reference (triton: interpreted, on demand)
    cuda        within one Triton launch          triton, cuda, reference
    cuda        larger                            cuda (up to some 640 x 640), triton, reference
    others      any                               reference

The size is that of the largest problem, as the host knows it (`max_seqlen_*`, or N and M): nothing
is read from a device to choose. `python -m cot2align.doctor` prints the table for every device.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import NamedTuple

import torch

from cot2align.kernels import native

ONE_LAUNCH = (64, 128)  # the largest problem of triton_sinkhorn.TILES
SMALLEST_CAPABILITY = (8, 0)  # for which Triton's configurations are compiled and checked
OLDEST_TRITON = (3, 6)  # before it, registers are spilled


def _triton_version() -> tuple[int, ...] | None:
    for name in ("triton", "pytorch-triton"):  # the second comes with PyTorch's nightly builds
        try:
            return tuple(map(int, metadata.version(name).split(".")[:2]))
        except metadata.PackageNotFoundError:
            pass
    return None


TRITON = _triton_version()


class Device(NamedTuple):
    """type: of torch.device. capability: of a CUDA device."""

    type: str
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> Device:
        if device.type != "cuda":
            return cls(device.type)
        return cls("cuda", torch.cuda.get_device_capability(device))


class Candidate(NamedTuple):
    """backend: its name. serves: whether it can. why: what it is, or what it lacks."""

    backend: str
    serves: bool
    why: str


def candidates(device: Device, rows: int, cols: int) -> list[Candidate]:
    """All backends for problems of up to rows x cols tokens, the preferred ones first."""
    return [_candidate(name, device, rows, cols) for name in _order(device, rows, cols)]


def choose(device: Device, rows: int, cols: int) -> Candidate:
    """The backend that `backend=None` means."""
    named = (_candidate(name, device, rows, cols) for name in _order(device, rows, cols))
    return next(candidate for candidate in named if candidate.serves)


def refusal(backend: str, device: Device, rows: int, cols: int) -> str | None:
    """Why a backend that is asked for by name cannot serve; None where it can."""
    candidate = _candidate(backend, device, rows, cols)
    return None if candidate.serves else candidate.why


def _order(device: Device, rows: int, cols: int) -> tuple[str, ...]:
    if device.type != "cuda":
        return "native", "reference", "triton", "cuda"
    if rows <= ONE_LAUNCH[0] and cols <= ONE_LAUNCH[1]:
        return "triton", "cuda", "reference", "native"
    return "cuda", "triton", "reference", "native"


def _candidate(backend: str, device: Device, rows: int, cols: int) -> Candidate:
    if backend == "reference":
        return Candidate(backend, True, "plain PyTorch: any device and size, slow")
    if backend == "native":
        if device.type != "cpu":
            return Candidate(backend, False, "it takes CPU tensors")
        if missing := native.missing():
            return Candidate(backend, False, missing)
        return Candidate(backend, True, f"compiled, {native.INSTRUCTION_SETS[0]} on this CPU")
    if backend == "cuda" and device.type != "cuda":
        return Candidate(backend, False, "it takes CUDA tensors")
    if lacking := _triton_lacks(device) if backend == "triton" else None:
        return Candidate(backend, False, lacking)
    if backend == "cuda" and (lacking := _cuda_lacks(device, rows, cols)):
        return Candidate(backend, False, lacking)
    if backend == "cuda":
        return Candidate(backend, True, "a cluster of thread blocks holds each problem on the chip")
    if rows <= ONE_LAUNCH[0] and cols <= ONE_LAUNCH[1]:
        return Candidate(backend, True, "one launch, each problem in one program's registers")
    return Candidate(backend, True, "streams the matrix from memory once an iteration")


def _triton_lacks(device: Device) -> str | None:
    if TRITON is None:
        return "Triton is not installed"
    if TRITON < OLDEST_TRITON:
        return "Triton {}.{} is older than {}.{}, which comes with PyTorch 2.10".format(
            *TRITON, *OLDEST_TRITON
        )
    if device.type != "cuda":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it takes CUDA tensors, and others under TRITON_INTERPRET=1, set before the import"
    if torch.version.hip:
        return "it is compiled and checked for NVIDIA GPUs, this PyTorch is built for AMD's"
    if device.capability < SMALLEST_CAPABILITY:
        return "it needs compute capability {}.{}, this is {}.{}".format(
            *SMALLEST_CAPABILITY, *device.capability
        )
    return None


def _cuda_lacks(device: Device, rows: int, cols: int) -> str | None:
    if lacking := _triton_lacks(device):
        return f"its similarities and products come from Triton: {lacking}"
    if torch.compiler.is_compiling():  # no C++ call, with sizes that may be symbols: asked when run
        return None
    from cot2align.kernels import cuda_sinkhorn

    return cuda_sinkhorn.fits(rows, cols, device.capability)


def gradient_dtype(tokens: torch.dtype) -> torch.dtype:
    """Of the tokens' gradients before they are scaled: float16's would be below its range, since
    1 / (problems * rows) is a factor of theirs and a loss scale is not yet."""
    return torch.float32 if tokens == torch.float16 else tokens
