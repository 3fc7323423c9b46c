"""Training without padding against padding to the longest text of the batch and to 512 tokens:

    python -m benchmarks.packing [--batches N] [--batch_size N] [--layers N] [--width N]

A step is forward and backward of the cross entropy of a GPT-2-shaped model. Its texts have random
tokens and the lengths of Dolly's rows under the paper's standard prompt: quantiles of 900 rows in
characters, prompt and response apart (they are uncorrelated), at 4.4 characters a token. Only
tokens of texts are counted. Before loss and gradients agree nothing is timed; the ways take turns
on the same batches. "by length": with batches of `group_by_length`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from cot2align.train.data import LengthSampler, Text, model_batch
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.token_states import token_states

MAX_LENGTH = 512
VOCABULARY = 8192
CHARACTERS_PER_TOKEN = 4.4
# Characters of Dolly's prompts and responses, of every twentieth of the rows.
PROMPTS = (
    *(152, 162, 168, 173, 177, 180, 184, 188, 192, 196, 202),
    *(208, 215, 228, 253, 293, 414, 642, 791, 954, 1284),
)
RESPONSES = (
    *(4, 16, 38, 49, 62, 81, 97, 118, 140, 168, 203),
    *(245, 291, 335, 377, 443, 519, 635, 797, 1214, 4663),
)


def text(generator: random.Random) -> Text:
    """Random tokens, with the lengths of a row of Dolly's."""

    def tokens(quantiles: Sequence[int]) -> int:
        place = generator.random() * (len(quantiles) - 1)
        low = int(place)
        characters = quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])
        return max(1, round(characters / CHARACTERS_PER_TOKEN))

    prompt = min(tokens(PROMPTS), MAX_LENGTH // 2)
    length = min(prompt + tokens(RESPONSES) + 1, MAX_LENGTH)
    return Text([generator.randrange(VOCABULARY) for _ in range(length)], prompt)


def padded_to_512(texts: Sequence[Text]) -> dict[str, Any]:
    """`model_batch`, with more padding."""
    batch = model_batch(texts)
    width = batch["input_ids"].shape[1]
    places = batch["positions"]
    wider = {
        name: F.pad(batch[name], (0, MAX_LENGTH - width))
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, **wider, "positions": places // width * MAX_LENGTH + places % width}


def main() -> None:
    """Print every way's tokens per second and its ratio to padding to 512."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=MAX_LENGTH,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.width // 64,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        )
    )

    def step(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = cross_entropy(token_states(model, batch))[0] / len(batch["targets"])
        loss.backward()
        return loss.detach(), model.transformer.wte.weight.grad.clone()

    generator = random.Random(0)
    texts = [text(generator) for _ in range(options.batches * options.batch_size)]
    lengths = [len(one.ids) for one in texts]
    by_length = list(LengthSampler(lengths, options.batch_size, 0, lambda: 0))
    ways: dict[str, tuple[Sequence[int], Callable[[Sequence[Text]], dict[str, Any]]]] = {
        "padded to 512": (range(len(texts)), padded_to_512),
        "padded": (range(len(texts)), model_batch),
        "padded, by length": (by_length, model_batch),
        "packed": (range(len(texts)), lambda some: model_batch(some, layout="packed")),
        "in one row": (range(len(texts)), lambda some: model_batch(some, layout="joined")),
    }
    some = texts[: options.batch_size]
    losses, gradients = zip(
        *(step(make(some)) for way, (_, make) in ways.items() if way != "padded, by length"),
        strict=True,
    )
    error = max(((g - gradients[0]).norm() / gradients[0].norm()).item() for g in gradients)
    print(f"losses {', '.join(f'{loss:.6f}' for loss in losses)}, gradients differ by {error:.1e}")
    if error > 1e-4:
        raise SystemExit("the ways disagree, nothing is timed")

    seconds: dict[str, float] = defaultdict(float)
    for first in range(0, len(texts), options.batch_size):
        for way, (order, make) in ways.items():
            batch = make([texts[i] for i in order[first : first + options.batch_size]])
            start = time.perf_counter()
            step(batch)
            seconds[way] += time.perf_counter() - start
    print(f"{len(texts)} texts, {sum(lengths) / len(lengths):.0f} tokens on average")
    for way, total in seconds.items():
        ratio = seconds["padded to 512"] / total
        print(f"{way:>18}: {sum(lengths) / total:7.0f} tokens/s, {ratio:.2f} times padded to 512")


if __name__ == "__main__":
    main()
