"""L_CE: the student's cross entropy on the response tokens, and its accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cot2align.train.config import UserError
from cot2align.train.token_states import TokenStates, sum_over_tokens


def cross_entropy(student: TokenStates) -> tuple[Tensor, Tensor]:
    """Sum over response tokens of -log p(target), nats, and the number of tokens whose most
    probable one is the target; float32 scalars."""

    def terms(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        correct = (logits.argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), correct.float()

    total, correct = sum_over_tokens(
        terms, student.logits(student.hidden), others=[student.targets]
    )
    return total, correct


def check_liger(device: str) -> None:
    """Raises UserError where Liger's kernels cannot run; device: "auto" or "cpu"."""
    try:
        import liger_kernel.transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"setting 'liger': {error}; the package liger-kernel comes with the extra 'liger', "
            "on Linux"
        ) from None
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("setting 'liger': its kernels need a GPU")


def liger_cross_entropy(model: PreTrainedModel) -> Callable[[TokenStates], tuple[Tensor, Tensor]]:
    """`cross_entropy` by Liger's fused kernel, for models whose head is a matrix, and perhaps a
    bias.

    Its backward pass may run once: it overwrites what it saved. Raises UserError for other heads.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    config = model.config.get_text_config()
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    if type(model.get_output_embeddings()) is not nn.Linear or any(
        getattr(config, name, None) is not None for name in names
    ):
        raise UserError(
            f"setting 'liger': the head of {type(model).__name__} is not a matrix alone"
        )
    loss = LigerFusedLinearCrossEntropyLoss(
        reduction="sum", accum_dtype=torch.float32, return_token_accuracy=True
    )

    def fused(student: TokenStates) -> tuple[Tensor, Tensor]:
        if not len(student.targets):
            return cross_entropy(student)
        weight, *bias = student.weights
        hidden = student.hidden
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        output = loss(weight, hidden, student.targets, *bias)
        return output.loss, output.token_accuracy.detach() * len(student.targets)

    return fused
