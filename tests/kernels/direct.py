"""The OT loss of one problem in a few lines of float64, written from the paper alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ot_loss(x: Tensor, y: Tensor, projection: Tensor | None, epsilon: float, num_iters: int):
    """x [N, d], y [M, D], projection [D, d] -> scalar, differentiable by autograd."""
    z = y if projection is None else y @ projection
    return ot_loss_of(x @ z.T / math.sqrt(x.shape[1]), epsilon, num_iters)


def ot_loss_of(similarity: Tensor, epsilon: float, num_iters: int):
    """similarity [N, M] -> scalar, differentiable by autograd."""
    cost = 1 - torch.softmax(similarity, dim=1)
    n, m = cost.shape
    f = torch.zeros(n, dtype=cost.dtype)
    for _ in range(num_iters):
        g = -math.log(m) - torch.logsumexp(f[:, None] - cost / epsilon, dim=0)
        f = -math.log(n) - torch.logsumexp(g[None, :] - cost / epsilon, dim=1)
    return (torch.exp(f[:, None] + g[None, :] - cost / epsilon) * cost).sum()


def problem(n: int, m: int, width: int = 12, teacher_width: int = 20, spread: float = 2.0, seed=0):
    """Random x [n, width], y [m, teacher_width], projection, float64; S has this spread."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return (
        spread * normal(n, width),
        normal(m, teacher_width),
        normal(teacher_width, width) / math.sqrt(teacher_width),
    )


def gradients(loss, tensors, dtype=torch.float64):
    """Value and gradients, both in float64, of loss(*tensors) computed in `dtype`."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves)
    return value.detach().double(), [g.double() for g in grads]


def relative(got: Tensor, expected: Tensor) -> float:
    """The error relative to the expected tensor's own norm."""
    return ((got - expected).norm() / expected.norm()).item()
