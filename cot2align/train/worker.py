"""Runs stages of a study one after the other, in one process: `python -m cot2align.train.worker`.

Importing the libraries takes longer than many a stage. A line of stdin is a JSON object, the words
of a command line and the file for what it prints; `done` on stdout answers. An exit code other than
0 ends the process with that code, the end of stdin with 0.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys

from cot2align.train.__main__ import INTERRUPTED, main

DONE = "done\n"


def serve() -> int:
    """Returns the last exit code."""
    answers = os.dup(1)
    for line in sys.stdin:
        task = json.loads(line)
        with open(task["log"], "a") as log:
            # Not only sys.stdout: compiled code prints too.
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = main(task["words"])
        sys.stdout.flush()
        if code:
            return code
        free_memory()
        os.write(answers, DONE.encode())
    return 0


def free_memory() -> None:
    """Of a stage that is over; a trainer and its optimizer refer to each other."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    # Ctrl-C in a terminal goes to a worker that waits, too; a study may be no more.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        sys.exit(serve())
    sys.exit(INTERRUPTED)
