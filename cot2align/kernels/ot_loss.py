"""The front door of the OT loss: checks, packing, choice of a backend, operators, public functions.

Every form of the call ends in the same packed problem: tokens [tokens, width], segments (first
token, number of tokens) on both sides, pairs of segments. Two custom operators solve it:
`cot2align::ot_loss` (the losses) and `cot2align::ot_loss_gradient` (the losses, and the gradient
of their weighted sum). The only gradient that comes from above is one scalar per problem, and for
"mean" and "sum" the weights of the problems are known beforehand: so the forward pass computes the
gradient while the matrix is in the cache, and the backward pass scales it. For "none" the weights
arrive with the backward pass, which then solves again; no N x M matrix is ever kept.

The projection stays outside, a matrix product on whichever side makes the fewer operations.

The compiled CPU kernels compute in float32. On a GPU, tokens of one 16-bit dtype keep it, for the
tensor cores; sums, similarities and all of the iterations are float32 there too.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cot2align.kernels import backends, native, reference
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
            "triton" takes CPU tensors under TRITON_INTERPRET=1.

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
    bounds = (student.shape[1], teacher.shape[1])
    backend = choose_backend(settings.backend, student, teacher, projection, bounds=bounds)
    if backend == "reference":
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
        leave_out = backend == "native" and not torch.compiler.is_compiling()
        x = _pack(student, student_mask, leave_out)
        y = _pack(teacher, teacher_mask, leave_out)
        segment = torch.arange(batch, device=student.device)
        pairs = torch.stack((segment, segment), dim=1)
        weights = None
        if reduction != "none":
            lengths = x.segments[:, 1], y.segments[:, 1]
            weights = _reduction_weights(*lengths, reduction, torch.float32)
        uniform = student_mask is None and teacher_mask is None
        sizes = _Sizes(*bounds, batch * bounds[0] * _padded(bounds[1]), uniform)
        terms = _solve(x, y, projection, pairs, weights, sizes, settings, backend)
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
        max_seqlen_student, max_seqlen_teacher: bounds of the lengths, known on the host. They are
            read from the device, once, where cu_seqlens is there and they are not given;
            `torch.compile(fullgraph=True)` on a GPU needs them. A problem that is longer than a
            given bound has loss NaN.

    Returns the loss as float32 (float64 for float64 inputs), a scalar or, for `reduction="none"`,
    [Q] (eq. 9-14 for each pair). Raises ValueError or TypeError as `fused_ot_loss` does; the values
    of cu_seqlens and pairs are checked on the CPU only, on a device they must be right.
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
    """The transport plan itself (CoT2Align, eq. 9-13), for looking, not for training: computed by
    the reference, without a gradient.

    Arguments as in `fused_ot_loss`. Returns OTPlan(plan [B, N, M], cost [B, N, M], loss [B],
    num_iters [B], marginal_error [B]), zero where there is no token. Raises ValueError or TypeError
    as `fused_ot_loss` does.
    """
    settings = OTSettings(epsilon, num_iters, tol)
    _check_tokens(student, teacher, projection, "[B, tokens, width]")
    _check_masks(student, teacher, student_mask, teacher_mask)
    with torch.no_grad():
        return reference.solve(student, teacher, projection, student_mask, teacher_mask, settings)


class OTLoss(nn.Module):
    """`fused_ot_loss` (CoT2Align, eq. 9-14) with a projection of its own, a parameter
    [teacher_dim, student_dim].

    settings: epsilon, num_iters, tol, grad, reduction and backend of `fused_ot_loss`. Raises
    ValueError or TypeError for settings that do not fit.
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
        """student [B, N, student_dim], teacher [B, M, teacher_dim], masks bool [B, N] and [B, M] ->
        the loss, a scalar or, for reduction "none", [B]. Raises as `fused_ot_loss` does."""
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


def choose_backend(
    wanted: str | None, *tensors: Tensor | None, bounds: tuple[int, int] = (1, 1)
) -> str:
    """The backend that serves the tensors, for problems of up to bounds[0] x bounds[1] tokens;
    "triton+cuda": Triton for the problems that one launch holds, CUDA for the others.

    Raises ValueError or TypeError where the wanted one cannot.
    """
    if wanted == "reference":
        return wanted
    if reference.loss_dtype(*tensors) == torch.float64:
        if wanted is None:
            return "reference"
        raise TypeError(f"backend {wanted!r} takes float32, bfloat16 and float16, got float64")
    device = backends.Device.of(next(t for t in tensors if t is not None).device)
    if wanted is None:
        chosen = backends.choose(device, *bounds)
        if chosen.backend == "reference":
            _warn_of_reference(device, bounds)
        return "triton+cuda" if chosen.backend == "cuda" else chosen.backend
    if why := backends.refusal(wanted, device, *bounds):
        able = ", ".join(repr(c.backend) for c in backends.candidates(device, *bounds) if c.serves)
        raise ValueError(
            f"backend {wanted!r} cannot serve {device.type} tensors of up to "
            f"{bounds[0]} x {bounds[1]} tokens ({why}); {able} can"
        )
    return wanted


_warned: set[str] = set()


def _warn_of_reference(device: backends.Device, bounds: tuple[int, int]) -> None:
    if device.type not in _warned:
        _warned.add(device.type)
        faster = [c for c in backends.candidates(device, *bounds) if c.backend != "reference"]
        why = f"{faster[0].backend}: {faster[0].why}"
        warnings.warn(
            f"cot2align: the slow reference serves {device.type} tensors ({why})", stacklevel=4
        )


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
    _check_place(name, cu_seqlens, tokens.device)
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


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if not tensor.is_cpu and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens on {device}")


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
    _check_place("pairs", pairs, device)
    if pairs.is_cpu and len(pairs) and not torch.compiler.is_compiling():
        most = pairs.max(0).values.tolist()
        if pairs.min() < 0 or most[0] >= segments_x or most[1] >= segments_y:
            raise ValueError(
                f"pairs must name student segments below {segments_x} and teacher segments below "
                f"{segments_y}, got values from {int(pairs.min())} to {most}"
            )
    return pairs.to(device, torch.int64, non_blocking=True).contiguous()


# ---- packing


class _Texts(NamedTuple):
    tokens: Tensor  # [tokens, width]
    segments: Tensor  # int64 [texts, 2]: first token, number of tokens
    places: Tensor | None = None  # int64 [tokens], a permutation: where the texts' tokens stand


def _pack(tokens: Tensor, mask: Tensor | None, leave_out: bool) -> _Texts:
    """[B, N, width] -> texts.

    leave_out: without the masked tokens. Else, where shapes must not depend on values (a GPU,
    torch.compile), all tokens stay where they are: of the places a text's own come first, and the
    segments step over the others.
    """
    batch, length, width = tokens.shape
    first = torch.arange(batch, device=tokens.device) * length
    flat = tokens.reshape(-1, width)
    if mask is None:
        return _Texts(flat, torch.stack((first, torch.full_like(first, length)), dim=1))
    lengths = mask.sum(1)
    if leave_out:
        packed = flat.index_select(0, mask.flatten().nonzero()[:, 0])
        return _Texts(packed, torch.stack((lengths.cumsum(0) - lengths, lengths), dim=1))
    order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    places = (first[:, None] + order).flatten()
    return _Texts(flat, torch.stack((first, lengths), dim=1), places)


def _reduction_weights(
    lengths_x: Tensor, lengths_y: Tensor, reduction: str, dtype: torch.dtype
) -> Tensor:
    """What "mean" or "sum" is, as weights [Q] of the problems' losses."""
    valid = ((lengths_x > 0) & (lengths_y > 0)).to(dtype)
    return valid / valid.sum().clamp(min=1) if reduction == "mean" else valid


def _varlen(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor],
    pairs: Tensor | None,
    weighting: Tensor | str,  # weights [Q], or a reduction
    known: tuple[int | None, int | None],
    settings: OTSettings,
) -> OTTerms:
    _check_tokens(student, teacher, projection, "[tokens, width]")
    longest_x = _check_cu_seqlens("cu_seqlens_student", cu_seqlens[0], student, known[0])
    longest_y = _check_cu_seqlens("cu_seqlens_teacher", cu_seqlens[1], teacher, known[1])
    device = student.device
    chosen = _check_pairs(pairs, len(cu_seqlens[0]) - 1, len(cu_seqlens[1]) - 1, device)
    entries = _count_entries(*cu_seqlens, pairs)
    pairs = chosen
    segments_x, segments_y = (
        torch.stack((cu[:-1], cu.diff()), dim=1).to(device, torch.int64, non_blocking=True)
        for cu in cu_seqlens
    )

    def lengths() -> tuple[Tensor, Tensor]:
        return segments_x[pairs[:, 0], 1], segments_y[pairs[:, 1], 1]

    dtype = reference.loss_dtype(student, teacher, projection)
    weights = None
    if isinstance(weighting, Tensor):
        if weighting.shape != pairs.shape[:1]:
            raise ValueError(f"weights must be [{len(pairs)}], got {list(weighting.shape)}")
        _check_place("weights", weighting, device)
        weights = weighting.detach().to(device, dtype, non_blocking=True).contiguous()
    elif weighting != "none":
        weights = _reduction_weights(*lengths(), weighting, dtype)
    with torch.autocast(device.type, enabled=False):
        if not student.is_cpu:  # kernels are chosen and launched by the lengths
            longest_x = _longest(cu_seqlens[0].diff()) if longest_x is None else longest_x
            longest_y = _longest(cu_seqlens[1].diff()) if longest_y is None else longest_y
        bounds = longest_x or 0, longest_y or 0
        backend = choose_backend(settings.backend, student, teacher, projection, bounds=bounds)
        if backend == "reference":
            x, mask_x = _pad(student, segments_x[pairs[:, 0]], longest_x)
            y, mask_y = _pad(teacher, segments_y[pairs[:, 1]], longest_y)
            solved = reference.solve(x, y, projection, mask_x, mask_y, settings)
            lengths_x, lengths_y = lengths()
            exceeds = (lengths_x > x.shape[1]) | (lengths_y > y.shape[1])
            loss = solved.loss.masked_fill(exceeds, math.nan)
            total = loss.sum() if weights is None else loss @ weights
            return OTTerms(total, loss, *solved[3:])
        most = len(pairs) * bounds[0] * _padded(bounds[1])
        uniform = entries == most
        entries = most if entries is None else entries
        texts = _Texts(student, segments_x), _Texts(teacher, segments_y)
        sizes = _Sizes(*bounds, entries, uniform)
        return _solve(*texts, projection, pairs, weights, sizes, settings, backend)


def _longest(lengths: Tensor) -> int:
    """Read from where the lengths are."""
    return int(lengths.amax()) if len(lengths) else 0


def _pad(tokens: Tensor, segments: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """[T, width] and segments [Q, 2] -> [Q, length, width] and their mask [Q, length].

    Without a bound from the host the longest length is read from the device.
    """
    if length is None:
        length = _longest(segments[:, 1])
    step = torch.arange(length, device=tokens.device)
    mask = step < segments[:, 1:]
    index = torch.where(mask, segments[:, :1] + step, len(tokens))
    behind = torch.cat((tokens, tokens.new_zeros(1, tokens.shape[1])))
    return behind.index_select(0, index.flatten()).view(*index.shape, tokens.shape[1]), mask


# ---- the packed problem


class _Sizes(NamedTuple):
    """What the host knows of the problems."""

    longest_x: int
    longest_y: int
    entries: int  # of all similarity matrices, their rows padded, at most
    uniform: bool  # known to have the longest sizes, all of them


def _padded(columns: Any) -> Any:
    return (columns + 3) // 4 * 4


def _count_entries(cu_x: Tensor, cu_y: Tensor, pairs: Tensor | None) -> int | None:
    """`_Sizes.entries`; None where a value would have to be read from the device."""
    tensors = (cu_x, cu_y) if pairs is None else (cu_x, cu_y, pairs)
    if torch.compiler.is_compiling() or not all(t.is_cpu for t in tensors):
        return None
    rows, cols = cu_x.diff().long(), _padded(cu_y.diff().long())
    if pairs is not None:
        rows, cols = rows[pairs[:, 0].long()], cols[pairs[:, 1].long()]
    return int(rows @ cols)


def _solve(
    student: _Texts,  # width d
    teacher: _Texts,  # width D
    projection: Tensor | None,  # [D, d]
    pairs: Tensor,  # [Q, 2]
    weights: Tensor | None,  # [Q]; None: differentiate each problem's loss
    sizes: _Sizes,
    settings: OTSettings,
    backend: str,
) -> OTTerms:
    x, z = student.tokens, teacher.tokens
    wide, narrow = z.shape[1], x.shape[1]
    dtype = x.dtype if backend != "native" and x.dtype == z.dtype else torch.float32
    backward = 2 if z.requires_grad else 1
    by_teacher = (1 + backward) * len(z) * wide * narrow + 3 * sizes.entries * narrow
    by_student = 3 * len(x) * wide * narrow + (1 + backward) * sizes.entries * wide
    x, z = x.to(dtype), z.to(dtype)
    if projection is not None and by_teacher <= by_student:
        z = _Project.apply(z, projection)
    elif projection is not None:
        x = _Project.apply(x, projection.T)
    enabled = torch.is_grad_enabled()
    arguments = (
        *(x.contiguous(), z.contiguous(), student.places, teacher.places),
        *(student.segments, teacher.segments, pairs, weights),
        *(1 / math.sqrt(narrow), settings.epsilon, settings.num_iters, settings.tol),
        *(backend, *sizes),
        *(settings.grad, enabled and x.requires_grad, enabled and z.requires_grad),
    )
    if weights is None:
        loss, num_iters, marginal_error = _Losses.apply(*arguments)
        return OTTerms(loss.sum(), loss, num_iters, marginal_error)
    return OTTerms(*_WeightedLoss.apply(*arguments))


class _WeightedLoss(torch.autograd.Function):
    """-> weights @ loss; and loss, num_iters, marginal_error [Q] without a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *problem, weights = arguments[:8]  # then the operators' other arguments
        *how, _, ctx.need_x, ctx.need_z = arguments[8:]
        if ctx.need_x or ctx.need_z:
            loss, iterations, marginal_error, dx, dz = _ot_loss_gradient(*arguments)
            ctx.save_for_backward(dx, dz)
        else:
            loss, iterations, marginal_error = _ot_loss(*problem, *how)
        ctx.others, ctx.dtype = len(arguments) - 2, problem[0].dtype
        ctx.mark_non_differentiable(loss, iterations, marginal_error)
        return weights @ loss, loss, iterations, marginal_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, dz = ctx.saved_tensors
        dx = (upstream * dx).to(ctx.dtype) if ctx.need_x else None
        dz = (upstream * dz).to(ctx.dtype) if ctx.need_z else None
        return dx, dz, *(None,) * ctx.others


class _Losses(torch.autograd.Function):
    """-> loss [Q]; and num_iters, marginal_error [Q] without a gradient. Backward solves again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *problem, _ = arguments[:8]
        ctx.save_for_backward(*problem)
        ctx.settings = arguments[8:]
        loss, iterations, marginal_error = _ot_loss(*problem, *ctx.settings[:-3])
        ctx.mark_non_differentiable(iterations, marginal_error)
        return loss, iterations, marginal_error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_z = ctx.settings[-2:]
        weights = upstream.contiguous()
        *_, dx, dz = _ot_loss_gradient(*ctx.saved_tensors, weights, *ctx.settings)
        others, dtype = (None,) * (6 + len(ctx.settings)), ctx.saved_tensors[0].dtype
        return dx.to(dtype) if need_x else None, dz.to(dtype) if need_z else None, *others


def _run(
    backend: str,
    sizes: _Sizes,
    x: Tensor,
    z: Tensor,
    index_x: Tensor | None,
    index_z: Tensor | None,
    *problem: Tensor,  # segments_x, segments_z, pairs, weights
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "native":
        x, z = _moved(x, index_x), _moved(z, index_z)
        loss, iterations, marginal_error, dx, dz = native.ot_loss(x, z, *problem, **how)
        return loss, iterations, marginal_error, _moved_back(dx, index_x), _moved_back(dz, index_z)
    from cot2align.kernels import triton_sinkhorn

    core = "cuda" if "cuda" in backend else "triton"
    device = backends.Device.of(x.device)
    bounds = sizes.longest_x, sizes.longest_y
    if backend == "triton+cuda" and backends.refusal("cuda", device, *bounds):
        core = "triton"  # chosen where the sizes were symbols
    return triton_sinkhorn.ot_loss(
        x,
        z,
        index_x,
        index_z,
        *problem,
        bounds=bounds,
        entries=sizes.entries,
        uniform=sizes.uniform,
        core=core,
        fused=backend != "cuda",
        **how,
    )


def _moved(tokens: Tensor, index: Tensor | None) -> Tensor:
    return tokens if index is None else tokens.index_select(0, index)


def _moved_back(gradient: Tensor, index: Tensor | None) -> Tensor:
    if index is None or len(gradient) == 0:
        return gradient
    return torch.empty_like(gradient).index_copy_(0, index, gradient)


@torch.library.custom_op("cot2align::ot_loss", mutates_args=())
def _ot_loss(
    x: Tensor,
    z: Tensor,
    index_x: Tensor | None,
    index_z: Tensor | None,
    segments_x: Tensor,
    segments_z: Tensor,
    pairs: Tensor,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
    backend: str,
    longest_x: int,
    longest_z: int,
    entries: int,
    uniform: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(
        backend,
        _Sizes(longest_x, longest_z, entries, uniform),
        x,
        z,
        index_x,
        index_z,
        *(segments_x, segments_z, pairs, x.new_ones(len(pairs), dtype=torch.float32)),
        scale=scale,
        epsilon=epsilon,
        num_iters=num_iters,
        tol=tol,
        gradient="none",
    )[:3]


@_ot_loss.register_fake
def _(
    x: Tensor, z: Tensor, ix: Tensor, iz: Tensor, sx: Tensor, sz: Tensor, pairs: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    per_problem = x.new_empty(pairs.shape[0], dtype=torch.float32)
    return per_problem, per_problem.to(torch.int32), torch.empty_like(per_problem)


@torch.library.custom_op("cot2align::ot_loss_gradient", mutates_args=())
def _ot_loss_gradient(
    x: Tensor,
    z: Tensor,
    index_x: Tensor | None,
    index_z: Tensor | None,
    segments_x: Tensor,
    segments_z: Tensor,
    pairs: Tensor,
    weights: Tensor,
    scale: float,
    epsilon: float,
    num_iters: int,
    tol: float,
    backend: str,
    longest_x: int,
    longest_z: int,
    entries: int,
    uniform: bool,
    grad: str,
    need_x: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _run(
        backend,
        _Sizes(longest_x, longest_z, entries, uniform),
        x,
        z,
        index_x,
        index_z,
        *(segments_x, segments_z, pairs, weights),
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
    x: Tensor, z: Tensor, ix: Tensor, iz: Tensor, sx: Tensor, sz: Tensor, pairs: Tensor, *how: Any
) -> tuple[Tensor, ...]:
    per_problem = x.new_empty(pairs.shape[0], dtype=torch.float32)
    dtype = backends.gradient_dtype(x.dtype)
    dx = torch.empty_like(x, dtype=dtype) if how[-2] else x.new_empty(0, dtype=dtype)
    dz = torch.empty_like(z, dtype=dtype) if how[-1] else z.new_empty(0, dtype=dtype)
    integers = per_problem.to(torch.int32)
    return per_problem, integers, torch.empty_like(per_problem), dx, dz


# ---- the projection


class _Project(torch.autograd.Function):
    """tokens [T, a], matrix [a, b] -> [T, b], of the tokens' dtype; the matrix may have another,
    in which it gets its gradient, summed in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, matrix)
        return _matmul(tokens, matrix.to(tokens.dtype), tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        tokens, matrix = ctx.saved_tensors
        d_tokens = d_matrix = None
        if ctx.needs_input_grad[0]:
            d_tokens = _matmul(upstream, matrix.T.to(tokens.dtype), tokens.dtype)
        if ctx.needs_input_grad[1]:
            # What counts nowhere, masked or of no problem, may be NaN, and 0 times NaN is NaN.
            # The host sees that in the product, a device leaves them out of it.
            host = tokens.is_cpu and not torch.compiler.is_compiling()
            d_matrix = _matmul(tokens.T, upstream, torch.float32) if host else None
            if d_matrix is None or not d_matrix.isfinite().all():
                tokens = tokens.masked_fill(~upstream.any(1, keepdim=True), 0)
                d_matrix = _matmul(tokens.T, upstream, torch.float32)
            d_matrix = d_matrix.to(matrix.dtype)
        return d_tokens, d_matrix


@torch.library.custom_op("cot2align::matmul", mutates_args=())
def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed in float32: no TF32, and no 16-bit partial sums, whatever the switches say."""
    mm_takes_dtype = "dtype" in torch.ops.aten.mm.overloads()  # PyTorch 2.8
    if a.is_cuda and a.dtype != torch.float32 and mm_takes_dtype and a.numel() > 0:
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    if a.is_cpu and native.missing() is None:
        return native.matmul(a.float(), b.float()).to(dtype)
    with _full_precision(), torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float()).to(dtype)


@_matmul.register_fake
def _(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


_tf32_switch = threading.Lock()


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32. The switch is the process's: a thread waits for the others, and leaves it alone
    where it is off."""
    matmul: Any = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # PyTorch 2.9, which refuses a mixture of the two
    with _tf32_switch:
        before = matmul.fp32_precision if new else torch.get_float32_matmul_precision()
        if before in ("none", "ieee", "highest"):
            yield
            return
        if new:
            matmul.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if not new:
                torch.set_float32_matmul_precision(before)
            else:
                matmul.fp32_precision = "none"  # follows torch.backends.fp32_precision
                if matmul.fp32_precision != before:
                    matmul.fp32_precision = before
