"""Distilling from a cached teacher and from a live one:

    python -m benchmarks.teacher [--rows N] [--steps N] [--layers N] [--width N]

The rows, the tokenizers and the student are the demo's, the teacher is a wider Llama with random
weights, bfloat16. Each way trains in a process of its own (Linux), by the command `distill`.
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

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cot2align.train import teacher, trainer
from cot2align.train.config import CacheConfig, DistillConfig, build
from cot2align.train.data import TextEncoder, encode_rows, read_rows
from cot2align.train.demo import MAX_LENGTH, DemoConfig, prepare, stages
from cot2align.train.models import load_tokenizer


def make_teacher(folder: Path, layers: int, width: int) -> int:
    """A random Llama with the demo teacher's tokenizer, bfloat16; returns its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / "teacher")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).bfloat16()
    model.save_pretrained(folder / "big")
    tokenizer.save_pretrained(folder / "big")
    return sum(parameter.numel() for parameter in model.parameters())


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
    config = build(DistillConfig, settings)
    encoders = [
        TextEncoder(
            load_tokenizer(name),
            prompt_format=config.prompt_format,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
        )
        for name in (config.student, config.teacher)
    ]
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
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = DemoConfig(output=name, train_rows=options.rows, test_rows=1, device="cpu")
        prepare(demo, folder)
        parameters = make_teacher(folder, options.layers, options.width)
        (stage,) = (stage for stage in stages(demo, folder) if stage.command == "distill")
        settings = {
            **stage.settings,
            "teacher": str(folder / "big"),
            "max_steps": options.steps,
            "save_steps": 1000,
        }
        names = ("teacher", "train", "prompt_format", "max_length", "max_prompt_length", "device")
        cache = {name: settings[name] for name in names} | {"output": str(folder / "cache")}
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
