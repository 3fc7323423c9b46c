"""The command `new-model`: an untrained small model, with a tokenizer made from rows.

For trying the whole chain without a download: the shapes and the kinds of tokenizers are those of
the models that the method's paper distils, at a width that a laptop trains.

    bpe      byte-level BPE: GPT-2, Qwen
    spm      BPE with space markers and byte fallback, a token at the beginning: Llama 2, Mistral
    unigram  Unigram with space markers, a token at the beginning: T5, XLM-R
    words    whole words and single characters, each with its frequency: for very small worlds
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from cot2align.train.config import NewModelConfig, UserError
from cot2align.train.data import PROMPT_FORMATS, Row, read_rows

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def run(config: NewModelConfig) -> dict[str, Any]:
    """Write the model and its tokenizer; returns {"output", "parameters", "pieces"}.

    Raises UserError.
    """
    rows = read_rows(config.data)
    folder = Path(config.output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"output folder {config.output} is not empty or not a folder")
    if config.width % (2 * config.heads):
        raise UserError(f"width {config.width} must be a multiple of twice heads {config.heads}")
    if config.shape != "gpt2" and config.heads % 2:
        raise UserError(f"heads {config.heads} must be even: half of them are for keys")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = TOKENIZERS[config.tokenizer](row_texts(rows, config.prompt_format), config.pieces)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(_shape(config, tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    parameters = model.num_parameters()
    print(
        f"{config.shape}, {parameters:,} parameters, {config.tokenizer} tokenizer of "
        f"{len(tokenizer)} pieces -> {config.output}"
    )
    return {"output": config.output, "parameters": parameters, "pieces": len(tokenizer)}


def row_texts(rows: Iterable[Row], prompt_format: str) -> list[str]:
    """The rows' whole texts, as they are trained on."""
    prompts = PROMPT_FORMATS[prompt_format]
    return [
        prompts.text(row, is_cot) + row.response(is_cot)
        for row in rows
        for is_cot in ((False, True) if row.rationale else (False,))
    ]


def byte_level_bpe(
    texts: Iterable[str], pieces: int, show_progress: bool = False
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: any text, no unknown token, none at the beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece_bpe(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a text begins with a space marker, bytes where a character is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # SentencePiece merges across nothing but spaces; merging is per word here as well.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=pieces - len(byte_pieces),
        special_tokens=[*SPECIAL.values()],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer only takes them as special tokens, which decoding drops.
    whole = json.loads(tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    whole["model"]["vocab"] |= {p: len(vocabulary) + i for i, p in enumerate(byte_pieces)}
    return _with_beginning(Tokenizer.from_str(json.dumps(whole)))


def unigram(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, with space markers."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces,
        special_tokens=[*SPECIAL.values()],
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_beginning(tokenizer)


def words(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """The most frequent words of the texts and their characters, as a Unigram with Metaspace."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    # UnigramTrainer would part every digit from its space, since it starts from the frequencies of
    # characters; a model then needs twice the steps.
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    total = counts.total()
    for character in sorted(set("".join(counts))):
        counts.setdefault(character, 1)
    scored = [(piece, math.log(count / total)) for piece, count in counts.most_common(pieces)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *scored], unk_id=0))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


TOKENIZERS: dict[str, Callable[[Iterable[str], int], PreTrainedTokenizerFast]] = {
    "bpe": byte_level_bpe,
    "spm": sentencepiece_bpe,
    "unigram": unigram,
    "words": words,
}


def _with_beginning(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", **SPECIAL)


def _shape(config: NewModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": config.init_std,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if config.shape == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            n_positions=config.max_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            # The fused kernel: GPT-2's own formula takes a fifth of the time at such sizes.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    return AutoConfig.for_model(
        config.shape,
        max_position_embeddings=config.max_length,
        hidden_size=config.width,
        intermediate_size=2 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads // 2,
        **common,
    )
