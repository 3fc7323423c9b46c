"""What the paper's recipes cost on 1, 8 and 64 GPUs: an estimate on paper.

    python -m benchmarks.scale [--flops TFLOPS] [--efficiency SHARE] [--cot_tokens N]

Nothing here is measured on a GPU. The work of a step is counted by formulas: 2 operations per
weight and token in a forward pass, 4 in a backward pass (2 where the weight is frozen), 4 L d per
layer and token for attention's forward pass over L tokens, halved for the causal mask, and the
heads on response tokens, once for every loss that makes logits. The formulas are first compared
with the operations that PyTorch counts in a real forward and backward pass of small models; the
activations' bytes per token, layer and width are measured on the same, on the CPU, under bfloat16
autocast. Time is work over what the GPUs are assumed to do. Rows are Dolly's, 11435, their lengths
as in `benchmarks.packing`; how long a rationale is, is an assumption.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cot2align.train.check import CountedBytes
from cot2align.train.models import body_states

ROWS, BATCH = 11435, 32  # of Dolly's training set; rows per step
PROMPT, RESPONSE = 73, 84  # tokens of a standard text, means of benchmarks.packing's lengths
CHUNK = 1.2 * 4 * 2**26  # bytes of the logits, see token_states


@dataclass(frozen=True)
class Model:
    """Weights without embedding table and head; the head counts where logits are made."""

    name: str
    layers: int
    width: int
    body: float
    vocabulary: int

    @property
    def parameters(self) -> float:
        return self.body + self.vocabulary * self.width

    def forward(self, tokens: float, length: float) -> float:
        """Operations of the body for `tokens` in texts of `length`."""
        return tokens * (2 * self.body + 2 * length * self.width * self.layers)

    def head(self, tokens: float) -> float:
        return 2 * tokens * self.vocabulary * self.width


@dataclass(frozen=True)
class Recipe:
    student: Model
    teacher: Model
    kd: str
    epochs: int
    lora: float = 0  # trained weights of an adapter; 0: all are trained


GPT2 = Model("GPT2-120M", 12, 768, 85e6, 50257)
GPT2_XL = Model("GPT2-1.5B", 48, 1600, 1.475e9, 50257)
QWEN = Model("Qwen1.5-1.8B", 24, 2048, 1.21e9, 151936)
QWEN_7B = Model("Qwen2.5-7B", 28, 3584, 6.53e9, 152064)
MISTRAL = Model("Mistral-7B", 32, 4096, 6.98e9, 32000)
TINY_LLAMA = Model("TinyLlama-1.1B", 22, 2048, 0.97e9, 32000)
RECIPES = (
    Recipe(GPT2, GPT2_XL, "kl", 20),
    Recipe(GPT2, QWEN, "dskd", 20),
    # Rank 256 on all linear layers.
    Recipe(TINY_LLAMA, MISTRAL, "dskd", 10, lora=0.2e9),
    Recipe(GPT2_XL, QWEN_7B, "dskd", 10, lora=0.23e9),
)
# Heads that a loss evaluates: student's and teacher's, with a backward pass or without.
HEADS = {"kl": ((1, 0), (0, 1)), "dskd": ((2, 0), (1, 1))}


def compare(model: torch.nn.Module, described: Model) -> tuple[float, float]:
    """(operations counted over those of the formula, bytes per token, layer and width) of a forward
    and backward pass over one text of 256 tokens."""
    ids = torch.zeros(1, 256, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter:
        body_states(model, **inputs)[-1].sum().backward()
    formula = 3 * described.forward(256, 256)
    with (
        CountedBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as counted,
        torch.autocast("cpu", torch.bfloat16),
    ):
        last = body_states(model, **inputs)[-1]
        # Weights in bfloat16 are kept for the backward pass, too, but not for each token.
        kept = counted.alive - 2 * described.body
    del last
    return counter.get_total_flops() / formula, kept / (256 * described.layers * described.width)


def small_models() -> list[tuple[torch.nn.Module, Model]]:
    """The two architectures of the recipes, with their proportions."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=4, n_head=8, vocab_size=1000,
                                      bos_token_id=0, eos_token_id=0))  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1408,
                                         num_hidden_layers=4, num_attention_heads=8,
                                         num_key_value_heads=2, vocab_size=1000))  # fmt: skip
    return [
        (model, Model(name, 4, 512, sum(p.numel() for p in layers.parameters()), 1000))
        for name, model, layers in (
            ("GPT-2", gpt2, gpt2.transformer.h),
            ("Llama", llama, llama.model.layers),
        )
    ]


def work(recipe: Recipe, cot: float) -> tuple[float, float]:
    """Operations of an epoch: of the student with all losses, and of the teacher's body."""
    texts = ((PROMPT + RESPONSE, RESPONSE), (PROMPT + cot + RESPONSE, cot + RESPONSE))
    student, teacher = recipe.student, recipe.teacher
    backward = 1 if recipe.lora else 2
    ours = theirs = 0.0
    for length, responses in texts:
        ours += (1 + backward) * student.forward(length, length)
        ours += 6 * recipe.lora * length
        # Cross entropy, then L_KD; a frozen head has no gradient of its own.
        ours += (1 + backward) * student.head(responses)
        for head, (trained, constant) in zip((student, teacher), HEADS[recipe.kd], strict=True):
            ours += ((1 + backward) * trained + constant) * head.head(responses)
        theirs += teacher.forward(length, length)
    return ROWS * ours, ROWS * theirs


def memory(recipe: Recipe, cot: float, rows: int, bytes_per: float) -> tuple[float, float]:
    """Bytes on one GPU without sharding, with the teacher live and from the cache."""
    student, teacher = recipe.student, recipe.teacher
    trained = recipe.lora or student.parameters
    # float32 weights, gradients and two averages; frozen weights as loaded, in float32.
    ours = 16 * trained + (4 * student.parameters if recipe.lora else 0)
    tokens = rows * (2 * (PROMPT + RESPONSE) + cot)
    ours += bytes_per * tokens * student.layers * student.width + CHUNK
    tables = 2 * 2 * teacher.vocabulary * teacher.width
    # Its states of all layers are there until the wanted ones are taken.
    states = 2 * tokens * (teacher.layers + 1) * teacher.width
    return ours + 2 * teacher.body + tables + states, ours + tables


def main() -> None:
    """Print the comparison and the tables, Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, default=312, help="peak of a GPU, 1e12 a second")
    parser.add_argument("--efficiency", type=float, default=0.35, help="share of it reached")
    parser.add_argument("--cot_tokens", type=int, default=200, help="tokens of a rationale")
    options = parser.parse_args()
    cot = options.cot_tokens
    bytes_per = {}
    for model, described in small_models():
        ratio, bytes_per[described.name] = compare(model, described)
        print(f"{described.name}: counted operations are {ratio:.3f} of the formula's; activations "
              f"{bytes_per[described.name]:.1f} bytes per token, layer and width")  # fmt: skip
    speed = options.flops * 1e12 * options.efficiency

    work_rows, memory_rows = [], []
    for recipe in RECIPES:
        name = f"{recipe.student.name} from {recipe.teacher.name}"
        ours, theirs = (recipe.epochs * part for part in work(recipe, cot))
        live, cached = (
            part / speed / 3600 for part in (ours + theirs, ours + theirs / recipe.epochs)
        )
        hours = [f"{live / gpus:.2g} h" for gpus in (1, 8, 64)]
        share = f"{theirs / (ours + theirs):.0%}"
        work_rows.append(
            [name, recipe.kd, f"{ours + theirs:.1e}", share, *hours, f"{cached:.2g} h"]
        )
        kind = bytes_per["Llama" if recipe.student is TINY_LLAMA else "GPT-2"]
        sizes = [
            memory(recipe, cot, 32, kind)[0],
            *memory(recipe, cot, 4, kind),
            memory(recipe, cot, 1, kind)[1],
            2 * ROWS * (2 * RESPONSE + cot) * recipe.teacher.width,
        ]
        steps = str(ROWS * recipe.epochs // BATCH)
        memory_rows.append([name, steps, *(f"{size / 1e9:.0f} GB" for size in sizes)])
    heads = (
        ["recipe", "L_KD", "operations", "teacher's", "1 GPU", "8", "64", "1, cached"],
        ["recipe", "steps", "32 rows", "4 rows", "4, cached", "1, cached", "cache on disk"],
    )
    for head, rows in zip(heads, (work_rows, memory_rows), strict=True):
        print()
        for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
