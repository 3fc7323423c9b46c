"""How it is measured: float64 first, then time in turns, then memory in processes of their own."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cot2align
from benchmarks.cases import CASES, Case, Tensors, Work
from benchmarks.ways import WAYS, Way

TRAINED = ("student", "projection")
# An error of the gradient, relative to its norm, beyond which a way has not computed this loss.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
# Floats of a thread's packed panels and of its part of the gradient's correction.
PANELS = (512 + 64) * 256 + 128 * 1024
SHORT = 300  # ms
QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
PROC = Path("/proc/self")  # Linux


def forward_backward(way: Way, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    """-> loss, dX and, with a projection, dP."""
    trained = {n: t for n, t in tensors.items() if n in TRAINED and t is not None}
    leaves = {name: t.detach().requires_grad_() for name, t in trained.items()}
    loss = way.run(case, tensors | leaves)
    return (loss.detach(), *torch.autograd.grad(loss, tuple(leaves.values())))


def forward(way: Way, case: Case, tensors: Tensors) -> Tensor:
    with torch.no_grad():
        return way.run(case, tensors)


def exact(case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    """Loss, dX and dP in float64: all iterations (at `tol` > 0 too), log domain, problem by problem
    and recomputed iteration by iteration, so that the tape holds vectors only."""
    from cot2align.kernels.reference import _softmax_cost

    x, y, p = (tensors[name] for name in ("student", "teacher", "projection"))
    assert x is not None
    assert y is not None

    def iterate(exponent: Tensor, f: Tensor) -> Tensor:
        g = -math.log(exponent.shape[1]) - torch.logsumexp(exponent + f[:, None], dim=0)
        return -math.log(exponent.shape[0]) - torch.logsumexp(exponent + g, dim=1)

    projection = None if p is None else p.detach().double().requires_grad_()
    dx = torch.zeros_like(x, dtype=torch.float64)
    total, dp = dx.new_zeros(()), None if projection is None else torch.zeros_like(projection)
    for b in tqdm(range(len(x)), desc=f"{case.name}: float64", leave=False, disable=None):
        leaf = x[b].detach().double().requires_grad_()
        rows, cols = leaf, y[b].double()
        if case.ragged:
            rows, cols = rows[tensors["student_mask"][b]], cols[tensors["teacher_mask"][b]]  # type: ignore[index]
        if projection is not None:
            cols = cols @ projection
        cost = _softmax_cost(rows @ cols.T / math.sqrt(x.shape[-1]))
        exponent, f = -cost / case.epsilon, torch.zeros_like(cost[:, 0])
        for _ in range(case.num_iters - 1):
            f = checkpoint(iterate, exponent, f, use_reentrant=False)  # type: ignore[assignment]
        g = -math.log(cost.shape[1]) - torch.logsumexp(exponent + f[:, None], dim=0)
        plan = torch.softmax(exponent + g, dim=1) / len(cost)
        loss = (plan * cost).sum() / len(x)
        leaves = (leaf,) if projection is None else (leaf, projection)
        dx[b], *rest = torch.autograd.grad(loss, leaves)
        total = total + loss.detach()
        dp = None if dp is None else dp + rest[0]
    return (total, dx) if dp is None else (total, dx, dp)


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, float]:
    """The loss's relative error and the largest of the gradients', relative to their own norms."""
    relative = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return relative[0], max(relative[1:])


def timer(call: Callable[[], object], device: str) -> Callable[[], float]:
    """-> a function that runs `call` once and returns its milliseconds."""

    def on_cpu() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def on_gpu() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return on_cpu if device == "cpu" else on_gpu


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """`call` captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    case: Case, device: str, repeats: int, memory: bool, named: Collection[str] = tuple(WAYS)
) -> list[dict[str, object]]:
    """One row for each of the named ways that can; they take turns. A rival that fails is left out
    with its error."""
    torch.compiler.reset()  # its limit of recompilations is over all cases
    tensors = case.make(device)
    ways = {
        name: way
        for name, way in WAYS.items()
        if not way.cannot(case, device) and name in (case.ways or WAYS) and name in named
    }
    truth = exact(case, tensors)
    checked, timers = {}, {}
    for name, way in list(ways.items()):
        calls = [lambda w=way, f=f: f(w, case, tensors) for f in (forward, forward_backward)]
        try:
            checked[name] = errors(forward_backward(way, case, tensors), truth)
            timers[name] = [timer(graphed(c) if way.graph else c, device) for c in calls]
        except Exception as error:  # of another project's code, whatever it raises
            if name == "product":
                raise
            tqdm.write(f"{case.name}: {name}: {str(error).splitlines()[0]}")
            del ways[name]
    del truth
    times: dict[str, list[list[float]]] = {name: [[], []] for name in ways}
    warm_up: dict[tuple[str, int], float] = {}
    for turn in tqdm(range(repeats + 1), desc=f"{case.name}: timing", leave=False, disable=None):
        for name, pair in timers.items():
            for number, (into, run) in enumerate(zip(times[name], pair, strict=True)):
                if not turn:  # the first one warms up
                    warm_up[name, number] = run()
                    continue
                # What the way before it did to caches and pages counts for much in a short call.
                if warm_up[name, number] < SHORT:
                    run()
                into.append(run())
    peaks = {name: peak_mib(case.name, name, device) if memory else math.nan for name in ways}
    rows = []
    ran = iterations(case, tensors)
    at_most = Limit(math.nan, math.nan, math.nan, math.nan)
    if device == "cpu":
        at_most = limit(case.work(tensors, ran), torch.get_num_threads())
    for name in ways:
        loss_error, gradient_error = checked[name]
        right = max(loss_error, gradient_error) < TOLERANCE[case.dtype]
        row: dict[str, object] = {"case": case.name, "group": case.group, "way": name}
        row |= {"device": device, "shape": case.shape(), "dtype": case.dtype}
        row |= {key: getattr(case, key) for key in ("problems", "n", "m", "epsilon", "num_iters")}
        row |= {"tol": case.tol, "threads": torch.get_num_threads()}
        for label, values in zip(("forward", "both"), times[name], strict=True):
            of = torch.tensor(values, dtype=torch.float64)
            row |= {f"{label}_ms_{q}": f"{of.quantile(at):.4g}" for q, at in QUANTILES.items()}
        rows.append(
            row
            | {
                "peak_mib": f"{peaks[name]:.4g}",
                "limit_ms": f"{at_most.ms:.4g}",
                "limit_products": f"{at_most.products:.2f}",
                "fma_gflops": f"{at_most.fma_gflops:.4g}",
                "read_gbs": f"{at_most.read_gbs:.4g}",
                "loss_error": f"{loss_error:.1e}",
                "gradient_error": f"{gradient_error:.1e}",
                "right": right,
                "iterations": f"{ran:.4g}" if name == "product" else case.num_iters,
            }
        )
    return rows


def iterations(case: Case, tensors: Tensors) -> float:
    """The mean number of iterations that the product runs."""
    settings = {"epsilon": case.epsilon, "num_iters": case.num_iters, "tol": case.tol}
    if not case.tol:
        return case.num_iters
    return float(cot2align.sinkhorn_plan(**tensors, **settings).num_iters.float().mean())


# ---- memory


def peak_mib(case: str, way: str, device: str) -> float:
    """Of forward + backward above the inputs, in a process of its own, so that nothing that another
    way left behind counts; NaN where there is no /proc, as on macOS."""
    if device == "cuda":
        return peak_here(case, way, device)
    if not PROC.exists():
        return math.nan
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks", "peak", case, way, "--threads", threads]
    # Large blocks go back to the system when they are freed, so that the peak is that of use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_here(case_name: str, way_name: str, device: str) -> float:
    case, way = CASES[case_name], WAYS[way_name]
    tensors = case.make(device)
    if device == "cuda":
        forward_backward(way, case, tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(way, case, tensors)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = Case("", "", 1, 2, 2, case.width, case.teacher_width, num_iters=1)
    forward_backward(way, small, small.make())  # threads, libraries, compilers

    def resident(field: str) -> float:
        lines = (PROC / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    before = resident("VmRSS")
    (PROC / "clear_refs").write_text("5")  # the peak begins anew
    forward_backward(way, case, tensors)
    return resident("VmHWM") - before


def predicted_mib(case: Case, tensors: Tensors, threads: int) -> float:
    """What the product needs on the CPU in forward + backward, as docs/benchmarks.md derives it."""
    n, m, d, wide = case.n, case.m, case.width, case.teacher_width or case.width
    masked = tensors["student_mask"] is not None
    tokens_x, tokens_y = case.problems * n, case.problems * m
    copy_x = copy_y = padded = 0
    if masked:
        masks = [tensors[name] for name in ("student_mask", "teacher_mask")]
        tokens_x, tokens_y = (int(mask.sum()) for mask in masks if mask is not None)
        copy_x, copy_y, padded = tokens_x * d, tokens_y * wide, case.problems * n * d
    projected, parameters = (tokens_y * d, wide * d) if case.teacher_width else (0, 0)
    gradients = tokens_x * d + projected
    problem = 2 * n * m + 2 * case.num_iters * (n + m)
    workers = min(threads if n * m <= 192 * 1024 else 1, case.problems)
    solving = copy_x + projected + workers * problem + threads * PANELS
    scaling, returning = gradients, padded + parameters
    return 4 * (copy_y + gradients + max(solving, scaling, returning)) / 2**20


# ---- the machine


class Limit(NamedTuple):
    """ms: the least that forward + backward can take; products: the part of it that is matrix
    products; the rates it is made of."""

    ms: float
    products: float
    fma_gflops: float
    read_gbs: float


def cpus() -> int:
    """The CPUs of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def probe() -> ctypes.CDLL | None:
    """probe.cpp, compiled for this machine; None without a compiler."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "probe.so")
        flags = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fopenmp"]
        source = Path(__file__).with_name("probe.cpp")
        if subprocess.run([compiler, *flags, "-shared", "-fPIC", source, "-o", library]).returncode:
            return None
        rates = ctypes.CDLL(str(library))
    rates.fma_rate.restype = rates.read_rate.restype = ctypes.c_double
    rates.read_rate.argtypes = [ctypes.c_int64, ctypes.c_int]
    return rates


@cache
def fma_rate(threads: int) -> float:
    """FLOP/s: the best of some tries, so that a disturbed one does not count."""
    rates = probe()
    return math.nan if rates is None else max(rates.fma_rate(threads) for _ in range(10))


def limit(work: Work, threads: int) -> Limit:
    """Of the machine, for this work on so many threads: the products at the rate of multiply-adds;
    the iterations at that rate or at that of reading from where a thread's share of the matrix
    lies, whichever takes longer."""
    rates, threads = probe(), min(threads, cpus())
    if rates is None:
        return Limit(math.nan, math.nan, math.nan, math.nan)
    fma = fma_rate(threads)
    alone = work.matrix < 2**20  # one thread's problem
    share = int(work.matrix / (1 if alone else threads))
    reading = max(rates.read_rate(share, threads) for _ in range(3))
    products = work.products / fma
    whole = products + work.sweeps * max(4 / fma, 4 / reading)
    return Limit(1e3 * whole, products / whole, fma / 1e9, reading / 1e9)


def surroundings(device: str, program: str = "python -m benchmarks") -> dict[str, str]:
    def said(*command: str) -> str:
        if not shutil.which(command[0]):
            return "unknown"
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"

    versions = [f"cot2align {cot2align.__version__}", f"torch {torch.__version__}"]
    machine = f"{processor()}, {os.cpu_count()} CPUs"
    if device == "cuda":
        import triton

        query = "--query-gpu=name,driver_version"
        machine = said("nvidia-smi", query, "--format=csv,noheader").splitlines()[0]
        versions += [f"triton {triton.__version__}", f"CUDA {torch.version.cuda}"]
    return {
        "machine": machine,
        "versions": ", ".join(versions),
        "commit": os.environ.get("COT2ALIGN_COMMIT") or said("git", "rev-parse", "--short", "HEAD"),
        "command": " ".join([program, *sys.argv[1:]]),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(case: Case) -> str:
    settings = asdict(case)
    return f"{case.name:>22}  {case.shape()}, K {settings['num_iters']}, tol {settings['tol']:g}"
