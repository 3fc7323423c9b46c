"""Token alignment against plain Python dynamic programmes, compiled and not."""

from __future__ import annotations

import functools
import itertools
import random

import pytest

from cot2align.kernels import native, token_alignment
from cot2align.kernels.token_alignment import align_tokens, nearest_tokens


@pytest.fixture(params=["compiled", "python"])
def implementation(request, monkeypatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(token_alignment, "_native", None)
        monkeypatch.setattr(token_alignment, "_warn_of_python", lambda: None)
    else:
        assert native.missing() is None
    return request.param


@functools.cache
def direct_distance(a: bytes, b: bytes) -> int:
    """Levenshtein's distance by its recurrence."""
    if not a or not b:
        return len(a) + len(b)
    changed = direct_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, direct_distance(a[1:], b) + 1, direct_distance(a, b[1:]) + 1)


def direct_alignment(x: list[bytes], y: list[bytes]) -> list[int]:
    """The partners, from the costs of all paths to every cell."""
    paths = {(-1, -1): 0}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        before = [paths[p] for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in paths]
        paths[i, j] = direct_distance(x[i], y[j]) + min(before)
    matches = {i: set() for i in range(len(x))}
    cell = (len(x) - 1, len(y) - 1)
    while cell != (-1, -1):
        i, j = cell
        matches[i].add(j)
        steps = [p for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in paths]
        cell = min(steps, key=lambda p: paths[p])
    return [found.pop() if len(found) == 1 else -1 for found in matches.values()]


def random_token(generator: random.Random, longest: int) -> bytes:
    alphabet = b"abc \xc3\xa9"
    return bytes(generator.choices(alphabet, k=generator.randint(0, longest)))


def test_nearest(implementation) -> None:
    generator = random.Random(0)
    for _ in range(70):
        tokens = [random_token(generator, 7) for _ in range(generator.randint(1, 60))]
        queries = [random_token(generator, 9) for _ in range(30)]
        expected = [
            min(range(len(tokens)), key=lambda i: direct_distance(query, tokens[i]))
            for query in queries
        ]
        assert nearest_tokens(queries, tokens) == expected


def test_nearest_of_long_tokens(implementation) -> None:
    generator = random.Random(1)
    lengths = (60, 63, 64, 65, 66, 130)
    tokens = [bytes(generator.choices(b"ab", k=n)) for n in lengths for _ in range(4)]
    queries = []
    for token in tokens:
        changed = bytearray(token)
        for _ in range(generator.randint(0, 20)):
            del changed[generator.randrange(len(changed))]
            changed.insert(generator.randrange(len(changed)), generator.choice(b"abc"))
        queries += [bytes(changed), bytes(changed) + b"a" * generator.randint(0, 5)]
    distance = token_alignment._distance
    for query, found in zip(queries, nearest_tokens(queries, tokens), strict=True):
        assert found == min(range(len(tokens)), key=lambda i: distance(query, tokens[i]))


def test_row_by_row_distance() -> None:
    generator = random.Random(2)
    for _ in range(500):
        a, b = random_token(generator, 9), random_token(generator, 9)
        assert token_alignment._distance(a, b) == direct_distance(a, b)


def test_nearest_reports_and_refuses(implementation) -> None:
    done: list[int] = []
    assert nearest_tokens([b"a"] * 1000, [b"b", b"a", b"a"], done.append) == [1] * 1000
    assert sum(done) == 1000
    assert nearest_tokens([], [b"a"]) == []
    assert nearest_tokens([b"", b"zz"], [b"yyyy", b"", b"y"]) == [1, 1]
    with pytest.raises(ValueError, match="tokens is empty"):
        nearest_tokens([b"a"], [])


def test_alignment(implementation) -> None:
    generator = random.Random(3)
    for _ in range(2000):
        x, y = (
            [random_token(generator, 3) for _ in range(generator.randint(1, 12))] for _ in range(2)
        )
        assert align_tokens(x, y) == direct_alignment(x, y)


def test_alignment_of_two_splits_of_a_text(implementation) -> None:
    text = "Na\u00efve \U0001f600 tests,\r\n\u6f22\u5b57".encode()

    def split(*ends: int) -> list[bytes]:
        return [text[a:b] for a, b in itertools.pairwise((0, *ends, len(text)))]

    x, y = split(6, 11, 17), split(6, 7, 11, 17, 20)
    assert align_tokens(x, y) == direct_alignment(x, y)
    assert align_tokens(x, x) == [0, 1, 2, 3]
    assert align_tokens([b"<s>", *x], x)[1:] == [0, 1, 2, 3]
    assert align_tokens([], x) == []
    assert align_tokens(x, []) == [-1] * 4


def test_ties_go_diagonally_first() -> None:
    # Every path costs 0 here; the one that is taken has the most diagonal steps at its end.
    assert align_tokens([b"a"] * 3, [b"a"] * 3) == [0, 1, 2]
    assert align_tokens([b"a"] * 3, [b"a"] * 2) == [0, 0, 1]
    assert align_tokens([b"a"] * 2, [b"a"] * 3) == [-1, 2]


def test_without_the_native_module_it_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(token_alignment, "_native", None)
    token_alignment._warn_of_python.cache_clear()
    with pytest.warns(UserWarning, match="plain Python aligns the tokens") as warned:
        assert align_tokens([b"a"], [b"a"]) == nearest_tokens([b"a"], [b"a"])
    assert len(warned) == 1
