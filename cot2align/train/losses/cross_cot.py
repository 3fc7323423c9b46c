"""L_CCoT: OT alignment of standard and CoT texts across two tokenizers (eq. 7, 8, 14, 15).

    L_CST  = L_OT(y, Y) + L_OT(y_CoT, Y_CoT)        same format
    L_CRC  = L_OT(y, Y_CoT) + L_OT(y_CoT, Y)        crossed formats
    L_CCoT = L_CST + L_CRC, summed over layers, averaged over the rows of the global batch

Lower case is the student. A row without a rationale has L_OT(y, Y) alone. All layers, texts and
pairs of a batch go through one call of the OT kernel (one call a layer where every layer has its
own projection): the layers' packed tokens are further segments of the same packing.

The loss value says little (at small lambda it is nearly 1 - 1/M for any input), so each pair's
signal is reported: ot/signal = 1 - 1/M - L_OT, and ot/relative_signal, its share of what is
reachable, min(1, N/M) - 1/M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cot2align.kernels.ot_loss import OTSettings, ot_loss_terms
from cot2align.train.token_states import TokenStates

# student text - teacher text; the first two are L_CST, the others L_CRC
KINDS = ("std-std", "cot-cot", "std-cot", "cot-std")


class CrossCoTLoss(NamedTuple):
    """L_CCoT, connected; its parts ("ot/cst", "ot/crc"); metrics name -> [sum, count]."""

    total: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


class CrossCoT(nn.Module):
    """Owns the projections from the teacher's width to the student's.

    terms: "cst", "crc" or both. layers: names as in TokenStates. norm: "none", or "rms" to scale
    every token of both sides to unit root mean square. per_layer: a projection for each layer.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        terms: Sequence[str],
        layers: Sequence[str],
        norm: str,
        per_layer: bool,
        settings: OTSettings,
    ):
        super().__init__()
        self.terms = tuple(terms)
        self.layers = tuple(layers)
        self.norm = norm
        self.settings = settings
        self.groups = [(layer,) for layer in self.layers] if per_layer else [self.layers]
        # [D, d]; a token of unit root mean square keeps it, and S of eq. 10 has unit spread.
        self.projections = nn.ParameterList(
            torch.randn(teacher_width, student_width) * teacher_width**-0.5 for _ in self.groups
        )

    def forward(
        self,
        student: TokenStates,
        teacher: TokenStates,
        text_rows: Sequence[int],
        text_is_cot: Sequence[bool],
        num_rows: Tensor | float,
    ) -> CrossCoTLoss:
        """L_CCoT of one batch; `num_rows` is the row count of the global batch, the divisor."""
        problems = text_pairs(text_rows, text_is_cot, self.terms)
        pairs = torch.tensor([pair for pair, _ in problems], dtype=torch.int64).reshape(-1, 2)
        kinds = torch.tensor([kind for _, kind in problems], dtype=torch.int64)
        device = student.hidden.device
        weight = 1 / torch.as_tensor(num_rows, dtype=torch.float32, device=device)

        total = torch.zeros((), device=device)
        parts = {name: torch.zeros((), device=device) for name in ("ot/cst", "ot/crc")}
        metrics: dict[str, Tensor] = {}
        statistics = []
        for layers, projection in zip(self.groups, self.projections, strict=True):
            terms = ot_loss_terms(
                torch.cat([self._normalised(student.layers[layer]) for layer in layers]),
                torch.cat([self._normalised(teacher.layers[layer]) for layer in layers]),
                projection,
                cu_seqlens_student=_repeated(student.cu_seqlens, len(layers)),
                cu_seqlens_teacher=_repeated(teacher.cu_seqlens, len(layers)),
                pairs=torch.cat([pairs + i * len(text_rows) for i in range(len(layers))]),
                weights=weight.repeat(len(layers) * len(pairs)),
                settings=self.settings,
            )
            total = total + terms.total
            statistics.append(
                torch.stack([terms.num_iters.float(), terms.marginal_error.float()], 1)
            )
            loss = terms.loss.view(len(layers), len(pairs))
            same_format = (kinds < 2).to(device)
            parts["ot/cst"] += (loss * same_format).sum() * weight
            parts["ot/crc"] += (loss * ~same_format).sum() * weight
            for layer, layer_loss in zip(layers, loss, strict=True):
                metrics |= _signals(layer, layer_loss, pairs, kinds, student, teacher)
        table = torch.cat(statistics)
        sums, count = table.sum(0), table.new_tensor(float(len(table)))
        metrics["ot/iterations"] = torch.stack([sums[0], count])
        metrics["ot/marginal_error"] = torch.stack([sums[1], count])
        return CrossCoTLoss(total, parts, metrics)

    def _normalised(self, tokens: Tensor) -> Tensor:
        if self.norm == "none":
            return tokens
        return F.rms_norm(tokens.float(), tokens.shape[-1:], eps=1e-12)


def text_pairs(
    text_rows: Sequence[int], text_is_cot: Sequence[bool], terms: Sequence[str]
) -> list[tuple[tuple[int, int], int]]:
    """((student text, teacher text), index in KINDS) for every pair of every row's texts."""
    rows: dict[int, dict[bool, int]] = {}
    for text, (row, is_cot) in enumerate(zip(text_rows, text_is_cot, strict=True)):
        rows.setdefault(row, {})[is_cot] = text
    formats = ((False, False), (True, True), (False, True), (True, False))
    return [
        ((texts[student_is_cot], texts[teacher_is_cot]), kind)
        for texts in rows.values()
        for kind, (student_is_cot, teacher_is_cot) in enumerate(formats)
        if student_is_cot in texts
        and teacher_is_cot in texts
        and ("cst" if kind < 2 else "crc") in terms
    ]


def _repeated(cu_seqlens: Tensor, times: int) -> Tensor:
    """The packing of `times` copies, one after the other."""
    copies = [cu_seqlens[1:] + i * cu_seqlens[-1] for i in range(times)]
    return torch.cat([cu_seqlens[:1], *copies]).to(torch.int32)


def _signals(
    layer: str,
    loss: Tensor,
    pairs: Tensor,
    kinds: Tensor,
    student: TokenStates,
    teacher: TokenStates,
) -> dict[str, Tensor]:
    n = student.cu_seqlens.diff()[pairs[:, 0]].double()
    m = teacher.cu_seqlens.diff()[pairs[:, 1]].double()
    ceiling = torch.clamp(n / m, max=1) - 1 / m
    reachable = (ceiling > 0).float()
    device = loss.device
    signal = (1 - 1 / m).float().to(device) - loss
    share = signal / torch.where(ceiling > 0, ceiling, 1).float().to(device)
    columns = (signal, torch.ones_like(signal), share * reachable.to(device), reachable.to(device))
    table = torch.zeros(len(KINDS), 4, device=device)
    table.index_add_(0, kinds.to(device), torch.stack(columns, 1))
    metrics = {}
    for kind, name in enumerate(KINDS):
        metrics[f"ot/signal/{layer}/{name}"] = table[kind, :2]
        metrics[f"ot/relative_signal/{layer}/{name}"] = table[kind, 2:]
    return metrics
