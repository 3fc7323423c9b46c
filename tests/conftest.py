"""Tiny real models: two tokenizers trained on the spot, GPT-2 and Llama shapes, saved to folders.

Everything goes through `from_pretrained` on these folders; nothing reaches for a network.
"""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
# Several pytest processes share the cores; before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# Some tests press Ctrl-C, which a shell's background jobs ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; `pytest --hypothesis-profile=default` searches for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

MAX_LENGTH = 256


@dataclass(frozen=True)
class Workspace:
    """Folders and files that every test may read and none may change."""

    student: str  # GPT-2, byte-level BPE
    teacher: str  # Llama, Unigram with Metaspace
    sibling: str  # Llama, the student's tokenizer, a head padded by 8
    train: str  # 12 rows, 8 of them with a rationale, 5 without an input
    test: str  # 4 rows, lists of references


def sample_rows(count: int) -> list[dict]:
    """Rows of different lengths; two in three have a rationale, and some no input."""
    rows = []
    for i in range(count):
        a, b = 3 + i, 11 - i % 5
        row = {
            "instruction": f"Add {a} and {b}." if i % 2 else f"What is the sum of {a} and {b}?",
            "input": "" if i % 5 in (1, 3) else "Small numbers only. " * (1 + i % 3),
            "output": f"The sum is {a + b}." if i % 3 else str(a + b),
        }
        if i % 3:
            row["rationale"] = f"First take {a}. Then count {b} more, which gives {a + b}." + (
                " So we are done." * (i % 4)
            )
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    """JSON Lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _corpus() -> list[str]:
    from cot2align.train.data import PROMPT_FORMATS

    rows = [value for row in sample_rows(40) for value in row.values()]
    templates = [vars(prompts) for prompts in PROMPT_FORMATS.values()]
    return rows + [text for template in templates for text in template.values()]


def byte_level_bpe():
    """GPT-2's kind of tokenizer, 400 pieces."""
    from cot2align.train import new_model

    return new_model.byte_level_bpe(_corpus(), 400)


def unigram():
    """SentencePiece's kind of tokenizer, with a beginning-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def save_gpt2(folder: Path, tokenizer, width: int = 32) -> str:
    """A GPT-2 of 40k parameters, no dropout, with its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path, tokenizer, extra_vocabulary: int = 0, width: int = 48) -> str:
    """A Llama of 50k parameters with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_vocabulary,
        max_position_embeddings=MAX_LENGTH,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def cli(command: str, **settings) -> int:
    """Run a command in this process on the CPU; returns the exit code."""
    from cot2align.train.__main__ import main

    return main([command, *options(device="cpu", **settings)])


def in_two_processes(*module_words: str) -> None:
    """`torchrun -m` of a module with its words; fails with what the workers said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, *module_words],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"exit code {done.returncode}, workers said:\n{done.stdout}", pytrace=False)


def command_process(*words: str) -> subprocess.Popen:
    """The command line in a process group of its own, for `interrupt`."""
    import torch

    return subprocess.Popen(
        [sys.executable, "-m", "cot2align.train", *words],
        cwd=Path(__file__).resolve().parents[1],
        # As many as here: sums are rounded by their number.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C: a signal to the whole group. One line, exit code 130, and no process is left."""
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def options(**settings) -> list[str]:
    """Settings as command-line words."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def log_of(output) -> list[dict]:
    """The training entries of a run's metrics.jsonl."""
    lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def distill_settings(workspace) -> dict:
    """Three optimizer steps of four rows from Llama to GPT-2, every one of them logged."""
    return {
        "student": workspace.student,
        "teacher": workspace.teacher,
        "train": workspace.train,
        "max_length": MAX_LENGTH,
        "max_prompt_length": 160,
        "batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 100,
        # With a tolerance, a rounding error can add or save an iteration.
        "ot_iters": 20,
        "ot_tol": 0,
    }


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    bpe = byte_level_bpe()
    test_rows = [{**row, "output": [row["output"], "No idea."]} for row in sample_rows(4)]
    return Workspace(
        student=save_gpt2(folder / "student", bpe),
        teacher=save_llama(folder / "teacher", unigram()),
        sibling=save_llama(folder / "sibling", bpe, extra_vocabulary=8),
        train=write_rows(folder / "train.jsonl", sample_rows(12)),
        test=write_rows(folder / "test.jsonl", test_rows),
    )
