"""The chunk set that token_states documents bounds every loss, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("ce", "forward_kl", "adaptive_kl", "uld", "mined", "dskd", "dskd-one-vocabulary")
# A tenth of 50k and 152k, a sixteenth of the chunk.
SIZES = "--tokens 512 --student 5026 64 --teacher 15194 128 --chunk 4194304"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("loss", LOSSES)
def test_peak(loss) -> None:
    # What is loaded once would count for more than the loss at this size.
    command = [sys.executable, "-m", "tests.train.peak_memory", loss, "--warm-up", *SIZES.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 1.5
