"""The command `demo`: the whole chain on a small generated data set, from nothing to one table.

The task is arithmetic in words: two or three steps with values from 1 to 12, told as a story, with
the steps as the rationale. Problems are held out by their first three numbers, so no test problem
shares them with any training problem; every single step (3 plus 4) does occur in training.

The chain is what a user would run: data files, two tokenizers of different kinds, a Llama-shaped
teacher and a GPT-2-shaped student in folders, a YAML file for each command under `configs/`. The
teacher is fine-tuned on standard and chain-of-thought (CoT) texts. Three students begin at the same
weights and take the same number of steps: fine-tuned on the standard texts, fine-tuned on both, and
distilled from the teacher on both. All are evaluated on the test problems under both prompts.

It shows that the chain works and what it costs. One seed of one small task doesn't rank methods.
A finished stage is not run again: call the command once more with the same settings to continue.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cot2align.train.config import (
    DistillConfig,
    EvaluateConfig,
    SFTConfig,
    UserError,
    from_sources,
    setting,
    to_yaml,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HIGHEST = 12  # of all values on the way
LARGEST_CHANGE = 9
HELD_OUT = 0.1  # share of the triples (start, first change, second change)

PEOPLE = {
    "She": ("Ann", "Cleo", "Eva", "Hana", "June", "Lena"),
    "He": ("Ben", "Dan", "Finn", "Gus", "Ivo", "Kofi"),
}
ITEMS = (
    *("apples", "books", "cards", "coins", "eggs", "keys"),
    *("pears", "pens", "shells", "stamps", "tickets", "toys"),
)
GAINS = ("buys {} more", "finds {} more", "gets {}", "picks {} more")
LOSSES = ("drops {}", "gives away {}", "loses {}", "sells {}")

MAX_LENGTH = 128
MAX_NEW_TOKENS = 64
EOS, UNKNOWN = "<eos>", "<unk>"


@dataclass(kw_only=True)
class DemoConfig:
    """Fine-tune a teacher and a student, distil, evaluate and compare, on generated problems."""

    output: str = setting("runs/demo", "output folder; an unfinished demo in it is continued")
    train_rows: int = setting(4000, "training problems", at_least=1, at_most=8000)
    test_rows: int = setting(200, "test problems", at_least=1, at_most=500)
    steps: int = setting(800, "optimizer steps of each training", at_least=1)
    batch_size: int = setting(16, "problems per optimizer step", at_least=1)
    seed: int = setting(10, "seed of the problems, the models and the training", at_least=0)
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu"))


@dataclass(frozen=True)
class Problem:
    """`start` things, then each change added to them."""

    start: int
    changes: tuple[int, ...]

    @property
    def triple(self) -> tuple[int, ...]:
        """The first three numbers, as the text shows them: what a problem is held out by."""
        return (self.start, *(abs(change) for change in self.changes[:2]))


def problems(seed: int, train_rows: int, test_rows: int) -> tuple[list[Problem], list[Problem]]:
    """Different training and test problems; the triples of the two never meet."""
    generator = random.Random(seed)
    operands = range(1, LARGEST_CHANGE + 1)
    triples = list(product(range(1, HIGHEST + 1), operands, operands))
    held_out = set(generator.sample(triples, round(HELD_OUT * len(triples))))
    train: dict[Problem, None] = {}
    test: dict[Problem, None] = {}
    while len(train) < train_rows or len(test) < test_rows:
        problem = _problem(generator)
        chosen, wanted = (test, test_rows) if problem.triple in held_out else (train, train_rows)
        if len(chosen) < wanted:
            chosen[problem] = None
    return list(train), list(test)


def _problem(generator: random.Random) -> Problem:
    start = value = generator.randint(1, HIGHEST)
    changes = []
    for _ in range(generator.choice((2, 3))):
        least, most = max(1 - value, -LARGEST_CHANGE), min(HIGHEST - value, LARGEST_CHANGE)
        change = generator.choice([c for c in range(least, most + 1) if c])
        changes.append(change)
        value += change
    return Problem(start, tuple(changes))


def tell(problem: Problem, generator: random.Random) -> dict[str, str]:
    """The problem as a row: instruction, output and rationale."""
    pronoun = generator.choice(list(PEOPLE))
    name = generator.choice(PEOPLE[pronoun])
    item = generator.choice(ITEMS)
    value = problem.start
    story, steps = [f"{name} has {value} {item}."], []
    for change in problem.changes:
        action = generator.choice(GAINS if change > 0 else LOSSES).format(abs(change))
        story.append(f"{pronoun} {action}.")
        sign = "plus" if change > 0 else "minus"
        steps.append(f"Now {value} {sign} {abs(change)} is {value + change}.")
        value += change
    return {
        "instruction": " ".join([*story, f"How many {item} are left?"]),
        "output": f"{value} {item}",
        "rationale": " ".join(steps),
    }


def student_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, the GPT-2 kind; too few pieces for all the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def teacher_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace, the SentencePiece kind: whole words and single characters, each with
    its frequency in the texts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    # UnigramTrainer would part every digit from its space, since it starts from the frequencies of
    # characters; the teacher then needs twice the steps.
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    total = counts.total()
    for character in sorted(set("".join(counts))):
        counts.setdefault(character, 1)
    pieces = [(piece, math.log(count / total)) for piece, count in counts.most_common()]
    tokenizer = Tokenizer(models.Unigram([(UNKNOWN, 0.0), (EOS, 0.0), *pieces], unk_id=0))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, unk_token=UNKNOWN
    )


def prepare(config: DemoConfig, folder: Path) -> None:
    """Write the problems, and the untrained teacher and student with their tokenizers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from cot2align.train.data import PROMPT_FORMATS, parse_row

    generator = random.Random(config.seed)
    texts = []
    for name, chosen in zip(
        ("train", "test"),
        problems(config.seed, config.train_rows, config.test_rows),
        strict=True,
    ):
        lines = [json.dumps(tell(problem, generator)) for problem in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if name == "train":
            for line in lines:
                row = parse_row(line, "train.jsonl", default_id="")
                for is_cot in (False, True):
                    texts.append(PROMPT_FORMATS["raw"].text(row, is_cot) + row.response(is_cot))

    torch.manual_seed(config.seed)
    tokenizer = teacher_tokenizer(texts)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=112,
            intermediate_size=224,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    teacher.save_pretrained(folder / "models" / "teacher")
    tokenizer.save_pretrained(folder / "models" / "teacher")

    tokenizer = student_tokenizer(texts)
    student = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=MAX_LENGTH,
            n_embd=96,
            n_layer=3,
            n_head=4,
            # The fused kernel: GPT-2's own formula takes a fifth of the time at this size.
            activation_function="gelu_pytorch_tanh",
            # The default of 0.02 learns slowly at this width.
            initializer_range=0.06,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    student.save_pretrained(folder / "models" / "student")
    tokenizer.save_pretrained(folder / "models" / "student")


@dataclass(frozen=True)
class Stage:
    """One command of the chain: `name` is its folder, `settings` its YAML file."""

    name: str
    title: str
    command: str
    settings: dict[str, Any]


MODELS = {
    "teacher": "teacher, standard + CoT texts",
    "student-standard": "student, standard texts",
    "student-both": "student, standard + CoT texts",
    "student-distilled": "student, distilled",
}
"""Folder -> row of the table."""


def stages(config: DemoConfig, folder: Path) -> list[Stage]:
    """The commands in order, with the settings that a user would write."""
    texts = {"prompt_format": "raw", "max_length": MAX_LENGTH, "device": config.device}
    training = texts | {
        "train": str(folder / "train.jsonl"),
        "max_prompt_length": MAX_LENGTH - MAX_NEW_TOKENS,
        "max_steps": config.steps,
        "batch_size": config.batch_size,
        "warmup": 0.03,
        "seed": config.seed,
        "logging_steps": 50,
        "save_steps": 200,
    }
    teacher, student = (str(folder / "models" / name) for name in ("teacher", "student"))
    student_training = training | {"learning_rate": 5e-3}
    trainings = {
        "teacher": ("sft", training | {"model": teacher, "texts": "both", "learning_rate": 4e-3}),
        "student-standard": ("sft", student_training | {"model": student, "texts": "standard"}),
        "student-both": ("sft", student_training | {"model": student, "texts": "both"}),
        "student-distilled": (
            "distill",
            student_training
            | {
                "student": student,
                "teacher": str(folder / "teacher"),
                "texts": "both",
                "alpha": 0.5,
                "ot_weight": 0.25,
                "ot_norm": "rms",
            },
        ),
    }
    chain = [
        Stage(
            name,
            f"{'distil' if command == 'distill' else 'fine-tune'}: {MODELS[name]}",
            command,
            settings | {"output": str(folder / name)},
        )
        for name, (command, settings) in trainings.items()
    ]
    for name in MODELS:
        evaluation = texts | {
            "model": str(folder / name),
            "data": str(folder / "test.jsonl"),
            "prompts": ["standard", "cot"],
            "seeds": [],
            "batch_size": 100,
            "max_new_tokens": MAX_NEW_TOKENS,
            "output": str(folder / f"evaluate-{name}"),
        }
        chain.append(Stage(f"evaluate-{name}", f"evaluate: {MODELS[name]}", "evaluate", evaluation))
    return chain


def run(config: DemoConfig) -> dict[str, Any]:
    """Run what is left of the chain; print the table, write it to report.md and results.json.

    Returns {"settings", "threads", "seconds": stage -> s, "models": name -> results of `evaluate`,
    "distillation": {"first", "last": log entry}}. Raises UserError for an output folder that holds
    something else.
    """
    folder = Path(config.output)
    _open_output(config, folder)
    seconds = _read_seconds(folder)

    import torch
    import yaml

    from cot2align.train import evaluate, trainer

    commands: dict[str, Any] = {
        "sft": (SFTConfig, trainer.run),
        "distill": (DistillConfig, trainer.run),
        "evaluate": (EvaluateConfig, evaluate.run),
    }
    chain = stages(config, folder)
    begin = time.perf_counter()

    def announce(number: int, title: str) -> None:
        elapsed = time.perf_counter() - begin
        print(f"[{number}/{len(chain) + 1}] {title} ({elapsed:.0f} s elapsed)", flush=True)

    announce(1, "prepare: problems, tokenizers and untrained models")
    if "prepare" not in seconds:
        start = time.perf_counter()
        prepare(config, folder)
        _finished(folder, seconds, "prepare", start)
    for number, stage in enumerate(chain, start=2):
        announce(number, stage.title)
        if stage.name in seconds:
            continue
        start = time.perf_counter()
        path = folder / "configs" / f"{stage.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(stage.settings, sort_keys=False), encoding="utf-8")
        config_class, run_command = commands[stage.command]
        overrides = {}
        if stage.command == "evaluate":
            shutil.rmtree(folder / stage.name, ignore_errors=True)
        else:
            overrides["resume"] = "true"
        run_command(from_sources(config_class, str(path), overrides))
        _finished(folder, seconds, stage.name, start)

    log = [
        entry
        for line in (folder / "student-distilled" / trainer.METRICS_FILE).read_text().splitlines()
        if "loss" in (entry := json.loads(line))
    ]
    results = {
        "settings": asdict(config),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "models": {
            name: json.loads((folder / f"evaluate-{name}" / evaluate.RESULTS_FILE).read_text())
            for name in MODELS
        },
        "distillation": {"first": log[0], "last": log[-1]},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report = table(results)
    (folder / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}\n-> {folder / 'report.md'}")
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: a row for each model, and what the numbers are."""
    head = ["model"]
    for prompt in ("standard", "CoT"):
        head += [f"{prompt} prompt: loss", "ROUGE-L", "exact match"]
    rows = [[*head, "training"]]
    for name, title in MODELS.items():
        row = [title]
        for prompt in ("standard", "cot"):
            result = results["models"][name][prompt]
            row += [
                f"{result['loss']:.3f}",
                f"{result['rouge_l']:.1f}",
                f"{result['exact_match']:.1f}",
            ]
        rows.append([*row, f"{results['seconds'][name]:.0f} s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [widths[0] * "-", *((width - 1) * "-" + ":" for width in widths[1:])])
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    settings = results["settings"]
    total = sum(results["seconds"].values())
    return "\n".join(
        [
            *lines,
            "",
            f"{settings['test_rows']} test problems, greedy decoding, {settings['steps']} steps a "
            f"model, seed {settings['seed']}; loss in nats per token, the others in percent. "
            f"{total:.0f} s in all with {results['threads']} threads.",
            "",
        ]
    )


def _open_output(config: DemoConfig, folder: Path) -> None:
    """Accept a new or empty folder, or the same demo; note its settings there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file, expected a folder")
    note = folder / "demo.yaml"
    settings = to_yaml(config)
    if note.is_file():
        if note.read_text(encoding="utf-8") != settings:
            raise UserError(
                f"{folder} holds a demo with other settings (see {note}); choose another --output"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output folder {folder} is not empty and holds no demo; choose another")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(settings, encoding="utf-8")


def _read_seconds(folder: Path) -> dict[str, float]:
    """Seconds of each finished stage."""
    path = folder / "seconds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _finished(folder: Path, seconds: dict[str, float], name: str, start: float) -> None:
    seconds[name] = round(time.perf_counter() - start, 1)
    (folder / "seconds.json").write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")
