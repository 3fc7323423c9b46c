"""What an unfinished output is made from: the settings that count, the rows, the model's files.

`augment` and `evaluate` write it beside their output before the first row, and a resumed run that
would be made from something else is refused: its rows could not be told from those that are there.
`cache` keeps the same fingerprint of the teacher in its index. A training's checkpoints hold its
config, and what goes on from one has to agree with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import cached_file

from cot2align.train.adapters import base_of
from cot2align.train.config import (
    CONFIG_FILE,
    RESUMABLE_WITH,
    AugmentConfig,
    DistillConfig,
    EvaluateConfig,
    SFTConfig,
    UserError,
    build,
    counted,
    read_yaml,
)
from cot2align.train.files import write_whole

MODEL_FILES = ("config.json", "tokenizer.json")
# What else decides on a generated text: end tokens, and the chat template.
GENERATION_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
BLOCK, BLOCKS = 1 << 16, 64  # what a fingerprint reads of a file of weights


def origin(config: AugmentConfig | EvaluateConfig, rows: Mapping[str, str]) -> dict[str, Any]:
    """{"settings", "model", "files" of the model, "rows"}; rows: the sets' files by name."""
    settings = counted(config)
    del settings["model"], settings["data"]
    in_process = not settings.get("server")
    files = fingerprint(config.model, (*MODEL_FILES, *GENERATION_FILES)) if in_process else {}
    hashes = {name: file_hash(Path(path)) for name, path in rows.items()}
    return {"settings": settings, "model": config.model, "files": files, "rows": hashes}


def write_origin(path: Path, made_from: dict[str, Any]) -> None:
    """Keep it, whole or not at all."""
    write_whole(path, yaml.safe_dump(made_from, sort_keys=False))


def check_origin(path: Path, made_from: dict[str, Any], output: Path) -> None:
    """Raises UserError that names all in which the origin kept in `path` differs, or where none is
    kept there."""
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
        differences = _differences(kept, made_from)
    except FileNotFoundError:
        raise UserError(
            f"{output} cannot be continued: {path.name}, which says what it is made from, is "
            "missing; choose another output"
        ) from None
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} does not say what {output} is made from; choose another") from None
    if differences:
        raise UserError(
            f"{output} is made from something else: {'; '.join(differences)}; choose another output"
        )


def check_training(config: SFTConfig | DistillConfig, checkpoint: Path) -> None:
    """Raises UserError that names all settings in which the run that left a checkpoint differs, but
    for those that it may go on with changed. Data and models may have been moved."""
    kept = read_yaml(str(checkpoint / CONFIG_FILE))
    cls = DistillConfig if "student" in kept else SFTConfig
    known = {f.name for f in dataclasses.fields(cls)}
    there = counted(build(cls, {name: kept[name] for name in kept.keys() & known}))
    here = {k: v for k, v in counted(config).items() if k not in RESUMABLE_WITH}
    if config.keep_best == kept.get("keep_best", "none") == "none":  # then they are looked at only
        for name in ("eval", "generate_rows", "generate_data", "generate_prompt", "max_new_tokens"):
            here.pop(name, None)
    for name in ("train", "eval", "generate_data", "model", "student", "teacher"):
        paths = [[x] if isinstance(x, str) else x or [] for x in (there.get(name), here.get(name))]
        if len(paths[0]) == len(paths[1]) > 0 and all(map(_same_place, *paths)):
            del here[name]
    differences = _differing(there, here)
    if not isinstance(config, cls):
        differences = [f"it is a run of {'sft' if cls is SFTConfig else 'distill'}"]
    if differences:
        raise UserError(
            f"{checkpoint} cannot be continued: {'; '.join(differences)}; choose another output"
        )


def _same_place(kept: str, here: str) -> bool:
    """Whether two paths are of the same files; of those that are no more, by the name."""
    there, now = Path(kept), Path(here)
    if not there.exists():
        return now.exists() and there.name == now.name
    if there.is_file() and now.is_file():
        return file_hash(there) == file_hash(now)
    return there.is_dir() and now.is_dir() and fingerprint(kept) == fingerprint(here)


def _differing(kept: dict[str, Any], here: dict[str, Any]) -> list[str]:
    # A setting that one of them lacks has no effect there, for a reason that is another setting.
    return [
        f"{name} is {_shown(kept[name])} there and {_shown(value)} here"
        for name, value in here.items()
        if name in kept and kept[name] != value
    ]


def _differences(kept: dict[str, Any], here: dict[str, Any]) -> list[str]:
    differences = _differing(kept["settings"], here["settings"])
    if kept["files"] and here["files"]:
        differences += other_files("the model", here["files"], kept["model"], kept["files"])
    elif kept["model"] != here["model"]:
        differences.append(f"model is {kept['model']} there and {here['model']} here")
    for name in sorted(kept["rows"].keys() | here["rows"].keys()):
        if kept["rows"].get(name) != here["rows"].get(name):
            differences.append(f"the rows {name} are others")
    return differences


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fingerprint(model: str, names: Sequence[str] = MODEL_FILES) -> dict[str, str]:
    """File -> hash, of a folder's or a downloaded model's files of these names and weights (of
    these the size and evenly spaced blocks: training changes all of a file), and of an adapter's
    base; empty if not on disk."""
    for name in ("config.json", "adapter_config.json"):
        try:
            path = cached_file(model, name, local_files_only=True)
        except OSError:  # Not on this disk.
            path = None
        if path is not None:
            break
    else:
        return {}
    assert path is not None
    folder = Path(path).parent
    base = base_of(model)
    weights = sorted(folder.glob("*.safetensors"))
    found = {name: file_hash(folder / name) for name in names if (folder / name).exists()}
    found |= {file.name: _sampled_hash(file) for file in weights}
    if base is not None:
        found |= {f"{name} of the base": value for name, value in fingerprint(base, names).items()}
    return found if weights else {}


def other_files(
    what: str, files: dict[str, str], kept: str, kept_files: dict[str, str]
) -> list[str]:
    """A line for each file of `what` that differs from that of the model `kept`; none where the
    files of one of them were not on the disk to be compared."""
    if not files or not kept_files:
        return []
    return [
        f"{name} of {what} is not that of {kept}"
        for name in sorted(files.keys() | kept_files.keys())
        if files.get(name) != kept_files.get(name)
    ]


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(BLOCKS):
            file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
