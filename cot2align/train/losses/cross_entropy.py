"""L_CE: the student's cross entropy on the response tokens, and its accuracy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

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
