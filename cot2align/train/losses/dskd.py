"""L_KD by dual-space distillation (DSKD): each model's states are read by the other model's head.

    student space   z = head_s(aligned t2s(H)):   CE(z, target) + divergence(z, student's logits)
    teacher space   r = head_t(aligned s2t(h)):   KL(teacher's logits, r)

t2s and s2t are linear projectors between the widths, trained with the student. In student space
only the cross entropy trains t2s (z is a constant of the divergence); neither term trains the head
through z or r. Softmaxes are at the temperature, with no factor for it; the cross entropy is at 1.

With one vocabulary both models have the same positions, as far as neither's response is cut, and
the states need no alignment. With two, cross-model attention aligns them: a student token asks with
the embeddings of its input and its target, teacher tokens of the same text answer with theirs,

    A = query([e_in ; e_target]) ([E_in ; E_target] / std)^T / sqrt(2 D)
    z = head_s(softmax_teacher(A) t2s(H / std + E_target / std))
    r = head_t(softmax_student(A^T) s2t(h))

and the divergence counts only where z's most probable token is the target. Each std is one number
per text over its response tokens, so that a text's loss does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cot2align.train.losses import KDLoss
from cot2align.train.losses.divergences import DIVERGENCES, forward_kl
from cot2align.train.token_states import TokenStates, shared_positions, sum_over_tokens


class DSKD(nn.Module):
    """Owns the projectors: t2s [D -> d], s2t [d -> D] and, for two vocabularies, query [2d -> 2D].

    divergence: that of student space, a key of DIVERGENCES.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        one_vocabulary: bool,
        divergence: str,
        temperature: float,
    ):
        super().__init__()
        self.t2s = nn.Linear(teacher_width, student_width)
        self.s2t = nn.Linear(student_width, teacher_width)
        self.query = None if one_vocabulary else nn.Linear(2 * student_width, 2 * teacher_width)
        self.distance = DIVERGENCES[divergence]
        self.temperature = temperature

    @torch.no_grad()
    def start_from_heads(self, student: Tensor, teacher: Tensor) -> None:
        """t2s = pinv(student) teacher, for rows [K, d] and [K, D] of the heads' weights that belong
        to the same K tokens: student's head on t2s(H) is nearest to teacher's head on H."""
        # gelsy, since the rows need not have full rank.
        rows = (student.double().cpu(), teacher.double().cpu())
        self.t2s.weight.copy_(torch.linalg.lstsq(*rows, driver="gelsy").solution)
        self.t2s.bias.zero_()

    def forward(self, student: TokenStates, teacher: TokenStates) -> KDLoss:
        """Sums over the response tokens, the student's in student space and the teacher's in
        teacher space, float32. parts: "kd/t2s_ce", "kd/t2s", "kd/s2t". metrics:
        "dskd/t2s_accuracy", the share of student tokens that z gets right."""
        if self.query is None:
            student, teacher = shared_positions(student, teacher)
            to_student = _projected(self.t2s, teacher.hidden)
            to_teacher = _projected(self.s2t, student.hidden)
        else:
            # Its intermediate results are as wide as 2D and would outlast the logits.
            to_student, to_teacher = checkpoint(
                self._attend, self.query, student, teacher, use_reentrant=False
            )
        in_student, ce, t2s, correct = sum_over_tokens(
            self._student_space,
            student.logits(to_student.to(student.hidden.dtype), frozen=True),
            student.logits(student.hidden),
            others=[student.targets],
        )
        (s2t,) = sum_over_tokens(
            self._teacher_space,
            # Not in the teacher's dtype, float16 perhaps, where small gradients are lost.
            teacher.logits(to_teacher, frozen=True),
            teacher.logits(teacher.hidden, frozen=True),
        )
        accuracy = torch.stack([correct, torch.full_like(correct, len(student.targets))])
        return KDLoss(
            in_student + s2t,
            {"kd/t2s_ce": ce, "kd/t2s": t2s, "kd/s2t": s2t.detach()},
            {"dskd/t2s_accuracy": accuracy},
        )

    def _attend(
        self, query: nn.Linear, student: TokenStates, teacher: TokenStates
    ) -> tuple[Tensor, Tensor]:
        """The teacher's states at the student's tokens, [N, d], and the student's at the
        teacher's, [M, D]; text by text."""
        with torch.no_grad():
            ours = torch.cat([student.embed(student.inputs), student.embed(student.targets)], 1)
            target = teacher.embed(teacher.targets)
            theirs = torch.cat([teacher.embed(teacher.inputs), target], 1)
        lengths = [states.cu_responses.diff().tolist() for states in (student, teacher)]
        queries, our_values = _projected(query, ours), _projected(self.s2t, student.hidden)
        to_student, to_teacher = [], []
        for q, v, k, hidden, embedded in zip(
            queries.split(lengths[0]),
            our_values.split(lengths[0]),
            theirs.float().split(lengths[1]),
            teacher.hidden.float().split(lengths[1]),
            target.float().split(lengths[1]),
            strict=True,
        ):
            k = k / k.std()
            their_values = _projected(self.t2s, hidden / hidden.std() + embedded / embedded.std())
            to_student.append(_attention(q, k, their_values))
            to_teacher.append(_attention(k, q, v))
        return torch.cat(to_student), torch.cat(to_teacher)

    def _student_space(self, z: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        ce = F.cross_entropy(z, targets, reduction="sum")
        z = z.detach()
        log_p, log_q = ((x / self.temperature).log_softmax(-1) for x in (z, logits))
        distances = self.distance(log_p, log_q)
        correct = z.argmax(-1) == targets
        t2s = (distances if self.query is None else distances * correct).sum()
        return ce + t2s, ce, t2s, correct.sum().float()

    def _teacher_space(self, r: Tensor, logits: Tensor) -> tuple[Tensor]:
        log_p, log_q = ((x / self.temperature).log_softmax(-1) for x in (logits, r))
        return (forward_kl(log_p, log_q).sum(),)


def _projected(projector: nn.Linear, states: Tensor) -> Tensor:
    """In the projector's dtype, where no autocast chooses another."""
    return projector(states.to(projector.weight.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(width)) v: [N, width], [M, width], [M, out] -> [N, out]."""
    q, k = (tensor.to(v.dtype) for tensor in (q, k))
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
