"""Heads with a bias, a scale or a softcap are reproduced; what cannot be is refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    PhiConfig,
)

from cot2align.train.config import UserError
from cot2align.train.models import body_states, lm_logits, load_model
from tests.conftest import byte_level_bpe

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "softcap": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.25),
    "divided": GraniteConfig(**SIZES, logits_scaling=4.0),
    "bias": PhiConfig(**SIZES),
    "plain": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads(name, tmp_path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), byte_level_bpe(), dtype="float32", max_length=64)
    ids = torch.randint(0, 400, (2, 9))
    hidden = body_states(loaded, input_ids=ids, attention_mask=torch.ones_like(ids))[-1]
    torch.testing.assert_close(lm_logits(loaded, hidden), loaded(input_ids=ids).logits)


def test_a_head_that_cannot_be_reproduced_is_refused(tmp_path, workspace, monkeypatch) -> None:
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    def twisted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.sin()
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", twisted)
    with pytest.raises(UserError, match="logits are not its head applied to the last hidden state"):
        load_model(workspace.student, byte_level_bpe(), dtype="float32", max_length=64)


def test_missing_weights_are_refused(workspace, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    AutoConfig.from_pretrained(workspace.student).save_pretrained(tmp_path)
    weights = load_file(f"{workspace.student}/model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing, first 'transformer"):
        load_model(str(tmp_path), byte_level_bpe(), dtype="float32", max_length=64)


def test_a_tokenizer_that_outgrew_its_model_is_refused(workspace) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="embeds 400 tokens, but its tokenizer has 401"):
        load_model(workspace.student, tokenizer, dtype="float32", max_length=64)
