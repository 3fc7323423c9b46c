"""`python -m cot2align.doctor`: what is there, which backend each device gets, and why.

One dictionary of facts, printed as a table or, with `--json`, as it is. Nothing here computes on a
device, and a broken part (PyTorch that does not import, a driver that is too old) is a fact to
report, not an error: the exit code is 0 whatever was found. What is missing comes with what to do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import cot2align

Facts = dict[str, Any]
SIZES = ((64, 64), (128, 128), (512, 512), (4096, 4096))  # of a problem, in tokens
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "tokenizers")


def gather(sizes: Sequence[tuple[int, int]] = SIZES) -> Facts:
    """All facts: keys versions, native, torch, cuda, devices, backends, advice."""
    facts: Facts = {
        "versions": {
            "cot2align": cot2align.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "native": _native(),
        "torch": _torch(),
    }
    facts["cuda"], facts["devices"] = _cuda(facts["native"]["build"], facts["torch"])
    facts["backends"] = backends(facts, sizes)
    facts["advice"] = advice(facts)
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native() -> Facts:
    """The compiled module's file and build, or why it does not load."""
    try:
        module = importlib.import_module("cot2align.kernels._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return {"file": None, "build": None, "error": None if missing else str(error)}
    return {"file": module.__file__, "build": module.build_info(), "error": None}


def _torch() -> Facts:
    """The CUDA version that PyTorch has and the devices that it sees, or why it does not import."""
    try:
        import torch
    except ImportError as error:
        return {"cuda": None, "devices": [], "error": str(error)}
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    devices = [
        _device(i, p.name, (p.major, p.minor), p.total_memory, p.multi_processor_count)
        for i, p in enumerate(properties)
    ]
    return {"cuda": torch.version.cuda, "devices": devices, "error": None}


def _device(
    index: int, name: str, capability: Sequence[int], memory: int, multiprocessors: int
) -> Facts:
    return {
        "device": f"cuda:{index}",
        "name": name,
        "capability": "{}.{}".format(*capability),
        "memory_gib": round(memory / 2**30, 1),
        "multiprocessors": multiprocessors,
    }


def _cuda(build: Facts | None, torch: Facts) -> tuple[Facts, list[Facts]]:
    """Driver, runtime and devices: asked of the compiled module, else as PyTorch sees them."""
    facts: Facts = {"driver": None, "runtime": None, "reason": None}
    if not (build and build["cuda"]):
        return facts, torch["devices"]
    native = importlib.import_module("cot2align.kernels._native")
    try:
        driver, runtime = native.cuda_versions()
        facts |= {"driver": _cuda_version(driver), "runtime": _cuda_version(runtime)}
        found, facts["reason"] = native.cuda_devices()
    except RuntimeError as error:
        return facts | {"reason": str(error)}, torch["devices"]
    devices = [
        _device(d["index"], d["name"], d["capability"], d["total_memory"], d["multiprocessors"])
        for d in found
    ]
    return facts, devices


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def backends(facts: Facts, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Facts]:
    """For each device and size of problem: the backend that `backend=None` takes there and why, and
    the others in their order, with whether they could serve."""
    seen = {"cpu", *(device["device"] for device in facts["torch"]["devices"])}
    capabilities = {device["device"]: device["capability"] for device in facts["devices"]}
    chosen = []
    for device in ("cpu", *capabilities):
        unusable = None
        if facts["torch"]["error"]:
            unusable = "PyTorch does not import"
        elif facts["native"]["error"]:
            unusable = "the compiled module does not load"
        elif device not in seen:
            unusable = "PyTorch does not see this device"
        for size in sizes if device != "cpu" and not unusable else sizes[:1]:
            entry: Facts = {"device": device, "size": None if device == "cpu" else list(size)}
            if unusable:
                chosen.append(entry | {"backend": "none", "why": unusable, "others": []})
                continue
            from cot2align.kernels.backends import Device, candidates

            major, minor = capabilities.get(device, "0.0").split(".")
            all_of = candidates(Device(device.split(":")[0], (int(major), int(minor))), *size)
            first = next(candidate for candidate in all_of if candidate.serves)
            others = [candidate._asdict() for candidate in all_of if candidate != first]
            chosen.append(entry | {"backend": first.backend, "why": first.why, "others": others})
    return chosen


def size(text: str) -> tuple[int, int]:
    """ "64x128" -> (64, 128)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 64x128, student x teacher tokens")
    return int(match[1]), int(match[2])


def _backend_lines(entries: list[Facts]) -> list[str]:
    lines = []
    for entry in entries:
        of_size = "any size" if entry["size"] is None else "{}x{}".format(*entry["size"])
        lines.append(f"{entry['device']:<8} {of_size:<10} {entry['backend']}: {entry['why']}")
        for other in entry["others"]:
            place = "then" if other["serves"] else "not"
            lines.append(f"{'':<19}   {place} {other['backend']}: {other['why']}")
    return lines


def advice(facts: Facts) -> list[str]:
    """One line for each thing that is missing or does not fit, with what to do about it."""
    native, torch, cuda = facts["native"], facts["torch"], facts["cuda"]
    build, lines = native["build"], []
    if torch["error"]:
        lines.append(f"PyTorch does not import ({torch['error']}): pip install 'torch>=2.6,<3'")
    if facts["versions"]["transformers"] is None:
        lines.append(
            "training needs transformers and more: in the source tree, pip install -e '.[train]'"
        )
    if native["error"]:
        lines.append(f"the compiled module does not load ({native['error']}): build it again")
    elif build is None and Path(cot2align.__file__).parents[1].joinpath("setup.py").exists():
        lines.append("Python runs the source tree, where nothing is compiled: pip install -e .")
    elif build is None:
        lines.append(
            "the CPU part was not compiled (COT2ALIGN_NATIVE=0): install a C++ compiler, then in "
            "the source tree COT2ALIGN_NATIVE=1 pip install --force-reinstall --no-deps ."
        )
    if build is None:
        return lines
    if build["version"] != cot2align.__version__:
        lines.append(f"the compiled module is of version {build['version']}: build it again")
    if not build["openmp"]:
        lines.append("the CPU part runs on one thread: build it with a compiler that has OpenMP")
    lines += _cuda_part(facts)
    driver, runtime = cuda["driver"], cuda["runtime"]
    if driver and runtime and int(driver.split(".")[0]) < int(runtime.split(".")[0]):
        lines.append(
            f"the driver supports CUDA {driver}, the CUDA part is built with {runtime}: "
            "update the driver, or build with an older CUDA_HOME"
        )
    if facts["devices"] and not torch["error"] and not torch["devices"]:
        lines.append(
            f"PyTorch (CUDA {torch['cuda']}) does not see the devices: install a build that fits "
            "the driver"
            if torch["cuda"]
            else "this PyTorch is built for the CPU only: install its CUDA build"
        )
    return lines


def _cuda_part(facts: Facts) -> list[str]:
    """What the devices that it can serve need of the CUDA part."""
    if not facts["torch"]["cuda"]:  # broken, for the CPU only, or for AMD's GPUs
        return []
    from cot2align.kernels.cuda_sinkhorn import MAJORS, runs

    build, lines = facts["native"]["build"], []
    for device in facts["devices"]:
        major, minor = map(int, device["capability"].split("."))
        if major not in MAJORS:
            continue
        if not build["cuda"]:
            return ["no CUDA part: put nvcc on PATH or set CUDA_HOME, then build it again"]
        if not any(runs(arch, (major, minor)) for arch in build["cuda_archs"].split()):
            lines.append(
                f"{device['device']} has compute capability {device['capability']}, built were "
                f"{build['cuda_archs']}: build with TORCH_CUDA_ARCH_LIST={device['capability']}"
            )
    return lines


def table(facts: Facts) -> str:
    """The facts as text, one section after the other."""
    native, build, cuda = facts["native"], facts["native"]["build"], facts["cuda"]
    versions = {name: version or "not installed" for name, version in facts["versions"].items()}
    built = {"module": native["file"] or native["error"] or "none, pure Python"}
    if build:
        threads = "OpenMP" if build["openmp"] else "one thread"
        built["compiler"] = build["compiler"]
        built["CPU part"] = f"{build['instruction_set']}, {threads}"
        built["CUDA part"] = build["cuda_archs"] if build["cuda"] else "not built"
    devices = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores"} | {
        d["device"]: f"{d['name']}, compute capability {d['capability']}, {d['memory_gib']} GiB, "
        f"{d['multiprocessors']} multiprocessors"
        for d in facts["devices"]
    }
    if cuda["reason"]:
        devices["cuda"] = cuda["reason"]
    versions_of_cuda = {
        "driver": f"up to {cuda['driver']}" if cuda["driver"] else "none found",
        "this build": cuda["runtime"] or "none",
        "PyTorch": facts["torch"]["cuda"] or "none",
    }
    sections = {
        "Versions": versions,
        "Built": built,
        "Devices": devices,
        "CUDA": versions_of_cuda,
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<13} {value}" for name, value in rows.items()), ""]
    lines += ["Backends", *(f"  {line}" for line in _backend_lines(facts["backends"])), ""]
    lines += ["What to do", *(f"  {line}" for line in facts["advice"] or ["nothing is missing"])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or JSON with `--json`; the exit code is 0."""
    parser = argparse.ArgumentParser(
        prog="python -m cot2align.doctor",
        description="What is installed, what was built, and which backend each device gets.",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        default=SIZES,
        metavar="NxM",
        help="sizes of problems, student x teacher tokens, to choose a backend for",
    )
    options = parser.parse_args(argv)
    facts = gather(options.sizes)
    print(json.dumps(facts, indent=2) if options.json else table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
