"""A training step against the per-sample way: `python -m benchmarks.step [--rows N] [--repeats N]`.

The models, rows and settings are the demo's distillation. The plain way runs student and teacher
once for the standard and once for the chain-of-thought texts, makes all logits, and goes through
layers, rows and pairs one by one: Sinkhorn's scaling form under autograd, with a test of
convergence on the host after every iteration. Before loss and gradients agree nothing is timed; the
two take turns. A step is forward and backward, without the optimizer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from cot2align.train.config import DistillConfig, build
from cot2align.train.data import Example, Text, TextEncoder, collate, encode_rows, read_rows
from cot2align.train.demo import DemoConfig, prepare, stages
from cot2align.train.distiller import Distiller
from cot2align.train.models import load_tokenizer
from cot2align.train.trainer import build_distiller


def demo_step(folder: Path, rows: int) -> tuple[DistillConfig, Distiller, list[Example]]:
    """The demo's distillation from untrained models, and one batch."""
    demo = DemoConfig(output=str(folder), train_rows=rows, test_rows=1, device="cpu")
    prepare(demo, folder)
    (stage,) = (stage for stage in stages(demo, folder) if stage.command == "distill")
    teacher = str(folder / "models" / "teacher")
    config = build(DistillConfig, {**stage.settings, "teacher": teacher})
    tokenizers = [load_tokenizer(name) for name in (config.student, config.teacher)]
    encoders = [
        TextEncoder(
            tokenizer,
            prompt_format=config.prompt_format,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
        )
        for tokenizer in tokenizers
    ]
    torch.manual_seed(config.seed)
    distiller = build_distiller(config, *tokenizers)
    return config, distiller.train(), encode_rows(read_rows(config.train), *encoders)[0]


def forward(
    model: PreTrainedModel, texts: Sequence[Text]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """One padded forward pass -> response states by layer and text, response logits by text."""
    ids = [torch.tensor(text.ids) for text in texts]
    mask = [torch.ones_like(one) for one in ids]
    padded, attention = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, mask))
    output = model(
        input_ids=padded, attention_mask=attention, output_hidden_states=True, use_cache=False
    )
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


def plain_loss(distiller: Distiller, config: DistillConfig, examples: list[Example]) -> Tensor:
    """The demo's objective, the per-sample way; every row has both texts."""
    student, teacher = [], []
    for is_cot in (False, True):
        pairs = [text for example in examples for text in example.texts if text.is_cot == is_cot]
        student.append((forward(distiller.student, [p.student for p in pairs]), pairs))
        with torch.no_grad():
            teacher.append(forward(distiller.teacher, [p.teacher for p in pairs])[0])
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


def main() -> int:
    """Compare, time, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config, distiller, examples = demo_step(Path(folder), options.rows)

    ways: dict[str, Callable[[], Tensor]] = {
        "cot2align": lambda: distiller(**collate(examples))["loss"],
        "per sample": lambda: plain_loss(distiller, config, examples),
    }
    trained = [p for p in distiller.parameters() if p.requires_grad]

    def step(way: str) -> tuple[Tensor, Tensor]:
        loss = ways[way]()
        gradients = torch.autograd.grad(loss, trained)
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    (loss, gradient), (plain, plain_gradient) = (step(way) for way in ways)
    loss_error = ((loss - plain) / plain).abs().item()
    gradient_error = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
    print(f"the ways differ by {loss_error:.1e} of the loss, {gradient_error:.1e} of the gradient")
    if max(loss_error, gradient_error) > 1e-3:
        return 1

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, measured in seconds.items():
            start = time.perf_counter()
            step(way)
            measured.append(time.perf_counter() - start)
    tokens = sum(len(text.student.ids) for example in examples for text in example.texts)
    medians = {way: statistics.median(measured) for way, measured in seconds.items()}
    for way, median in medians.items():
        print(f"{way:>10}: {1e3 * median:7.1f} ms a step, {tokens / median:7.0f} student tokens/s")
    print(f"{medians['per sample'] / medians['cot2align']:.1f} times the tokens per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
