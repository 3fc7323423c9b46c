"""The settings of every command: one dataclass each, filled from YAML and the command line.

A setting is a dataclass field made by `setting(...)`: its default, its help with the unit, its
range. From these come the `--help` texts, the type checks, and the errors that offer the nearest
name. The command line beats the YAML file. Relative paths are taken as given.

A file may begin from another with `base: FILE` (relative to itself, one level deep): its own
settings beat the base's, key by key. There is no interpolation, and nesting in recipes only.
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CONFIG_FILE = "config.yaml"  # a run's own settings, resolved, in its output folder
PROMPTS = ("standard", "cot")
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "js",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
)


class UserError(ValueError):
    """A mistake in what the user gave: shown as one `error:` line, exit code 2."""


def about(
    help: str,
    *,
    choices: Sequence[str] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A field's metadata: its help and the range of its value, or of each of a list's items."""
    return {
        "help": help,
        "choices": tuple(choices),
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
    }


def setting(default: Any = dataclasses.MISSING, help: str = "", **limits: Any) -> Any:
    """A field with its help and range; without a default it is required."""
    return field(default=default, metadata=about(help, **limits))


@dataclass(kw_only=True)
class TextConfig:
    """Settings of everything that reads rows and models."""

    prompt_format: str = setting(
        "paper",
        "the paper's Figure 3, each model's own chat template, or the row's words alone",
        choices=("paper", "chat", "raw"),
    )
    max_length: int = setting(512, "prompt and response together, tokens", at_least=8)
    trust_remote_code: bool = setting(
        False, "run code that comes with a model folder; off unless you trust its author"
    )
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu"))


@dataclass(kw_only=True)
class TrainConfig(TextConfig):
    """Settings that fine-tuning and distillation share."""

    train: str = setting(help="training rows, a JSON Lines file")
    eval: str | None = setting(None, "rows for the evaluation loss, a JSON Lines file")
    output: str = setting(help="output folder; must be empty or new unless --resume")
    resume: bool = setting(False, "continue from the last checkpoint in the output folder")
    texts: str = setting(
        "both",
        "train on the standard text of a row, its chain-of-thought text, or both",
        choices=("standard", "cot", "both"),
    )
    max_prompt_length: int = setting(
        256, "tokens a prompt may always keep; a longer one is cut in its input", at_least=4
    )
    epochs: float = setting(10.0, "passes over the training rows", above=0)
    max_steps: int | None = setting(None, "optimizer steps; beats epochs", at_least=1)
    batch_size: int = setting(8, "rows per process and forward pass", at_least=1)
    padding_free: bool = setting(
        False, "texts of a batch share rows, where the attention keeps them apart: less padding"
    )
    group_by_length: bool = setting(False, "rows of like length in a step: less padding")
    gradient_accumulation: int = setting(1, "forward passes per optimizer step", at_least=1)
    eval_batch_size: int = setting(8, "rows per process when evaluating", at_least=1)
    learning_rate: float = setting(5e-4, "peak learning rate of the student", above=0)
    weight_decay: float = setting(0.01, "AdamW weight decay", at_least=0)
    schedule: str = setting(
        "cosine", "learning-rate schedule", choices=("cosine", "linear", "constant_with_warmup")
    )
    warmup: float = setting(0.0, "warm-up, fraction of all steps", at_least=0, at_most=0.99)
    max_grad_norm: float = setting(1.0, "gradient clipping norm; 0 = off", at_least=0)
    seed: int = setting(10, "seed of initialisation, order and dropout", at_least=0)
    bf16: bool = setting(False, "mixed precision with bfloat16; the losses stay float32")
    fp16: bool = setting(
        False, "mixed precision with float16 and a loss scale; heads and losses float32; on a GPU"
    )
    attn_implementation: str | None = setting(
        None,
        "attention of student and teacher; none: the model's own choice",
        choices=("sdpa", "eager", "flash_attention_2"),
    )
    liger: bool = setting(False, "the cross entropy by Liger's fused kernel, on a GPU")
    torch_compile: bool = setting(False, "compile the student's body; needs a C++ compiler")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward pass")
    logging_steps: int = setting(10, "optimizer steps between two log entries", at_least=1)
    save_steps: int = setting(500, "optimizer steps between two checkpoints", at_least=1)
    eval_steps: int = setting(500, "optimizer steps between two evaluations", at_least=1)
    checkpoints: int = setting(1, "checkpoints kept", at_least=1)
    generate_rows: int = setting(
        0, "evaluation rows to generate for, greedily, at every evaluation; 0 = none", at_least=0
    )
    generate_data: list[str] = field(
        default_factory=list,
        metadata=about("files of those rows, whose mean counts; empty: eval"),
    )
    generate_prompt: str = setting("standard", "the prompt of those rows", choices=PROMPTS)
    max_new_tokens: int = setting(256, "tokens generated for such a row at most", at_least=1)
    keep_best: str = setting(
        "none",
        "evaluation whose weights are kept at the end: none, the last; by ROUGE-L; by loss",
        choices=("none", "rougeL", "loss"),
    )
    report_to: list[str] = field(
        default_factory=list, metadata=about("trackers, by transformers' names; empty: none")
    )
    on_nan: str = setting(
        "stop",
        "a loss or gradient that is not finite stops the run, or its step is skipped",
        choices=("stop", "skip"),
    )
    spike_factor: float = setting(
        2.0,
        "log the rows of a forward pass with this many times the last logged ce; 0 = off",
        at_least=0,
    )
    lora_r: int = setting(0, "rank of LoRA adapters; 0: all weights are trained", at_least=0)
    lora_alpha: float = setting(16.0, "LoRA scale, times 1 / lora_r", above=0)
    lora_dropout: float = setting(0.0, "dropout in front of the adapters", at_least=0, at_most=0.99)
    target_modules: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata=about("names of the modules with adapters; auto: all linear ones but the head"),
    )
    merge: bool = setting(False, "save a plain model at the end; its adapter goes to adapter/")
    load_in_4bit: bool = setting(False, "QLoRA: the frozen weights in 4 bits, through bitsandbytes")

    def __post_init__(self) -> None:
        """Raises UserError for settings that contradict each other."""
        if self.generate_rows:
            check_room(self.max_new_tokens, self.max_length)
        check_prompt_length(self.max_prompt_length, self.max_length)
        for contradicted, reason in (
            (
                self.generate_rows > 0 and self.eval is None,
                "'generate_rows' generates at evaluations, and 'eval' is none",
            ),
            (
                self.keep_best == "rougeL" and not self.generate_rows,
                "'keep_best' is rougeL and 'generate_rows' is 0: nothing to score",
            ),
            (
                self.keep_best == "loss" and self.eval is None,
                "'keep_best' is loss and 'eval' is none: no loss to compare",
            ),
            (self.bf16 and self.fp16, "'bf16' and 'fp16' are both on; choose one"),
            (
                self.attn_implementation == "flash_attention_2" and not (self.bf16 or self.fp16),
                "'attn_implementation' flash_attention_2 takes no float32; it needs bf16 or fp16",
            ),
            (
                self.load_in_4bit and not self.lora_r,
                "'load_in_4bit' is on and 'lora_r' is 0: weights of 4 bits cannot be trained",
            ),
            (
                self.lora_r > 0 and not self.target_modules,
                "setting 'target_modules' is empty; 'lora_r: 0' trains all weights",
            ),
        ):
            if contradicted:
                raise UserError(reason)


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Fine-tune one model, teacher or student, on standard and chain-of-thought texts."""

    model: str = setting(help="model to fine-tune: a folder or a hub name")


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """Train a student from a teacher: (1 - alpha) CE + alpha (ot_weight L_CCoT + L_KD), eq. 16."""

    student: str = setting(help="student model: a folder or a hub name")
    teacher: str = setting(help="teacher model: a folder or a hub name")
    teacher_dtype: str = setting(
        "auto",
        "teacher weights; auto: as saved",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    teacher_quantization: str = setting(
        "none",
        "teacher weights in fewer bits, through bitsandbytes",
        choices=("none", "8bit", "4bit"),
    )
    teacher_cache: str | None = setting(
        None, "folder that `cache` wrote: the teacher's states are read from it, not computed"
    )
    teacher_cache_checksums: bool = setting(
        False, "read the whole cache at the start and compare its checksums"
    )
    alpha: float = setting(0.5, "weight of the distillation terms, eq. 16", at_least=0, at_most=1)
    kd: str = setting(
        "none",
        "L_KD; kl needs one vocabulary for both",
        choices=("none", "kl", "uld", "mined", "dskd"),
    )
    divergence: str = setting(
        "forward_kl", "divergence inside L_KD, for kl and dskd", choices=DIVERGENCES
    )
    temperature: float | None = setting(
        None, "softmax temperature of L_KD; none: 2, of uld 1", above=0
    )
    token_maps: str | None = setting(
        None, "folder that keeps mined's maps and alignments; none: ~/.cache/cot2align"
    )
    t2s_init: str = setting(
        "random",
        "dskd's t2s at first: random, or by least squares from the heads, on shared tokens",
        choices=("random", "pseudo-inverse"),
    )
    ot: bool = setting(True, "L_CCoT, the OT alignment")
    cst: bool = setting(True, "its same-format pairs, eq. 7")
    crc: bool = setting(True, "its crossed pairs, eq. 8")
    ot_weight: float = setting(1.0, "weight of L_CCoT", above=0)
    layers: list[str] = field(
        default_factory=lambda: ["embed", "last"],
        metadata=about("layers summed in eq. 14: embed, last, or an index of hidden_states"),
    )
    tokens: str = setting("response", "positions that are aligned", choices=("response", "all"))
    ot_norm: str = setting(
        "none", "normalisation of the tokens before the projection", choices=("none", "rms")
    )
    projection: str = setting(
        "shared", "one projection for all layers, or one each", choices=("shared", "per-layer")
    )
    projection_learning_rate: float = setting(
        1e-3, "learning rate of the projections, also dskd's", above=0
    )
    ot_epsilon: float = setting(0.1, "entropic regularisation, 1/lambda of the paper", above=0)
    ot_iters: int = setting(100, "Sinkhorn iterations at most", at_least=1)
    ot_tol: float = setting(1e-6, "L1 marginal error that stops a problem; 0 = never", at_least=0)
    ot_grad: str = setting(
        "unrolled",
        "gradient of the plan: of the iterations run, at the fixed point, or none",
        choices=("unrolled", "implicit", "detached"),
    )
    ot_backend: str | None = setting(
        None,
        "OT implementation; none: the fastest the device has",
        choices=("reference", "native", "triton", "cuda"),
    )

    def __post_init__(self) -> None:
        """Raises UserError for settings that contradict each other."""
        super().__post_init__()
        layers = [{"0": "embed", "-1": "last"}.get(name, name) for name in self.layers]
        for contradicted, reason in (
            (
                self.kd == "none" and not self.ot,
                "'kd' is none and 'ot' is off: nothing to distil; the command sft fine-tunes",
            ),
            (
                self.kd == "uld" and self.divergence != "forward_kl",
                f"kd uld has no divergence, but 'divergence' is {self.divergence}",
            ),
            (
                self.kd == "mined" and self.divergence != "forward_kl",
                f"kd mined has forward_kl, but 'divergence' is {self.divergence}",
            ),
            (
                self.ot and not (self.cst or self.crc),
                "'cst' and 'crc' are both off; 'ot: off' turns the alignment off",
            ),
            (
                self.ot and not self.cst and self.texts != "both",
                f"'cst' is off and 'texts' is {self.texts}: no row has a crossed pair",
            ),
            (
                self.ot and not layers,
                "setting 'layers' is empty; 'ot: off' turns the alignment off",
            ),
            (
                self.ot and len(set(layers)) < len(layers),
                f"setting 'layers' has a layer twice: {', '.join(self.layers)}",
            ),
        ):
            if contradicted:
                raise UserError(reason)


@dataclass(kw_only=True)
class CheckConfig(DistillConfig):
    """What a run needs, before it is paid for: takes the file of distill or sft, or a recipe."""

    student: str = setting("", "student model: a folder or a hub name")
    teacher: str = setting("", "teacher model: a folder or a hub name")
    model: str = setting("", "of sft: the model to fine-tune, in place of student and teacher")
    output: str = setting("unused", "output folder of the run, or of the recipe; not touched")
    method: str | None = setting(
        None, "of a recipe: the method or teacher to check; none: the first method that distils"
    )
    processes: int = setting(1, "data-parallel processes of the run", at_least=1)
    dry_run: bool = setting(True, "run and time two steps on a largest batch")

    def checked(self) -> SFTConfig | DistillConfig:
        """The config of the run. Raises UserError where it is that of neither command."""
        if self.method is not None:
            raise UserError("setting 'method' names a method of a recipe, and no recipe is given")
        if bool(self.model) == bool(self.student and self.teacher):
            raise UserError("check needs either model, or student and teacher")
        cls = SFTConfig if self.model else DistillConfig
        return cls(**{f.name: getattr(self, f.name) for f in dataclasses.fields(cls)})


@dataclass(kw_only=True)
class RecipeCheck:
    """`check` of a recipe: what its file says, and CheckConfig's settings that are given beside it,
    as texts."""

    recipe: dict[str, Any]
    settings: dict[str, str]


@dataclass(frozen=True)
class RecipeList:
    """`run` of a file that lists recipes."""

    recipes: list[RecipeConfig]


@dataclass(kw_only=True)
class CacheConfig(TextConfig):
    """Write a teacher's states of all texts to disk, for distill --teacher_cache."""

    teacher: str = setting(help="teacher model: a folder or a hub name")
    teacher_dtype: str = setting(
        "auto",
        "teacher weights; auto: as saved",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    train: str = setting(help="training rows, a JSON Lines file")
    eval: str | None = setting(None, "further rows, a JSON Lines file")
    output: str = setting(help="folder of the cache; must be empty or new unless --resume")
    resume: bool = setting(
        False, "keep the whole shards that the output folder holds, add what is missing"
    )
    texts: str = setting(
        "both", "texts of a row that are cached", choices=("standard", "cot", "both")
    )
    max_prompt_length: int = setting(
        256, "tokens a prompt may always keep; a longer one is cut in its input", at_least=4
    )
    batch_size: int = setting(16, "texts per forward pass", at_least=1)
    cache_dtype: str = setting(
        "bfloat16",
        "the states on disk; int8: each element to 1/254 of its token's largest",
        choices=("float32", "bfloat16", "float16", "int8"),
    )
    layers: list[str] = field(
        default_factory=lambda: ["embed", "last"],
        metadata=about("layers that distill can align: embed, last, or an index of hidden_states"),
    )
    tokens: str = setting(
        "response", "positions that distill can align", choices=("response", "all")
    )
    shard_size: int = setting(256, "size of a file, MiB; a kill loses one at most", at_least=1)


@dataclass(kw_only=True)
class GenerationConfig(TextConfig):
    """Settings of everything that generates."""

    model: str = setting(help="model: a folder or a hub name")
    data: str = setting(help="rows, a JSON Lines file")
    batch_size: int = setting(16, "rows generated at once", at_least=1)
    max_new_tokens: int = setting(
        256, "generated tokens at most; the prompt keeps max_length less these", at_least=1
    )
    dtype: str = setting(
        "auto", "weights; auto: as saved", choices=("auto", "float32", "bfloat16", "float16")
    )

    def __post_init__(self) -> None:
        """Raises UserError for settings that contradict each other."""
        if not getattr(self, "server", None):
            check_room(self.max_new_tokens, self.max_length)


def check_room(max_new_tokens: int, max_length: int) -> None:
    """Raises UserError where the limits leave no room for a prompt."""
    if max_new_tokens >= max_length:
        raise UserError(
            f"max_new_tokens {max_new_tokens} must be below max_length {max_length}: the prompt "
            "gets the rest"
        )


def check_prompt_length(max_prompt_length: int, max_length: int) -> None:
    """Raises UserError where the limits leave no room for a response."""
    if max_prompt_length >= max_length:
        raise UserError(
            f"max_prompt_length {max_prompt_length} must be below max_length {max_length}"
        )


@dataclass(kw_only=True)
class ServerConfig:
    """Settings of everything that asks an OpenAI-compatible server."""

    server_api: str = setting(
        "chat",
        "chat: the prompt is a user's message; completions: the server goes on with it",
        choices=("chat", "completions"),
    )
    concurrency: int = setting(16, "requests under way at a time", at_least=1)
    requests_per_minute: float | None = setting(
        None, "requests started per minute, retries included; none: no limit", above=0
    )
    timeout: float = setting(600.0, "seconds for one answer", above=0)
    retries: int = setting(
        6,
        "further tries after a timeout, a broken connection, 429, 5xx or a rubbish answer",
        at_least=0,
    )
    api_key_env: str | None = setting(
        None, "NAME of the environment variable that holds the key; none: no key is sent"
    )


@dataclass(kw_only=True)
class AugmentConfig(GenerationConfig, ServerConfig):
    """Let the teacher write a rationale for every row, under the chain-of-thought prompt."""

    server: str | None = setting(
        None,
        "URL of an OpenAI-compatible server that generates; it knows the teacher as `model`. "
        "None: transformers",
    )
    output: str = setting(help="JSON Lines file with the rows and their rationales")
    resume: bool = setting(False, "keep the rows that the output file holds, add the others")
    seed: int = setting(10, "sampling seed", at_least=0)
    temperature: float = setting(1.0, "sampling temperature", above=0)
    only_with_input: bool = setting(False, "no rationale for rows whose input is empty")
    max_repetition: float = setting(
        50.0,
        "drop a rationale with more repeated word 4-grams, percent; 100 = off",
        at_least=0,
        at_most=100,
    )
    min_rationale_words: int = setting(1, "drop a shorter rationale, words", at_least=1)
    max_rationale_words: int | None = setting(
        None, "drop a longer rationale, words; none: max_new_tokens alone", at_least=1
    )
    drop_unfinished: bool = setting(
        True, "drop a rationale that was cut at max_new_tokens, before an answer"
    )
    check_answer: str = setting(
        "off",
        "drop a rationale whose answer is none of the row's outputs (exact), or whose ROUGE-L with "
        "the nearest is below min_answer_rouge",
        choices=("off", "exact", "rouge"),
    )
    min_answer_rouge: float = setting(
        50.0, "ROUGE-L F that an answer must reach, percent", at_least=0, at_most=100
    )

    def __post_init__(self) -> None:
        """Raises UserError for settings that contradict each other."""
        super().__post_init__()
        if self.server and self.server_api == "completions" and self.prompt_format == "chat":
            raise UserError(
                "'prompt_format' chat is a user's message, which 'server_api' completions would "
                "send without the chat template; use 'server_api' chat"
            )
        if self.max_rationale_words and self.max_rationale_words < self.min_rationale_words:
            raise UserError(
                f"'max_rationale_words' {self.max_rationale_words} is below 'min_rationale_words' "
                f"{self.min_rationale_words}"
            )


@dataclass(kw_only=True)
class EvaluateConfig(GenerationConfig):
    """Generate for test rows; ROUGE-L, exact match, and the loss of the reference text."""

    on: list[str] = field(
        default_factory=list,
        metadata=about("names of sets: rows are read from DATA/NAME/test.jsonl, each scored apart"),
    )
    output: str = setting(help="folder for predictions and results; new or empty")
    resume: bool = setting(False, "keep the predictions in the output folder, add the others")
    prompts: list[str] = field(
        default_factory=lambda: ["standard"],
        metadata=about("prompts to evaluate under", choices=PROMPTS),
    )
    seeds: list[int] = field(
        default_factory=lambda: [10, 20, 30, 40, 50],
        metadata=about("sampling seeds, one run each (temperature 1); empty: one greedy run"),
    )
    rouge_tokens: str = setting(
        "rouge",
        "what ROUGE-L compares: stemmed a-z words as published, or any script's",
        choices=("rouge", "words", "characters"),
    )


@dataclass(kw_only=True)
class NewModelConfig:
    """Make an untrained small model, with a tokenizer from the texts of rows."""

    data: str = setting(help="rows, a JSON Lines file")
    output: str = setting(help="folder of the model; new or empty")
    shape: str = setting("gpt2", "architecture", choices=("gpt2", "llama", "qwen2", "mistral"))
    tokenizer: str = setting(
        "bpe",
        "byte-level BPE, SentencePiece's BPE, its Unigram, or whole words",
        choices=("bpe", "spm", "unigram", "words"),
    )
    pieces: int = setting(4000, "tokens at most", at_least=380)
    width: int = setting(160, "width of the hidden states", at_least=8)
    layers: int = setting(4, "transformer layers", at_least=1)
    heads: int = setting(
        4, "attention heads; of the others than gpt2, half for the keys", at_least=2
    )
    max_length: int = setting(512, "tokens that it takes", at_least=8)
    # The usual 0.02 learns slowly at a small width.
    init_std: float = setting(0.05, "standard deviation of the first weights", above=0)
    prompt_format: str = setting(
        "paper", "of the texts that the tokenizer is made from", choices=("paper", "chat", "raw")
    )
    seed: int = setting(10, "seed of the first weights", at_least=0)


@dataclass(kw_only=True)
class RecipeConfig:
    """A whole study: data, teachers, rationales, a student for each method and seed, one table.

    The sections hold settings of other commands; see docs/recipes.md.
    """

    output: str = setting(help="folder of the study; what is finished in it is not run again")
    data: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("train, validation, test: files; or the settings of prepare"),
    )
    models: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("name -> settings of new-model: untrained, from the rows"),
    )
    common: dict[str, Any] = field(
        default_factory=dict, metadata=about("settings of every command that has them")
    )
    teachers: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("name -> settings of sft; the first writes the rationales"),
    )
    rationales: dict[str, Any] | None = field(
        default=None, metadata=about("settings of augment; none: the rows as they are")
    )
    students: dict[str, Any] = field(
        default_factory=dict, metadata=about("settings that all methods share")
    )
    methods: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("name -> settings of distill, or of sft (command: sft)"),
    )
    tune: dict[str, Any] = field(
        default_factory=dict,
        metadata=about("one setting -> values to try for each method, on validation"),
    )
    evaluate: dict[str, Any] = field(default_factory=dict, metadata=about("settings of evaluate"))
    judge: dict[str, Any] | None = field(
        default=None, metadata=about("settings of judge, and `against`: a method; none: off")
    )
    only: list[str] = field(default_factory=list, metadata=about("methods to run; empty: all"))
    seeds: list[int] = field(
        default_factory=lambda: [10], metadata=about("training seeds, a student each", at_least=0)
    )
    jobs: int = setting(
        1, "stages that run at the same time, with a share of the cores", at_least=1
    )
    launcher: str | None = setting(
        None, "what starts a training instead of python, as: torchrun --nproc-per-node 4"
    )
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu"))


@dataclass(kw_only=True)
class JudgeConfig(ServerConfig):
    """Let a language model choose between two systems' predictions, in both orders."""

    a: str = setting(help="predictions.jsonl of one system, or the folder of its evaluation")
    b: str = setting(help="predictions.jsonl of the other system, or its folder")
    data: str = setting(help="the rows that both were evaluated on, a JSON Lines file")
    output: str = setting(help="folder for verdicts, table and chart; new or empty unless --resume")
    resume: bool = setting(False, "keep the verdicts that the output folder holds, ask the others")
    server: str = setting(help="URL of an OpenAI-compatible server")
    model: str = setting(help="the judge's name on that server")
    set: str | None = setting(None, "set of the predictions; none: they are of one set")
    prompt: str = setting("standard", "the prompt the predictions were made under", choices=PROMPTS)
    prediction_seed: int | None = setting(
        None, "decoding seed of the predictions; none: the first in `a`"
    )
    rows: int = setting(100, "rows compared, drawn at random; two requests each", at_least=1)
    seed: int = setting(10, "seed of the draw and of the judge", at_least=0)
    temperature: float = setting(0.1, "the judge's sampling temperature", at_least=0)
    max_new_tokens: int = setting(1024, "tokens of one verdict at most", at_least=1)


@dataclass(kw_only=True)
class PrepareConfig:
    """Make train, validation and test rows from a published data set, or from your own file."""

    source: str = setting(
        help="dolly | alpaca | sni | dialogsum | arithmetic, or a file or folder of your own rows"
    )
    output: str = setting(help="folder for the rows; new or empty")
    files: str | None = setting(
        None, "the data set as its publisher ships it: a file or folder; none: from the hub"
    )
    format: str = setting(
        "auto", "of the files; auto: by suffix", choices=("auto", "jsonl", "json", "csv", "parquet")
    )
    instruction_field: str = setting("instruction", "field of your own rows: the task")
    input_field: str = setting("input", "field of your own rows: its context; may be missing")
    output_field: str = setting("output", "field of your own rows: the answer, or a list of them")
    rationale_field: str = setting("rationale", "field of your own rows; may be missing")
    min_words: int | None = setting(
        None, "words of an answer at least; none: as the data set's rule", at_least=0
    )
    max_words: int | None = setting(None, "words of an answer at most", at_least=1)
    max_prompt_tokens: int | None = setting(
        None, "tokens of a prompt at most; none: as the data set's rule", at_least=1
    )
    tokenizer: str = setting(
        "openai-community/gpt2", "counts a prompt's tokens: a folder or a hub name"
    )
    duplicates: str = setting(
        "auto",
        "equal rows; auto: dropped from your own rows, kept in the data sets",
        choices=("auto", "keep", "drop"),
    )
    rows_per_task: int = setting(100, "rows taken from each task file of sni", at_least=1)
    references: str = setting(
        "own",
        "of a dialogsum test row: its own summary, or all of its dialogue",
        choices=("own", "all"),
    )
    train_rows: int | None = setting(
        None, "training rows at most; none: the paper's count, or all", at_least=1
    )
    validation_rows: int | None = setting(
        None, "validation rows; none: the paper's count, or a tenth, 500 at most", at_least=0
    )
    test_rows: int | None = setting(
        None, "test rows; none: the paper's count, or a tenth, 500 at most", at_least=0
    )
    seed: int = setting(42, "seed of the splits", at_least=0)


# What has no effect, and when; of the configs that have the first of the names.
_UNUSED: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "server is set",
        lambda config: getattr(config, "server", None) is not None,
        ("batch_size", "max_length", "dtype", "device", "trust_remote_code"),
    ),
    (
        "server is none",
        lambda config: config.server is None,
        tuple(f.name for f in dataclasses.fields(ServerConfig)),
    ),
    (
        "check_answer is not rouge",
        lambda config: config.check_answer != "rouge",
        ("min_answer_rouge",),
    ),
    ("eval is none", lambda config: config.eval is None, ("eval_steps", "eval_batch_size")),
    (
        "teacher_cache is none",
        lambda config: config.teacher_cache is None,
        ("teacher_cache_checksums",),
    ),
    (
        "generate_rows is 0",
        lambda config: config.generate_rows == 0,
        ("generate_prompt", "generate_data", "max_new_tokens"),
    ),
    (
        "lora_r is 0",
        lambda config: config.lora_r == 0,
        ("lora_alpha", "lora_dropout", "target_modules", "merge"),
    ),
    ("kd is none", lambda config: config.kd == "none", ("divergence", "temperature")),
    ("kd is not mined", lambda config: config.kd != "mined", ("token_maps",)),
    ("kd is not dskd", lambda config: config.kd != "dskd", ("t2s_init",)),
    (
        "ot is off",
        lambda config: not config.ot,
        (
            *("cst", "crc", "ot_weight", "layers", "tokens", "ot_norm", "projection"),
            *("ot_epsilon", "ot_iters", "ot_tol", "ot_grad", "ot_backend"),
        ),
    ),
    (
        "nothing is projected",
        lambda config: not config.ot and config.kd != "dskd",
        ("projection_learning_rate",),
    ),
)


def _unused(config: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The reasons that hold for a config, each with the settings that have no effect."""
    known = {f.name for f in dataclasses.fields(config)}
    for reason, holds, names in _UNUSED:
        if names[0] in known and holds(config):
            yield reason, names


# Settings that change how a command is run, or what is logged, not what comes out.
_HOW = {
    *("output", "resume", "device", "token_maps", "logging_steps", "report_to", "checkpoints"),
    "liger",
    *("concurrency", "requests_per_minute", "timeout", "retries", "api_key_env"),
}


# What a training may go on with changed: its length, how a step is divided and computed, and what
# is said and saved on the way.
RESUMABLE_WITH = {
    *("epochs", "max_steps", "batch_size", "gradient_accumulation", "padding_free"),
    *("eval_batch_size", "eval_steps", "save_steps", "spike_factor", "on_nan", "merge"),
    *("attn_implementation", "torch_compile", "gradient_checkpointing", "ot_backend"),
    *("teacher_cache", "teacher_cache_checksums", "trust_remote_code"),
}


def counted(config: Any) -> dict[str, Any]:
    """The settings of any config that what comes out depends on.

    Of a server it counts that there is one, not its address. Batch size and device of a generation
    decide only which samples are drawn, as does the number of requests at a time; in a training the
    batch size counts.
    """
    left_out = {name for _, names in _unused(config) for name in names} | _HOW
    if isinstance(config, GenerationConfig):
        left_out.add("batch_size")
    fields = (f.name for f in dataclasses.fields(config))
    settings = {name: getattr(config, name) for name in fields if name not in left_out}
    if "server" in settings:
        settings["server"] = settings["server"] is not None
    return settings


def without_effect(config: SFTConfig | DistillConfig | AugmentConfig) -> list[str]:
    """A line for each reason why settings that are not at their defaults have no effect."""
    lines = []
    fields = {f.name: f for f in dataclasses.fields(config)}
    changed = {
        name
        for name, f in fields.items()
        if getattr(config, name)
        != (f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
    }
    for reason, names in _unused(config):
        found = [name for name in names if name in changed]
        if found:
            lines.append(f"{reason}: no effect of {', '.join(found)}")
    return lines


Config = TypeVar("Config")


def from_sources(cls: type[Config], yaml_path: str | None, overrides: dict[str, str]) -> Config:
    """The config of class `cls` from a YAML file, beaten by command-line texts; a RecipeCheck where
    `cls` is CheckConfig and the file is a recipe, a RecipeList where `cls` is RecipeConfig and the
    file lists recipes.

    Raises UserError for an unreadable file, an unknown name, a wrong type or range, or a missing
    setting.
    """
    given = {} if yaml_path is None else _read_with_base(yaml_path)
    if yaml_path is not None and "recipes" in given:
        if issubclass(cls, CheckConfig):
            raise UserError(f"{yaml_path} is a list of recipes: check one of them")
        if issubclass(cls, RecipeConfig):
            return typing.cast(Config, _recipe_list(yaml_path, given, overrides))
    if issubclass(cls, CheckConfig) and "methods" in given:
        _check_names(RecipeConfig, given, f"{yaml_path}: ")
        return typing.cast(Config, RecipeCheck(recipe=given, settings=overrides))
    _check_names(cls, given, f"{yaml_path}: ")
    return build(cls, {**given, **overrides})


def _recipe_list(path: str, given: dict[str, Any], overrides: dict[str, str]) -> RecipeList:
    files = given["recipes"]
    if not isinstance(files, list) or not files or not all(isinstance(f, str) for f in files):
        raise UserError(f"{path}: 'recipes': expected a list of files, got {files!r}")
    for name in given:
        if name != "recipes":
            raise UserError(f"{path} is a list of recipes: setting {name!r} belongs into each")
    recipes: dict[Path, RecipeConfig] = {}
    for file in files:
        own = dict(overrides)
        if "output" in own:
            own["output"] = str(Path(own["output"], Path(file).stem))
        recipe = from_sources(RecipeConfig, str(Path(path).parent / file), own)
        if isinstance(recipe, RecipeList):
            raise UserError(f"{path}: 'recipes': {file} is a list itself")
        output = Path(recipe.output).resolve()
        if output in recipes:
            raise UserError(f"{path}: two of its recipes have the output {recipe.output}")
        recipes[output] = recipe
    return RecipeList(list(recipes.values()))


def build(cls: type[Config], values: dict[str, Any]) -> Config:
    """A config from checked values; texts are read as the field's type.

    Raises UserError for an unknown name, a wrong type or range, or a missing setting.
    """
    _check_names(cls, values, "")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    checked = {f.name: _check(f, hints[f.name], values[f.name]) for f in fields if f.name in values}
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in checked:
            raise UserError(f"setting {f.name!r} is missing ({f.metadata['help']})")
    return cls(**checked)


def _check_names(cls: type, values: dict[str, Any], where: str) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{where}unknown setting {name!r}{nearest(str(name), known)}")


def to_yaml(config: Any) -> str:
    """The resolved config, as a YAML file that the same command reads."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; did you mean ...?' for a mistyped name, or the list of names where none is near."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(names)}"


def parse_command_line(cls: type[Config], prog: str, argv: Sequence[str]) -> Config:
    """Parse `[--config] FILE [--key value]...`. Raises UserError."""
    parser = _Parser(
        prog=prog, description=cls.__doc__, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if _is_section(hints[f.name]):
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_text(f)}
        options["metavar"] = _type_name(hints[f.name]).upper()
        if hints[f.name] is bool:
            options |= {"nargs": "?", "const": "true"}
        elif typing.get_origin(hints[f.name]) is list:
            options["nargs"] = "*"
        parser.add_argument(f"--{f.name}", **options)
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    # --teacher-cache is --teacher_cache.
    argv = [re.sub("^--[^=]+", lambda m: f"--{m[0][2:].replace('-', '_')}", word) for word in argv]
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            raise UserError(f"unknown option --{name}{nearest(name, [*names, 'config'])}")
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; options are written --key value")
    values = vars(given)
    return from_sources(cls, values.pop("config"), values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        super().add_usage("%(prog)s [FILE] [--key value]...", [], [], prefix)


def _help_text(f: dataclasses.Field) -> str:
    text = f.metadata["help"]
    if f.metadata["choices"]:
        text += f" ({' | '.join(f.metadata['choices'])})"
    if f.default_factory is not dataclasses.MISSING:
        default = ",".join(str(item) for item in f.default_factory()) or "empty"
    elif f.default is dataclasses.MISSING:
        return text.replace("%", "%%") + " [required]"
    else:
        default = str(f.default)
        if f.default is None or isinstance(f.default, bool):
            default = default.lower()
    return text.replace("%", "%%") + f" [{default}]"


def _read_with_base(path: str) -> dict[str, Any]:
    given = read_yaml(path)
    base = given.pop("base", None)
    if base is None:
        return given
    if not isinstance(base, str):
        raise UserError(f"{path}: 'base': expected a file, got {base!r}")
    base_path = str(Path(path).parent / base)
    below = read_yaml(base_path)
    if "base" in below:
        raise UserError(f"{base_path} has a base of its own; {path} may go one level deep only")
    return merged(below, given)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, with the values of `above` where both have one, key by key in mappings."""
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = merged(below[name], value) if both else value
    return result


def read_yaml(path: str) -> dict[str, Any]:
    """The settings of a YAML file. Raises UserError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """As YAML 1.2: `on` is a word, and the name of a setting; only true and false are not."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_mapping_node(self, anchor: Any) -> Any:
            """Refuse a name that comes twice, of which YAML would take the last."""
            node = super().compose_mapping_node(anchor)
            names = set()
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode):
                    if name.value in names:
                        problem = f"{name.value!r} is given twice"
                        raise yaml.composer.ComposerError(None, None, problem, name.start_mark)
                    names.add(name.value)
            return node

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("true|false|True|False"), list("tfTF")
    )
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: {_reason(error)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{path}:{line} not valid YAML: {problem}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: expected `name: value` lines, got a {type(content).__name__}")
    return content or {}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check(f: dataclasses.Field, hint: Any, value: Any) -> Any:
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if _is_section(hint):
        if not isinstance(value, dict):
            raise UserError(f"section {f.name!r}: expected `name: value` lines, got {value!r}")
        return value
    if typing.get_origin(hint) is list:
        (item_hint,) = typing.get_args(hint)
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = [word for item in value for word in item.replace(",", " ").split()]
        if not isinstance(value, list):
            raise _wrong_type(f.name, hint, value)
        return [_check_scalar(f, item_hint, item) for item in value]
    return _check_scalar(f, hint, value)


def _check_scalar(f: dataclasses.Field, hint: type, value: Any) -> Any:
    value = _convert(f.name, hint, value)
    limits = f.metadata
    if limits["choices"] and value not in limits["choices"]:
        near = nearest(str(value), limits["choices"])
        raise UserError(f"setting {f.name!r}: unknown value {value!r}{near}")
    for limit, holds, words in (
        (limits["above"], lambda bound: value > bound, "greater than"),
        (limits["at_least"], lambda bound: value >= bound, "at least"),
        (limits["at_most"], lambda bound: value <= bound, "at most"),
    ):
        if limit is not None and not holds(limit):
            raise UserError(f"setting {f.name!r} must be {words} {limit}, got {value}")
    return value


def _convert(name: str, hint: type, value: Any) -> Any:
    if hint is str:
        # A layer index or a folder named 7 is a number to YAML.
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value:
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "on", "false", "off"):
            return value.lower() in ("true", "on")
    elif not isinstance(value, bool) and isinstance(value, int | float | str):
        # YAML 1.1 reads 1e-3, without a point, as text: numbers are accepted in quotes.
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            raise _wrong_type(name, hint, value) from None
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    raise _wrong_type(name, hint, value)


def _wrong_type(name: str, hint: Any, value: Any) -> UserError:
    return UserError(f"setting {name!r}: expected {_type_name(hint)}, got {value!r}")


def _is_section(hint: Any) -> bool:
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(arm) is dict for arm in arms)


def _type_name(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return _type_name(typing.get_args(hint)[0])
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    return {str: "text", int: "integer", float: "number", bool: "true|false"}[hint]
