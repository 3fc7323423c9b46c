"""MinED against its definition, text by text in float64."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cot2align.kernels.token_alignment import nearest_tokens
from cot2align.train import token_states as token_states_module
from cot2align.train.config import UserError
from cot2align.train.data import collate, encode_rows, read_rows
from cot2align.train.losses import mined as mined_module
from cot2align.train.losses.kl import kl
from cot2align.train.losses.mined import (
    NO_TOKEN,
    MinED,
    TokenAligner,
    Vocabulary,
    shared_tokens,
    vocabulary_map,
)
from cot2align.train.models import load_tokenizer
from cot2align.train.token_states import token_states
from tests.conftest import byte_level_bpe, cli, log_of
from tests.kernels.test_token_alignment import direct_alignment, direct_distance
from tests.train.conftest import Pair, random_states

# Two-byte letters, a line end of two characters, CJK, emoji that are joined.
TEXT = "Add 3 and 4:\r\n\tna\u00efve caf\u00e9 \u2014 \u6f22\u5b57 \U0001f468\u200d\U0001f469 1 < 2"


def byte_fallback_unigram():
    """SentencePiece's kind of tokenizer, ASCII and a few words, everything else as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    words = [f"{space}{word}" for space in ("", "\u2581") for word in ("Add", "and", "caf", "na")]
    pieces += [(piece, -2.0) for piece in [*words, "\u2581", *map(chr, range(33, 127))]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(workspace):
    return load_tokenizer(workspace.student), load_tokenizer(workspace.teacher)


@pytest.fixture(scope="module")
def aligner(tokenizers, tmp_path_factory) -> TokenAligner:
    return TokenAligner(*tokenizers, str(tmp_path_factory.mktemp("maps")))


def test_tokens_are_the_bytes_of_their_text(tokenizers) -> None:
    for tokenizer, prefix in ((tokenizers[0], ""), (byte_fallback_unigram(), " ")):
        tokens = Vocabulary(tokenizer).tokens
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert b"".join(tokens[i] for i in ids) == (prefix + TEXT).encode()
    unigram = Vocabulary(tokenizers[1])
    ids = tokenizers[1]("Add 3 and 4.")["input_ids"]
    assert b"".join(unigram.tokens[i] for i in ids) == b"\xffbos Add 3 and 4."
    assert unigram.roles == {0: "unk", 1: "bos", 2: "eos", 3: "pad"}


@pytest.mark.parametrize("fallback", [False, True])
def test_vocabulary_map(fallback, tokenizers) -> None:
    student = Vocabulary(tokenizers[0])
    teacher = Vocabulary(byte_fallback_unigram() if fallback else tokenizers[1])
    ids = vocabulary_map(student, teacher).tolist()
    assert student.roles == {0: "eos"}
    if fallback:  # bytes that no other piece stands for
        spare = [2 + i for i in range(33, 127)]
        assert sorted(teacher.roles) == [0, 1, 2 + ord(" "), *spare]
    for token_id, found in enumerate(ids):
        if token_id in teacher.roles:
            assert found == (0 if teacher.roles[token_id] == "eos" else -1)
            continue
        token = teacher.tokens[token_id]
        distances = [direct_distance(token, other) for other in student.tokens[1:]]
        assert found == 1 + distances.index(min(distances))
    if fallback:  # every byte is a token on both sides
        for byte in set(range(256)) - {token_id - 2 for token_id in teacher.roles}:
            assert student.tokens[ids[byte + 2]] == bytes([byte])


def test_special_tokens_without_a_role() -> None:
    student, teacher = byte_level_bpe(), byte_level_bpe()
    student.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|tool|>"]})
    teacher.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|tools|>"]})
    ids = vocabulary_map(Vocabulary(student), Vocabulary(teacher))
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    assert ids[theirs["<|tool|>"]] == ours["<|tool|>"]
    assert ids[theirs["<|tools|>"]] == -1
    assert ours["<|user|>"] not in ids


def test_bytes_beside_their_pieces(tokenizers, tmp_path) -> None:
    """Llama's order: <0x2E> has a smaller id than ".", the token that texts are made of."""
    unigram, bpe = byte_fallback_unigram(), tokenizers[0]
    assert vocabulary_map(*map(Vocabulary, (unigram, unigram))).tolist() == [*range(len(unigram))]
    ours = {token: i for token, i in unigram.get_vocab().items() if len(token) == 1}
    found = vocabulary_map(Vocabulary(unigram), Vocabulary(bpe)).tolist()
    for token, token_id in bpe.get_vocab().items():
        if len(token) == 1 and 33 <= ord(token) < 127:
            assert found[token_id] == ours[token]
    shared = dict(zip(*shared_tokens(*map(Vocabulary, (bpe, unigram))), strict=True))
    # A teacher's <0x2E> would give the student's "." its logit, a "caf" the "a" its own.
    aligner = TokenAligner(bpe, unigram, str(tmp_path))
    mined = MinED(aligner.student_ids, temperature=2.0, equal=aligner.equal)
    sources = dict(zip(mined.reached.tolist(), mined.source.tolist(), strict=True))
    for token in "0.,a~":
        token_id = bpe.convert_tokens_to_ids(token)
        assert sources[token_id] == shared[token_id] == ours[token]
    assert len(unigram.tokenize(TEXT)) > len(TEXT)  # bytes among them
    ids = unigram(TEXT)["input_ids"]
    assert TokenAligner(unigram, unigram, str(tmp_path)).align(ids, ids) == [*range(len(ids))]


def test_added_tokens_that_are_pieces() -> None:
    """Gemma's runs of spaces are in the vocabulary, and added to it."""
    from tokenizers import AddedToken

    tokenizer = byte_fallback_unigram()
    piece = "\u2581and"
    tokenizer.add_tokens([AddedToken(piece, normalized=False), AddedToken("\u2581<tool>")])
    tokens = Vocabulary(tokenizer).tokens
    assert tokens[tokenizer.get_vocab()[piece]] == b" and"
    assert tokens[-1] == "\u2581<tool>".encode()


def test_shared_tokens(tokenizers) -> None:
    student, teacher = map(Vocabulary, tokenizers)
    found = set(zip(*shared_tokens(student, teacher), strict=True))
    ours, theirs = (t.get_vocab() for t in tokenizers)
    expected = {i for text, i in ours.items() if text.replace("\u0120", "\u2581") in theirs}
    assert len(expected) > 90
    assert expected <= {i for i, _ in found}
    assert all(student.tokens[i] == teacher.tokens[j] for i, j in found)
    assert (tokenizers[0].eos_token_id, tokenizers[1].eos_token_id) in found
    student.tokens = [NO_TOKEN]
    with pytest.raises(UserError, match="the two vocabularies share no token"):
        shared_tokens(student, teacher)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("fallback", [False, True])
def test_alignment_of_responses(side, fallback, tokenizers, tmp_path) -> None:
    pair = [tokenizers[0], byte_fallback_unigram() if fallback else tokenizers[1]]
    if side == "teacher":
        pair.reverse()
    aligner = TokenAligner(*pair, str(tmp_path))
    map_of = aligner.student_ids.tolist()
    generator = random.Random(0)
    words = ["Add", "sum", "the", "is", "First", "12", "7.", "done", "so", "numbers", *TEXT.split()]
    aligned = 0
    for _ in range(500):
        text = generator.choice([" ", "\r\n", ""]).join(
            generator.choices(words, k=generator.randint(1, 8))
        )
        ours, theirs = (
            # One side alone may begin or end with a token of its own.
            generator.choice([[], [t.bos_token_id or 0]])
            + t(text, add_special_tokens=False)["input_ids"]
            + generator.choice([[], [t.eos_token_id]])
            for t in pair
        )
        partners = direct_alignment(
            [aligner.student.tokens[i] for i in ours], [aligner.teacher.tokens[i] for i in theirs]
        )
        expected = [
            j if j >= 0 and map_of[theirs[j]] == i else -1
            for i, j in zip(ours, partners, strict=True)
        ]
        assert aligner.align(ours, theirs) == expected
        aligned += sum(j >= 0 for j in expected)
    assert aligned > 2000


def test_maps_and_alignments_are_kept(tokenizers, tmp_path, monkeypatch) -> None:
    texts = [(f"Add {i} and {i}.", f"sum {i}.") for i in range(5)]
    ids = [tuple(t(text)["input_ids"] for t in tokenizers) for pair in texts for text in pair]
    monkeypatch.setattr(mined_module, "TEXTS_PER_FILE", 4)
    monkeypatch.setattr(mined_module, "TOKENS_PER_FILE", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = TokenAligner(*tokenizers)
    alignments = made(ids)
    assert alignments == [made.align(*pair) for pair in ids]
    files = sorted((tmp_path / "cot2align").iterdir())
    names = [file.name.split("-")[0] for file in files]
    pieces = math.ceil(len(made.teacher.ordinary) / 100)
    assert names == ["alignments"] * 3 + ["token"] * pieces
    assert pieces > 1

    def again(folder: Path | None) -> None:
        aligner = TokenAligner(*tokenizers, folder and str(folder))
        assert torch.equal(aligner.student_ids, made.student_ids)
        assert aligner(ids) == alignments

    with monkeypatch.context() as patch:
        for name in ("nearest_tokens", "align_tokens"):
            patch.setattr(mined_module, name, lambda *_: pytest.fail("computed again"))
        again(None)
        (tmp_path / "cot2align").rename(tmp_path / "elsewhere")
        again(tmp_path / "elsewhere")
    TokenAligner(*tokenizers[::-1], str(tmp_path / "other"))
    others = {file.name for file in (tmp_path / "other").iterdir()}
    assert not others & {file.name for file in files}


@pytest.mark.parametrize("kind", ["token-map", "alignments"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_a_damaged_file_is_made_anew(kind, damage, tokenizers, tmp_path, capsys) -> None:
    ids = [tuple(t("Add 3 and 4.")["input_ids"] for t in tokenizers)]
    made = TokenAligner(*tokenizers, str(tmp_path))
    expected = made(ids)
    (file,) = tmp_path.glob(f"{kind}-*")
    (other,) = set(tmp_path.iterdir()) - {file}
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    damaged = {"cut": whole[:-4], "flipped": flipped, "empty": b"", "another": other.read_bytes()}
    file.write_bytes(damaged[damage])
    for _ in range(2):
        aligner = TokenAligner(*tokenizers, str(tmp_path))
        assert torch.equal(aligner.student_ids, made.student_ids)
        assert aligner(ids) == expected
    assert file.read_bytes() == whole
    assert capsys.readouterr().out == f"{file} is damaged and computed again\n"


def test_an_interrupted_map_goes_on(tokenizers, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mined_module, "TOKENS_PER_FILE", 50)
    made = []

    def interrupted(queries, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(queries)
        return nearest_tokens(queries, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mined_module, "nearest_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TokenAligner(*tokenizers, str(tmp_path))
        made[:] = ["two pieces are there"]
        with pytest.raises(KeyboardInterrupt):
            TokenAligner(*tokenizers, str(tmp_path))
    assert sorted(file.name.split("-", 3)[3] for file in tmp_path.iterdir()) == [
        "0-50", "100-150", "50-100"
    ]  # fmt: skip
    resumed = TokenAligner(*tokenizers, str(tmp_path)).student_ids
    assert torch.equal(resumed, vocabulary_map(*map(Vocabulary, tokenizers)))


def test_a_folder_that_cannot_be_written(tokenizers, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"'token_maps': .*token-map-.*: File exists"):
        TokenAligner(*tokenizers, str(tmp_path / "file"))


def direct_mined(
    logits: Tensor, targets: list[int], teacher: Tensor, partners: list[int], ids: list[int]
) -> Tensor:
    """One text, temperature 2: [N, V], N, [M, W], N, the map of W -> the sum."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target, partner in zip(logits, targets, partners, strict=True):
        q = (row / 2).softmax(0)
        if partner < 0:
            total = total - q[target].log()
            continue
        moved = torch.full_like(row, -torch.inf).detach()
        for student_id in set(ids) - {-1}:
            moved[student_id] = teacher[partner][ids.index(student_id)]
        p = (moved / 2).softmax(0)
        total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0)
    return total


@pytest.mark.parametrize("chunk", [10**6, 60])
@pytest.mark.parametrize("equal", [None, torch.tensor([0, 1, 0, 0, 0, 1, 1, 0, 0]).bool()])
def test_value_and_gradient(chunk, equal, monkeypatch) -> None:
    monkeypatch.setattr(token_states_module, "LOGITS_PER_CHUNK", chunk)
    student, teacher = random_states(0, [5, 1, 7], 8, 11), random_states(1, [4, 2, 9], 12, 9)
    ids = torch.tensor([3, 3, -1, 0, 10, 7, 0, 1, 2])
    partners = torch.tensor([0, -1, 3, -1, 2, -1, 6, 7, -1, 14, 9, 9, -1])
    alignment = {
        "student": torch.tensor([0, 2, 4, 6, 7, 9, 10, 11]),
        "teacher": partners[partners >= 0],
        "unaligned": torch.tensor([1, 3, 5, 8, 12]),
    }
    student = dataclasses.replace(student, alignment=alignment)
    actual = MinED(ids, temperature=2.0, equal=equal)(student, teacher)
    first = ids if equal is None else torch.tensor([-1, 3, -1, -1, 10, 7, 0, 1, 2])
    hidden = student.hidden.detach().double().requires_grad_()
    (weight,) = student.weights
    logits = teacher.head(teacher.hidden.detach().double(), *teacher.weights)
    expected = direct_mined(
        hidden @ weight.double().T,
        student.targets.tolist(),
        logits,
        partners.tolist(),
        first.tolist(),
    )
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert actual.total == sum(actual.parts.values())
    assert actual.metrics["mined/aligned_share"].tolist() == [8, 13]
    ours = torch.autograd.grad(actual.total, [student.hidden, weight])
    theirs = torch.autograd.grad(expected, [hidden, weight])
    for gradient, exact in zip(ours, theirs, strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


def aligned_examples(pair: Pair, aligner: TokenAligner, train: str) -> list:
    return encode_rows(read_rows(train)[:5], **pair.encoders, align=aligner)[0]


def mined_total(pair: Pair, mined: MinED, batch) -> Tensor:
    sides = [token_states(pair.models[side], batch[side]) for side in ("student", "teacher")]
    return mined(*sides).total


def test_models(two_tokenizers, aligner, workspace) -> None:
    pair = two_tokenizers
    examples = aligned_examples(pair, aligner, workspace.train)
    mined = MinED(aligner.student_ids, temperature=2.0)
    actual = mined_total(pair, mined, collate(examples))
    expected = torch.zeros((), dtype=torch.float64)
    texts = [text for example in examples for text in example.texts]
    outputs = zip(texts, pair.per_text("student"), pair.per_text("teacher"), strict=True)
    for text, ours, theirs in outputs:
        student_ids, teacher_ids = text.student.response_ids, text.teacher.response_ids
        partners = aligner.align(student_ids, teacher_ids)
        assert partners[-1] == len(teacher_ids) - 1  # the end of the text is the end of the text
        expected = expected + direct_mined(
            ours["logits"], student_ids, theirs["logits"], partners, aligner.student_ids.tolist()
        )
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(pair.models["student"].parameters())
    gradients = torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)
    for gradient, exact in zip(*gradients, strict=True):
        assert (gradient - exact).norm() <= 2e-5 * exact.norm()


def test_padding_and_the_order_of_rows_change_nothing(two_tokenizers, aligner, workspace) -> None:
    examples = aligned_examples(two_tokenizers, aligner, workspace.train)
    mined = MinED(aligner.student_ids, temperature=2.0)

    def total(*arguments) -> float:
        return mined_total(two_tokenizers, mined, collate(*arguments)).item()

    whole = total(examples)
    assert total(examples[::-1]) == pytest.approx(whole, rel=1e-5)
    assert total(examples, "all") == pytest.approx(whole, rel=1e-5)
    assert sum(total([example]) for example in examples) == pytest.approx(whole, rel=1e-5)


def test_one_tokenizer_makes_it_kl(one_tokenizer, tokenizers, workspace, tmp_path) -> None:
    aligner = TokenAligner(tokenizers[0], tokenizers[0], str(tmp_path))
    assert aligner.student_ids.tolist() == list(range(len(tokenizers[0])))
    batch = collate(aligned_examples(one_tokenizer, aligner, workspace.train))
    assert len(batch["student"]["alignment"]["unaligned"]) == 0
    total = mined_total(one_tokenizer, MinED(aligner.student_ids, temperature=2.0), batch)
    sides = [one_tokenizer.states(side) for side in ("student", "teacher")]
    expected = kl(*sides, divergence="forward_kl", temperature=2.0).total
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_run(distill_settings, tmp_path) -> None:
    settings = {**distill_settings, "kd": "mined", "ot": "off", "token_maps": tmp_path / "maps"}
    assert cli("distill", output=tmp_path / "whole", **settings) == 0
    divided = {**settings, "batch_size": 2, "gradient_accumulation": 2}
    assert cli("distill", output=tmp_path / "divided", **divided) == 0
    for ours, theirs in zip(log_of(tmp_path / "divided"), log_of(tmp_path / "whole"), strict=True):
        assert ours["kd"] == pytest.approx(ours["kd/aligned"] + ours["kd/gold"])
        assert 0 < ours["mined/aligned_share"] < 1
        for name in ("kd", "kd/aligned", "mined/aligned_share", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert not (tmp_path / "whole" / "projections.safetensors").exists()
