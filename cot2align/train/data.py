"""Rows -> prompts -> token ids -> batches.

A row is a JSON line with `instruction`, `input`, `output`, and optionally `rationale` and `id`. It
has a standard text and, where it has a rationale, a chain-of-thought (CoT) text:

    standard   prompt                     + "{output}"
    CoT        prompt that asks for steps + "{rationale}\\nTherefore, the answer is: {output}"

Prompt and response are tokenised separately, the end-of-sequence token closes the response, and
every model has its own tokenizer and, with `prompt_format: chat`, its own chat template. A text
that is too long loses tokens of its prompt's input first, then of its instruction, never of what
follows them (`### Response:`); then of its response's end.

A batch carries all texts of its rows, standard and CoT alike, once per model. The positions that
predict a response token are computed here, on the CPU, so that the models' forward passes read
nothing back from the device.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cot2align.train.config import CacheConfig, TrainConfig, UserError, check_prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_MARKER = "Therefore, the answer is:"


@dataclass(frozen=True)
class PromptFormat:
    """Templates over {instruction} and {input}; what follows the input is the tail, never cut."""

    standard: str
    standard_with_input: str
    cot: str
    cot_with_input: str

    def template(self, row: Row, is_cot: bool) -> str:
        if is_cot:
            return self.cot_with_input if row.input else self.cot
        return self.standard_with_input if row.input else self.standard

    def text(self, row: Row, is_cot: bool) -> str:
        """The row's whole prompt; in the format "chat", the user's message."""
        return self.template(row, is_cot).format(instruction=row.instruction, input=row.input)


_SECTIONS = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
_SECTIONS_WITH_INPUT = (
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_COT = (
    "Below is an instruction that describes a task. "
    "Write a response with reasoning step by step that appropriately completes the request."
)
_STEPS = "Let's think step by step."
PROMPT_FORMATS = {
    # Figure 3 of the paper.
    "paper": PromptFormat(
        standard="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request." + _SECTIONS,
        standard_with_input="Below is an instruction that describes a task, paired with an input "
        "that provides further context. "
        "Write a response that appropriately completes the request." + _SECTIONS_WITH_INPUT,
        cot=_COT + _SECTIONS + _STEPS + "\n",
        cot_with_input=_COT + _SECTIONS_WITH_INPUT + _STEPS + "\n",
    ),
    # A user's message, which the tokenizer's chat template then surrounds.
    "chat": PromptFormat(
        standard="{instruction}",
        standard_with_input="{instruction}\n\n{input}",
        cot="{instruction}\n\n" + _STEPS,
        cot_with_input="{instruction}\n\n{input}\n\n" + _STEPS,
    ),
    # The row's own words: for base models, small models and small context windows.
    "raw": PromptFormat(
        standard="{instruction}\n",
        standard_with_input="{instruction}\n{input}\n",
        cot="{instruction}\n" + _STEPS + "\n",
        cot_with_input="{instruction}\n{input}\n" + _STEPS + "\n",
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of a data file; `fields` holds it as it was read."""

    id: str
    instruction: str
    input: str
    outputs: tuple[str, ...]
    rationale: str
    fields: dict[str, Any] = field(repr=False, compare=False)

    def response(self, is_cot: bool) -> str:
        """The target text; of several references, the first."""
        if is_cot:
            return f"{self.rationale}\n{ANSWER_MARKER} {self.outputs[0]}"
        return self.outputs[0]


def read_rows(path: str) -> list[Row]:
    """The rows of a JSON Lines file; blank lines are skipped, a missing `id` is the row's number
    from 0.

    Raises UserError, with file and line, for a missing file, broken JSON, a field that is missing,
    of a wrong type or empty, and an `id` that comes twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"data file {path}: {error.strerror}") from None
    lines = decode_text(content, path).split("\n")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line, f"{path}:{number}", default_id=str(len(rows)))
        if row.id in seen:
            raise UserError(f"{path}:{number}: id {row.id!r} is also on line {seen[row.id]}")
        seen[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"data file {path}: no rows")
    return rows


def decode_text(content: bytes, path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, each line's end as "\\n".

    Raises UserError that names the file and the line.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"data file {path}: UTF-16, expected UTF-8")
    for what, place in (
        ("a NUL byte, so not a text", content.find(0)),
        ("not UTF-8", _not_utf8(content)),
    ):
        if place >= 0:
            line = content.count(b"\n", 0, place) + 1
            raise UserError(f"data file {path}: {what} (line {line}, byte {content[place]:#04x})")
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(content: bytes) -> int:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start
    return -1


def load_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises UserError that begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text else ""
        reason = f"{error.msg} ({place}column {error.colno})"
    except RecursionError:
        reason = "too many brackets inside each other"
    except ValueError as error:  # an integer of thousands of digits
        reason = str(error)
    raise UserError(f"{where}: broken JSON: {reason}")


def has_surrogate(text: str) -> bool:
    """Whether a JSON escape such as \\ud800 left half a character, which no file can hold."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def parse_row(line: str, where: str, default_id: str) -> Row:
    """One JSON line as a Row. Raises UserError that begins with `where`."""
    fields = load_json(line, where)
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    texts = {"input": "", "rationale": "", **{k: v for k, v in fields.items() if v is not None}}
    for name in ("instruction", "output"):
        if name not in texts:
            raise UserError(f"{where}: field {name!r} is missing")
    outputs = texts["output"] if isinstance(texts["output"], list) else [texts["output"]]
    for name, value in [
        *((name, texts[name]) for name in ("instruction", "input", "rationale")),
        *(("output", output) for output in outputs),
    ]:
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r}: expected text, got {type(value).__name__}")
        if has_surrogate(value):
            raise UserError(f"{where}: field {name!r} has half of a surrogate pair, no character")
        if not value.strip() and name in ("instruction", "output"):
            what = "empty response" if name == "output" else "empty instruction"
            raise UserError(f"{where}: {what} (field {name!r})")
    if not outputs:
        raise UserError(f"{where}: empty response (field 'output' is an empty list)")
    row_id = fields.get("id", default_id)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise UserError(f"{where}: field 'id': expected text or an integer, got {row_id!r}")
    return Row(
        id=str(row_id),
        instruction=texts["instruction"],
        input=texts["input"].strip() and texts["input"],
        outputs=tuple(outputs),
        rationale=texts["rationale"].strip(),
        fields=fields,
    )


@dataclass(frozen=True)
class Text:
    """Token ids of one text for one model; the response begins at `prompt_length`."""

    ids: list[int]
    prompt_length: int

    @property
    def response_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class TextPair:
    """One text as the student's and, in distillation, the teacher's tokens; with MinED, for each
    token of the student's response the place of its partner in the teacher's, or -1."""

    is_cot: bool
    student: Text
    teacher: Text | None = None
    alignment: list[int] | None = None


@dataclass(frozen=True)
class Cuts:
    """How many prompts and responses did not fit, of how many texts."""

    texts: int
    prompts: int
    responses: int

    def __str__(self) -> str:
        shares = (
            f"{100 * count / max(self.texts, 1):.1f} % of {what}"
            for count, what in ((self.prompts, "prompts"), (self.responses, "responses"))
        )
        return f"cut to fit: {', '.join(shares)} ({self.texts} texts)"


class TextEncoder:
    """Turns rows into token ids with one tokenizer.

    prompt_format: a key of PROMPT_FORMATS; max_length: prompt and response, tokens;
    max_prompt_length: what a prompt may keep even where the response is long, tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: str,
        max_length: int,
        max_prompt_length: int,
    ):
        check_prompt_length(max_prompt_length, max_length)
        self.is_chat = prompt_format == "chat"
        if self.is_chat and not tokenizer.chat_template:
            raise UserError(
                f"prompt_format is chat, but the tokenizer of {tokenizer.name_or_path!r} has no "
                "chat template; base models take paper or raw"
            )
        self.tokenizer = tokenizer
        self.format = PROMPT_FORMATS[prompt_format]
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length

    @classmethod
    def of(
        cls, config: TrainConfig | CacheConfig, tokenizer: PreTrainedTokenizerBase
    ) -> TextEncoder:
        """With the limits that a config names. Raises UserError."""
        return cls(
            tokenizer,
            prompt_format=config.prompt_format,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
        )

    def texts(self, rows: Sequence[Row], is_cot: bool) -> tuple[list[Text], Cuts]:
        """Prompt, response and end-of-sequence token of every row."""
        if not rows:
            return [], Cuts(0, 0, 0)
        responses = self.tokenizer(
            [row.response(is_cot) for row in rows], add_special_tokens=False
        )["input_ids"]
        for row, ids in zip(rows, responses, strict=True):
            if not ids:
                raise UserError(f"row {row.id!r}: the response has no tokens in this tokenizer")
            ids.append(self.tokenizer.eos_token_id)
        budgets = [max(self.max_length - len(ids), self.max_prompt_length) for ids in responses]
        prompts, cut_prompts = self.prompts(rows, is_cot, budgets)
        texts = [
            Text((prompt + response)[: self.max_length], len(prompt))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        cut_responses = sum(
            len(prompt) + len(response) > self.max_length
            for prompt, response in zip(prompts, responses, strict=True)
        )
        return texts, Cuts(len(texts), cut_prompts, cut_responses)

    def prompts(
        self, rows: Sequence[Row], is_cot: bool, budgets: Sequence[int]
    ) -> tuple[list[list[int]], int]:
        """Token ids of every row's prompt, at most its budget; and how many had to be cut."""
        encoded = self._encode([self.format.text(row, is_cot) for row in rows])
        cut = 0
        for index, (row, ids, budget) in enumerate(zip(rows, encoded, budgets, strict=True)):
            if len(ids) > budget:
                encoded[index] = self._cut(row, is_cot, ids, budget)
                cut += 1
        return encoded, cut

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if self.is_chat:
            # A chat template writes the special tokens itself.
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = self.tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer(prompts, add_special_tokens=True)["input_ids"]
        # Some tokenizers close every text; the prompt is not the end of ours.
        eos = self.tokenizer.eos_token_id
        return [ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in encoded]

    def _cut(self, row: Row, is_cot: bool, ids: list[int], budget: int) -> list[int]:
        template = self.format.template(row, is_cot)
        parts = {"instruction": row.instruction, "input": row.input}
        for name in ("input", "instruction"):
            # Tokens at the cut may merge anew, so the first guess is checked and corrected.
            while parts[name] and len(ids) > budget:
                parts[name] = self._drop_tokens(parts[name], len(ids) - budget)
                (ids,) = self._encode([template.format(**parts)])
        if len(ids) > budget:
            raise UserError(
                f"row {row.id!r}: the prompt's fixed text alone takes {len(ids)} tokens, more than "
                f"the {budget} it may have; raise max_length or max_prompt_length"
            )
        return ids

    def _drop_tokens(self, text: str, count: int) -> str:
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        kept = len(offsets) - count
        # At least one character goes, so that the caller's loop ends.
        return text[: min(offsets[kept - 1][1], len(text) - 1)] if kept > 0 else ""


@dataclass(frozen=True)
class Example:
    """One row, tokenised: its texts of the wanted kinds; the row's id."""

    texts: tuple[TextPair, ...]
    id: str = ""


def encode_rows(
    rows: Sequence[Row],
    student: TextEncoder,
    teacher: TextEncoder | None = None,
    *,
    texts: str = "both",
    same_vocabulary: bool = False,
    align: Callable[[list[tuple[list[int], list[int]]]], list[list[int]]] | None = None,
) -> tuple[list[Example], dict[str, Cuts]]:
    """Every row's texts for one model or two, and what was cut ("student", "teacher").

    texts: "standard", "cot" or "both"; a row without a rationale has no CoT text, and a row with no
    text left is dropped. same_vocabulary: both tokenizers must give the same response ids, but for
    their end-of-sequence tokens and what was cut (the models are compared position by position).
    Raises UserError where they do not, or where no row is left. align: [(student's, teacher's
    response ids)] -> each text's TextPair.alignment.
    """
    pairs: list[list[TextPair]] = [[] for _ in rows]
    cuts: dict[str, list[Cuts]] = {"student": [], "teacher": []}
    ends = tuple(e.tokenizer.eos_token_id for e in (student, teacher) if e is not None)
    for is_cot in [kind == "cot" for kind in ("standard", "cot") if texts in (kind, "both")]:
        members = [i for i, row in enumerate(rows) if row.rationale or not is_cot]
        chosen = [rows[i] for i in members]
        student_texts, cut = student.texts(chosen, is_cot)
        cuts["student"].append(cut)
        teacher_texts: Sequence[Text | None] = [None] * len(chosen)
        alignments: Sequence[list[int] | None] = [None] * len(chosen)
        if teacher is not None:
            both, cut = teacher.texts(chosen, is_cot)
            cuts["teacher"].append(cut)
            teacher_texts = both
            if align is not None:
                sides = zip(student_texts, both, strict=True)
                alignments = align([(a.response_ids, b.response_ids) for a, b in sides])
        for index, student_text, teacher_text, alignment in zip(
            members, student_texts, teacher_texts, alignments, strict=True
        ):
            if same_vocabulary and teacher_text is not None:
                tokens = zip(student_text.response_ids, teacher_text.response_ids, strict=False)
                if any(ours != theirs and (ours, theirs) != ends for ours, theirs in tokens):
                    raise UserError(
                        "student and teacher have one vocabulary, but their tokenizers split the "
                        f"response of row {rows[index].id!r} differently; kd uld and mined can "
                        "compare them"
                    )
            pairs[index].append(TextPair(is_cot, student_text, teacher_text, alignment))
    examples = [
        Example(tuple(row_pairs), row.id)
        for row, row_pairs in zip(rows, pairs, strict=True)
        if row_pairs
    ]
    if not examples:
        raise UserError("no row has a rationale, and texts is 'cot': nothing to train on")
    totals = {
        name: Cuts(
            sum(c.texts for c in cut), sum(c.prompts for c in cut), sum(c.responses for c in cut)
        )
        for name, cut in cuts.items()
        if cut
    }
    return examples, totals


def collate(
    examples: Sequence[Example],
    tokens: str = "response",
    *,
    layout: str = "padded",
    crossed: bool = False,
    cached: Callable[[Sequence[Text], str], dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """One batch: the texts of all rows, row by row, as `B` texts for each model.

    Returns {"student": model batch, "teacher": model batch (in distillation only), "text_rows": [B]
    row of each text, "text_is_cot": [B], "num_tokens": student response tokens, "num_rows",
    "ids": of the rows}. See `model_batch`. With MinED the student's has an "alignment" of its R
    response tokens: int64 "student" [A] and "teacher" [A], the aligned ones and their partners of
    the teacher's, and "unaligned" [R - A]. layout: see `model_batch`. crossed: only rows with both
    texts have a pair, those of the others are empty for the teacher (but for the shortest one where
    no row has a pair: a model needs a text). cached: gives the teacher's "states", see
    `teacher.TeacherCache.states`.
    """
    texts = [(row, pair) for row, example in enumerate(examples) for pair in example.texts]
    batch: dict[str, Any] = {
        "student": model_batch([pair.student for _, pair in texts], tokens, layout),
        "text_rows": [row for row, _ in texts],
        "text_is_cot": [pair.is_cot for _, pair in texts],
        "num_tokens": sum(len(pair.student.response_ids) for _, pair in texts),
        "num_rows": len(examples),
        "ids": [example.id for example in examples],
    }
    teacher_texts = [pair.teacher for _, pair in texts if pair.teacher is not None]
    if teacher_texts:
        if crossed:
            needed = [len(examples[row].texts) == 2 for row, _ in texts]
            if not any(needed):
                lengths = [len(text.ids) for text in teacher_texts]
                needed[lengths.index(min(lengths))] = True
            chosen = zip(teacher_texts, needed, strict=True)
            teacher_texts = [text if is_needed else Text([], 0) for text, is_needed in chosen]
        batch["teacher"] = model_batch(teacher_texts, tokens, layout)
        if cached is not None:
            batch["teacher"]["states"] = cached([t for t in teacher_texts if t.ids], tokens)
    alignments = [pair.alignment for _, pair in texts if pair.alignment is not None]
    if alignments:
        starts = batch["teacher"]["cu_responses"]
        partners = torch.tensor(
            [
                place + start if place >= 0 else -1
                for start, alignment in zip(starts, alignments, strict=False)
                for place in alignment
            ],
            dtype=torch.int64,
        )
        batch["student"]["alignment"] = {
            "student": (partners >= 0).nonzero()[:, 0],
            "teacher": partners[partners >= 0],
            "unaligned": (partners < 0).nonzero()[:, 0],
        }
    return batch


def places(lengths: Sequence[int], layout: str) -> tuple[list[int], int, int]:
    """Where texts begin in a matrix of tokens, flat, and its rows and its width.

    layout: "padded": every text has a row; "packed": texts share rows, of the width up to twice the
    longest text's that leaves the least padding; "joined": all are in one row. Empty texts have no
    place.
    """
    longest = max(lengths)
    if layout == "padded":
        *starts, size = itertools.accumulate((longest * (n > 0) for n in lengths), initial=0)
        return starts, size // longest, longest
    if layout == "joined":
        return _first_fit(lengths, sum(lengths))
    widths = range(longest, 2 * longest, math.ceil(longest / 16))
    filled = [_first_fit(lengths, width) for width in widths]
    return min(filled, key=lambda one: one[1] * one[2])


def _first_fit(lengths: Sequence[int], width: int) -> tuple[list[int], int, int]:
    """`places` where each text, the longest first, goes into the first row with room for it."""
    starts = [0] * len(lengths)
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        if length := lengths[text]:
            row = next((row for row, free in enumerate(room) if free >= length), len(room))
            room += [width] * (row == len(room))
            starts[text] = (row + 1) * width - room[row]
            room[row] -= length
    return starts, len(room), width


def model_batch(
    texts: Iterable[Text], tokens: str = "response", layout: str = "padded"
) -> dict[str, Any]:
    """What one model's forward pass needs of `B` texts in `n` rows of `L` tokens, by `places`.

    input_ids: int64 [n, L]. attention_mask: int64 [n, L], or, where texts share a row,
    position_ids: int64 [n, L], which begin again with every text. positions: int64 [T], the flat
    places of input_ids whose states are wanted: with tokens "response" those that predict a
    response token, with "all" every place that holds a token. cu_seqlens: list of B + 1 ints, which
    of the T are of each text. response: int64 [R], which of the T predict a response token, or None
    where all do. targets: int64 [R], the response tokens. cu_responses: list of B + 1 ints, those
    of each text.
    """
    texts = list(texts)
    lengths = [len(text.ids) for text in texts]
    starts, rows, width = places(lengths, layout)
    input_ids, position_ids, attention_mask = torch.zeros(3, rows * width, dtype=torch.int64)
    positions: list[int] = []
    response: list[int] = []
    targets: list[int] = []
    cu_seqlens = [0]
    cu_responses = [0]
    for text, start, length in zip(texts, starts, lengths, strict=True):
        input_ids[start : start + length] = torch.tensor(text.ids)
        position_ids[start : start + length] = torch.arange(length)
        attention_mask[start : start + length] = 1
        before = text.prompt_length - 1
        first, last = (0, length) if tokens == "all" else (before, length - 1)
        response.extend(range(len(positions) + before, len(positions) + length - 1))
        positions.extend(range(start + first, start + last))
        targets.extend(text.response_ids)
        cu_seqlens.append(len(positions))
        cu_responses.append(len(targets))
    name, of_places = (
        ("attention_mask", attention_mask) if layout == "padded" else ("position_ids", position_ids)
    )
    return {
        "input_ids": input_ids.view(rows, width),
        name: of_places.view(rows, width),
        "positions": torch.tensor(positions, dtype=torch.int64),
        "cu_seqlens": cu_seqlens,
        "response": torch.tensor(response, dtype=torch.int64) if tokens == "all" else None,
        "targets": torch.tensor(targets, dtype=torch.int64),
        "cu_responses": cu_responses,
    }


class LengthSampler(torch.utils.data.Sampler[int]):
    """Rows in random order, but those of one optimizer step of like length.

    Shuffled rows are sorted by length in pools of 50 steps, cut into steps, and the steps shuffled.
    The order follows from seed and epoch alone, however a step is divided into processes and
    forward passes.
    """

    POOL = 50

    def __init__(
        self, lengths: Sequence[int], rows_per_step: int, seed: int, epoch: Callable[[], int]
    ):
        """epoch: the number of the epoch that begins, asked when it does."""
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch()}")
        order = generator.sample(range(len(self)), len(self))
        size = self.rows_per_step
        steps = []
        for first in range(0, len(order), self.POOL * size):
            pool = sorted(order[first : first + self.POOL * size], key=self.lengths.__getitem__)
            steps += [pool[start : start + size] for start in range(0, len(pool), size)]
        # A step that is not full stays the last.
        last = [steps.pop()] if len(steps[-1]) < size else []
        generator.shuffle(steps)
        return iter([i for step in steps + last for i in step])
