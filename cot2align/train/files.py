"""Files that are there whole or not at all, or that grow by whole lines; and writes that fail."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

from cot2align.train.config import UserError

# A disk that is full or a place that may not be written.
WRITE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a kill, never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def refused_write(error: Exception) -> str | None:
    """Why the disk or its permissions refused a write, whichever library tried; None: another
    error."""
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return error.strerror
    code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    if code and int(code[1]) in WRITE_ERRORS:
        return os.strerror(int(code[1]))
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch.save
        return "a checkpoint cannot be written; is the disk full?"
    return None


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
