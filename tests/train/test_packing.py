"""Packed texts give what padded ones give; rows of like length come in one step."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cot2align.train.config import UserError
from cot2align.train.data import LengthSampler, Text, model_batch, places
from cot2align.train.models import check_packing
from cot2align.train.teacher import embedding_states
from cot2align.train.token_states import token_states
from tests.conftest import byte_level_bpe, cli, log_of

TEXTS = [
    Text(list(range(5, 5 + length)), prompt)
    for length, prompt in ((9, 3), (4, 1), (17, 16), (12, 5))
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    ("side", "attention"),
    [
        *itertools.product(("student", "teacher"), ("sdpa", "eager")),
        # Eager attention gives a padded row without keys NaN in float64, which 0 times NaN spreads.
        ("window", "sdpa"),
    ],
)
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_states_and_gradients_are_the_padded_ones(side, tokens, attention, workspace) -> None:
    torch.manual_seed(0)
    if side == "window":  # shorter than the longest text
        model = MistralForCausalLM(
            MistralConfig(
                **SMALL, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
                sliding_window=6,
            )
        )  # fmt: skip
    else:
        cls = GPT2LMHeadModel if side == "student" else LlamaForCausalLM
        model = cls.from_pretrained(getattr(workspace, side))
    model = model.double().eval()
    model.set_attn_implementation(attention)
    check_packing(model, side)
    outcomes = []
    for layout, shape in (("padded", (4, 17)), ("packed", (2, 21)), ("joined", (1, 42))):
        batch = model_batch(TEXTS, tokens, layout)
        assert batch["input_ids"].shape == shape
        states = token_states(model, batch, ["embed", "last", "1"])
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(states.hidden.shape, generator=generator, dtype=torch.float64)
        (states.hidden * weights).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        embedded = embedding_states(model, batch).flatten(0, 1)[batch["positions"]]
        assert torch.equal(embedded, states.layers["embed"])
        outcomes.append([*states.layers.values(), states.inputs, states.targets, *gradients])
    for padded, *others in zip(*outcomes, strict=True):
        for other in others:
            torch.testing.assert_close(other, padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed", "joined"])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
def test_places(layout, lengths) -> None:
    """Every token has a place of its own, in the row where its text begins."""
    starts, rows, width = places(lengths, layout)
    texts = [range(start, start + n) for start, n in zip(starts, lengths, strict=True) if n]
    taken = [place for text in texts for place in text]
    assert len(set(taken)) == len(taken) == sum(lengths)
    assert all(text[0] // width == text[-1] // width for text in texts)
    assert {place // width for place in taken} == set(range(rows))
    if layout == "padded":
        assert [text[0] for text in texts] == [i * max(lengths) for i in range(rows)]
    if layout == "joined":
        assert rows == 1
        assert width == sum(lengths)
    if layout == "packed":
        assert max(lengths) <= width <= 2 * max(lengths)
        assert rows * width <= max(lengths) * len(texts)


def test_the_width_of_shared_rows() -> None:
    """Rows of the longest text's width would hold one text each."""
    lengths = [80, 41, 80, 41, 80, 41]
    _, rows, width = places(lengths, "packed")
    assert rows == 3
    assert sum(lengths) <= rows * width < 1.1 * sum(lengths)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),  # its state runs on
        lambda: BloomForCausalLM(BloomConfig(**SMALL, n_head=2)),  # takes no position_ids
    ],
)
def test_models_that_cannot_be_packed_are_refused(model) -> None:
    with pytest.raises(UserError, match="of a packed text are not those of the text alone"):
        check_packing(model().eval(), "model")


@pytest.mark.parametrize(("rows", "size"), [(1000, 8), (37, 8), (5, 8)])
def test_rows_of_like_length_come_in_one_step(rows, size) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 500, (rows,), generator=generator).tolist()
    epoch = [0]
    sampler = LengthSampler(lengths, size, 1, lambda: epoch[0])
    first = list(sampler)
    assert sorted(first) == list(range(rows))
    assert list(sampler) == first

    def padding(order: list[int]) -> float:
        steps = [[lengths[i] for i in order[k : k + size]] for k in range(0, rows, size)]
        return sum(max(step) * len(step) for step in steps) / sum(lengths)

    if rows > 5 * size:
        assert padding(first) < 1.1 < 1.5 < padding(list(range(rows)))
        # The steps themselves do not come by length.
        means = [sum(lengths[i] for i in first[k : k + size]) for k in range(0, 8 * size, size)]
        assert means not in (sorted(means), sorted(means, reverse=True))
        epoch[0] = 1
        assert list(sampler) != first


def test_a_resumed_run_goes_on_in_the_order_of_its_epoch(distill_settings, tmp_path) -> None:
    """Three steps an epoch; the second epoch is broken and resumed."""
    changed = {"max_steps": 6, "save_steps": 4, "checkpoints": 3, "group_by_length": "true"}
    settings = {**distill_settings, **changed}
    assert cli("distill", output=tmp_path / "unbroken", **settings) == 0
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6")
    assert cli("distill", output=tmp_path / "broken", resume="true", **settings) == 0
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "unbroken")
    # The order is not that of the plain sampler.
    plain = {**settings, "group_by_length": "false"}
    assert cli("distill", output=tmp_path / "plain", **plain) == 0
    assert log_of(tmp_path / "plain")[0]["ce"] != log_of(tmp_path / "unbroken")[0]["ce"]


def test_refused_by_the_command(distill_settings, tmp_path, capsys, workspace) -> None:
    tokenizer = byte_level_bpe()
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=400))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    settings = {**distill_settings, "student": tmp_path / "bloom", "padding_free": "true"}
    assert cli("distill", output=tmp_path / "out", **settings) == 2
    assert "cannot be trained with padding_free" in capsys.readouterr().err
