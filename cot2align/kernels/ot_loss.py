"""The front door of the OT loss: checks, packing, choice of a backend, operators, public functions.

Every form of the call ends in the same packed problem: tokens [tokens, width], segments (first
token, number of tokens) on both sides, pairs of segments. Two custom operators solve it:
`cot2align::ot_loss` (the losses) and `cot2align::ot_loss_gradient` (the losses, and the gradient
of their weighted sum). The only gradient that comes from above is one scalar per problem, and for
"mean" and "sum" the weights of the problems are known beforehand: so the forward pass computes the
gradient while the matrix is in the cache, and the backward pass scales it. For "none" the weights
arrive with the backward pass, which then solves again; no N x M matrix is ever kept.

The projection stays outside, in plain PyTorch, on whichever side makes the fewer operations.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cot2align.kernels import native, reference
from cot2align.kernels.reference import REDUCTIONS, OTPlan, OTSettings

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """Optimal-transport loss between student and projected teacher tokens (CoT2Align, eq. 9-14).

    Args:
        student: [B, N, d] float32, bfloat16 or float16 (float64: reference only).
        teacher: [B, M, D], on the same device; the dtypes may differ.
        projection: [D, d], `nn.Linear(D, d).weight.T`; None where D == d.
        student_mask, teacher_mask: bool [B, N] and [B, M], True for a token that counts; None: all
            do.
        epsilon: entropic regularisation, 1/lambda of the paper; accurate from 1e-3 to 1e3.
        num_iters: Sinkhorn iterations at most.
        tol: a problem stops when the L1 error of its plan's column sums is at most this; 0 = never.
        grad: "unrolled", the exact gradient of the iterations run; "implicit", at the fixed point;
            "detached", the plan as a constant.
        reduction: "mean" over the problems that have tokens on both sides, "sum", or "none" -> [B].
        backend: None (the best for the device), "reference", "native", "triton" or "cuda".

    Returns the loss as float32 (float64 for float64 inputs), differentiable once. A problem
    without tokens on a side has loss 0 and gradient 0; NaN or infinity in a problem's tokens give
    NaN for that problem only.

    Raises ValueError or TypeError, naming the argument, for shapes, dtypes, devices and settings
    that do not fit.
    """
    settings = OTSettings(epsilon, num_iters, tol, grad, backend)
    _check_tokens(student, teacher, projection, "[B, tokens, width]")
    _check_masks(student, teacher, student_mask, teacher_mask)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if choose_backend(settings.backend, student, teacher, projection) == "reference":
        return reference.fused_ot_loss(
            student,
            teacher,
            projection,
            student_mask=student_mask,
            teacher_mask=teacher_mask,
            epsilon=epsilon,
            num_iters=num_iters,
            tol=tol,
            grad=grad,
            reduction=reduction,
        )
    batch = len(student)
    with torch.autocast(student.device.type, enabled=False):
        x, segments_x = _pack(student, student_mask)
        y, segments_y = _pack(teacher, teacher_mask)
        segment = torch.arange(batch, device=student.device)
        pairs = torch.stack((segment, segment), dim=1)
        weights = None
        if reduction != "none":
            weights = _reduction_weights(segments_x[:, 1], segments_y[:, 1], reduction)
        entries = batch * student.shape[1] * teacher.shape[1]
        terms = _solve(x, y, projection, segments_x, segments_y, pairs, weights, entries, settings)
    return terms.loss if weights is None else terms.total


def fused_ot_loss_varlen(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    *,
    cu_seqlens_student: Tensor,
    cu_seqlens_teacher: Tensor,
    pairs: Tensor | None = None,
    max_seqlen_student: int | None = None,
    max_seqlen_teacher: int | None = None,
    epsilon: float = 0.1,
    num_iters: int = 100,
    tol: float = 1e-6,
    grad: str = "unrolled",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """`fused_ot_loss` on packed texts of different lengths.

    Args:
        student: [sum of the lengths, d]; teacher: [sum of the lengths, D]; projection as in
            `fused_ot_loss`.
        cu_seqlens_student, cu_seqlens_teacher: int32 or int64 [segments + 1], where each segment
            begins and the last one ends; on the CPU (then no value is ever read from the device)
            or on the tokens' device.
        pairs: int [Q, 2]: problem q aligns student segment pairs[q, 0] with teacher segment
            pairs[q, 1]; None: segment with segment. A token is projected once, however many
            problems it is in.
        max_seqlen_student, max_seqlen_teacher: bounds of the lengths, known on the host. The
            reference reads them from the device where cu_seqlens is there and they are not given.

    Returns the loss, [Q] for `reduction="none"`. Raises as `fused_ot_loss` does.
    """
    settings = OTSettings(epsilon, num_iters, tol, grad, backend)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    terms = _varlen(
        student,
        teacher,
        projection,
        (cu_seqlens_student, cu_seqlens_teacher),
        pairs,
        reduction,
        (max_seqlen_student, max_seqlen_teacher),
        settings,
    )
    return terms.loss if reduction == "none" else terms.total


class OTTerms(NamedTuple):
    """total: the sum of weights * loss, differentiable; the rest [Q], detached."""

    total: Tensor
    loss: Tensor
    num_iters: Tensor
    marginal_error: Tensor


def ot_loss_terms(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    *,
    cu_seqlens_student: Tensor,
    cu_seqlens_teacher: Tensor,
    pairs: Tensor | None = None,
    weights: Tensor,
    max_seqlen_student: int | None = None,
    max_seqlen_teacher: int | None = None,
    settings: OTSettings,
) -> OTTerms:
    """`fused_ot_loss_varlen` with a weight for each problem, [Q], and what a log wants to know.

    The weights get no gradient.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights must be a floating-point tensor, got {got}")
    terms = _varlen(
        student,
        teacher,
        projection,
        (cu_seqlens_student, cu_seqlens_teacher),
        pairs,
        weights,
        (max_seqlen_student, max_seqlen_teacher),
        settings,
    )
    return terms._replace(loss=terms.loss.detach())


def sinkhorn_plan(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None = None,
    *,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    epsilon: float = 0.1,
    num_iters: int = 100,
    tol: float = 1e-6,
) -> OTPlan:
    """The transport plan itself, for looking, not for training: computed by the reference, without
    a gradient.

    Arguments as in `fused_ot_loss`. Returns OTPlan(plan [B, N, M], cost [B, N, M], loss [B],
    num_iters [B], marginal_error [B]), zero where there is no token.
    """
    settings = OTSettings(epsilon, num_iters, tol)
    _check_tokens(student, teacher, projection, "[B, tokens, width]")
    _check_masks(student, teacher, student_mask, teacher_mask)
    with torch.no_grad():
        return reference.solve(student, teacher, projection, student_mask, teacher_mask, settings)


class OTLoss(nn.Module):
    """`fused_ot_loss` with a projection of its own, a parameter [teacher_dim, student_dim].

    settings: epsilon, num_iters, tol, grad, reduction and backend of `fused_ot_loss`.
    """

    def __init__(self, student_dim: int, teacher_dim: int, **settings: Any) -> None:
        super().__init__()
        self.reduction = settings.pop("reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}"
            )
        self.settings = OTSettings(**settings)
        self.projection = nn.Parameter(torch.empty(teacher_dim, student_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.projection.shape[0] ** -0.5
        nn.init.uniform_(self.projection, -bound, bound)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """student [B, N, student_dim], teacher [B, M, teacher_dim] -> loss."""
        return fused_ot_loss(
            student,
            teacher,
            self.projection,
            student_mask=student_mask,
            teacher_mask=teacher_mask,
            epsilon=self.settings.epsilon,
            num_iters=self.settings.num_iters,
            tol=self.settings.tol,
            grad=self.settings.grad,
            reduction=self.reduction,
            backend=self.settings.backend,
        )

    def extra_repr(self) -> str:
        teacher_dim, student_dim = self.projection.shape
        return f"{teacher_dim} -> {student_dim}, {self.settings}, reduction={self.reduction!r}"


def backend_for(device_type: str) -> tuple[str, str]:
    """The backend that `backend=None` means on a device, and why."""
    if device_type == "cpu":
        missing = native.missing()
        if missing is None:
            return "native", f"compiled, {native.INSTRUCTION_SETS[0]} on this CPU"
        return "reference", missing
    return "reference", f"there is no kernel for {device_type} tensors in this version"


def choose_backend(wanted: str | None, *tensors: Tensor | None) -> str:
    """The backend that serves the tensors; ValueError or TypeError where the wanted one cannot."""
    if wanted == "reference":
        return wanted
    device_type = next(t for t in tensors if t is not None).device.type
    default, why = backend_for(device_type)
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        if wanted is None:
            return "reference"
        raise TypeError(f"backend {wanted!r} takes float32, bfloat16 and float16, got float64")
    if wanted is None:
        if default == "reference":
            _warn_of_reference(device_type, why)
        return default
    if wanted != default:
        reason = "it takes CPU tensors" if wanted == "native" and device_type != "cpu" else why
        raise ValueError(
            f"backend {wanted!r} cannot serve {device_type} tensors ({reason}); {default!r} can"
        )
    return wanted


_warned: set[str] = set()


def _warn_of_reference(device_type: str, why: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(f"cot2align: the slow reference serves {device_type}: {why}", stacklevel=4)


# ---- checks


def _check_tokens(student: Tensor, teacher: Tensor, projection: Tensor | None, form: str) -> None:
    dims = form.count(",") + 1
    for name, tensor in (("student", student), ("teacher", teacher), ("projection", projection)):
        if tensor is None and name == "projection":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, student on {student.device}")
        if tensor.dim() != (2 if name == "projection" else dims):
            expected = "[D, d]" if name == "projection" else form
            raise ValueError(f"{name} must be {expected}, got shape {tuple(tensor.shape)}")
    if dims == 3 and len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} problems (axis 0), teacher {len(teacher)}")
    width, teacher_width = student.shape[-1], teacher.shape[-1]
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} has width 0: shape {tuple(tensor.shape)}")
    if projection is None:
        if width != teacher_width:
            raise ValueError(
                f"projection must be [{teacher_width}, {width}] for a student of width {width} and "
                f"a teacher of width {teacher_width}, got None"
            )
    elif projection.shape != (teacher_width, width):
        raise ValueError(
            f"projection must be [{teacher_width}, {width}] (teacher width, student width), "
            f"got {list(projection.shape)}"
        )


def _check_masks(
    student: Tensor, teacher: Tensor, student_mask: Tensor | None, teacher_mask: Tensor | None
) -> None:
    sides = (("student_mask", student_mask, student), ("teacher_mask", teacher_mask, teacher))
    for name, mask, tokens in sides:
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {getattr(mask, 'dtype', mask)}")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"{name} must be {list(tokens.shape[:2])}, got {list(mask.shape)}")
        if mask.device != tokens.device:
            raise ValueError(f"{name} is on {mask.device}, its tokens on {tokens.device}")


def _check_cu_seqlens(
    name: str, cu_seqlens: Tensor, tokens: Tensor, bound: int | None
) -> int | None:
    """-> a bound of the lengths; None where it could only be read from the device."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} must be [segments + 1], got shape {tuple(cu_seqlens.shape)}")
    if not cu_seqlens.is_cpu and cu_seqlens.device != tokens.device:
        raise ValueError(f"{name} is on {cu_seqlens.device}, its tokens on {tokens.device}")
    longest = name.replace("cu_seqlens", "max_seqlen")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
        raise ValueError(f"{longest} must be an int >= 0 or None, got {bound!r}")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return bound
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens) or (lengths < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to {len(tokens)}, the number of tokens, got "
            + (str(cu_seqlens.tolist()) if len(cu_seqlens) <= 16 else _summary(cu_seqlens))
        )
    most = int(lengths.max()) if len(lengths) else 0
    if bound is not None and bound < most:
        raise ValueError(f"{longest} is {bound}, but a segment has {most} tokens")
    return most


def _summary(cu_seqlens: Tensor) -> str:
    falls = (cu_seqlens.diff() < 0).nonzero().flatten().tolist()
    where = f", falling at index {falls[0] + 1}" if falls else ""
    return f"{len(cu_seqlens)} values from {cu_seqlens[0]} to {cu_seqlens[-1]}{where}"


def _check_pairs(
    pairs: Tensor | None, segments_x: int, segments_y: int, device: torch.device
) -> Tensor:
    if pairs is None:
        if segments_x != segments_y:
            raise ValueError(
                f"pairs is None, but there are {segments_x} student segments and {segments_y} "
                "teacher segments"
            )
        index = torch.arange(segments_x, device=device)
        return torch.stack((index, index), dim=1)
    if not isinstance(pairs, Tensor) or pairs.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"pairs must be an int tensor, got {getattr(pairs, 'dtype', pairs)}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [Q, 2], got shape {tuple(pairs.shape)}")
    if pairs.is_cpu and len(pairs) and not torch.compiler.is_compiling():
        most = pairs.max(0).values.tolist()
        if pairs.min() < 0 or most[0] >= segments_x or most[1] >= segments_y:
            raise ValueError(
                f"pairs must name student segments below {segments_x} and teacher segments below "
                f"{segments_y}, got values from {int(pairs.min())} to {most}"
            )
    return pairs.to(device=device, dtype=torch.int64).contiguous()


# ---- packing


def _pack(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, N, width] -> packed tokens [T, width] and segments [B, 2].

    On the CPU masked tokens are left out. Where shapes must not depend on values (a GPU,
    torch.compile) they are moved behind the others and zeroed, and the segments step over them.
    """
    batch, length, width = tokens.shape
    first = torch.arange(batch, device=tokens.device) * length
    if mask is None:
        lengths = torch.full_like(first, length)
        return tokens.reshape(-1, width), torch.stack((first, lengths), dim=1)
    lengths = mask.sum(1)
    if tokens.is_cpu and not torch.compiler.is_compiling():
        packed = tokens.reshape(-1, width).index_select(0, mask.flatten().nonzero()[:, 0])
        return packed, torch.stack((lengths.cumsum(0) - lengths, lengths), dim=1)
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    moved = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
    behind = torch.arange(length, device=tokens.device) >= lengths[:, None]
    moved = moved.masked_fill(behind[:, :, None], 0.0)
    return moved.reshape(-1, width), torch.stack((first, lengths), dim=1)


def _reduction_weights(lengths_x: Tensor, lengths_y: Tensor, reduction: str) -> Tensor:
    """What "mean" or "sum" is, as weights [Q] of the problems' losses."""
    valid = ((lengths_x > 0) & (lengths_y > 0)).float()
    return valid / valid.sum().clamp(min=1) if reduction == "mean" else valid


def _varlen(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor],
    pairs: Tensor | None,
    weighting: Tensor | str,  # weights [Q], or a reduction
    bounds: tuple[int | None, int | None],
    settings: OTSettings,
) -> OTTerms:
    _check_tokens(student, teacher, projection, "[tokens, width]")
    longest_x = _check_cu_seqlens("cu_seqlens_student", cu_seqlens[0], student, bounds[0])
    longest_y = _check_cu_seqlens("cu_seqlens_teacher", cu_seqlens[1], teacher, bounds[1])
    device = student.device
    pairs = _check_pairs(pairs, len(cu_seqlens[0]) - 1, len(cu_seqlens[1]) - 1, device)
    segments_x, segments_y = (
        torch.stack((cu[:-1], cu.diff()), dim=1).to(device=device, dtype=torch.int64)
        for cu in cu_seqlens
    )
    weights = None
    if isinstance(weighting, Tensor):
        if weighting.shape != pairs.shape[:1]:
            raise ValueError(f"weights must be [{len(pairs)}], got {list(weighting.shape)}")
        weights = weighting.detach().to(device=device, dtype=torch.float32).contiguous()
    elif weighting != "none":
        lengths = segments_x[pairs[:, 0], 1], segments_y[pairs[:, 1], 1]
        weights = _reduction_weights(*lengths, weighting)
    with torch.autocast(device.type, enabled=False):
        if choose_backend(settings.backend, student, teacher, projection) == "reference":
            x, mask_x = _pad(student, segments_x[pairs[:, 0]], longest_x)
            y, mask_y = _pad(teacher, segments_y[pairs[:, 1]], longest_y)
            solved = reference.solve(x, y, projection, mask_x, mask_y, settings)
            total = solved.loss.sum() if weights is None else solved.loss @ weights.to(solved.loss)
            return OTTerms(total, *solved[2:])
        per_segment = len(student) * len(teacher) / max(1, len(segments_x) * len(segments_y))
        entries = int(len(pairs) * per_segment)
        return _solve(
            student, teacher, projection, segments_x, segments_y, pairs, weights, entries, settings
        )


def _pad(tokens: Tensor, segments: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """[T, width] and segments [Q, 2] -> [Q, length, width] and their mask [Q, length].

    Without a bound from the host the longest length is read from the device.
    """
    if length is None:
        length = int(segments[:, 1].max()) if len(segments) else 0
    step = torch.arange(length, device=tokens.device)
    mask = step < segments[:, 1:]
    index = torch.where(mask, segments[:, :1] + step, len(tokens))
    behind = torch.cat((tokens, tokens.new_zeros(1, tokens.shape[1])))
    return behind.index_select(0, index.flatten()).view(*index.shape, tokens.shape[1]), mask


# ---- the packed problem


def _solve(
    student: Tensor,  # [tokens, d]
    teacher: Tensor,  # [tokens, D]
    projection: Tensor | None,  # [D, d]
    segments_x: Tensor,  # [segments, 2]
    segments_y: Tensor,
    pairs: Tensor,  # [Q, 2]
    weights: Tensor | None,  # [Q]; None: differentiate each problem's loss
    entries: int,  # of all similarity matrices, about
    settings: OTSettings,
) -> OTTerms:
    x, z = student.float(), teacher.float()
    if projection is not None:
        wide, narrow = teacher.shape[1], student.shape[1]
        one_side = wide * narrow
        backward = 2 if teacher.requires_grad else 1
        by_teacher = (1 + backward) * len(teacher) * one_side + 3 * entries * narrow
        by_student = 3 * len(student) * one_side + (1 + backward) * entries * wide
        if by_teacher <= by_student:
            z = z @ projection.float()
        else:
            x = x @ projection.float().T
    enabled = torch.is_grad_enabled()
    arguments = (
        x.contiguous(),
        z.contiguous(),
        segments_x,
        segments_y,
        pairs,
        weights,
        1 / math.sqrt(student.shape[1]),
        settings.epsilon,
        settings.num_iters,
        settings.tol,
        settings.grad,
        enabled and x.requires_grad,
        enabled and z.requires_grad,
    )
    if weights is None:
        loss, num_iters, marginal_error = _Losses.apply(*arguments)
        return OTTerms(loss.sum(), loss, num_iters, marginal_error)
    return OTTerms(*_WeightedLoss.apply(*arguments))


class _WeightedLoss(torch.autograd.Function):
    """-> weights @ loss; and loss, num_iters, marginal_error [Q] without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        segments_x: Tensor,
        segments_z: Tensor,
        pairs: Tensor,
        weights: Tensor,
        scale: float,
        epsilon: float,
        num_iters: int,
        tol: float,
        grad: str,
        need_x: bool,
        need_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem = (x, z, segments_x, segments_z, pairs)
        how = (scale, epsilon, num_iters, tol)
        if need_x or need_z:
            loss, iterations, marginal_error, dx, dz = _ot_loss_gradient(
                *problem, weights, *how, grad, need_x, need_z
            )
            ctx.save_for_backward(dx, dz)
        else:
            loss, iterations, marginal_error = _ot_loss(*problem, *how)
        ctx.need_x, ctx.need_z = need_x, need_z
        ctx.mark_non_differentiable(loss, iterations, marginal_error)
        return weights @ loss, loss, iterations, marginal_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dz = ctx.saved_tensors
        return (upstream * dx if ctx.need_x else None, upstream * dz if ctx.need_z else None) + (
            None,
        ) * 11


class _Losses(torch.autograd.Function):
    """-> loss [Q]; and num_iters, marginal_error [Q] without a gradient. Backward solves again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        segments_x: Tensor,
        segments_z: Tensor,
        pairs: Tensor,
        weights: None,
        scale: float,
        epsilon: float,
        num_iters: int,
        tol: float,
        grad: str,
        need_x: bool,
        need_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, z, segments_x, segments_z, pairs)
        ctx.settings = (scale, epsilon, num_iters, tol, grad, need_x, need_z)
        loss, iterations, marginal_error = _ot_loss(
            x, z, segments_x, segments_z, pairs, scale, epsilon, num_iters, tol
        )
        ctx.mark_non_differentiable(iterations, marginal_error)
        return loss, iterations, marginal_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_z = ctx.settings[-2:]
        weights = upstream.contiguous()
        *_, dx, dz = _ot_loss_gradient(*ctx.saved_tensors, weights, *ctx.settings)
        return (dx if need_x else None, dz if need_z else None) + (None,) * 11


@torch.library.custom_op("cot2align::ot_loss", mutates_args=(), device_types="cpu")
def _ot_loss(
    x: Tensor,
    z: Tensor,
    segments_x: Tensor,
    segments_z: Tensor,
    pairs: Tensor,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return native.ot_loss(
        x,
        z,
        segments_x,
        segments_z,
        pairs,
        x.new_ones(len(pairs)),
        scale=scale,
        epsilon=epsilon,
        num_iters=num_iters,
        tol=tol,
        gradient="none",
    )[:3]


@_ot_loss.register_fake
def _(x: Tensor, z: Tensor, sx: Tensor, sz: Tensor, pairs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    per_problem = x.new_empty(pairs.shape[0])
    return per_problem, per_problem.to(torch.int32), torch.empty_like(per_problem)


@torch.library.custom_op("cot2align::ot_loss_gradient", mutates_args=(), device_types="cpu")
def _ot_loss_gradient(
    x: Tensor,
    z: Tensor,
    segments_x: Tensor,
    segments_z: Tensor,
    pairs: Tensor,
    weights: Tensor,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
    grad: str,
    need_x: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return native.ot_loss(
        x,
        z,
        segments_x,
        segments_z,
        pairs,
        weights,
        scale=scale,
        epsilon=epsilon,
        num_iters=num_iters,
        tol=tol,
        gradient=grad,
        need_x=need_x,
        need_z=need_z,
    )


@_ot_loss_gradient.register_fake
def _(
    x: Tensor, z: Tensor, sx: Tensor, sz: Tensor, pairs: Tensor, weights: Tensor, *how: Any
) -> tuple[Tensor, ...]:
    per_problem = x.new_empty(pairs.shape[0])
    dx = torch.empty_like(x) if how[-2] else x.new_empty(0)
    dz = torch.empty_like(z) if how[-1] else z.new_empty(0)
    integers = per_problem.to(torch.int32)
    return per_problem, integers, torch.empty_like(per_problem), dx, dz
