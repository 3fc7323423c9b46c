"""L_KD between any two vocabularies: universal logit distillation (ULD).

    sum_v |p_(v) - q_(v)|        p_(1) >= p_(2) >= ..., the shorter of the two padded with zeros

p and q are the teacher's and the student's distributions at the k-th response token of the same
text, for k up to the length of the shorter response. It compares the shapes of two distributions,
not what they say, and knows no alignment other than the position.
"""

from __future__ import annotations

from torch import Tensor

from cot2align.train.losses import KDLoss
from cot2align.train.token_states import TokenStates, shared_positions, sum_over_tokens


def uld(student: TokenStates, teacher: TokenStates, *, temperature: float) -> KDLoss:
    """Sum over positions of the L1 distance of the sorted distributions, float32."""
    sides = shared_positions(student, teacher)
    narrow = min(student.vocabulary, teacher.vocabulary)

    def terms(*logits: Tensor) -> tuple[Tensor]:
        q, p = ((z / temperature).softmax(-1).sort(-1, descending=True).values for z in logits)
        rest = p[:, narrow:].sum() + q[:, narrow:].sum()
        return ((p[:, :narrow] - q[:, :narrow]).abs().sum() + rest,)

    (total,) = sum_over_tokens(terms, *(side.logits(side.hidden) for side in sides))
    return KDLoss(total, {}, {})
