"""What one model says of a batch: the states of the wanted positions, packed.

`TokenStates` is the only thing that the losses see of a model. It holds no logits: a loss asks
`sum_over_tokens` for those of some states, which makes them chunk by chunk, once, on no padding.

Memory: a chunk's logits, of all models together, are LOGITS_PER_CHUNK values: 256 MiB in float32,
the *chunk set*. A loss is computed on a BLOCKS-th of the chunk at a time, its gradient is written
over the logits and goes through the head before the next chunk is made. So forward and backward of
any loss take less than 1.5 chunk sets above their inputs and gradients, however many tokens there
are and however many intermediate results the loss has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from cot2align.train.config import UserError
from cot2align.train.models import body_states, lm_logits

LOGITS_PER_CHUNK = 2**26
BLOCKS = 32
NAMED_LAYERS = {"embed": 0, "last": -1}


@dataclass(frozen=True)
class Logits:
    """The logits [T, vocabulary] head(hidden, *weights), not yet made."""

    head: Callable[..., Tensor]
    hidden: Tensor
    weights: tuple[Tensor, ...]
    vocabulary: int


@dataclass(frozen=True)
class TokenStates:
    """States of T packed positions of B texts, R of which predict a response token.

    layers: name ("embed", "last", or an index of hidden_states) -> [T, d]; "last" is always there.
    cu_seqlens: int32 [B + 1] on the CPU, the packed positions of each text.
    hidden: [R, d], the last hidden states of the response; inputs, targets: int64 [R], the token
    at each of their positions and the one that it predicts; cu_responses: int32 [B + 1] on the CPU,
    those of each text.
    head: (states [n, d], *weights) -> logits [n, V]; vocabulary: V. embed: int64 [n] -> the
    embedding table's rows [n, d].
    alignment: of a student with MinED, see `data.collate`.
    """

    layers: dict[str, Tensor]
    cu_seqlens: Tensor
    hidden: Tensor
    inputs: Tensor
    targets: Tensor
    cu_responses: Tensor
    head: Callable[..., Tensor]
    weights: tuple[Tensor, ...]
    vocabulary: int
    embed: Callable[[Tensor], Tensor]
    alignment: dict[str, Tensor] | None = None

    def logits(self, hidden: Tensor, *, frozen: bool = False) -> Logits:
        """What the head says of `hidden` [n, d]; frozen: no gradient flows to its weights."""
        weights = tuple(w.detach() for w in self.weights) if frozen else self.weights
        return Logits(self.head, hidden, weights, self.vocabulary)


def token_states(
    model: PreTrainedModel, batch: dict[str, Any], layers: Sequence[str] = ()
) -> TokenStates:
    """One forward pass of `model` over a `data.model_batch`."""
    hidden_states = body_states(model, **model_inputs(batch))
    indices = {name: layer_index(name) % len(hidden_states) for name in (*layers, "last")}
    # One tensor for all names of a layer, so that a gradient at one counts what uses another.
    packed = {
        index: hidden_states[index].flatten(0, 1).index_select(0, batch["positions"])
        for index in dict.fromkeys(indices.values())
    }
    return packed_states(model, batch, {name: packed[i] for name, i in indices.items()})


def model_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What of a `data.model_batch` goes into the model."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch}


def packed_states(
    model: PreTrainedModel, batch: dict[str, Any], packed: dict[str, Tensor]
) -> TokenStates:
    """TokenStates of a `data.model_batch` from its states: layer -> [T, d], with "last"; `model`
    gives the head and the embedding table."""
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
        weights=tuple(model.get_output_embeddings().parameters()),
        vocabulary=model.get_output_embeddings().weight.shape[0],
        embed=model.get_input_embeddings(),
        alignment=batch.get("alignment"),
    )


def shared_positions(*sides: TokenStates) -> list[TokenStates]:
    """The sides with the response tokens that all of them have by their number: of every text the
    first ones, as many as the side with the fewest has."""
    counts = [side.cu_responses.diff() for side in sides]
    fewest = torch.stack(counts).amin(0)
    return [
        side if torch.equal(count, fewest) else _first_tokens(side, fewest)
        for side, count in zip(sides, counts, strict=True)
    ]


def _first_tokens(side: TokenStates, counts: Tensor) -> TokenStates:
    ends = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    starts = side.cu_responses[:-1] - ends[:-1]
    places = torch.arange(int(ends[-1])) + starts.repeat_interleave(counts)
    places = places.to(side.hidden.device)
    kept = {name: getattr(side, name)[places] for name in ("hidden", "inputs", "targets")}
    return replace(side, **kept, cu_responses=ends)


def layer_index(name: str) -> int:
    """The index of hidden_states that a layer's name means. Raises ValueError."""
    return NAMED_LAYERS[name] if name in NAMED_LAYERS else int(name)


def check_layers(depth: int, layers: Sequence[str]) -> None:
    """Raises UserError for a layer that a model of `depth` layers does not have, or that has two
    names here."""
    named: dict[int, str] = {}
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
        other = named.setdefault(layer_index(name) % (depth + 1), name)
        if other != name:
            raise UserError(
                f"layers {other!r} and {name!r} are the same one of a model of {depth} layers"
            )


def sum_over_tokens(
    function: Callable[..., Sequence[Tensor]], *logits: Logits, others: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Sums over T tokens of the scalars `function(*logits, *others)`, float32.

    It is called with the same n tokens of each of `logits`, [n, V] in float32, and of `others`,
    tensors [T, ...]; all but the first of `logits` may end earlier. The first sum is differentiable
    with respect to the states and weights of `logits`, the further ones are constants. Gradients
    are made in the forward pass, with the loss.
    """
    tensors = [tensor for side in logits for tensor in (side.hidden, *side.weights)]
    if not torch.is_grad_enabled():
        tensors = [tensor.detach() for tensor in tensors]
    return _SumOverTokens.apply(function, logits, others, *tensors)


class _SumOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, logits, others, *tensors):  # type: ignore[no-untyped-def]
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        rows = max(1, LOGITS_PER_CHUNK // sum(side.vocabulary for side in logits))
        chunks = [
            _chunk(function, logits, leaves, others, chunk, max(1, rows // BLOCKS))
            for chunk in _slices(len(tensors[0]), rows)
        ]
        first, *rest = (torch.stack(values).sum() for values in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*(leaf.grad for leaf in leaves))
        return first, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        gradients = (None if g is None else g * upstream for g in ctx.saved_tensors)
        return None, None, None, *gradients


def _chunk(
    function: Callable[..., Sequence[Tensor]],
    logits: Sequence[Logits],
    leaves: Sequence[Tensor],
    others: Sequence[Tensor],
    chunk: slice,
    block_rows: int,
) -> list[Tensor]:
    """The sums over one chunk; its gradients are added to those of the leaves."""
    rest = iter(leaves)
    with torch.enable_grad():
        made = [
            side.head(next(rest)[chunk], *(next(rest) for _ in side.weights)) for side in logits
        ]
    values = [
        _block(function, [m[block] for m in made], [other[chunk][block] for other in others])
        for block in _slices(len(made[0]), block_rows)
    ]
    # Constants are freed first, then each side's as soon as the head has seen it.
    made = [m for m in made if m.requires_grad]
    while made:
        _through_head(made.pop(0))
    return [torch.stack(block_values).sum() for block_values in zip(*values, strict=True)]


def _block(
    function: Callable[..., Sequence[Tensor]], logits: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Tensor]:
    """The sums over one block, whose logits are overwritten by the first sum's gradient."""
    made = [m.detach() for m in logits]
    inputs = [
        m.float().requires_grad_(side.requires_grad) for m, side in zip(made, logits, strict=True)
    ]
    with torch.enable_grad():
        values = function(*inputs, *others)
    trained = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    if trained:
        gradients = torch.autograd.grad(values[0], [inputs[i] for i in trained])
        for i, gradient in zip(trained, gradients, strict=True):
            made[i].copy_(gradient)
    return [value.detach() for value in values]


def _through_head(logits: Tensor) -> None:
    logits.backward(logits.detach())


def _slices(length: int, size: int) -> Iterator[slice]:
    """Of nothing, one empty slice: a sum over no tokens has its terms, too."""
    for start in range(0, max(length, 1), size):
        yield slice(start, start + size)
