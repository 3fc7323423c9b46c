"""The ways to compute the loss: the product and its peers, each as its authors document it.

A way takes a case's tensors (student [B, N, d], teacher [B, M, D], projection [D, d], masks or
None) and returns the mean loss, to be differentiated by autograd for the student and the
projection; the teacher is frozen, as in training. The peers get the same tensors in their own
dtype, except that they compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Tensors
from cot2align import fused_ot_loss
from cot2align.kernels import reference


@dataclass(frozen=True)
class Way:
    run: Callable[[Case, Tensors], Tensor]
    note: str  # what it is, and what it cannot do
    masks: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str | None = None  # a package that may be missing
    graph: bool = False  # captured once, replayed

    def cannot(self, case: Case, device: str) -> str | None:
        """Why it does not run this case, or None."""
        if device not in self.devices:
            return f"not on {device}"
        if case.ragged and not self.masks:
            return "takes no masks"
        if self.needs and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


def _through(function: Callable[..., Tensor], **fixed: Any) -> Callable[[Case, Tensors], Tensor]:
    """A function of fused_ot_loss's signature as a way."""

    def run(case: Case, tensors: Tensors) -> Tensor:
        settings = {"epsilon": case.epsilon, "num_iters": case.num_iters, "tol": case.tol}
        return function(**tensors, **settings, **fixed)

    return run


def _projected(teacher: Tensor | None, projection: Tensor | None) -> Tensor:
    assert teacher is not None
    return teacher.float() if projection is None else teacher.float() @ projection.float()


def _cost(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """-> 1 - softmax(S) [B, N, M] in float32, masses a [B, N] and b [B, M], 0 where masked."""
    x, y = tensors["student"], tensors["teacher"]
    assert x is not None
    assert y is not None
    z = _projected(y, tensors["projection"])
    similarity = x.float() @ z.mT / math.sqrt(x.shape[-1])
    masses = []
    for name, tokens in (("student_mask", x), ("teacher_mask", y)):
        mask = tensors[name]
        valid = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
        masses.append(valid.float() / valid.float().sum(1, keepdim=True))
    similarity = similarity.masked_fill(masses[1][:, None] == 0, -math.inf)
    return 1 - similarity.softmax(-1), masses[0], masses[1]


def bmm(case: Case, tensors: Tensors) -> Tensor:
    """The scaling form on batched matrix-vector products: the strongest simple rival."""
    cost, a, b = _cost(tensors)
    kernel = torch.exp(-cost / case.epsilon)
    u = (a > 0).float()
    for _ in range(case.num_iters):
        v = b / torch.bmm(u[:, None], kernel)[:, 0]
        u = a / torch.bmm(kernel, v[:, :, None])[:, :, 0]
    return (u[:, :, None] * kernel * v[:, None] * cost).sum((1, 2)).mean()


@cache
def _compiled_iteration() -> Callable[..., tuple[Tensor, Tensor]]:
    def iteration(exponent: Tensor, f: Tensor, log_a: Tensor, log_b: Tensor):
        g = log_b - torch.logsumexp(exponent + f[:, :, None], dim=1)
        f = log_a - torch.logsumexp(exponent + g[:, None, :], dim=2)
        return f, g

    return torch.compile(iteration, dynamic=False)


def compiled(case: Case, tensors: Tensors) -> Tensor:
    """One log-domain iteration under torch.compile, called in a loop."""
    cost, a, b = _cost(tensors)
    exponent, log_a, log_b = -cost / case.epsilon, a.log(), b.log()
    f = torch.zeros_like(a)
    for _ in range(case.num_iters):
        f, g = _compiled_iteration()(exponent, f, log_a, log_b)
    return ((exponent + f[:, :, None] + g[:, None]).exp() * cost).sum((1, 2)).mean()


def authors_loop(case: Case, tensors: Tensors) -> Tensor:
    """The way of the authors' code: sample by sample, plain domain, 1e-9 added to each denominator,
    a test of convergence on the host after every iteration."""
    x, y = tensors["student"], tensors["teacher"]
    assert x is not None
    assert y is not None
    p, losses = tensors["projection"], []
    for sample in range(len(x)):
        s, t = x[sample].float(), y[sample].float()
        for name in ("student_mask", "teacher_mask"):
            mask = tensors[name]
            if mask is not None:
                s, t = (s[mask[sample]], t) if name[0] == "s" else (s, t[mask[sample]])
        cost = 1 - torch.softmax(s @ _projected(t, p).mT / math.sqrt(s.shape[1]), dim=-1)
        kernel = torch.exp(-cost / case.epsilon)
        a, b = torch.full_like(s[:, 0], 1 / len(s)), torch.full_like(t[:, 0], 1 / len(t))
        u = torch.ones_like(a)
        for _ in range(case.num_iters):
            v = b / (kernel.mT @ u + 1e-9)
            u_next = a / (kernel @ v + 1e-9)
            moved = (u_next - u).detach().abs().max().item()
            u = u_next
            if moved < case.tol:
                break
        losses.append((u[:, None] * kernel * v * cost).sum())
    return torch.stack(losses).mean()


def pot(case: Case, tensors: Tensors) -> Tensor:
    """POT's batched solver on the transposed cost: its rows come first, ours are the columns."""
    from ot.batch import solve_batch

    cost, a, b = _cost(tensors)
    solved = solve_batch(
        cost.mT.contiguous(),
        reg=case.epsilon,
        a=b,
        b=a,
        max_iter=case.num_iters,
        tol=case.tol,
        method="log_sinkhorn",
        grad="autodiff",
    )
    return solved.value_linear.mean()


def geomloss(case: Case, tensors: Tensors) -> Tensor:
    """<plan, cost> of GeomLoss's batched solver, which gives the entropic value only."""
    from geomloss.ot._implementations.matrix import solve_batch

    cost, a, b = _cost(tensors)
    solved = solve_batch(cost, reg=case.epsilon, a=a, b=b, max_iter=case.num_iters)
    return (solved.plan * cost).sum((1, 2)).mean()


def flash_sinkhorn(case: Case, tensors: Tensors) -> Tensor:
    """FlashSinkhorn on its own cost, the squared distance of the same tokens."""
    from flash_sinkhorn import SamplesLoss

    x, y = tensors["student"], tensors["teacher"]
    assert x is not None
    solve = SamplesLoss(
        loss="sinkhorn",
        backend="alternating",
        use_epsilon_scaling=False,
        eps=case.epsilon * x.shape[-1],  # its costs are of the order of the width
        n_iters=case.num_iters,
        allow_tf32=False,
    )
    return solve(x.float(), _projected(y, tensors["projection"])).mean()


WAYS: dict[str, Way] = {
    "product": Way(_through(fused_ot_loss), "cot2align.fused_ot_loss, the device's own backend"),
    "triton": Way(
        _through(fused_ot_loss, backend="triton"), "the Triton kernels alone", devices=("cuda",)
    ),
    "product-graph": Way(
        _through(fused_ot_loss),
        "the product in a CUDA graph, without the host's part",
        devices=("cuda",),
        graph=True,
    ),
    "naive": Way(_through(reference.fused_ot_loss), "batched log-domain iterations under autograd"),
    "compile": Way(
        compiled, "the same iteration under torch.compile, looped; no masks, no stop", masks=False
    ),
    "bmm": Way(bmm, "scaling form on torch.bmm; overflows for small epsilon; no stop"),
    "bmm-graph": Way(bmm, "bmm in a CUDA graph", devices=("cuda",), graph=True),
    "authors": Way(authors_loop, "a Python loop over samples; wrong for small epsilon"),
    "pot": Way(pot, "ot.batch.solve_batch, grad='autodiff'; no masks", masks=False, needs="ot"),
    "geomloss": Way(
        geomloss,
        "geomloss 0.3 solve_batch: anneals epsilon; its gradient goes through the last step only, "
        "so it is not this loss's",
        masks=False,
        needs="geomloss",
    ),
    "flash": Way(
        flash_sinkhorn,
        "flash-sinkhorn's SamplesLoss on squared distances: another cost, so another loss; only "
        "its time at equal sizes compares; no masks",
        masks=False,
        devices=("cuda",),
        needs="flash_sinkhorn",
    ),
}
