"""python -m benchmarks list | run [CASE...] [--repeats N] [--threads N] [--out FILE] | table FILE

Runs every way of computing the loss on the same problem, in turns, and prints for each the median
time of forward + backward and how many times faster than naive PyTorch it is. Before that it
compares loss and gradients with float64; where they disagree no speed is reported.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cot2align
from benchmarks.cases import CASES, WAYS, Case
from cot2align.kernels import reference

FLOATS = ("student", "teacher", "projection")
# An error of the gradient, relative to its norm, beyond which a way has not computed this loss.
TOLERANCE = 1e-3


def forward_backward(way: Callable[..., Tensor], case: Case, tensors: dict) -> tuple[Tensor, ...]:
    student = tensors["student"].detach().requires_grad_()
    projection = tensors["projection"]
    leaves = [student]
    if projection is not None:
        leaves.append(projection := projection.detach().requires_grad_())
    loss = way(
        student,
        tensors["teacher"],
        projection,
        student_mask=tensors["student_mask"],
        teacher_mask=tensors["teacher_mask"],
        epsilon=case.epsilon,
        num_iters=case.num_iters,
        tol=case.tol,
    )
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def exact(case: Case, tensors: dict) -> tuple[Tensor, ...]:
    """The reference in float64, problem by problem, since its tape is large."""
    loss = torch.zeros((), dtype=torch.float64)
    dx, dp = torch.zeros_like(tensors["student"], dtype=torch.float64), []
    for b in tqdm(range(case.problems), desc=f"{case.name}: float64", leave=False, disable=None):
        one = {
            name: t if t is None or name == "projection" else t[b : b + 1]
            for name, t in tensors.items()
        }
        double = {n: t.double() if t is not None and n in FLOATS else t for n, t in one.items()}
        each = forward_backward(reference.fused_ot_loss, case, double)
        loss += each[0] / case.problems
        dx[b] = each[1][0] / case.problems
        dp.append(each[2:])
    return (loss, dx, *(sum(of) / case.problems for of in zip(*dp, strict=True)))


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, float]:
    """The loss's relative error and the largest of the gradients', relative to their own norms."""
    relative = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return relative[0], max(relative[1:])


def measure(case: Case, repeats: int) -> list[dict[str, object]]:
    tensors = case.make()
    truth = exact(case, tensors)
    checked = {
        name: errors(forward_backward(way, case, tensors), truth) for name, way in WAYS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in tqdm(range(repeats), desc=f"{case.name}: timing", leave=False, disable=None):
        for name, way in WAYS.items():
            start = time.perf_counter()
            forward_backward(way, case, tensors)
            times[name].append(1e3 * (time.perf_counter() - start))
    naive = statistics.median(times["naive"])
    rows: list[dict[str, object]] = []
    for name, (loss_error, gradient_error) in checked.items():
        right = loss_error < TOLERANCE and gradient_error < TOLERANCE
        p20, p50, p80 = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            {
                "case": case.name,
                "way": name,
                "problems": case.problems,
                "n": case.n,
                "m": case.m,
                "width": case.width,
                "teacher_width": case.teacher_width,
                "epsilon": case.epsilon,
                "num_iters": case.num_iters,
                "tol": case.tol,
                "p20_ms": f"{p20:.2f}",
                "p50_ms": f"{p50:.2f}",
                "p80_ms": f"{p80:.2f}",
                "faster": f"{naive / p50:.1f}" if right else "wrong",
                "loss_error": f"{loss_error:.1e}",
                "gradient_error": f"{gradient_error:.1e}",
            }
        )
    return rows


def surroundings() -> dict[str, object]:
    commit = "unknown"
    if shutil.which("git"):
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    return {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": f"cot2align {cot2align.__version__}, torch {torch.__version__}",
        "commit": commit,
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def table(path: Path) -> str:
    """A results file as Markdown."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    titles = ["problems", *(f"{way}, ms" for way in ways), "native is faster", "gradient error"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["way"]: row for row in rows if row["case"] == case}
        times = " | ".join(f"{float(of[way]['p50_ms']):.4g}" for way in ways)
        native = of["native"]
        lines.append(f"| {case} | {times} | {native['faster']} x | {native['gradient_error']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n\n")[1]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the cases and the ways")
    run = commands.add_parser("run", help="measure")
    run.add_argument("cases", nargs="*", metavar="CASE", help="default: all of them")
    run.add_argument("--repeats", type=int, default=7, help="runs of each way (default: 7)")
    run.add_argument("--threads", type=int, help="PyTorch's threads (default: its own choice)")
    run.add_argument("--out", type=Path, help="a CSV file to write")
    show = commands.add_parser("table", help="a results file as the README's table")
    show.add_argument("file", type=Path, help="a CSV file of `run`")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.file))
        return 0
    if options.command == "list":
        for case in CASES.values():
            print(case)
        print("ways:", ", ".join(WAYS))
        return 0
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case {sorted(unknown)[0]}, expected of {', '.join(CASES)}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.out:  # an unwritable place is found before the measuring
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    rows = []
    for name in options.cases or CASES:
        for row in measure(CASES[name], options.repeats):
            rows.append(row | surroundings())
            print(
                f"{row['case']:>20} {row['way']:>8} {row['p50_ms']:>9} ms, "
                f"{row['faster']:>6} x naive PyTorch, relative errors: "
                f"loss {row['loss_error']}, gradient {row['gradient_error']}"
            )
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0 if all(row["faster"] != "wrong" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
