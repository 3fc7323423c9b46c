"""L_CE: the student's cross entropy on the response tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cot2align.train.token_states import TokenStates, sum_over_tokens


def cross_entropy(student: TokenStates) -> Tensor:
    """Sum over response tokens of -log p(target), nats, float32; a scalar."""

    def chunk_sum(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(student.head(hidden).float(), targets, reduction="sum")

    return sum_over_tokens(
        chunk_sum, student.hidden, student.targets, logits_per_token=student.vocabulary
    )
