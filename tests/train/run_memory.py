"""What runs take: `python -m tests.train.run_memory FILE...` trains with the configs of `sft` and
`distill` in the files, one after the other, and prints for each but the first the most resident
bytes above those before it (Linux). The first loads what is loaded once."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# Freed tensors go back to the system at once.
if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, "-m", "tests.train.run_memory", *sys.argv[1:]])

from cot2align.train import trainer
from cot2align.train.config import CheckConfig, from_sources


def bytes_of(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Print the bytes."""
    for number, file in enumerate(sys.argv[1:]):
        config = from_sources(CheckConfig, file, {}).checked()
        gc.collect()
        before = bytes_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        trainer.run(config)
        if number:
            print(f"used {bytes_of('VmHWM') - before}")


if __name__ == "__main__":
    main()
