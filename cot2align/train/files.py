"""Files that are there whole or not at all, or that grow by whole lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cot2align.train.config import UserError


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a kill, never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def whole_lines(path: Path) -> list[str]:
    """The JSON lines of a file that a killed run was appending to, without a torn last one; none
    where there is no file. Raises UserError."""
    if not path.exists():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    try:
        json.loads(tail)
        lines.append(tail)
    except ValueError:
        pass
    try:
        return [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from None
