"""The command `prepare`: training, validation and test rows from what a publisher ships, or from a
file of your own.

    records of the hub or of local files, by split -> rows (instruction, input, output, id)
        -> filters, each counted -> splits -> OUTPUT/{train,validation,test}.jsonl, prepare.json

A split that the source has is kept. One that it lacks is cut from the training rows, shuffled with
`seed`: test from the end, validation before it, which with seed 42 is how the paper's authors cut
Alpaca and S-NI. Sizes are the paper's; of a smaller source, and of rows of your own, a tenth at
most. The filters and templates are those of the authors' code, where it has them:

    dolly       prompt of at most 256 GPT-2 tokens (MiniLLM). MiniLLM's own validation and test
                rows cannot be drawn again from the hub; give its processed files to have them.
    alpaca      input not empty, answer of at least 11 words
    sni         train: input not empty, answer of at least 6 words; test: at least 11, and an
                instruction of at most 175 words (the code asks for 350 and counts it twice)
    dialogsum   nothing; each of a test dialogue's three summaries, with its topic, is a row
    arithmetic  nothing; problems with rationales are generated, see arithmetic.py

No code that comes with a data set is run. Nothing but these fields goes into the rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cot2align.train import arithmetic
from cot2align.train.config import PrepareConfig, TextConfig, UserError, nearest
from cot2align.train.data import Row as TrainingRow
from cot2align.train.data import TextEncoder, decode_text, has_surrogate, load_json

SPLITS = ("train", "validation", "test")
REPORT_FILE = "prepare.json"
TOPIC = "Generate a summary of the dialogue, focusing specifically on the provided topic: {topic}."

Record = dict[str, Any]  # as its publisher ships it
Row = dict[str, Any]  # as it is written
Located = tuple[str, Record]  # FILE:LINE, or what else says where it stands


@dataclass(frozen=True)
class Filters:
    """What a row must have to be kept; words are counted between white space, None: no limit."""

    needs_input: bool = False
    min_words: int | None = None
    max_words: int | None = None
    max_instruction_words: int | None = None
    max_prompt_tokens: int | None = None

    def reason_to_drop(self, row: Row) -> str | None:
        """Why the row goes, but for its prompt's tokens, or None."""
        answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
        words = len(answers[0].split()) if answers else 0
        instruction_words = len(row["instruction"].split())
        for holds, reason in (
            (not instruction_words, "no instruction"),
            (not all(answer.strip() for answer in answers) or not answers, "no answer"),
            (self.needs_input and not row["input"].strip(), "no input"),
            (
                self.min_words is not None and words < self.min_words,
                f"answer under {self.min_words} words",
            ),
            (
                self.max_words is not None and words > self.max_words,
                f"answer over {self.max_words} words",
            ),
            (
                self.max_instruction_words is not None
                and instruction_words > self.max_instruction_words,
                f"instruction over {self.max_instruction_words} words",
            ),
        ):
            if holds:
                return reason
        return None


@dataclass(frozen=True)
class Source:
    """A data set: where the hub has it (arguments of load_dataset), what one of its records holds,
    the paper's numbers of rows, and its filters; test_filters: those of a test split it ships."""

    rows: Callable[[Record, str], list[Row]]
    hub: dict[str, str]
    counts: dict[str, int]
    filters: Filters = Filters()
    test_filters: Filters | None = None


def run(config: PrepareConfig) -> dict[str, Any]:
    """Write the rows; returns what prepare.json holds.

    {"source", "seed", "hashes": sha256 by file, "read": rows by shipped split, "dropped":
    {shipped split: {reason: rows}}, "rows": {split: rows written}, "paper": the paper's rows or
    None, "shared_prompts": {split: rows whose prompt is also in train}, "settings"}. Raises
    UserError, and then has written nothing.
    """
    source = source_of(config)
    _check_output(config.output)
    limit = config.max_prompt_tokens or source.filters.max_prompt_tokens
    encoder = None if limit is None else _encoder(config.tokenizer)
    shipped, hashes = _read(config, source)
    kept: dict[str, list[Row]] = {}
    read: dict[str, int] = {}
    dropped: dict[str, dict[str, int]] = {}
    for split, records in shipped.items():
        filters = source.filters if split != "test" else source.test_filters or source.filters
        rows = _rows(config, source, split, records)
        read[split] = len(rows)
        kept[split], dropped[split] = _filter(
            config, rows, _with_settings(filters, config), encoder
        )
    splits = _split(config, source.counts, kept)
    if config.references == "all":
        splits["test"] = _with_all_references(splits["test"])
    report = {
        "source": config.source,
        "seed": config.seed,
        "hashes": hashes,
        "read": read,
        "dropped": dropped,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "paper": source.counts if source.hub else None,
        "shared_prompts": _shared_prompts(splits),
        "settings": vars(config),
    }
    _write(config.output, splits, report)
    print(f"{_table(report)}\n-> {config.output}")
    return report


# What each data set's records hold.

PLAIN = ("instruction", "input", "output")
_SNI_PROMPT = re.compile(
    r"(?P<definition>.*?)(?:\n\s*Input:(?P<input>.*?))?(?:\s*Output:\s*)?", re.DOTALL
)


def _dolly(record: Record, where: str) -> list[Row]:
    # As published, or as MiniLLM processed it.
    return [_row(record, where, ("instruction", "context", "response"), PLAIN)]


def _alpaca(record: Record, where: str) -> list[Row]:
    return [_row(record, where, PLAIN)]


def _sni(record: Record, where: str) -> list[Row]:
    if "prompt" not in record or "completion" not in record:
        return [_row(record, where, PLAIN, ("prompt", "completion"))]
    parts = _SNI_PROMPT.fullmatch(_text(record, "prompt", where))
    assert parts is not None
    return [
        {
            "instruction": parts["definition"].strip(),
            "input": (parts["input"] or "").strip(),
            "output": _text(record, "completion", where).strip(),
        }
    ]


def _arithmetic(record: Record, where: str) -> list[Row]:
    return [{"input": "", **record}]


def _dialogsum(record: Record, where: str) -> list[Row]:
    numbers = [number for number in ("", "1", "2", "3") if f"summary{number}" in record]
    if not numbers or "dialogue" not in record:
        raise _wrong_fields(record, where, ("dialogue", "summary", "topic"))
    rows = []
    for number in numbers:
        if f"topic{number}" not in record:
            raise _wrong_fields(record, where, ("dialogue", f"summary{number}", f"topic{number}"))
        topic = _text(record, f"topic{number}", where).strip()
        row = {
            "instruction": TOPIC.format(topic=topic) if topic else "",
            "input": _text(record, "dialogue", where).strip(),
            "output": _text(record, f"summary{number}", where).strip(),
            "topic": topic,
        }
        name = record.get("id", record.get("fname"))
        if name is not None:
            row = {"id": f"{name}_{number}" if number else name, **row}
        rows.append(row)
    return rows


SOURCES = {
    "dolly": Source(
        rows=_dolly,
        hub={"path": "databricks/databricks-dolly-15k"},
        counts={"train": 11435, "validation": 1000, "test": 500},
        filters=Filters(max_prompt_tokens=256),
    ),
    "alpaca": Source(
        rows=_alpaca,
        hub={"path": "tatsu-lab/alpaca"},
        counts={"train": 10396, "validation": 500, "test": 500},
        filters=Filters(needs_input=True, min_words=11),
    ),
    "sni": Source(
        rows=_sni,
        # Its main branch is a script; the hub keeps it as parquet too.
        hub={
            "path": "yizhongw/self_instruct",
            "name": "super_natural_instructions",
            "revision": "refs/convert/parquet",
        },
        counts={"train": 10414, "validation": 500, "test": 1902},
        filters=Filters(needs_input=True, min_words=6),
        test_filters=Filters(needs_input=True, min_words=11, max_instruction_words=175),
    ),
    "dialogsum": Source(
        rows=_dialogsum,
        hub={"path": "knkarthick/dialogsum"},
        counts={"train": 12460, "validation": 500, "test": 1500},
    ),
    "arithmetic": Source(
        rows=_arithmetic, hub={}, counts={"train": 4000, "validation": 100, "test": 200}
    ),
}


def source_of(config: PrepareConfig) -> Source:
    """Raises UserError for what is neither a data set nor there, and for settings that it lacks."""
    names = [name + "_field" for name in (*PLAIN, "rationale")]
    if config.source in SOURCES:
        changed = [name for name in names if getattr(config, name) != name.removesuffix("_field")]
        if changed:
            raise UserError(f"source {config.source} has fields of its own: no {changed[0]!r}")
        if config.references == "all" and config.source != "dialogsum":
            raise UserError(f"'references' is all, but source {config.source} has only its own")
        if config.files is not None and config.source == "arithmetic":
            raise UserError("'files' is given, but the rows of source arithmetic are generated")
        return SOURCES[config.source]
    if not Path(config.source).exists():
        near = nearest(config.source, SOURCES)
        raise UserError(f"source {config.source!r}: no such file, nor a data set{near}")
    if config.files is not None:
        raise UserError(
            f"'files' is given, but source {config.source!r} is a file or folder itself; "
            f"data sets: {', '.join(SOURCES)}"
        )
    if config.references == "all":
        raise UserError("'references' is all, but only source dialogsum has further ones")

    def own(record: Record, where: str) -> list[Row]:
        fields = [getattr(config, name) for name in names]
        for name, field in zip(names, fields, strict=True):
            # Only an input and a rationale that no setting names may be missing.
            optional = name in ("input_field", "rationale_field") and field + "_field" == name
            if field not in record and not optional:
                raise UserError(
                    f"{where}: field {field!r} is missing; found "
                    f"{', '.join(map(repr, record)) or 'none'}; setting {name!r} names another"
                )
        row = {
            "instruction": _text(record, fields[0], where),
            "input": _text(record, fields[1], where),
            "output": _answers(record, fields[2], where),
        }
        if record.get("id") is not None:
            row = {"id": record["id"], **row}
        rationale = _text(record, fields[3], where)
        return [{**row, "rationale": rationale} if rationale.strip() else row]

    return Source(rows=own, hub={}, counts={})


def _row(record: Record, where: str, *alternatives: Sequence[str]) -> Row:
    """The record's instruction, input and output, under the first names that it has all of."""
    for names in alternatives:
        if all(name in record for name in names):
            row = {
                "instruction": _text(record, names[0], where).strip(),
                "input": _text(record, names[1], where).strip(),
                "output": _answers(record, names[2], where),
            }
            return {"id": record["id"], **row} if record.get("id") is not None else row
    raise _wrong_fields(record, where, *alternatives)


def _wrong_fields(record: Record, where: str, *alternatives: Sequence[str]) -> UserError:
    expected = " or ".join(", ".join(map(repr, names)) for names in alternatives)
    found = ", ".join(map(repr, record)) or "none"
    return UserError(f"{where}: expected the fields {expected}; found {found}")


def _text(record: Record, name: str, where: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r}: expected text, got {type(value).__name__}")
    if has_surrogate(value):
        raise UserError(f"{where}: field {name!r} has half of a surrogate pair, no character")
    return value


def _answers(record: Record, name: str, where: str) -> str | list[str]:
    if isinstance(record[name], list):
        return [_text({name: answer}, name, where).strip() for answer in record[name]]
    return _text(record, name, where).strip()


# Reading: the hub, or files as jsonl, json, csv or parquet.


def _generate(config: PrepareConfig, counts: dict[str, int]) -> dict[str, list[Located]]:
    asked = {split: getattr(config, f"{split}_rows") for split in SPLITS}
    asked = {split: counts[split] if n is None else n for split, n in asked.items()}
    if asked["train"] > 8000 or asked["validation"] + asked["test"] > 500:
        raise UserError(
            "source arithmetic has 8000 training rows and 500 others at most, got "
            f"{asked['train']} and {asked['validation'] + asked['test']}"
        )
    generated = arithmetic.rows(config.seed, asked)
    return {split: [(split, row) for row in generated[split]] for split in SPLITS}


def _read(config: PrepareConfig, source: Source) -> tuple[dict[str, list[Located]], dict[str, str]]:
    """The records of each split that the source ships, "train" where it has none; and sha256 by
    file."""
    if config.source == "arithmetic":
        return _generate(config, source.counts), {}
    if config.source in SOURCES and config.files is None:
        return _read_hub(config.source, source.hub)
    path = Path(config.files or config.source)
    if config.source == "sni" and (path / "splits").is_dir():
        shipped, hashes = _read_tasks(path, config)
    else:
        shipped, hashes = {}, {}
        files = _files(path, config.format)
        for file, split in tqdm(files, desc="reading", unit="file", delay=1):
            content = _content(file)
            hashes[str(file.relative_to(path)) if path.is_dir() else file.name] = _sha256(content)
            shipped.setdefault(split, []).extend(_records(content, file, config.format))
    return {split: shipped[split] for split in SPLITS if split in shipped}, hashes


def _read_hub(name: str, hub: dict[str, str]) -> tuple[dict[str, list[Located]], dict[str, str]]:
    instead = f"or give the published files: --source {name} --files PATH"
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"source {name} comes from the hub ({hub['path']}), which needs the package datasets: "
            f"pip install 'cot2align[data]'; {instead}"
        ) from None
    try:
        loaded = datasets.load_dataset(**hub)
    # What fails below (network, hub, cache, formats) has no common class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{hub['path']} cannot be had from the hub: {reason}; {instead}") from None
    shipped = {
        split: [
            (f"{hub['path']} {split} row {i}", row)
            for i, row in enumerate(tqdm(rows, desc=f"reading {split}", unit="row", delay=1))
        ]
        for split, rows in loaded.items()
        if split in SPLITS
    }
    hashes = {
        f"{hub['path']} {split}": _sha256(
            "".join(json.dumps(record) + "\n" for _, record in records).encode()
        )
        for split, records in shipped.items()
    }
    return shipped, hashes


_FORMATS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    **dict.fromkeys(("dev", "valid", "val"), "validation"),
}


def _files(path: Path, format: str) -> list[tuple[Path, str]]:
    """The files of a folder, each with the split that its name says, or one file as "train".

    Where any name says a split, files that say none are left.
    """
    if not path.is_dir():
        return [(path, "train")]
    suffixes = [s for s, name in _FORMATS.items() if format in ("auto", name)]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and file.is_file()
        and file.name != REPORT_FILE
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"folder {path}: no file that ends in {', '.join(suffixes)}")
    said = [(file, _split_of(file.relative_to(path))) for file in found]
    if any(split for _, split in said):
        return [(file, split) for file, split in said if split]
    return [(file, "train") for file in found]


def _split_of(path: Path) -> str | None:
    for word in reversed(re.split("[^a-z]+", str(path).lower())):
        if word in _SPLIT_NAMES:
            return _SPLIT_NAMES[word]
    return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data file {path}: {error.strerror}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _records(content: bytes, path: Path, format: str) -> Iterator[Located]:
    if format == "auto":
        if path.suffix.lower() not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise UserError(
                f"data file {path}: unknown suffix {path.suffix!r} (known: {known}); set 'format'"
            )
        format = _FORMATS[path.suffix.lower()]
    if format == "parquet":
        records = _parquet(content, path)
    else:
        text = decode_text(content, path)
        # Many a .json file holds JSON lines.
        if format == "json" and not text.lstrip().startswith("{"):
            records = _json_list(text, path)
        else:
            records = _csv(text, path) if format == "csv" else _json_lines(text, path)
    count = 0
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
        count += 1
        yield where, record
    if not count:
        raise UserError(f"data file {path}: no rows")


def _json_lines(text: str, path: Path) -> Iterator[Located]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, load_json(line, where)


def _json_list(text: str, path: Path) -> Iterator[Located]:
    records = load_json(text, f"data file {path}")
    if not isinstance(records, list):
        raise UserError(f"data file {path}: expected a list, got {type(records).__name__}")
    for index, record in enumerate(records):
        yield f"{path}: item {index}", record


def _csv(text: str, path: Path) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column twice: {', '.join(header)}")
        for values in lines:
            where = f"{path}:{lines.line_num}"
            if len(values) != len(header) and values:
                raise UserError(
                    f"{where}: {len(values)} fields, but the first line names {len(header)}"
                )
            if values:
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: broken CSV: {error}") from None


def _parquet(content: bytes, path: Path) -> Iterator[Located]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"data file {path}: parquet needs the package pyarrow: pip install 'cot2align[data]'"
        ) from None
    try:
        records = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data file {path}: broken parquet: {error}") from None
    for index, record in enumerate(records):
        yield f"{path}: row {index}", record


def _read_tasks(
    folder: Path, config: PrepareConfig
) -> tuple[dict[str, list[Located]], dict[str, str]]:
    """Super-NaturalInstructions' own repository: splits/default/{train,test}_tasks.txt name files
    of tasks/. Of a test task the first instances are taken, which its publisher chose, of a
    training task a sample; a training row has the first answer."""
    shipped: dict[str, list[Located]] = {}
    hashes: dict[str, str] = {}
    lists = {
        split: folder / "splits" / "default" / f"{split}_tasks.txt" for split in ("train", "test")
    }
    for split, path in lists.items():
        names = decode_text(_content(path), path).split()
        shipped[split] = []
        for name in tqdm(names, desc=f"reading {split} tasks", unit="task", delay=1):
            file = folder / "tasks" / f"{name}.json"
            content = _content(file)
            hashes[f"tasks/{file.name}"] = _sha256(content)
            task = load_json(decode_text(content, file), f"data file {file}")
            if not isinstance(task, dict) or not isinstance(task.get("Instances"), list):
                raise UserError(f"data file {file}: expected 'Definition' and a list 'Instances'")
            definition = _answers({"Definition": "", **task}, "Definition", f"data file {file}")
            if isinstance(definition, list):
                definition = " ".join(definition)
            located = list(enumerate(task["Instances"]))
            size = min(config.rows_per_task, len(located))
            chosen = located[:size]
            if split == "train":
                chosen = random.Random(f"{config.seed} {name}").sample(located, size)
            for index, instance in chosen:
                where = f"{file}: instance {index}"
                if not isinstance(instance, dict):
                    raise UserError(f"{where}: expected a JSON object")
                answer = instance.get("output")
                if isinstance(answer, list) and (split == "train" or len(answer) == 1):
                    instance = {**instance, "output": answer[0] if answer else ""}
                shipped[split].append((where, {**instance, "instruction": definition}))
    return shipped, hashes


# From records to splits.


def _rows(
    config: PrepareConfig, source: Source, split: str, records: Iterable[Located]
) -> list[Row]:
    """Every record's rows, each with an `id`: its own, or data set, split and number of the
    record, which are the same however the rows are filtered and split."""
    name = config.source if config.source in SOURCES else "own"
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for index, (where, record) in enumerate(records):
        made = source.rows(record, where)
        for number, row in enumerate(made, start=1):
            default = f"{name}-{split}-{index}" + (f"-{number}" if len(made) > 1 else "")
            row_id = row.get("id", default)
            if not isinstance(row_id, str | int) or isinstance(row_id, bool):
                raise UserError(f"{where}: field 'id': expected text or an integer, got {row_id!r}")
            row = {"id": str(row_id), **{k: v for k, v in row.items() if k != "id"}}
            if row["id"] in seen:
                raise UserError(f"{where}: id {row['id']!r} is also at {seen[row['id']]}")
            seen[row["id"]] = where
            rows.append(row)
    return rows


def _with_settings(filters: Filters, config: PrepareConfig) -> Filters:
    given = {
        name: value
        for name in ("min_words", "max_words", "max_prompt_tokens")
        if (value := getattr(config, name)) is not None
    }
    return replace(filters, **given)


def _filter(
    config: PrepareConfig, rows: Sequence[Row], filters: Filters, encoder: TextEncoder | None
) -> tuple[list[Row], dict[str, int]]:
    """The rows that stay, and how many went, by reason."""
    dropped: Counter[str] = Counter()
    kept = []
    for row in rows:
        reason = filters.reason_to_drop(row)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    keep = {"auto": config.source in SOURCES, "keep": True, "drop": False}[config.duplicates]
    if not keep:
        unique: dict[str, Row] = {}
        for row in kept:
            unique.setdefault(json.dumps([row[name] for name in PLAIN]), row)
        if len(unique) < len(kept):
            dropped["duplicate"] = len(kept) - len(unique)
        kept = list(unique.values())
    limit = filters.max_prompt_tokens
    if encoder is not None and limit is not None:
        lengths = _prompt_tokens(kept, encoder)
        short = [row for row, length in zip(kept, lengths, strict=True) if length <= limit]
        if len(short) < len(kept):
            dropped[f"prompt over {limit} tokens"] = len(kept) - len(short)
        kept = short
    return kept, dict(dropped)


def _encoder(tokenizer: str) -> TextEncoder:
    """For the standard prompts, however long."""
    from transformers.utils import logging as transformers_logging

    from cot2align.train.models import load_tokenizer

    transformers_logging.set_verbosity_error()
    return TextEncoder(
        load_tokenizer(tokenizer),
        prompt_format=TextConfig.prompt_format,
        max_length=sys.maxsize,
        max_prompt_length=sys.maxsize - 1,
    )


def _prompt_tokens(rows: Sequence[Row], encoder: TextEncoder) -> list[int]:
    lengths: list[int] = []
    with tqdm(total=len(rows), desc="counting tokens", unit="row", delay=1) as progress:
        for start in range(0, len(rows), 500):
            batch = [
                TrainingRow(row["id"], row["instruction"], row["input"], (), "", {})
                for row in rows[start : start + 500]
            ]
            prompts, _ = encoder.prompts(batch, False, [sys.maxsize] * len(batch))
            lengths += [len(prompt) for prompt in prompts]
            progress.update(len(batch))
    return lengths


def _split(
    config: PrepareConfig, counts: dict[str, int], kept: dict[str, list[Row]]
) -> dict[str, list[Row]]:
    """The rows of every split: those shipped, and those cut from the shuffled training rows."""
    generator = random.Random(config.seed)
    asked = {split: getattr(config, f"{split}_rows") for split in SPLITS}
    splits = {split: list(kept.get(split, [])) for split in SPLITS}
    train = splits["train"]
    sizes = {
        split: min(counts.get(split, 500), len(train) // 10)
        if asked[split] is None
        else asked[split]
        for split in ("validation", "test")
        if split not in kept
    }
    if "train" in kept and sum(sizes.values()) >= len(train):
        words = ", ".join(f"{split}_rows {size}" for split, size in sizes.items() if size)
        raise UserError(
            f"source {config.source!r}: no training row is left"
            + (f" of {len(train)}; asked for: {words}" if words else " by the filters")
        )
    if train and any(sizes.values()):
        generator.shuffle(train)
        # The test rows are the last, the validation rows come before them.
        for split, size in reversed(sizes.items()):
            splits[split] = train[len(train) - size :]
            del train[len(train) - size :]
    for split, rows in splits.items():
        most = counts.get(split) if asked[split] is None else asked[split]
        if most is not None and len(rows) > most:
            splits[split] = [rows[i] for i in sorted(generator.sample(range(len(rows)), most))]
    return splits


def _with_all_references(rows: Sequence[Row]) -> list[Row]:
    """Each row with its dialogue's other summaries after its own, and the topic of each."""
    by_dialogue: dict[str, list[Row]] = {}
    for row in rows:
        by_dialogue.setdefault(row["input"], []).append(row)
    every = []
    for row in rows:
        others = [other for other in by_dialogue[row["input"]] if other is not row]
        group = [row, *others]
        fields = {name: value for name, value in row.items() if name != "topic"}
        fields["output"] = [member["output"] for member in group]
        every.append({**fields, "topics": [member["topic"] for member in group]})
    return every


def _shared_prompts(splits: dict[str, list[Row]]) -> dict[str, int]:
    train = {(row["instruction"], row["input"]) for row in splits["train"]}
    return {
        split: sum((row["instruction"], row["input"]) in train for row in splits[split])
        for split in ("validation", "test")
    }


# Writing.

# What a killed run may leave.
_PARTIAL = [f"{name}.partial" for name in (*(f"{split}.jsonl" for split in SPLITS), REPORT_FILE)]


def _check_output(output: str) -> None:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {output} is a file, expected a folder")
    if folder.is_dir() and any(file.name not in _PARTIAL for file in folder.iterdir()):
        raise UserError(f"output folder {output} is not empty; choose another")


def _write(output: str, splits: dict[str, list[Row]], report: dict[str, Any]) -> None:
    """All files under other names first; the report comes last and says that all are there."""
    texts = {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in splits.items()
        if rows
    }
    texts[REPORT_FILE] = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    folder = Path(output)
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in texts.items():
                path = folder / f"{name}.partial"
                path.write_text(text, encoding="utf-8")
            for name in texts:
                os.replace(folder / f"{name}.partial", folder / name)
        finally:
            for name in texts:
                (folder / f"{name}.partial").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _table(report: dict[str, Any]) -> str:
    """What was read, dropped and why, and written."""
    lines = ["read            rows  dropped"]
    for split, read in report["read"].items():
        reasons = report["dropped"][split].items()
        dropped = ", ".join(f"{count} {reason}" for reason, count in reasons) or "none"
        lines.append(f"{split:<12}{read:>8}  {dropped}")
    lines.append("written         rows" + ("  in the paper" if report["paper"] else ""))
    for split, rows in report["rows"].items():
        paper = f"{report['paper'][split]:>14}" if report["paper"] else ""
        how = ""
        if not rows:
            how = "  no rows, no file"
        elif split not in report["read"]:
            how = f"  cut from train, seed {report['seed']}"
        lines.append(f"{split:<12}{rows:>8}{paper}{how}")
    if report["paper"] and report["rows"] != report["paper"]:
        lines.append("not the paper's numbers: the source has other rows, or settings ask for it")
    for split, shared in report["shared_prompts"].items():
        if shared:
            lines.append(f"warning: {shared} prompts of {split} are also in train")
    return "\n".join(lines)
