"""L_KD between two vocabularies by minimum edit distance (MinED).

    aligned tokens   KL(p, q)     p: the teacher's logits moved into the student's vocabulary
    all others       -log q(target)

A token is the bytes that it stands for: byte-level alphabets, SentencePiece's space marker and its
<0x0A> are read back, so that tokens of any two tokenizers can be compared. The vocabulary map sends
a teacher's token to the student's equal one, else to the one of least edit distance (of several the
first id); special tokens only to the special token of the same role or, without a role, of the same
text, and a <0x2E> beside a piece "." only to another <0x2E>. A response's two tokenizations are
aligned by time warping on edit distances. A student token is aligned if that matches it with
exactly one teacher token and the map sends this one to it.

The moved logit of a student token is that of the equal teacher token, without one that of the first
teacher id that is mapped to it, and without any its p is 0. Softmaxes are at the temperature, with
no factor for it.

Map and alignments depend on token ids alone: both are computed before training, by compiled code,
and kept on disk, under the hash of what they were computed from. They are written in pieces, each
whole or not at all, so that an interrupted run goes on where it was; every piece carries a
checksum, and one that does not match is computed again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cot2align.kernels.token_alignment import align_tokens, nearest_tokens
from cot2align.train.config import UserError
from cot2align.train.losses import KDLoss
from cot2align.train.losses.divergences import forward_kl
from cot2align.train.token_states import TokenStates, sum_over_tokens

TEXTS_PER_FILE = 1024
TOKENS_PER_FILE = 8192
# An id that no token has. Not empty: an empty token is near to every short one.
NO_TOKEN = b"\xff" * 256
ROLES = ("eos", "bos", "unk", "pad")
BYTE = re.compile("<0x[0-9A-F]{2}>")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The characters that byte-level tokenizers write bytes as.
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


class Vocabulary:
    """What every token of a tokenizer stands for.

    tokens: bytes by id. roles: id -> what a token that no text is made of is called: the role of a
    special token, the first of ROLES that it has, or its own text; or a spare byte's "<0x2E>",
    where another piece is that byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = tokenizer.backend_tokenizer
        stages = (backend.decoder, backend.pre_tokenizer)
        byte_level = any(b'"ByteLevel"' in stage.__getstate__() for stage in stages if stage)
        added = tokenizer.get_added_vocab()
        ids = tokenizer.get_vocab()
        self.tokens = [NO_TOKEN] * (max(ids.values()) + 1)
        spare: dict[int, str] = {}
        for token, token_id in ids.items():
            # Of the added tokens some are pieces too, such as runs of the space marker.
            literal = token in added and backend.model.token_to_id(token) is None
            self.tokens[token_id] = token.encode() if literal else _bytes(token, byte_level)
            if not literal and not byte_level and BYTE.fullmatch(token):
                spare[token_id] = token
        pieces = {token for token_id, token in enumerate(self.tokens) if token_id not in spare}
        self.roles = {i: token for i, token in spare.items() if self.tokens[i] in pieces}
        for role in ROLES:
            token_id = getattr(tokenizer, f"{role}_token_id")
            if token_id is not None and token_id not in self.roles:
                self.roles[token_id] = role
        for token_id, added_token in tokenizer.added_tokens_decoder.items():
            if added_token.special:
                self.roles.setdefault(token_id, added_token.content)
        for token_id, role in self.roles.items():
            # No text has the byte 0xff: far from every other token, equal to its counterpart.
            self.tokens[token_id] = b"\xff" + role.encode()

    @property
    def ordinary(self) -> list[int]:
        """The ids of all tokens that texts are made of."""
        return [token_id for token_id in range(len(self.tokens)) if token_id not in self.roles]


def shared_tokens(student: Vocabulary, teacher: Vocabulary) -> tuple[list[int], list[int]]:
    """The ids of all tokens that stand for the same in both, the student's and the teacher's (of
    several the first). Raises UserError where there are none."""
    ids = reversed(range(len(teacher.tokens)))
    theirs = {teacher.tokens[i]: i for i in ids if teacher.tokens[i] != NO_TOKEN}
    both = [(i, theirs[token]) for i, token in enumerate(student.tokens) if token in theirs]
    if not both:
        raise UserError("the two vocabularies share no token")
    return [i for i, _ in both], [j for _, j in both]


class TokenAligner:
    """The vocabulary map of a pair of tokenizers, and alignments of responses by it.

    student_ids: int64 [V_teacher], -1 for special tokens without a counterpart. equal: bool
    [V_teacher], whether both tokens stand for the same.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        folder: str | None = None,
    ):
        """The map and the alignments are kept in `folder` (none: ~/.cache/cot2align). Raises
        UserError where it cannot be written."""
        self.student, self.teacher = Vocabulary(student), Vocabulary(teacher)
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder or Path(cache, "cot2align"))
        self.key = self._key()
        self.student_ids = vocabulary_map(self.student, self.teacher, self._keep_map)
        pairs = zip(self.student_ids.tolist(), self.teacher.tokens, strict=True)
        self.equal = torch.tensor([i >= 0 and self.student.tokens[i] == t for i, t in pairs])

    def __call__(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
        """`align` of every text's response ids, the student's and the teacher's."""
        found: list[list[int]] = []
        with tqdm(total=len(texts), unit="text", desc="alignments", delay=2) as progress:
            for start in range(0, len(texts), TEXTS_PER_FILE):
                some = texts[start : start + TEXTS_PER_FILE]
                key = hashlib.sha256(f"{self.key} {some}".encode()).hexdigest()[:32]
                path = self.folder / f"alignments-{key}"
                places = kept(path, partial(self._places, some))
                found += map(Tensor.tolist, places.split([len(ours) for ours, _ in some]))
                progress.update(len(some))
        return found

    def align(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> list[int]:
        """For each student token of a response the place of the teacher's that it is aligned with,
        or -1."""
        partners = align_tokens(
            [self.student.tokens[i] for i in student_ids],
            [self.teacher.tokens[i] for i in teacher_ids],
        )
        mapped = self.student_ids[list(teacher_ids)].tolist()
        return [
            partner if partner >= 0 and mapped[partner] == student_id else -1
            for student_id, partner in zip(student_ids, partners, strict=True)
        ]

    def _places(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[int]:
        return [place for ids in texts for place in self.align(*ids)]

    def _keep_map(self, piece: str, make: Callable[[], list[int]]) -> Tensor:
        return kept(self.folder / f"token-map-{self.key}-{piece}", make)

    def _key(self) -> str:
        digest = hashlib.sha256()
        for vocabulary in (self.student, self.teacher):
            roles = sorted(vocabulary.roles.items())
            digest.update(f"{len(vocabulary.tokens)} {roles} ".encode())
            for token in vocabulary.tokens:
                digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:32]


def vocabulary_map(
    student: Vocabulary,
    teacher: Vocabulary,
    keep: Callable[[str, Callable[[], list[int]]], Tensor] = lambda _, make: torch.tensor(make()),
) -> Tensor:
    """int64 [V_teacher]: the student's id for each of the teacher's, -1 for special tokens without
    a counterpart. keep: (name of a piece, how to compute it) -> the piece."""
    ids = torch.full((len(teacher.tokens),), -1)
    candidates, queries = student.ordinary, teacher.ordinary
    tokens = [student.tokens[i] for i in candidates]
    with tqdm(total=len(queries), unit="token", desc="token map", delay=2) as progress:
        for start in range(0, len(queries), TOKENS_PER_FILE):
            piece = queries[start : start + TOKENS_PER_FILE]
            wanted = [teacher.tokens[i] for i in piece]
            make = partial(nearest_tokens, wanted, tokens, progress.update)
            found = keep(f"{start}-{start + len(piece)}", make)
            ids[piece] = torch.tensor(candidates)[found.long()]
            progress.update(start + len(piece) - progress.n)  # if it was kept
    counterparts = {role: token_id for token_id, role in student.roles.items()}
    for token_id, role in teacher.roles.items():
        ids[token_id] = counterparts.get(role, -1)
    return ids


def kept(path: Path, make: Callable[[], list[int]]) -> Tensor:
    """int32: what `make` gives, from `path` where it is there and whole, else written there."""
    try:
        if path.exists():
            content = path.read_bytes()
            if content[:32] == _checksum(path, content[32:]):
                return torch.frombuffer(bytearray(content), dtype=torch.int32, offset=32)
            print(f"{path} is damaged and computed again", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        places = torch.tensor(make(), dtype=torch.int32)
        body = places.numpy().tobytes()
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(_checksum(path, body) + body)
        part.replace(path)
    except OSError as error:
        raise UserError(f"setting 'token_maps': {path}: {error.strerror or error}") from None
    return places


def _checksum(path: Path, body: bytes) -> bytes:
    # Of the name, too: a file of another key is not whole.
    return hashlib.sha256(path.name.encode() + body).digest()


class MinED(nn.Module):
    """student_ids: the vocabulary map, int64 [V_teacher], -1 for none. equal: bool [V_teacher], the
    tokens that go before others with the same student id; None: none does."""

    def __init__(self, student_ids: Tensor, *, temperature: float, equal: Tensor | None = None):
        super().__init__()
        self.temperature = temperature
        teacher_ids = (student_ids >= 0).nonzero()[:, 0].flip(0)
        if equal is not None:
            teacher_ids = teacher_ids[equal[teacher_ids].int().argsort(stable=True)]
        # Of several, the last one is kept: an equal token, or the first id.
        first = dict(zip(student_ids[teacher_ids].tolist(), teacher_ids.tolist(), strict=True))
        self.reached: Tensor
        self.source: Tensor
        # int64 [K]: the student's ids that some token is mapped to, and where their logits are.
        self.register_buffer("reached", torch.tensor(list(first)), persistent=False)
        self.register_buffer("source", torch.tensor(list(first.values())), persistent=False)

    def forward(self, student: TokenStates, teacher: TokenStates) -> KDLoss:
        """Sum over the student's response tokens, nats, float32. parts: "kd/aligned", "kd/gold".
        metrics: "mined/aligned_share"."""
        assert student.alignment is not None
        ours, theirs, rest = (
            student.alignment[name] for name in ("student", "teacher", "unaligned")
        )
        order = torch.cat([ours, rest])
        total, aligned, gold = sum_over_tokens(
            self._terms,
            student.logits(student.hidden.index_select(0, order)),
            teacher.logits(teacher.hidden.index_select(0, theirs)),
            others=[student.targets.index_select(0, order)],
        )
        share = torch.tensor([len(ours), len(student.targets)], dtype=torch.float32)
        return KDLoss(
            total,
            {"kd/aligned": aligned, "kd/gold": gold},
            {"mined/aligned_share": share.to(gold.device)},
        )

    def _terms(self, ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        n = len(theirs)  # ours are aligned so far
        log_q = (ours / self.temperature).log_softmax(-1)
        log_p = (theirs.index_select(1, self.source) / self.temperature).log_softmax(-1)
        aligned = forward_kl(log_p, log_q[:n].index_select(1, self.reached)).sum()
        gold = F.nll_loss(log_q[n:], targets[n:], reduction="sum")
        return aligned + gold, aligned, gold


def _bytes(token: str, byte_level: bool) -> bytes:
    if byte_level and all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    if BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
