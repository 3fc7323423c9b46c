"""L_KD between any two vocabularies: universal logit distillation (ULD).

    sum_v |p_(v) - q_(v)|        p_(1) >= p_(2) >= ..., the shorter of the two padded with zeros

p and q are the teacher's and the student's distributions at the k-th response token of the same
text, for k up to the length of the shorter response. It compares the shapes of two distributions,
not what they say, and knows no alignment other than the position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cot2align.train.losses import KDLoss
from cot2align.train.token_states import TokenStates, sum_over_tokens


def uld(student: TokenStates, teacher: TokenStates, *, temperature: float) -> KDLoss:
    """Sum over positions of the L1 distance of the sorted distributions, float32."""
    shared = torch.minimum(student.cu_responses.diff(), teacher.cu_responses.diff())
    narrow = min(student.vocabulary, teacher.vocabulary)

    def terms(*logits: Tensor) -> tuple[Tensor]:
        q, p = ((z / temperature).softmax(-1).sort(-1, descending=True).values for z in logits)
        rest = p[:, narrow:].sum() + q[:, narrow:].sum()
        return ((p[:, :narrow] - q[:, :narrow]).abs().sum() + rest,)

    (total,) = sum_over_tokens(
        terms, *(states.logits(_first_tokens(states, shared)) for states in (student, teacher))
    )
    return KDLoss(total, {}, {})


def _first_tokens(states: TokenStates, counts: Tensor) -> Tensor:
    """The hidden states of the first `counts[b]` response tokens of every text b, packed."""
    starts = states.cu_responses[:-1] - (counts.cumsum(0) - counts)
    places = torch.arange(int(counts.sum())) + starts.repeat_interleave(counts)
    return states.hidden.index_select(0, places.to(states.hidden.device))
