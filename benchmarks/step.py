"""A training step: what the OT loss takes of it, and the per-sample way.

    python -m benchmarks.step [--rows N] [--repeats N] [--threads N] [--out FILE]

Two setups, forward and backward without the optimizer: the demo's distillation, and a larger one
(student of about 13 M parameters, teacher of 36 M, four of the demo's problems in each text). Each
with the compiled loss ("native"), also with `padding_free` ("packed"), with plain PyTorch
("reference"), without the loss but with the teacher ("no OT") and with the student's cross entropy
alone ("student only"); they take turns. The share of the loss is what torch.profiler gives to its
module's forward pass and to the nodes of the backward pass that were made there.

And the way of the authors' code ("per sample"): student and teacher run once for the standard and
once for the chain-of-thought texts, all padded to max_length, make all logits, and go through
layers, rows and pairs one by one: Sinkhorn's scaling form under autograd, with a test of
convergence on the host after every iteration. "trimmed" is the same, padded to the longest text of
each forward pass. Nothing is timed before the ways' losses and gradients agree.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.measure import QUANTILES, surroundings
from cot2align.train.__main__ import config_class, run_module
from cot2align.train.config import DistillConfig, build
from cot2align.train.data import (
    Example,
    Text,
    TextEncoder,
    collate,
    encode_rows,
    model_batch,
    read_rows,
)
from cot2align.train.demo import DemoConfig, recipe_of
from cot2align.train.distiller import Distiller, build_distiller
from cot2align.train.models import load_tokenizer
from cot2align.train.recipe import make_plan
from cot2align.train.token_states import model_inputs

JOINED = 4  # problems of the demo in one text of the larger setup
BACKENDS = {"native": "native", "packed": "native", "reference": "reference"}
PLAIN = ("per sample", "trimmed")
WAYS = (*BACKENDS, "no OT", "student only", *PLAIN)


def enlarge(folder: Path) -> dict[str, int]:
    """Longer texts and larger models in place of the demo's -> the settings that this needs."""
    data = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    joined = [rows[i : i + JOINED] for i in range(0, len(rows), JOINED)]
    texts = [{key: " ".join(row[key] for row in some) for key in some[0]} for some in joined]
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    sizes = {
        "new-student": {"n_embd": 384, "n_layer": 7, "n_head": 6, "n_positions": 512},
        "new-teacher": {
            "hidden_size": 640,
            "intermediate_size": 1760,
            "num_hidden_layers": 7,
            "num_attention_heads": 10,
            "num_key_value_heads": 10,
            "head_dim": 64,
            "max_position_embeddings": 512,
        },
    }
    for name, size in sizes.items():
        path = folder / "models" / name
        config = AutoConfig.from_pretrained(path)
        config.update(size)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return {"max_length": 512, "max_prompt_length": 256}


def make_step(
    folder: Path, rows: int, larger: bool
) -> tuple[DistillConfig, Distiller, list[Example]]:
    """The demo's distillation from untrained models, and one batch."""
    demo = DemoConfig(output=str(folder), train_rows=rows, test_rows=1, device="cpu")
    stages = {stage.name: stage for stage in make_plan(recipe_of(demo)).stages}
    for name in ("data", "models/new-teacher", "models/new-student"):
        command = stages[name].command
        run_module(command).run(build(config_class(command), stages[name].settings))
    settings = stages["students/distilled/seed-10"].settings
    settings = {**settings, "teacher": str(folder / "models" / "new-teacher"), "eval": None}
    config = build(DistillConfig, settings | (enlarge(folder) if larger else {}))
    tokenizers = [load_tokenizer(name) for name in (config.student, config.teacher)]
    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    torch.manual_seed(config.seed)
    distiller = build_distiller(config, *tokenizers)
    return config, distiller.train(), encode_rows(read_rows(config.train), *encoders)[0]


def forward(
    model: PreTrainedModel, texts: Sequence[Text], width: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """One forward pass, padded to the longest text and at least to `width` -> response states by
    layer and text, response logits by text."""
    inputs = model_inputs(model_batch(texts))
    missing = max(0, width - inputs["input_ids"].shape[1])
    padded = {name: F.pad(tensor, (0, missing)) for name, tensor in inputs.items()}
    output = model(**padded, output_hidden_states=True, use_cache=False)
    places = [slice(text.prompt_length - 1, len(text.ids) - 1) for text in texts]
    layers = (output.hidden_states[0], output.hidden_states[-1])
    states = [[layer[b, place] for b, place in enumerate(places)] for layer in layers]
    return states, [output.logits[b, place] for b, place in enumerate(places)]


def sinkhorn_loss(x: Tensor, y: Tensor, projection: Tensor, config: DistillConfig) -> Tensor:
    """L_OT of one student text [N, d] and one teacher text [M, D]."""
    x, y = (z / z.square().mean(-1, keepdim=True).sqrt() for z in (x, y))
    cost = 1 - (x @ (y @ projection).T / math.sqrt(x.shape[1])).softmax(-1)
    kernel = torch.exp(-cost / config.ot_epsilon)
    n, m = cost.shape
    u = torch.ones(n)
    for _ in range(config.ot_iters):
        v = 1 / (m * (kernel.T @ u))
        u = 1 / (n * (kernel @ v))
        if (v * (kernel.T @ u) - 1 / m).abs().sum().item() <= config.ot_tol:
            break
    return (u[:, None] * kernel * v * cost).sum()


def plain_loss(
    distiller: Distiller, config: DistillConfig, examples: list[Example], width: int
) -> Tensor:
    """The demo's objective, sample by sample; every row has both texts. width: see `forward`."""
    student, teacher = [], []
    for is_cot in (False, True):
        pairs = [text for example in examples for text in example.texts if text.is_cot == is_cot]
        student.append((forward(distiller.student, [p.student for p in pairs], width), pairs))
        with torch.no_grad():
            teacher.append(forward(distiller.teacher, [p.teacher for p in pairs], width)[0])
    ce, tokens = torch.zeros(()), 0
    for (_, logits), pairs in student:
        for one, pair in zip(logits, pairs, strict=True):
            targets = torch.tensor(pair.student.response_ids)
            ce = ce + F.cross_entropy(one, targets, reduction="sum")
            tokens += len(targets)
    ot = torch.zeros(())
    for (ours, _), _ in student:
        for theirs in teacher:
            for x, y in zip(ours, theirs, strict=True):
                for one, other in zip(x, y, strict=True):
                    projection = distiller.cross_cot.projections[0]
                    ot = ot + sinkhorn_loss(one, other, projection, config)
    distillation = config.ot_weight * ot / len(examples)
    return (1 - config.alpha) * ce / tokens + config.alpha * distillation


def one_step(
    way: str, distiller: Distiller, config: DistillConfig, examples: list[Example]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> the loss and its gradients for what is trained (None where the way has none)."""
    teacher, cross_cot = distiller.teacher, distiller.cross_cot
    try:
        if way in PLAIN:
            width = 0 if way == "trimmed" else config.max_length
            loss = plain_loss(distiller, config, examples, width)
        else:
            if way in BACKENDS:
                cross_cot.settings = replace(cross_cot.settings, backend=BACKENDS[way])
            else:
                distiller.cross_cot = None
            if way == "student only":
                distiller.teacher = None
            layout = "packed" if way == "packed" else "padded"
            loss = distiller(**collate(examples, layout=layout))["loss"]
    finally:
        distiller.teacher, distiller.cross_cot = teacher, cross_cot
    trained = [p for p in distiller.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)


def share_of_loss(run: Callable[[], object], loss: torch.nn.Module, steps: int = 3) -> float:
    """The part of `run` that is spent in the module and in the backward pass of what it made."""
    ranges: list[record_function] = []

    def enter(*_: object) -> None:
        ranges.append(record_function("ot_loss"))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges[-1].__exit__(None, None, None)

    hooks = [loss.register_forward_pre_hook(enter), loss.register_forward_hook(leave)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with record_function("step"):
                run()
    for hook in hooks:
        hook.remove()
    events = profiler.events()
    spans = [event.time_range for event in events if event.name == "ot_loss"]
    made = {
        event.sequence_nr
        for event in events
        if event.sequence_nr >= 0
        and any(span.start <= event.time_range.start <= span.end for span in spans)
    }
    backward = sum(
        event.time_range.elapsed_us()
        for event in events
        if event.name.startswith("autograd::engine::evaluate_function")
        and event.sequence_nr in made
    )
    whole = sum(event.time_range.elapsed_us() for event in events if event.name == "step")
    return (sum(span.elapsed_us() for span in spans) + backward) / whole


def setup(name: str, rows: int, repeats: int) -> list[dict[str, object]]:
    """One row for each way; raises ValueError where the ways differ."""
    with tempfile.TemporaryDirectory() as folder:
        config, distiller, examples = make_step(Path(folder), rows, larger=name == "larger")
    steps = {way: partial(one_step, way, distiller, config, examples) for way in WAYS}

    want_loss, gradients = steps["native"]()
    want = torch.cat([gradient.flatten() for gradient in gradients])
    for way in ("packed", "reference", *PLAIN):
        loss, gradients = steps[way]()
        gradient = torch.cat([gradient.flatten() for gradient in gradients])
        errors = [
            ((got - wanted).norm() / wanted.norm()).item()
            for got, wanted in ((loss, want_loss), (gradient, want))
        ]
        print(f"{way} differs by {errors[0]:.1e} of the loss, {errors[1]:.1e} of the gradient")
        if max(errors) > 1e-3:
            raise ValueError(f"{way} does not compute the loss of native")

    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in tqdm(range(repeats + 1), desc=f"{name}: timing", leave=False, disable=None):
        for way, measured in times.items():
            start = time.perf_counter()
            steps[way]()
            if turn:  # the first one warms up
                measured.append(time.perf_counter() - start)
    tokens = sum(len(text.student.ids) for example in examples for text in example.texts)
    table: list[dict[str, object]] = []
    for way, measured in times.items():
        of = torch.tensor(measured, dtype=torch.float64)
        share = 0.0
        if way in BACKENDS:
            assert distiller.cross_cot is not None
            share = share_of_loss(steps[way], distiller.cross_cot)
        table.append(
            {"setup": name, "way": way, "rows": len(examples), "tokens": tokens}
            | {"threads": torch.get_num_threads()}
            | {f"step_ms_{q}": f"{1e3 * of.quantile(at):.4g}" for q, at in QUANTILES.items()}
            | {"tokens_per_second": f"{tokens / of.median():.0f}"}
            | {"ot_share": "" if way in PLAIN else f"{share:.3f}"}
        )
    return table


def main() -> int:
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=16, help="the demo's problems in a batch")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--setups", nargs="+", choices=("demo", "larger"))
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    around = surroundings("cpu", "python -m benchmarks.step")
    table: list[dict[str, object]] = []
    for name in options.setups or ("demo", "larger"):
        for row in setup(name, options.rows, options.repeats):
            share = f", OT {float(str(row['ot_share'])):.1%}" if row["ot_share"] else ""
            print(
                f"{name:>7} {row['way']:>12}: {row['step_ms_p50']:>7} ms a step, "
                f"{row['tokens_per_second']:>6} student tokens/s{share}"
            )
            table.append(row | around)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
