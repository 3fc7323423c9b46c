"""Results files as text, as the README's table and as figures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.ways import WAYS

Row = Mapping[str, Any]


def read(*paths: Path) -> list[dict[str, str]]:
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def right(row: Row) -> bool:
    return str(row["right"]) == "True"


def faster(rows: Iterable[Row], way: str) -> str:
    """How many times faster the product is than this way in forward + backward; without a number
    where one of the two has not computed this loss and gradient."""
    of = {row["way"]: row for row in rows}
    if way not in of or not right(of["product"]):
        return ""
    if not right(of[way]):
        return "other gradient"
    ratio = float(of[way]["both_ms_p50"]) / float(of["product"]["both_ms_p50"])
    return f"{ratio:.1f} x"


def share_of_limit(row: Row) -> str:
    """What the row reaches of what the machine can do at most."""
    share = float(row["limit_ms"]) / float(row["both_ms_p50"])
    return "-" if math.isnan(share) else f"{share:.0%}"


def text(rows: list[dict[str, object]]) -> str:
    lines = []
    for row in rows:
        share = ""
        if row["way"] == "product" and row["limit_ms"] != "nan":
            products = float(str(row["limit_products"]))
            share = (
                f", {share_of_limit(row)} of the machine's limit, which is {row['limit_ms']} ms: "
                f"{products:.0%} matrix products at {row['fma_gflops']} GFLOP/s, "
                f"{1 - products:.0%} iterations, read at {row['read_gbs']} GB/s"
            )
        speed = faster(rows, str(row["way"])) if right(row) else "wrong here:"
        lines.append(
            f"{row['way']:>12} {row['forward_ms_p50']:>8} ms forward, {row['both_ms_p50']:>8} ms "
            f"with backward, {row['peak_mib']:>7} MiB, product is {speed or '-':>8} faster, "
            f"errors {row['loss_error']} {row['gradient_error']}{share}"
        )
    return "\n".join(lines)


def title(row: Row) -> str:
    name = f"{row['problems']} x {row['n']}x{row['m']}"
    name += ", ragged" if "ragged" in row["shape"] else ""
    name += ", unprojected" if "no projection" in row["shape"] else ""
    name += f", K {row['num_iters']}"
    return name + (f", tol {float(row['tol']):g}" if float(row["tol"]) else "")


def table(path: Path) -> str:
    """Markdown: a line for each case of the file."""
    rows = read(path)
    ways = [way for way in dict.fromkeys(row["way"] for row in rows) if way != "product"]
    titles = [
        "problems (N x M)",
        "product",
        "of the limit",
        "peak",
        *(f"{way}" for way in ways),
        "error",
    ]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of = [row for row in rows if row["case"] == case]
        product = next(row for row in of if row["way"] == "product")
        cells = [title(product), f"{float(product['both_ms_p50']):.3g} ms"]
        cells += [share_of_limit(product), f"{float(product['peak_mib']):.3g} MiB"]
        cells += [faster(of, way) or "-" for way in ways]
        lines.append(f"| {' | '.join([*cells, product['gradient_error']])} |")
    return "\n".join(lines)


def memory(cases: list[Case], ways: list[str], threads: int) -> Iterator[str]:
    """Markdown, line by line: the peak in MiB above the inputs of every way, and the formula's."""
    torch.set_num_threads(threads)
    yield f"| problems (N x M) | formula | {' | '.join(ways)} |"
    yield f"|---|{'---:|' * (len(ways) + 1)}"
    for case in tqdm(cases, desc="memory", leave=False, disable=None):
        tensors = case.make()
        cells = [f"{measure.predicted_mib(case, tensors, threads):.1f}"]
        del tensors
        for way in ways:
            able = not WAYS[way].cannot(case, "cpu")
            cells.append(f"{measure.peak_mib(case.name, way, 'cpu'):.1f}" if able else "-")
        yield f"| {title(asdict(case) | {'shape': case.shape()})} | {' | '.join(cells)} |"


# What grows, by group of cases: its field and the axis' title.
SCALING = {
    "size": ("n", "tokens on each side of one problem, K = 20"),
    "problems": ("problems", "problems of 128 x 128, K = 50"),
    "iterations": ("num_iters", "iterations of 16 problems of 128 x 128"),
    "threads": ("threads", "threads"),
}


def plots(paths: list[Path], folder: Path) -> list[Path]:
    """-> the PNG files written: one for each scaling group, one for the main cases."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = read(*paths)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
        written.append(folder / name)

    for group, (field, title) in SCALING.items():
        of_group = [row for row in rows if row["group"] == group and right(row)]
        if not of_group:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        lines: dict[str, list[Row]] = {}
        for row in of_group:
            size = f", {row['problems']} x {row['n']}x{row['m']}" if group == "threads" else ""
            lines.setdefault(row["way"] + size, []).append(row)
        for name, of in lines.items():
            of.sort(key=lambda row: float(row[field]))
            x = [float(row[field]) for row in of]
            style = "-" if name.startswith("product") else "--"
            times = [float(row["both_ms_p50"]) for row in of]
            (line,) = axes.loglog(x, times, style, marker="o", ms=3, label=name)
            if name.startswith("product"):
                limits = [float(row["limit_ms"]) for row in of]
                label = name.replace("product", "the machine's limit")
                axes.loglog(x, limits, ":", color=line.get_color(), label=label)
        axes.set(xlabel=title, ylabel="forward + backward, ms")
        ticks = sorted({int(row[field]) for row in of_group})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=7)
        save(figure, f"{group}.png")

    main = [row for row in rows if row["group"] in ("main", "gpu")]
    if main:
        cases = list(dict.fromkeys(row["case"] for row in main))
        ways = list(dict.fromkeys(row["way"] for row in main))
        inches = 0.45 * len(cases) * max(2, len(ways) / 2.5) + 1
        figure, axes = plt.subplots(figsize=(8, inches), layout="constrained")
        height = 0.8 / len(ways)
        for place, way in enumerate(ways):
            of = [row for row in main if row["way"] == way]
            y = [cases.index(row["case"]) + place * height for row in of]
            bars = axes.barh(y, [float(row["both_ms_p50"]) for row in of], height, label=way)
            notes = ["" if right(row) else "other gradient" for row in of]
            axes.bar_label(bars, notes, padding=3, fontsize=6)
        axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases)
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="forward + backward, ms")
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=7)
        save(figure, "main.png")
    return written
