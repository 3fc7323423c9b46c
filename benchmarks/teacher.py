"""Distilling from a cached teacher and from a live one:

    python -m benchmarks.teacher [--rows N] [--steps N] [--layers N] [--width N]

Rows and student are like the demo's, the teacher is a wide Llama with random weights, in bfloat16;
the tokenizers differ. Each way trains in a process of its own (Linux), by the command `distill`.
Seconds a step are the run's, with everything in it; the peak is the process's resident memory, less
that of a process that has imported the same modules. Reading is the time to gather the cached
states of a step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from cot2align.train import arithmetic, new_model, teacher, trainer
from cot2align.train.config import CacheConfig, DistillConfig, NewModelConfig, build
from cot2align.train.data import TextEncoder, encode_rows, read_rows
from cot2align.train.models import load_tokenizer

MAX_LENGTH = 128
TEXTS = {"prompt_format": "raw", "max_length": MAX_LENGTH, "max_prompt_length": 64, "device": "cpu"}


def make_pair(folder: Path, rows: int, layers: int, width: int) -> int:
    """Write rows, a student and a teacher; returns the teacher's parameters."""
    made = arithmetic.rows(0, {"train": rows, "validation": 1, "test": 1})["train"]
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in made))
    common = {"data": str(train), "max_length": MAX_LENGTH, "prompt_format": "raw"}
    student = {"shape": "gpt2", "pieces": 380, "width": 96, "layers": 3}
    teacher = {"shape": "llama", "tokenizer": "words", "width": width, "layers": layers,
               "heads": width // 64}  # fmt: skip
    for name, shape in (("student", student), ("teacher", teacher)):
        result = new_model.run(
            build(NewModelConfig, {**common, **shape, "output": str(folder / name)})
        )
    return result["parameters"]


def mebibytes(field: str) -> float:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def train(settings: dict[str, Any], folder: Path) -> None:
    """One way, in a process of its own; writes what it took."""
    before = mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    result = trainer.run(build(DistillConfig, settings))
    peak = mebibytes("VmHWM") - before
    took = {"seconds": result["seconds"] / result["steps"], "peak": peak}
    (folder / "took.json").write_text(json.dumps(took))


def reading(settings: dict[str, Any], cache: Path) -> float:
    """Seconds to gather the states of one step, the mean over all rows."""
    config = build(DistillConfig, {**settings, "output": "unused"})
    names = (config.student, config.teacher)
    encoders = [TextEncoder.of(config, load_tokenizer(name)) for name in names]
    examples, _ = encode_rows(read_rows(config.train), *encoders)
    opened = teacher.TeacherCache(cache)
    start = time.perf_counter()
    for first in range(0, len(examples), config.batch_size):
        some = examples[first : first + config.batch_size]
        texts = [pair.teacher for example in some for pair in example.texts if pair.teacher]
        opened.states(texts, "response")
    return (time.perf_counter() - start) / (len(examples) / config.batch_size)


def main() -> None:
    """Print the two ways and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_pair(folder, options.rows, options.layers, options.width)
        cache = {
            **TEXTS,
            "teacher": str(folder / "teacher"),
            "teacher_dtype": "bfloat16",
            "train": str(folder / "train.jsonl"),
        }
        settings = {
            **cache,
            "student": str(folder / "student"),
            "batch_size": 16,
            "max_steps": options.steps,
            "save_steps": 1000,
            "ot_norm": "rms",
        }
        cache["output"] = str(folder / "cache")
        made = teacher.run(build(CacheConfig, cache))

        took = {}
        for way in ("live", "cached"):
            changed = {**settings, "output": str(folder / way)}
            if way == "cached":
                changed["teacher_cache"] = cache["output"]
            process = multiprocessing.get_context("spawn").Process(
                target=train, args=(changed, folder)
            )
            process.start()
            process.join()
            took[way] = json.loads((folder / "took.json").read_text())
        read = reading(settings, folder / "cache")
    print(
        f"teacher of {parameters / 1e6:.0f} million parameters, cache {made['bytes'] / 1e6:.1f} MB"
    )
    for way, values in took.items():
        print(f"{way:>7}: {values['seconds']:.2f} s a step, peak {values['peak']:.0f} MiB")
    times, peaks = (took["live"][key] / took["cached"][key] for key in ("seconds", "peak"))
    share = read / took["cached"]["seconds"]
    print(f"live over cached: time {times:.1f}, memory {peaks:.1f}; reading {share:.2%} of a step")


if __name__ == "__main__":
    main()
