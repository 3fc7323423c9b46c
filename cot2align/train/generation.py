"""Text from a model for many prompts: batched, left-padded, longest first, the same on every run.

Batches are cut from the prompts sorted by length, and each is sampled with its own seed: a batch's
texts depend on the prompts, the batch size and the seed, not on which batches ran before. A model's
own sampling defaults (top-k, repetition penalties) are overruled.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from cot2align.train.config import GenerationConfig as GenerationSettings
from cot2align.train.config import check_room
from cot2align.train.data import Row, TextEncoder
from cot2align.train.models import Tokenizer, device_of, load_model, load_tokenizer, pad_token_id


class Generated(NamedTuple):
    """What follows a prompt: the text, its tokens, and whether it came to its own end."""

    text: str
    tokens: int
    ended: bool


class Generator:
    """A model on its device with its tokenizer and limits.

    max_length: prompt and text together, tokens; max_new_tokens: of the text alone; the prompt
    keeps the rest. batch_size: rows generated at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        prompt_format: str,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
    ):
        """Raises UserError where the limits leave no room for a prompt."""
        check_room(max_new_tokens, max_length)
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.encoder = TextEncoder(
            tokenizer,
            prompt_format=prompt_format,
            max_length=max_length,
            max_prompt_length=max_length - max_new_tokens,
        )

    @classmethod
    def load(cls, config: GenerationSettings) -> Generator:
        """What the config names, on its device. Raises UserError."""
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        model = load_model(
            config.model,
            tokenizer,
            dtype=config.dtype,
            max_length=config.max_length,
            trust_remote_code=config.trust_remote_code,
        )
        model.to(device_of(config.device))  # type: ignore[arg-type]
        return cls(
            model,
            tokenizer,
            prompt_format=config.prompt_format,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompts(self, rows: Sequence[Row], is_cot: bool) -> tuple[list[list[int]], int]:
        """Every row's prompt in tokens, leaving room for max_new_tokens; and how many were cut."""
        return self.encoder.prompts(rows, is_cot, [self.encoder.max_prompt_length] * len(rows))

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the prompts, in batches of near-equal length."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        size = self.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], seed: int | None, temperature: float = 1.0
    ) -> list[Generated]:
        """What follows each prompt of one batch; `seed` None is greedy."""
        if seed is not None:
            # 32 bits, of which the CPU's generator uses no more; batches must draw apart.
            drawn = repr((seed, [list(prompt) for prompt in prompts]))
            torch.manual_seed(zlib.crc32(drawn.encode()))
        width = max(len(prompt) for prompt in prompts)
        padding = pad_token_id(self.tokenizer)
        input_ids = torch.full((len(prompts), width), padding)
        attention_mask = torch.zeros_like(input_ids)
        for b, prompt in enumerate(prompts):
            input_ids[b, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[b, width - len(prompt) :] = 1
        ends = self._end_token_ids()
        output = self.model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            generation_config=GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                do_sample=seed is not None,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                num_beams=1,
                eos_token_id=ends,
                pad_token_id=padding,
                bos_token_id=self.tokenizer.bos_token_id,
            ),
        )
        return [self._generated(ids, ends) for ids in output[:, width:].tolist()]

    def _end_token_ids(self) -> list[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        more = configured if isinstance(configured, list) else [configured]
        return sorted({self.tokenizer.eos_token_id, *(i for i in more if i is not None)})

    def _generated(self, ids: list[int], ends: list[int]) -> Generated:
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(
            ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Generated(str(text).strip(), stop, stop < len(ids))
