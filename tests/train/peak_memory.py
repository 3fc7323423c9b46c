"""Peak memory of a loss, forward and backward, in chunk sets above its inputs and gradients:

    python -m tests.train.peak_memory LOSS [--tokens 2048] [--student VOCABULARY WIDTH] ...

The peak is the process's own (Linux), so that every buffer counts, and the process must be fresh.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path

# Freed tensors go back to the system at once.
if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, "-m", "tests.train.peak_memory", *sys.argv[1:]])

import torch

from cot2align.train import token_states
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.losses.divergences import DIVERGENCES
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.kl import kl
from cot2align.train.losses.mined import MinED
from cot2align.train.losses.uld import uld
from tests.train.conftest import random_states

LOSSES = ("ce", *DIVERGENCES, "uld", "mined", "dskd", "dskd-one-vocabulary")


def bytes_of(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Print the peak in chunk sets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loss", choices=LOSSES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--student", type=int, nargs=2, default=(50257, 768))
    parser.add_argument("--teacher", type=int, nargs=2, default=(151936, 2048))
    parser.add_argument("--chunk", type=int, default=token_states.LOGITS_PER_CHUNK)
    parser.add_argument("--warm-up", action="store_true", help="leave out what the first run loads")
    options = parser.parse_args()
    token_states.LOGITS_PER_CHUNK = options.chunk

    (ours, d), (theirs, D) = options.student, options.teacher

    def states(tokens: int):
        lengths = [tokens // 2, tokens - tokens // 2]
        student, teacher = random_states(0, lengths, d, ours), random_states(1, lengths, D, theirs)
        for tensor in (teacher.hidden, *teacher.weights):
            tensor.requires_grad_(False)
        aligned = torch.arange(0, tokens, 2)
        alignment = {"student": aligned, "teacher": aligned, "unaligned": aligned + 1}
        return dataclasses.replace(student, alignment=alignment), teacher

    def dskd(one_vocabulary: bool) -> DSKD:
        return DSKD(d, D, one_vocabulary=one_vocabulary, divergence="reverse_kl", temperature=2.0)

    divergences = {name: partial(kl, divergence=name, temperature=2.0) for name in DIVERGENCES}
    losses = {
        **divergences,
        "uld": partial(uld, temperature=1.0),
        "mined": MinED(torch.arange(theirs) % ours, temperature=2.0),
        "dskd": dskd(False),
        "dskd-one-vocabulary": dskd(True),
    }

    def backward(student, teacher) -> None:
        if options.loss == "ce":
            cross_entropy(student)[0].backward()
        else:
            losses[options.loss](student, teacher).total.backward()

    student, teacher = states(options.tokens)
    if options.warm_up:
        backward(student, teacher)
    trained = [student.hidden, *student.weights]
    if isinstance(losses.get(options.loss), torch.nn.Module):
        trained += list(losses[options.loss].parameters())
    for tensor in trained:
        tensor.grad = None
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    backward(student, teacher)
    gradients = sum(tensor.grad.nbytes for tensor in trained)
    print(f"{(bytes_of('VmHWM') - before - gradients) / (4 * options.chunk):.2f}")


if __name__ == "__main__":
    main()
