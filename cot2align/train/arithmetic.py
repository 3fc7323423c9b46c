"""Generated rows: arithmetic in words, the demo's task.

Two or three steps with values from 1 to 12, told as a story, with the steps as the rationale.
Validation and test problems are held out by their first three numbers, so none of them shares these
with any training problem; every single step (3 plus 4) does occur in training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

HIGHEST = 12  # of all values on the way
LARGEST_CHANGE = 9
HELD_OUT = 0.1  # share of the triples (start, first change, second change)

PEOPLE = {
    "She": ("Ann", "Cleo", "Eva", "Hana", "June", "Lena"),
    "He": ("Ben", "Dan", "Finn", "Gus", "Ivo", "Kofi"),
}
ITEMS = (
    *("apples", "books", "cards", "coins", "eggs", "keys"),
    *("pears", "pens", "shells", "stamps", "tickets", "toys"),
)
GAINS = ("buys {} more", "finds {} more", "gets {}", "picks {} more")
LOSSES = ("drops {}", "gives away {}", "loses {}", "sells {}")


@dataclass(frozen=True)
class Problem:
    """`start` things, then each change added to them."""

    start: int
    changes: tuple[int, ...]

    @property
    def triple(self) -> tuple[int, ...]:
        """The first three numbers, as the text shows them: what a problem is held out by."""
        return (self.start, *(abs(change) for change in self.changes[:2]))


def problems(seed: int, train_rows: int, held_out_rows: int) -> tuple[list[Problem], list[Problem]]:
    """Different training and held-out problems; the triples of the two never meet."""
    generator = random.Random(seed)
    operands = range(1, LARGEST_CHANGE + 1)
    triples = list(product(range(1, HIGHEST + 1), operands, operands))
    held_out = set(generator.sample(triples, round(HELD_OUT * len(triples))))
    train: dict[Problem, None] = {}
    other: dict[Problem, None] = {}
    while len(train) < train_rows or len(other) < held_out_rows:
        problem = _problem(generator)
        is_other = problem.triple in held_out
        chosen, wanted = (other, held_out_rows) if is_other else (train, train_rows)
        if len(chosen) < wanted:
            chosen[problem] = None
    return list(train), list(other)


def rows(seed: int, counts: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """Rows of each split, with their rationales: as many of "train", "validation" and "test" as
    `counts` says, the latter two both held out."""
    generator = random.Random(seed)
    train, other = problems(seed, counts["train"], counts["validation"] + counts["test"])
    test, validation = other[: counts["test"]], other[counts["test"] :]
    splits = {"train": train, "test": test, "validation": validation}
    return {
        name: [{"id": f"{name}-{i}"} | tell(problem, generator) for i, problem in enumerate(chosen)]
        for name, chosen in splits.items()
    }


def _problem(generator: random.Random) -> Problem:
    start = value = generator.randint(1, HIGHEST)
    changes = []
    for _ in range(generator.choice((2, 3))):
        least, most = max(1 - value, -LARGEST_CHANGE), min(HIGHEST - value, LARGEST_CHANGE)
        change = generator.choice([c for c in range(least, most + 1) if c])
        changes.append(change)
        value += change
    return Problem(start, tuple(changes))


def tell(problem: Problem, generator: random.Random) -> dict[str, str]:
    """The problem as a row: instruction, output and rationale."""
    pronoun = generator.choice(list(PEOPLE))
    name = generator.choice(PEOPLE[pronoun])
    item = generator.choice(ITEMS)
    value = problem.start
    story, steps = [f"{name} has {value} {item}."], []
    for change in problem.changes:
        action = generator.choice(GAINS if change > 0 else LOSSES).format(abs(change))
        story.append(f"{pronoun} {action}.")
        sign = "plus" if change > 0 else "minus"
        steps.append(f"Now {value} {sign} {abs(change)} is {value + change}.")
        value += change
    return {
        "instruction": " ".join([*story, f"How many {item} are left?"]),
        "output": f"{value} {item}",
        "rationale": " ".join(steps),
    }
