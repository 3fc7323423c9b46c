"""L_KD between models of one vocabulary: a divergence between their logits at the same tokens.

Both models must see the same response tokens: `same_vocabulary` refuses a pair of tokenizers that
do not agree, `data.encode_rows` a text that they split differently. A response that is cut for one
of the two, whose prompt is longer, is compared as far as both have it. Where a base model and a
chat model end a text with different tokens of the one vocabulary, the teacher's end is moved to the
student's. Heads that are padded to different widths are trimmed to the smaller one. The softmaxes
are at the temperature, with no factor for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cot2align.train.config import UserError
from cot2align.train.losses import KDLoss
from cot2align.train.losses.divergences import DIVERGENCES
from cot2align.train.token_states import TokenStates, shared_positions, sum_over_tokens


def same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless both tokenizers give every token the same id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        shared = len(ours.items() & theirs.items())
        raise UserError(
            f"kd kl needs one vocabulary, but of the student's {len(ours)} and the teacher's "
            f"{len(theirs)} tokens only {shared} have the same id in both; "
            "kd uld, mined and dskd take any two"
        )


def kl(
    student: TokenStates,
    teacher: TokenStates,
    *,
    divergence: str,
    temperature: float,
    ends: tuple[int, int] | None = None,
) -> KDLoss:
    """Sum over response tokens of the divergence of teacher and student, nats, float32.

    ends: the student's and the teacher's end-of-sequence token.
    """
    ours, theirs = shared_positions(student, teacher)
    vocabulary = min(student.vocabulary, teacher.vocabulary)
    distance = DIVERGENCES[divergence]
    order = None
    if ends is not None and ends[0] != ends[1]:
        order = torch.arange(vocabulary, device=teacher.hidden.device)
        order[list(ends)] = order[list(ends[::-1])]

    def terms(*logits: Tensor) -> tuple[Tensor]:
        log_q, log_p = ((z[:, :vocabulary] / temperature).log_softmax(-1) for z in logits)
        if order is not None:
            log_p = log_p[:, order]
        return (distance(log_p, log_q).sum(),)

    (total,) = sum_over_tokens(terms, ours.logits(ours.hidden), theirs.logits(theirs.hidden))
    return KDLoss(total, {}, {})
