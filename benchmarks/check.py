"""Every backend of a device against float64: sizes of all regimes, dtypes, epsilons, gradients.

Random data for each check, outputs poisoned before (PyTorch fills what torch.empty gives with NaN),
errors relative to the float64 gradient's own norm and to what the reference reaches in that dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from cot2align import fused_ot_loss, fused_ot_loss_varlen
from cot2align.kernels import reference
from cot2align.kernels.backends import Device, refusal

SIZES = [(1, 1), (1, 9), (9, 1), (31, 33), (32, 32), (64, 64), (60, 130), (65, 64), (64, 129)]
SIZES += [(128, 128), (200, 190), (257, 256), (500, 512), (640, 670), (1000, 900), (1500, 2049)]
EPSILONS = (1e-3, 1e-2, 0.1, 10.0, 1e3)
GRADS = ("unrolled", "implicit", "detached")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, TEACHER_WIDTH = 48, 80


def problem(
    n: int, m: int, dtype: torch.dtype, device: str, generator: torch.Generator, projected: bool
) -> list:
    x = 2 * torch.randn(2, n, WIDTH, generator=generator)
    y = torch.randn(2, m, TEACHER_WIDTH if projected else WIDTH, generator=generator)
    tokens = [x, y]
    if projected:
        p = torch.randn(TEACHER_WIDTH, WIDTH, generator=generator) / TEACHER_WIDTH**0.5
        tokens.append(p)
    masks = []
    for size in (n, m):  # the second problem is shorter, wherever it can be
        lengths = torch.tensor([[size], [max(1, size - size // 3)]])
        masks.append((torch.arange(size) < lengths).to(device))
    return [t.to(device, dtype) for t in tokens] + masks


def gradients(tensors: list, dtype: torch.dtype, **settings) -> tuple[Tensor, list[Tensor]]:
    *leaves, student_mask, teacher_mask = tensors
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    function = reference.fused_ot_loss if dtype == torch.float64 else fused_ot_loss
    loss = function(*leaves, student_mask=student_mask, teacher_mask=teacher_mask, **settings)
    return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, leaves)]


def worst(got: tuple, want: tuple, floor: float = 0.0) -> float:
    """The largest error of loss and gradients relative to their norms; NaN counts as infinite."""
    pairs = zip((got[0], *got[1]), (want[0], *want[1]), strict=True)
    errors = [(g - w).norm() / w.norm().clamp(min=floor) for g, w in pairs]
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item()


def checks(device: str, small: bool) -> Iterator[tuple]:
    sizes = SIZES[:8] if small else SIZES
    for size, epsilon, grad, dtype in itertools.product(sizes, EPSILONS, GRADS, DTYPES):
        if max(size) > 300 and (dtype == torch.float16 or epsilon in (1e-2, 1e3)):
            continue
        yield size, epsilon, grad, dtype, 0.0 if grad == "unrolled" else 1e-5


def run(device: str, backends: list[str], small: bool) -> int:
    """Prints what is wrong and a line of totals for each backend, which is spared the sizes that it
    does not take; -> the number of failures."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    generator = torch.Generator().manual_seed(0)
    failures = 0
    largest = dict.fromkeys(backends, 0.0)
    for size, epsilon, grad, dtype, tol in tqdm(list(checks(device, small)), disable=None):
        # Projected tokens are rounded to their 16 bits, which a small epsilon magnifies.
        projected = dtype == torch.float32 or epsilon >= 0.1
        tensors = problem(*size, dtype, device, generator, projected)
        settings = {"epsilon": epsilon, "num_iters": 12, "tol": tol, "grad": grad}
        want = gradients(tensors, torch.float64, **settings)
        # With one token on a side the gradient is 0, and what remains is rounding, over epsilon.
        floor = 6e-4 / epsilon if min(size) == 1 else 1e-30
        reached = worst(gradients(tensors, dtype, backend="reference", **settings), want, floor)
        for backend in backends:
            if refusal(backend, Device.of(tensors[0].device), *size):
                continue
            got = gradients(tensors, dtype, backend=backend, **settings)
            error = worst(got, want, floor)
            again = gradients(tensors, dtype, backend=backend, **settings)
            same = all(map(torch.equal, (got[0], *got[1]), (again[0], *again[1])))
            if dtype == torch.float32 and min(size) > 1:
                largest[backend] = max(largest[backend], error)
            bound = 4 * reached + (1e-5 if dtype == torch.float32 else 2e-2)
            if error > bound or not same:
                failures += 1
                what = f"{error:.1e} > {bound:.1e}" if error > bound else "other bits the next time"
                print(f"{backend}: {size} epsilon {epsilon:g} {grad} {dtype}: {what}")
    for backend in backends:
        failures += not packed_is_looped(device, backend, generator)
        print(f"{backend}: largest relative error in float32 {largest[backend]:.1e}")
    print(f"{failures} failures")
    return failures


def packed_is_looped(device: str, backend: str, generator: torch.Generator) -> bool:
    """Texts of every size in one call, with shared texts and empty ones, device-side cu_seqlens."""
    lengths = [torch.tensor(side) for side in ([0, 70, 3, 300, 17], [40, 0, 290, 128])]
    x = torch.randn(int(lengths[0].sum()), WIDTH, generator=generator).to(device)
    y = torch.randn(int(lengths[1].sum()), WIDTH, generator=generator).to(device)
    cu = [torch.cat((torch.zeros(1, dtype=torch.int64), side.cumsum(0))) for side in lengths]
    pairs = torch.tensor([[0, 0], [1, 0], [1, 2], [3, 2], [2, 3], [4, 1], [4, 2], [1, 0]])

    def value(q: Tensor, where: str, backend: str) -> tuple:
        leaves = [t.detach().requires_grad_() for t in (x, y)]
        loss = fused_ot_loss_varlen(
            *leaves,
            cu_seqlens_student=cu[0].to(where),
            cu_seqlens_teacher=cu[1].to(where),
            max_seqlen_student=300,
            max_seqlen_teacher=290,
            pairs=q,
            num_iters=10,
            reduction="sum",
            backend=backend,
        )
        return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, leaves)]

    want = value(pairs, "cpu", "reference")
    errors = [worst(value(pairs, where, backend), want) for where in ("cpu", device)]
    if max(errors) > 1e-4:
        print(f"{backend}: packed texts: {errors}")
    return max(errors) <= 1e-4
