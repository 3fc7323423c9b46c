"""What the losses are tested on: two loaded models with a batch, and every text of it alone; states
without a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.models import load_model, load_tokenizer
from cot2align.train.token_states import TokenStates, token_states
from tests.conftest import MAX_LENGTH

LAYERS = ("embed", "last", "1")


class Pair:
    """Two loaded models and a batch of five rows, three of them with a rationale."""

    def __init__(self, student: str, teacher: str, train: str, tokens: str = "response"):
        names = {"student": student, "teacher": teacher}
        tokenizers = {side: load_tokenizer(name) for side, name in names.items()}
        self.models = {
            side: load_model(name, tokenizers[side], dtype="float32", max_length=MAX_LENGTH)
            for side, name in names.items()
        }
        self.encoders = {
            side: TextEncoder(
                tokenizer, prompt_format="paper", max_length=MAX_LENGTH, max_prompt_length=160
            )
            for side, tokenizer in tokenizers.items()
        }
        self.examples, _ = encode_rows(read_rows(train)[:5], **self.encoders)
        self.batch = collate(self.examples, tokens)

    def states(self, side: str):
        return token_states(self.models[side], self.batch[side], LAYERS)

    def per_text(self, side: str, tokens: str = "response") -> list[dict[str, Tensor]]:
        """Every text alone, unpadded, through the whole model: states and logits, float64."""
        outputs = []
        for example in self.examples:
            for pair in example.texts:
                text = getattr(pair, side)
                output = self.models[side](
                    torch.tensor([text.ids]), output_hidden_states=True, use_cache=False
                )
                places = slice(text.prompt_length - 1, len(text.ids) - 1)
                aligned = places if tokens == "response" else slice(None)
                states = [layer[0].double() for layer in output.hidden_states]
                outputs.append(
                    {
                        "embed": states[0][aligned],
                        "1": states[1][aligned],
                        "last": states[-1][aligned],
                        "logits": output.logits[0, places].double(),
                        "targets": torch.tensor(text.response_ids),
                    }
                )
        return outputs


@pytest.fixture(scope="session")
def two_tokenizers(workspace) -> Pair:
    return Pair(workspace.student, workspace.teacher, workspace.train)


@pytest.fixture(scope="session")
def one_tokenizer(workspace) -> Pair:
    return Pair(workspace.student, workspace.sibling, workspace.train)


def random_states(seed: int, lengths: list[int], width: int, vocabulary: int) -> TokenStates:
    """States without a model, `lengths` response tokens a text; head and embeddings are
    matrices."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), width, generator=generator).requires_grad_()
    weight = (
        torch.randn(vocabulary, width, generator=generator) * 2 * width**-0.5
    ).requires_grad_()
    table = torch.randn(vocabulary, width, generator=generator)
    inputs, targets = torch.randint(vocabulary, (2, sum(lengths)), generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return TokenStates(
        layers={"last": hidden},
        cu_seqlens=bounds,
        hidden=hidden,
        inputs=inputs,
        targets=targets,
        cu_responses=bounds,
        head=_matrix_head,
        weights=(weight,),
        vocabulary=vocabulary,
        embed=table.__getitem__,
    )


def _matrix_head(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.to(hidden.dtype).T
