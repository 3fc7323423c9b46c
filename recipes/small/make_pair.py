"""Two tokenizers and two untrained models from a file of rows: a pair to try the whole chain on.

    python recipes/small/make_pair.py ROWS.jsonl FOLDER

FOLDER/student: GPT-2's shape, 2 million parameters, byte-level BPE of 4000 pieces.
FOLDER/teacher: Llama's shape, 4 million parameters, Unigram (as SentencePiece) of 4000 pieces.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cot2align.train.config import UserError
from cot2align.train.data import PROMPT_FORMATS, read_rows

PIECES = 4000
POSITIONS = 512


def byte_level_bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """GPT-2's kind; no token at the beginning of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    """Llama's kind, with space markers and a token at the beginning of a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def main(rows_file: str, folder: Path) -> None:
    rows = read_rows(rows_file)
    texts = [text for row in rows for text in (row.instruction, row.input, row.response(False))]
    # Every text begins with a template: often enough in the corpus that it takes few tokens.
    texts += 50 * list(vars(PROMPT_FORMATS["paper"]).values())
    torch.manual_seed(0)
    tokenizer = byte_level_bpe(texts)
    student = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=160,
            n_layer=4,
            n_head=4,
            initializer_range=0.05,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for model_part in (student, tokenizer):
        model_part.save_pretrained(folder / "student")
    tokenizer = unigram(texts)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=224,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for model_part in (teacher, tokenizer):
        model_part.save_pretrained(folder / "teacher")
    for name, model in (("student", student), ("teacher", teacher)):
        print(f"{folder / name}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/small/make_pair.py ROWS.jsonl FOLDER")
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
