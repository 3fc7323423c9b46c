"""What MinED prepares, timed: the vocabulary map of two tokenizers, and alignments by it.

    python -m benchmarks.token_maps [--student FOLDER --teacher FOLDER] [--texts N]

Without folders, byte-level tokenizers with as many pieces as GPT-2's (50 257) and Qwen2.5's
(151 936) are trained: the student's on Python's standard library, the teacher's on the installed
packages and on invented words of Chinese characters, near to which the student has no piece. The
map is made from nothing, on all cores, as at the start of a training.

The texts are those of the standard library, to 256 student tokens. They are aligned by the compiled
code and by plain Python, on one core, with the same result.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cot2align.kernels import token_alignment
from cot2align.train.losses.mined import MinED, TokenAligner
from cot2align.train.new_model import byte_level_bpe

PIECES = (50_257, 151_936)
TOKENS = 256
TURNS = 3
MEBIBYTES = 48  # of sources


def sources(where: str) -> list[str]:
    """Of "stdlib" or "purelib", shuffled."""
    folder = Path(sysconfig.get_path(where))
    files = [f for f in folder.rglob("*.py") if "-packages" not in str(f.relative_to(folder))]
    random.Random(0).shuffle(files)
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files]
    sizes = itertools.accumulate(map(len, texts))
    return [text for text, size in zip(texts, sizes, strict=True) if size < MEBIBYTES * 2**20]


def invented(words: int = 25_000) -> list[str]:
    """Texts of so many words, of one to four of 6000 Chinese characters, some of them frequent."""
    generator = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(6000)]
    lengths = generator.choices((1, 2, 3, 4), (2, 6, 3, 2), k=words)
    lexicon = ["".join(generator.choices(characters, k=length)) for length in lengths]
    frequencies = [1 / (10 + rank) for rank in range(words)]
    return [" ".join(generator.choices(lexicon, frequencies, k=100)) for _ in range(words)]


def pairs_of_tokens(
    texts: Sequence[str], aligner: TokenAligner, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Both tokenizations of the beginning of every text that is long enough."""
    student, teacher = tokenizers
    for text in texts:
        whole = student(text[: TOKENS * 20], add_special_tokens=False)
        if len(whole["input_ids"]) < TOKENS:
            continue
        ours = whole["input_ids"][:TOKENS]
        theirs = teacher(student.decode(ours), add_special_tokens=False)["input_ids"]
        yield (
            [aligner.student.tokens[i] for i in ours],
            [aligner.teacher.tokens[i] for i in theirs],
        )


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", help="folder of a tokenizer")
    parser.add_argument("--teacher", help="folder of a tokenizer")
    parser.add_argument("--texts", type=int, default=20)
    options = parser.parse_args()
    library = sources("stdlib")
    tokenizers = [
        AutoTokenizer.from_pretrained(folder)
        if folder
        else byte_level_bpe(texts(), pieces, show_progress=True)
        for folder, texts, pieces in (
            (options.student, lambda: library, PIECES[0]),
            (options.teacher, lambda: sources("purelib") + invented(), PIECES[1]),
        )
    ]

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        aligner = TokenAligner(*tokenizers, folder)
        seconds = time.perf_counter() - start
    ours, theirs = (v.ordinary for v in (aligner.student, aligner.teacher))
    equal = aligner.equal[theirs].float().mean()
    print(
        f"map of {len(theirs)} tokens to {len(ours)}, {equal:.0%} of them equal: {seconds:.1f} s "
        f"on {torch.get_num_threads()} threads"
    )
    by_id = MinED(aligner.student_ids, temperature=1.0)
    has_equal = torch.isin(by_id.reached, aligner.student_ids[aligner.equal])
    another = (has_equal & ~aligner.equal[by_id.source]).sum()
    print(
        f"{has_equal.sum()} student tokens have an equal one, which is not the first teacher id "
        f"of {another}"
    )

    pairs = list(itertools.islice(pairs_of_tokens(library, aligner, tokenizers), options.texts))
    plain = mock.patch.multiple(token_alignment, _native=None, _warn_of_python=lambda: None)

    def align() -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        found = [token_alignment.align_tokens(*pair) for pair in pairs]
        return (time.perf_counter() - start) / len(pairs), found

    compiled, interpreted = [], []
    for _ in range(TURNS):
        seconds, found = align()
        compiled.append(seconds)
        with plain:
            seconds, expected = align()
        interpreted.append(seconds)
        if found != expected:
            raise SystemExit("compiled code and plain Python align differently")
    fast, slow = statistics.median(compiled), statistics.median(interpreted)
    print(
        f"{len(pairs)} texts of {TOKENS} student tokens: {1e3 * fast:.2f} ms a text, "
        f"{1e3 * slow:.0f} ms by plain Python, {slow / fast:.0f} times as long"
    )


if __name__ == "__main__":
    main()
