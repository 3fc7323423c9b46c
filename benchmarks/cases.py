"""What is measured: problems of one size, or of the lengths of real responses."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]


class Work(NamedTuple):
    """products: FLOP of the matrix products; sweeps: entries read by the iterations, of 4 FLOP and
    4 bytes each; matrix: bytes of the matrix that they read, the mean over the entries."""

    products: float
    sweeps: float
    matrix: float


@dataclass(frozen=True)
class Case:
    """`problems` problems of n x m tokens. dtype is that of the hidden states; P is float32."""

    name: str
    group: str
    problems: int
    n: int
    m: int
    width: int = 256
    teacher_width: int | None = 512  # None: the student's, and no projection
    epsilon: float = 0.1
    num_iters: int = 100
    tol: float = 0.0
    ragged: bool = False
    dtype: str = "float32"
    threads: int | None = None
    ways: tuple[str, ...] | None = None  # None: all that can

    def make(self, device: str = "cpu", seed: int = 0) -> Tensors:
        """Tokens whose similarities have a spread of 3; lengths as in Dolly where ragged."""
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator)
        masks: list[Tensor | None] = [None, None]
        if self.ragged:
            # Log-normal with a median of 55 tokens, cut at n and m: as Dolly's responses.
            lengths = 55 * torch.exp(0.9 * normal(self.problems))
            masks = [
                torch.arange(size) < lengths.round().clamp(1, size)[:, None]
                for size in (self.n, self.m)
            ]
        dtype = getattr(torch, self.dtype)
        tensors: Tensors = {
            "student": (3 * normal(self.problems, self.n, self.width)).to(dtype),
            "teacher": normal(self.problems, self.m, self.teacher_width or self.width).to(dtype),
            "projection": None,
            "student_mask": masks[0],
            "teacher_mask": masks[1],
        }
        if self.teacher_width is not None:
            projection = normal(self.teacher_width, self.width) / self.teacher_width**0.5
            tensors["projection"] = projection
        return {name: None if t is None else t.to(device) for name, t in tensors.items()}

    def shape(self) -> str:
        ragged = " ragged" if self.ragged else ""
        projected = f"D {self.teacher_width}" if self.teacher_width else "no projection"
        return f"{self.problems} x {self.n}x{self.m}{ragged}, d {self.width}, {projected}"

    def work(self, tensors: Tensors, iterations: float) -> Work:
        """Of forward + backward. An iteration reads each entry for a row sum and a column sum, its
        reverse for two more; the gradient's correction is a product of inner size 2K."""
        rows, cols = torch.full((2, self.problems), 1.0)
        rows, cols = rows * self.n, cols * self.m
        for name, lengths in (("student_mask", rows), ("teacher_mask", cols)):
            mask = tensors[name]
            if mask is not None:
                lengths.copy_(mask.sum(1))
        entries = rows * cols
        total = float(entries.sum())
        project = 2 * 2 * self.width * (self.teacher_width or 0) * float(cols.sum())
        correction = 2 * 2 * iterations * total
        return Work(
            products=project + 3 * 2 * self.width * total + correction,
            sweeps=2 * iterations * total,
            matrix=4 * float(entries.square().sum()) / max(total, 1),
        )


def _scaling() -> list[Case]:
    """One number grows, the others stay."""
    alone, peers = ("product",), ("product", "naive", "bmm", "authors")
    return [
        *(
            Case(f"size-{n}", "size", 1, n, n, num_iters=20, ways=peers if n <= 2048 else alone)
            for n in (64, 128, 256, 512, 1024, 2048, 4096)
        ),
        *(
            Case(
                *(f"problems-{b}", "problems", b, 128, 128),
                num_iters=50,
                ways=peers if b <= 128 else alone,
            )
            for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        ),
        *(
            Case(f"iterations-{k}", "iterations", 16, 128, 128, num_iters=k, ways=peers)
            for k in (1, 2, 5, 10, 20, 50, 100, 200, 400)
        ),
        *(
            Case(
                *(f"threads-{size}-{t}", "threads", b, size, size),
                num_iters=50,
                threads=t,
                ways=("product", "naive"),
            )
            for t in (1, 2, 4, 8, 16)
            for b, size in ((64, 128), (1, 1024))
        ),
    ]


_GPU = Case("", "gpu", 64, 512, 512, width=1024, teacher_width=2048, dtype="bfloat16")

CASES = {
    case.name: case
    for case in [
        Case("64x128x128-unprojected", "main", 64, 128, 128, teacher_width=None),
        Case("8x256x256-unprojected", "main", 8, 256, 256, teacher_width=None),
        Case("4x512x512-unprojected", "main", 4, 512, 512, teacher_width=None),
        Case("64x128x128", "main", 64, 128, 128),
        Case("8x256x256", "main", 8, 256, 256),
        Case("4x512x512", "main", 4, 512, 512),
        Case("1x2048x2048", "main", 1, 2048, 2048, num_iters=20),
        Case("ragged", "main", 64, 256, 256, ragged=True),
        Case("64x128x128-tol", "main", 64, 128, 128, tol=1e-6),
        Case("ragged-tol", "main", 64, 256, 256, ragged=True, tol=1e-6),
        replace(_GPU, name="gpu-64x512x512"),
        replace(_GPU, name="gpu-64x512x512-fp32", dtype="float32"),
        replace(_GPU, name="gpu-64x64x64", n=64, m=64),
        replace(_GPU, name="gpu-64x64x128", m=128, n=64),
        replace(_GPU, name="gpu-64x128x128", n=128, m=128),
        replace(_GPU, name="gpu-64x256x256", n=256, m=256),
        replace(_GPU, name="gpu-64x512x512-tol", tol=1e-6),
        replace(_GPU, name="gpu-ragged", n=256, m=256, ragged=True),
        replace(_GPU, name="gpu-1x4096x4096", problems=1, n=4096, m=4096, num_iters=20),
        *_scaling(),
    ]
}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))
CASE_FIELDS = tuple(field.name for field in fields(Case))
