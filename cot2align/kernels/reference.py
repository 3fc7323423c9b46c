"""The specification: the OT loss in plain PyTorch, differentiated by autograd.

For each problem (one student text against one teacher text, eq. 9-14 of the CoT2Align paper):

    S = X (Y P)^T / sqrt(d)                          [N, M]
    p = softmax of S over the teacher's tokens       [N, M]
    C = 1 - p
    T = argmin over U(1/N, 1/M) of <T, C> - epsilon H(T)
    L = <T, C>

T comes from `num_iters` log-domain Sinkhorn iterations, column potentials g first, row potentials
f second, from f = 0:

    g_j = log(1/M) - LSE_i(f_i - C_ij / epsilon)
    f_i = log(1/N) - LSE_j(g_j - C_ij / epsilon)
    T   = exp(f + g - C / epsilon)

A problem stops after the first iteration whose column sums differ from 1/M by at most `tol` in L1.
Every other backend is tested against this file in float64; it is also the naive loss of the
benchmarks, with its memory of O(num_iters N M) for the autograd tape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

GRADS = ("unrolled", "implicit", "detached")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = (None, "reference", "native", "triton", "cuda")


@dataclass(frozen=True)
class OTSettings:
    """The settings of the OT loss; raises ValueError or TypeError for one that makes no sense.

    epsilon: entropic regularisation, 1/lambda of the paper, > 0.
    num_iters: Sinkhorn iterations at most, >= 1.
    tol: stop a problem when its L1 column-marginal error is at most this, 0 = never.
    grad: "unrolled" (exact for the iterations run), "implicit" (at the fixed point) or "detached"
        (the plan as a constant).
    backend: None (the best one for the device), "reference", "native", "triton" or "cuda".
    """

    epsilon: float = 0.1
    num_iters: int = 100
    tol: float = 1e-6
    grad: str = "unrolled"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "tol"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a positive finite number, got {self.epsilon}")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol}")
        if isinstance(self.num_iters, bool) or not isinstance(self.num_iters, int):
            raise TypeError(f"num_iters must be an int, got {type(self.num_iters).__name__}")
        if not 1 <= self.num_iters < 2**31:
            raise ValueError(f"num_iters must be from 1 to 2**31 - 1, got {self.num_iters}")
        if self.grad not in GRADS:
            raise ValueError(f"grad must be one of {', '.join(GRADS)}, got {self.grad!r}")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(str, BACKENDS))}, got {self.backend!r}"
            )


class OTPlan(NamedTuple):
    """What one solve gives. plan, cost [B, N, M]; loss, num_iters, marginal_error [B].

    marginal_error is the L1 distance of the plan's column sums from 1/M. Rows, columns and
    problems without tokens are 0.
    """

    plan: Tensor
    cost: Tensor
    loss: Tensor
    num_iters: Tensor
    marginal_error: Tensor


def fused_ot_loss(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    *,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    epsilon: float = 0.1,
    num_iters: int = 100,
    tol: float = 1e-6,
    grad: str = "unrolled",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """`cot2align.fused_ot_loss` by autograd, in float64 if an input is float64, else in float32.

    `backend` is there for the signature's sake and must be None or "reference".
    """
    if backend not in (None, "reference"):
        raise ValueError(f"backend of the reference must be None or 'reference', got {backend!r}")
    settings = OTSettings(epsilon, num_iters, tol, grad, backend)
    solved = solve(student, teacher, projection, student_mask, teacher_mask, settings)
    valid = torch.ones_like(solved.num_iters, dtype=torch.bool)
    for mask in (student_mask, teacher_mask):
        if mask is not None:
            valid = valid & mask.any(dim=1)
    return reduce(solved.loss, valid, reduction)


def loss_dtype(*tensors: Tensor | None) -> torch.dtype:
    """In which the loss of these tensors is computed: float64 if one is, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def reduce(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Losses [B] -> scalar or [B]; "mean" is over the problems that have tokens on both sides."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / valid.sum().clamp(min=1)
    raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def solve(
    student: Tensor,  # [B, N, d]
    teacher: Tensor,  # [B, M, D]
    projection: Tensor | None,  # [D, d]
    student_mask: Tensor | None,  # [B, N]
    teacher_mask: Tensor | None,  # [B, M]
    settings: OTSettings,
) -> OTPlan:
    """Solve a padded batch; `loss` is differentiable as `settings.grad` says, the rest detached."""
    with torch.autocast(student.device.type, enabled=False):
        dtype = loss_dtype(student, teacher, projection)
        x, y = student.to(dtype), teacher.to(dtype)
        rows = _all_valid(x) if student_mask is None else student_mask
        cols = _all_valid(y) if teacher_mask is None else teacher_mask
        n, m = x.shape[1], y.shape[1]
        if n == 0 or m == 0:  # a side needs a position, if only a masked one
            x, y = F.pad(x, (0, 0, 0, 1)), F.pad(y, (0, 0, 0, 1))
            rows, cols = F.pad(rows, (0, 1)), F.pad(cols, (0, 1))
        # What does not count may be NaN; zero times NaN would reach the gradient.
        valid = rows.any(dim=1) & cols.any(dim=1)
        x = x.masked_fill(~(rows & valid[:, None])[..., None], 0.0)
        y = y.masked_fill(~(cols & valid[:, None])[..., None], 0.0)
        # A problem without tokens is solved as if all its (zero) tokens were there, and its loss
        # dropped.
        rows, cols = rows | ~valid[:, None], cols | ~valid[:, None]

        z = y if projection is None else y @ projection.to(dtype)
        similarity = x @ z.transpose(1, 2) / math.sqrt(x.shape[-1])
        cost = _softmax_cost(similarity.masked_fill(~cols[:, None, :], -math.inf))
        log_a = torch.where(rows, -rows.sum(1, keepdim=True).to(dtype).log(), -math.inf)
        log_b = torch.where(cols, -cols.sum(1, keepdim=True).to(dtype).log(), -math.inf)

        with torch.set_grad_enabled(torch.is_grad_enabled() and settings.grad == "unrolled"):
            plan, num_iters, marginal_error = _sinkhorn(cost, log_a, log_b, settings)
        if settings.grad == "implicit":
            slope = _implicit_gradient(plan.detach(), cost.detach(), settings.epsilon)
            loss = (plan * cost).sum((1, 2)).detach() + _zero_with_slope(cost, slope)
        else:
            loss = (plan * cost).sum((1, 2))

        shown = (valid[:, None] & rows)[:, :, None] & cols[:, None, :]
        return OTPlan(
            plan.detach().masked_fill(~shown, 0.0)[:, :n, :m],
            cost.detach().masked_fill(~shown, 0.0)[:, :n, :m],
            torch.where(valid, loss, 0.0),
            num_iters.masked_fill(~valid, 0),
            marginal_error.masked_fill(~valid, 0.0),
        )


def _all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _softmax_cost(similarity: Tensor) -> Tensor:
    """1 - softmax over the last axis [B, N, M], exact to rounding where the softmax saturates.

    There 1 - p cancels at the row's largest entry, which is rest / (1 + rest) with rest the sum of
    the others.
    """
    largest = similarity.argmax(dim=-1, keepdim=True)
    exponential = (similarity - similarity.gather(-1, largest).detach()).exp()
    at_largest = torch.zeros_like(exponential, dtype=torch.bool).scatter(-1, largest, True)
    rest = exponential.masked_fill(at_largest, 0.0).sum(-1, keepdim=True)
    total = rest + exponential.gather(-1, largest)
    return torch.where(at_largest, rest / total, 1 - exponential / total)


def _sinkhorn(
    cost: Tensor,  # [B, N, M]
    log_a: Tensor,  # [B, N], -inf where masked
    log_b: Tensor,  # [B, M], -inf where masked
    settings: OTSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> plan [B, N, M], num_iters [B], marginal_error [B]."""
    exponent = -cost / settings.epsilon
    f = torch.where(log_a.isinf(), log_a, 0.0)
    g = log_b
    column = torch.logsumexp(exponent + f[:, :, None], dim=1)
    running = torch.ones_like(f[:, 0], dtype=torch.bool)
    num_iters = torch.zeros_like(running, dtype=torch.int32)
    for _ in range(settings.num_iters):
        new_g = log_b - column
        new_f = log_a - torch.logsumexp(exponent + new_g[:, None, :], dim=2)
        if settings.tol > 0:
            g = torch.where(running[:, None], new_g, g)
            f = torch.where(running[:, None], new_f, f)
        else:
            g, f = new_g, new_f
        num_iters = num_iters + running
        column = torch.logsumexp(exponent + f[:, :, None], dim=1)
        with torch.no_grad():
            marginal_error = ((column + g).exp() - log_b.exp()).abs().sum(1)
            if settings.tol > 0:
                running = running & ~(marginal_error <= settings.tol)
                if not running.any():
                    break
    return (exponent + f[:, :, None] + g[:, None, :]).exp(), num_iters, marginal_error


def float64_device(device: torch.device) -> torch.device:
    """Where tensors of this device can be float64: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def _implicit_gradient(plan: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """dL/dC [B, N, M] at the fixed point: T * (1 - (C - z - w) / epsilon), where z and w solve

        [diag(r)  T      ] [z]   [W 1  ]
        [T^T      diag(c)] [w] = [W^T 1]      W = T * C, r and c the plan's own row and column sums.

    z is eliminated. What remains for w is singular along the constants, and wherever the plan
    falls into blocks that exchange no mass; those directions do not matter, and the pseudo-inverse
    leaves them out. In float64, on the CPU where the device has none.
    """
    device = float64_device(cost.device)
    plan, cost = plan.to(device).double(), cost.to(device).double()
    finite = plan.isfinite().all(2).all(1)[:, None, None]
    plan = torch.where(finite, plan, 1.0)
    weighted = plan * cost.nan_to_num()
    rows, cols = plan.sum(2, keepdim=True), plan.sum(1)
    per_row = (1 / rows).masked_fill(rows == 0, 0.0)
    scale = cols.rsqrt().masked_fill(cols == 0, 0.0)[:, :, None]
    system = torch.diag_embed(cols) - plan.mT @ (per_row * plan)
    right = weighted.sum(1)[:, :, None] - plan.mT @ (per_row * weighted.sum(2, keepdim=True))
    inverse = torch.linalg.pinv(scale * system * scale.mT, rtol=1e-12, hermitian=True)
    w = scale * (inverse @ (scale * right))
    z = per_row * (weighted.sum(2, keepdim=True) - plan @ w)
    return torch.where(finite, plan * (1 - (cost - z - w.mT) / epsilon), math.nan)


def _zero_with_slope(cost: Tensor, slope: Tensor) -> Tensor:
    """Zero per problem, whose gradient with respect to the cost is `slope`."""
    term = (cost * slope.to(cost.dtype).to(cost.device)).sum((1, 2))
    return term - term.detach()
