"""What is measured: the sizes, and the ways to compute the same loss.

A way takes a problem (student [B, N, d], teacher [B, M, D], projection [D, d] and masks, or None)
and the settings, and returns the mean loss. The gradient is that of training: for the student and
the projection, the teacher is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cot2align import fused_ot_loss
from cot2align.kernels import reference


@dataclass(frozen=True)
class Case:
    name: str
    problems: int
    n: int
    m: int
    width: int = 256
    teacher_width: int | None = None  # None: the student's, and no projection
    epsilon: float = 0.1
    num_iters: int = 100
    tol: float = 0.0
    ragged: bool = False

    def make(self, seed: int = 0) -> dict[str, Tensor | None]:
        """float32 tokens of unit scale; the responses' lengths as in Dolly where ragged."""
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
        projection = None
        if self.teacher_width is not None:
            projection = normal(self.teacher_width, self.width) / self.teacher_width**0.5
        return {
            "student": 3 * normal(self.problems, self.n, self.width),
            "teacher": normal(self.problems, self.m, self.teacher_width or self.width),
            "projection": projection,
            "student_mask": masks[0],
            "teacher_mask": masks[1],
        }


CASES = {
    case.name: case
    for case in [
        Case("64x128x128", 64, 128, 128),
        Case("8x256x256", 8, 256, 256),
        Case("4x512x512", 4, 512, 512),
        Case("64x128x128-projected", 64, 128, 128, teacher_width=512),
        Case("ragged-projected", 64, 256, 256, teacher_width=512, ragged=True),
        Case("ragged-projected-tol", 64, 256, 256, teacher_width=512, ragged=True, tol=1e-6),
    ]
}

WAYS: dict[str, Callable[..., Tensor]] = {
    "native": partial(fused_ot_loss, backend="native"),
    "naive": reference.fused_ot_loss,
}
