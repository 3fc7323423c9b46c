"""The speed, the memory and the error of the loss, against its peers.

    python -m benchmarks                                  the cases and the ways
    python -m benchmarks run [CASE|GROUP...] [--out FILE] measure; default: the group `main`
    python -m benchmarks table FILE                       the README's table
    python -m benchmarks memory [CASE|GROUP...]           the table of peaks, with the formula's
    python -m benchmarks plot FILE... [--out FOLDER]      the figures
    python -m benchmarks check [--device cuda]            every backend against float64
    python -m benchmarks tune                             (GPU) the kernels' table of configurations

A run compares every way with float64 before it times it; where loss or gradient disagree, no
speed-up is reported. The ways take turns, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

from benchmarks import check as checking
from benchmarks import measure, report
from benchmarks.cases import CASES, GROUPS, Case
from benchmarks.ways import WAYS

PEERS = ["product", "naive", "compile", "bmm", "authors", "pot"]
BACKENDS = {"cpu": ["native"], "cuda": ["triton", "cuda"]}


def selected(parser: argparse.ArgumentParser, names: list[str]) -> list[Case]:
    cases: dict[str, Case] = {}
    for name in names:
        of = [case for case in CASES.values() if name in (case.name, case.group)]
        if not of:
            known = ", ".join((*GROUPS, *CASES))
            parser.error(f"unknown case {name}, expected of {known}")
        cases |= {case.name: case for case in of}
    return list(cases.values())


def run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    cases = selected(parser, options.cases or ["gpu" if options.device == "cuda" else "main"])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    threads = options.threads or torch.get_num_threads()
    cases = [case for case in cases if (case.threads or 1) <= measure.cpus()]
    if not cases:
        parser.error(f"these cases need more than the {measure.cpus()} CPUs of this machine")
    if options.out:  # an unwritable place is found before the measuring
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.touch()
    around = measure.surroundings(options.device)
    rows: list[dict[str, object]] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {measure.describe(case)}", flush=True)
        memory = not options.no_memory
        torch.set_num_threads(case.threads or threads)
        new = measure.measure(case, options.device, options.repeats, memory, options.ways)
        rows += [row | around for row in new]
        print(report.text(new), flush=True)
        if options.out:  # what is finished stays, whatever happens to the next case
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return 0 if all(row["right"] for row in rows if row["way"] in ("product", "triton")) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="the cases and the ways")
    running = commands.add_parser("run", help="measure")
    running.add_argument("cases", nargs="*", metavar="CASE", help="cases or groups of cases")
    running.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    running.add_argument("--repeats", type=int, default=7, help="turns of each way (default: 7)")
    running.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    running.add_argument("--threads", type=int, help="PyTorch's threads (default: its own choice)")
    running.add_argument("--no-memory", action="store_true", help="leave the peaks out")
    running.add_argument("--out", type=Path, help="a CSV file to write")
    table = commands.add_parser("table", help="a results file as the README's table")
    table.add_argument("file", type=Path, help="a CSV file of `run`")
    memory = commands.add_parser("memory", help="peaks of forward + backward, as a table")
    memory.add_argument("cases", nargs="*", metavar="CASE", help="cases or groups of cases")
    memory.add_argument("--ways", nargs="+", choices=WAYS, default=PEERS, metavar="WAY")
    memory.add_argument("--threads", type=int, default=torch.get_num_threads())
    plot = commands.add_parser("plot", help="the figures of results files")
    plot.add_argument("files", nargs="+", type=Path, help="CSV files of `run`")
    plot.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="a folder")
    check = commands.add_parser("check", help="every backend against float64")
    check.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    check.add_argument("--small", action="store_true", help="the small sizes only")
    tune = commands.add_parser("tune", help="time the kernels' configurations on this GPU")
    tune.add_argument("--repeats", type=int, default=20)
    peak = commands.add_parser("peak")  # of one way in this process: what `run` calls
    peak.add_argument("case", choices=CASES)
    peak.add_argument("way", choices=WAYS)
    peak.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.command == "run":
        return run(parser, options)
    if options.command == "table":
        print(report.table(options.file))
    elif options.command == "memory":
        for line in report.memory(
            selected(parser, options.cases or ["main"]), options.ways, options.threads
        ):
            print(line, flush=True)
    elif options.command == "plot":
        for path in report.plots(options.files, options.out):
            print(path)
    elif options.command == "peak":
        torch.set_num_threads(options.threads)
        print(measure.peak_here(options.case, options.way, "cpu"))
    elif options.command == "check":
        return min(1, checking.run(options.device, BACKENDS[options.device], options.small))
    elif options.command == "tune":
        if not torch.cuda.is_available():
            parser.error("tune: PyTorch finds no GPU here")
        from benchmarks import tuning

        print(tuning.table(options.repeats))
    else:
        print("\n".join(map(measure.describe, CASES.values())), end="\n\n")
        print("\n".join(f"{name:>10}  {way.note}" for name, way in WAYS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
