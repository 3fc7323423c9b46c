"""The module that is trained: student, projections, and the frozen teacher beside them.

    L = (1 - alpha) L_CE + alpha (ot_weight L_CCoT + L_KD)                (eq. 16)

`forward(batch)` runs both models over all texts of the batch and returns the loss, its parts and
the diagnostics: one forward, as data-parallel and sharding wrappers need it. L_CE and L_KD are
divided by the student response tokens, L_CCoT by the rows, of the *global* batch: all processes,
all accumulation steps. So losses and gradients depend on neither. Without a teacher this is
fine-tuning: L = L_CE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cot2align.train.losses import KDLoss
from cot2align.train.losses.cross_cot import CrossCoT
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.teacher import teacher_states
from cot2align.train.token_states import TokenStates, token_states


class Distiller(nn.Module):
    """Student and teacher with the objective between them.

    alpha: weight of the distillation terms; cross_cot: L_CCoT with its projections, or None; kd:
    L_KD of (student, teacher), summed over tokens, or None.
    """

    # Tells Trainer to pass the global batch's counts to forward.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        alpha: float = 0.0,
        ot_weight: float = 1.0,
        cross_cot: CrossCoT | None = None,
        kd: Callable[[TokenStates, TokenStates], KDLoss] | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.alpha = alpha
        self.ot_weight = ot_weight
        self.cross_cot = cross_cot
        self.kd = kd
        self.measure_gradients = False
        # The layers that FSDP2 shards one by one. All else (heads, embeddings, projections) belongs
        # to this module, and is whole wherever `forward` reads it.
        self._no_split_modules = sorted(
            {
                name
                for model in (student, teacher)
                if model is not None
                for name in model._no_split_modules or ()
            }
        )
        self.register_state_dict_post_hook(_without_teacher)
        self.register_load_state_dict_post_hook(_teacher_not_missing)
        self.train(self.training)

    def forward(
        self,
        *,
        student: dict[str, Any],
        text_rows: Sequence[int],
        text_is_cot: Sequence[bool],
        num_tokens: int,
        num_rows: int,
        ids: Sequence[str] = (),
        teacher: dict[str, Any] | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Any]:
        """The batch of `data.collate` -> {"loss", "parts", "metrics"}.

        num_items_in_batch: [response tokens, rows] of the global batch; None: this batch's own.
        ids: of the rows, not used here.
        loss: float32 scalar, this batch's share of eq. 16. parts: its terms ("ce", "kd", "ot",
        "ot/cst", "ot/crc"), detached shares too. metrics: name -> [sum, count], diagnostics to be
        averaged; with `measure_gradients`, also "gradient/ce" and "gradient/ot" -> [sum of squares,
        1], of the terms' gradients at the student's last hidden states.
        """
        if num_items_in_batch is None:
            num_items_in_batch = torch.tensor([num_tokens, num_rows])
        counts = num_items_in_batch.to(student["input_ids"].device, torch.float32)
        all_tokens, all_rows = counts.unbind()

        layers = () if self.cross_cot is None else self.cross_cot.layers
        ours = token_states(self.student, student, layers)
        theirs = None
        if self.teacher is not None and teacher is not None:
            with torch.no_grad():
                theirs = teacher_states(self.teacher, teacher, layers)
        with _not_in_float16(counts.device.type):
            return self._losses(ours, theirs, text_rows, text_is_cot, all_tokens, all_rows)

    def _losses(
        self,
        ours: TokenStates,
        theirs: TokenStates | None,
        text_rows: Sequence[int],
        text_is_cot: Sequence[bool],
        all_tokens: Tensor,
        all_rows: Tensor,
    ) -> dict[str, Any]:
        total, correct = cross_entropy(ours)
        ce = total / all_tokens
        loss = ce
        parts: dict[str, Tensor] = {"ce": ce.detach()}
        metrics = {
            "token_accuracy": torch.stack([correct, torch.full_like(correct, len(ours.targets))])
        }
        if theirs is not None:
            distillation = torch.zeros_like(ce)
            if self.kd is not None:
                kd = self.kd(ours, theirs)
                parts["kd"] = kd.total.detach() / all_tokens
                parts |= {name: value / all_tokens for name, value in kd.parts.items()}
                metrics |= kd.metrics
                distillation = distillation + kd.total / all_tokens
            if self.cross_cot is not None:
                ot = self.cross_cot(ours, theirs, text_rows, text_is_cot, all_rows)
                parts |= {"ot": ot.total.detach(), **ot.parts}
                metrics |= ot.metrics
                distillation = distillation + self.ot_weight * ot.total
                if self.measure_gradients and self.training:
                    for name, term in (("ce", ce), ("ot", ot.total)):
                        metrics[f"gradient/{name}"] = _squared_gradient(term, ours.layers["last"])
            loss = (1 - self.alpha) * ce + self.alpha * distillation
        return {"loss": loss, "parts": parts, "metrics": metrics}

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def projection_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and saved beside the student, by name."""
        parameters = {} if self.cross_cot is None else dict(self.cross_cot.named_parameters())
        if isinstance(self.kd, nn.Module):
            parameters |= {f"kd.{name}": p for name, p in self.kd.named_parameters()}
        return parameters


def _without_teacher(
    distiller: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    """The teacher is in no checkpoint, whoever writes it."""
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]


def _teacher_not_missing(distiller: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("teacher.")]


def _not_in_float16(device: str) -> AbstractContextManager:
    """The losses' autocast: none in place of float16.

    Their gradients are made in the forward pass, summed over tokens: no loss scale reaches them in
    time, and the head's can pass 65504.
    """
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _squared_gradient(term: Tensor, states: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(term, states, retain_graph=True, allow_unused=True)
    square = torch.zeros_like(term) if gradient is None else gradient.float().square().sum()
    return torch.stack([square, torch.ones_like(square)])
