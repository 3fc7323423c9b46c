"""What one model says of a batch: the states of the wanted positions, packed.

`TokenStates` is the only thing that the losses see of a model. It holds no logits: they are made
from the last hidden states and the head, in chunks of tokens, by `sum_over_tokens`, and made again
in the backward pass, so that at most LOGITS_PER_CHUNK of them exist at a time, and none on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cot2align.train.config import UserError
from cot2align.train.models import body_states, lm_logits

LOGITS_PER_CHUNK = 2**26
NAMED_LAYERS = {"embed": 0, "last": -1}


@dataclass(frozen=True)
class TokenStates:
    """States of T packed positions of B texts, R of which predict a response token.

    layers: name ("embed", "last", or an index of hidden_states) -> [T, d]; "last" is always there.
    cu_seqlens: int32 [B + 1] on the CPU, the packed positions of each text.
    hidden: [R, d], the last hidden states of the response; inputs, targets: int64 [R], the token
    at each of their positions and the one that it predicts; cu_responses: int32 [B + 1] on the CPU,
    those of each text.
    head: [n, d] -> logits [n, V]; frozen_head: the same, its parameters as constants. vocabulary:
    V. embed: int64 [n] -> the embedding table's rows [n, d].
    alignment: of a student with MinED, see `data.collate`.
    """

    layers: dict[str, Tensor]
    cu_seqlens: Tensor
    hidden: Tensor
    inputs: Tensor
    targets: Tensor
    cu_responses: Tensor
    head: Callable[[Tensor], Tensor]
    frozen_head: Callable[[Tensor], Tensor]
    vocabulary: int
    embed: Callable[[Tensor], Tensor]
    alignment: dict[str, Tensor] | None = None


def token_states(
    model: PreTrainedModel, batch: dict[str, Any], layers: Sequence[str] = ()
) -> TokenStates:
    """One forward pass of `model` over a `data.model_batch`."""
    hidden_states = body_states(model, batch["input_ids"], batch["attention_mask"])
    packed = {
        name: hidden_states[layer_index(name)].flatten(0, 1).index_select(0, batch["positions"])
        for name in dict.fromkeys([*layers, "last"])
    }
    response = batch["response"]
    inputs = batch["input_ids"].flatten().index_select(0, batch["positions"])
    return TokenStates(
        layers=packed,
        cu_seqlens=torch.tensor(batch["cu_seqlens"], dtype=torch.int32),
        hidden=packed["last"] if response is None else packed["last"].index_select(0, response),
        inputs=inputs if response is None else inputs.index_select(0, response),
        targets=batch["targets"],
        cu_responses=torch.tensor(batch["cu_responses"], dtype=torch.int32),
        head=partial(lm_logits, model),
        frozen_head=partial(lm_logits, model, frozen=True),
        vocabulary=model.get_output_embeddings().weight.shape[0],
        embed=model.get_input_embeddings(),
        alignment=batch.get("alignment"),
    )


def layer_index(name: str) -> int:
    """The index of hidden_states that a layer's name means. Raises ValueError."""
    return NAMED_LAYERS[name] if name in NAMED_LAYERS else int(name)


def check_layers(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Raises UserError for a layer that `model` does not have."""
    depth = model.config.get_text_config().num_hidden_layers
    for name in layers:
        try:
            exists = -depth - 1 <= layer_index(name) <= depth
        except ValueError:
            exists = False
        if not exists:
            raise UserError(
                f"unknown layer {name!r} for a model of {depth} layers: expected embed, last, or "
                f"an index of hidden_states from 0 to {depth}"
            )


def sum_over_tokens(
    function: Callable[..., Tensor], *tensors: Tensor, logits_per_token: int
) -> Tensor:
    """Sum of `function(*chunk)` over chunks of tokens, dimension 0 of all `tensors`.

    `logits_per_token`: how many logits `function` makes of a token. One chunk is computed as it
    stands; of more, each is computed again in the backward pass.
    """
    total = tensors[0].shape[0]
    chunk = max(1, LOGITS_PER_CHUNK // logits_per_token)
    if total <= chunk:
        return function(*tensors)
    parts = [
        checkpoint(
            function, *(tensor[start : start + chunk] for tensor in tensors), use_reentrant=False
        )
        for start in range(0, total, chunk)
    ]
    return torch.stack(parts).sum(0)
