"""Runs stages of a study one after the other, in one process: `python -m cot2align.train.worker`.

Importing the libraries takes longer than many a stage. A line of stdin is a JSON object, the words
of a command line and the file for what it prints; a line of stdout says that it is done. An exit
code other than 0 ends the process with that code, the end of stdin with 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

from cot2align.train.__main__ import INTERRUPTED, main


def serve() -> int:
    """Returns the last exit code."""
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            task = json.loads(line)
            with open(task["log"], "w") as log:
                # Not only sys.stdout: compiled code prints too.
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = main(task["words"])
            sys.stdout.flush()
            if code:
                return code
            print("done", file=answers, flush=True)
    return 0


if __name__ == "__main__":
    # The study's own end interrupts a worker that waits.
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(serve())
    sys.exit(INTERRUPTED)
