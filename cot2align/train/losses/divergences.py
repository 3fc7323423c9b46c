"""Divergences between the teacher's distribution p and the student's q, token by token.

Each takes float32 log-probabilities [T, V] and gives [T], in nats; gradients flow to the student.
The skew s is 0.1, the head of adaptive KL the tokens that hold half of the teacher's mass. A
probability of exactly 0 is allowed: 0 log 0 = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SKEW = 0.1
HEAD_MASS = 0.5


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q)."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum q log(q / p)."""
    return forward_kl(log_q, log_p)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2."""
    return (_kl_to_mix(log_p, log_q, 0.5) + _kl_to_mix(log_q, log_p, 0.5)) / 2


def skewed_forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / (s p + (1 - s) q))."""
    return _kl_to_mix(log_p, log_q, 1 - SKEW)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum q log(q / ((1 - s) q + s p))."""
    return _kl_to_mix(log_q, log_p, SKEW)


def adaptive_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """w forward_kl + (1 - w) reverse_kl; w is the share of |p - q| on the teacher's head, detached.

    The head: the most probable tokens of the teacher, up to the one whose cumulative mass reaches
    HEAD_MASS.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) - p < HEAD_MASS
        weight = (gap * head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return weight * forward_kl(log_p, log_q) + (1 - weight) * reverse_kl(log_p, log_q)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        js,
        skewed_forward_kl,
        skewed_reverse_kl,
        adaptive_kl,
    )
}


def _kl_to_mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """sum p log(p / ((1 - share) p + share q))."""
    gap = log_q - log_p
    # log(mix / p): near 0 without cancellation; beyond 20, e^gap is all that counts of the sum.
    mix = torch.where(gap < 20, (share * gap.clamp(max=20).expm1()).log1p(), gap + math.log(share))
    p = log_p.exp()
    return -(p * torch.where(p > 0, mix, 0.0)).sum(-1)
