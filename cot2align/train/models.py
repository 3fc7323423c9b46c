"""Models and tokenizers: loading, and what they must be able to do.

Any Hugging Face causal language model will do whose logits are a function of its last hidden state;
there is no list of model types. What cannot work is refused here, by name, before anything is
spent: a tokenizer that is not fast or has no end-of-sequence token, weights that are missing or not
in safetensors, a head that `lm_logits` does not reproduce, a context window below max_length.
Nothing is downloaded code unless `trust_remote_code` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from cot2align.train.adapters import base_of, quantization, set_up_4bit, with_adapter
from cot2align.train.config import UserError

FLASH = "flash_attention_2"
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The fast tokenizer of a folder or hub name; an adapter without one has its base's. Raises
    UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        if (base := base_of(name)) is not None:
            return load_tokenizer(base, trust_remote_code=trust_remote_code)
        raise UserError(f"tokenizer of {name!r} cannot be loaded: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer of {name!r} ({type(tokenizer).__name__}) is not a fast tokenizer "
            "(no tokenizer.json); convert it with the tokenizers library"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {name!r} has no end-of-sequence token")
    return tokenizer


def load_model(
    name: str,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    max_length: int,
    trust_remote_code: bool = False,
    bits: str = "none",
    device: str = "cpu",
    attention: str | None = None,
    packed: bool = False,
) -> PreTrainedModel:
    """The causal language model of a folder or hub name, checked, in eval mode, on the CPU or,
    where it is quantised, on `device` ("auto" or "cpu").

    An adapter's base is loaded, and the adapter merged into it. dtype: "float32", "bfloat16",
    "float16" or "auto" (as saved). max_length: tokens that it will be given. bits: "none", "8bit"
    or "4bit". attention: transformers' attn_implementation. packed: it has to keep packed texts
    apart. Raises UserError.
    """
    transformers_logging.disable_progress_bar()
    base = base_of(name)
    options = quantization(bits, device_of(device))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base or name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except LOAD_ERRORS as error:
        which = name if base is None else f"{base}' of the adapter '{name}"
        raise UserError(f"model '{which}' cannot be loaded: {one_line(error)}") from None
    model, info = loaded
    set_up_4bit(model)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model {name!r}: {len(missing)} weights are missing, first {missing[0]!r}")
    if base is not None:
        try:
            model = with_adapter(model, name)
        except LOAD_ERRORS as error:
            raise UserError(
                f"adapter {name!r} does not fit its base {base!r}: {one_line(error)}"
            ) from None
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model {name!r} embeds {vocabulary} tokens, but its tokenizer has {len(tokenizer)}"
        )
    window = getattr(model.config, "max_position_embeddings", None)
    if window is not None and window < max_length:
        raise UserError(f"model {name!r} takes {window} tokens, fewer than max_length {max_length}")
    _check_head(model, name)
    if attention != FLASH:
        _set_attention(model, name, attention)
    if packed:
        check_packing(model, name)
    if attention == FLASH:  # After the checks, which run on the CPU in float32.
        _set_attention(model, name, attention)
    return model


def _set_attention(model: PreTrainedModel, name: str, attention: str | None) -> None:
    try:
        if attention is not None:
            model.set_attn_implementation(attention)
    except LOAD_ERRORS as error:
        raise UserError(f"model {name!r}: no {attention} attention: {one_line(error)}") from None


def device_of(setting: str) -> torch.device:
    """What the setting `device` means here: "auto" is the GPU where there is one."""
    return torch.device("cuda" if setting == "auto" and torch.cuda.is_available() else "cpu")


def width(model: PreTrainedModel) -> int:
    """The width of its embedding output and hidden states."""
    return model.config.get_text_config().hidden_size


def lm_logits(model: PreTrainedModel, hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of last hidden states [T, d]: the head, with its bias, and the scales that
    configs name. weights: in place of the head's parameters, in their order.

    The attributes are those in use across transformers: `logit_scale` multiplies, `logits_scaling`
    divides, `final_logit_softcapping` is the bound c of c tanh(logits / c).
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(head.weight.dtype)
    names = [name for name, _ in head.named_parameters()] if weights else []
    logits = functional_call(head, dict(zip(names, weights, strict=True)), (hidden,))
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


def body_of(model: PreTrainedModel) -> nn.Module:
    """What is before the head."""
    # Not model.base_model, which of a PeftModel is something else.
    return getattr(model, model.base_model_prefix, model)


def body_states(model: PreTrainedModel, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`hidden_states` [B, L, d] of every stage, the embedding's first, without the head's logits.

    inputs: input_ids [B, L], and attention_mask or position_ids of the same shape.
    """
    output = body_of(model)(
        **inputs,
        output_hidden_states=True,
        use_cache=False,
        return_dict=True,
    )
    return output.hidden_states


@torch.no_grad()
def check_packing(model: PreTrainedModel, name: str) -> None:
    """Raises UserError for a model that does not keep packed texts apart."""
    ids = torch.arange(16, device=model.device).view(2, 8)
    texts = [*ids[:1].tensor_split([5], 1), *ids[1:].tensor_split([2], 1)]
    places = torch.cat([torch.arange(text.shape[1], device=model.device) for text in texts])
    training = model.training
    model.eval()
    try:
        packed = body_states(model, input_ids=ids, position_ids=places.view(2, 8))[-1].flatten(0, 1)
        alone = torch.cat(
            [
                body_states(model, input_ids=text, attention_mask=torch.ones_like(text))[-1][0]
                for text in texts
            ]
        )
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = f"it takes no position_ids: {one_line(error)}"
    else:
        tolerance = (1e-4 if model.dtype == torch.float32 else 3e-2) * alone.abs().max()
        if bool(((packed - alone).abs() <= tolerance).all()):
            return
        reason = "its states of a packed text are not those of the text alone"
    finally:
        model.train(training)
    raise UserError(
        f"model {name!r} ({type(model).__name__}, {model.config._attn_implementation} attention) "
        f"cannot be trained with padding_free: {reason}"
    )


def pad_token_id(tokenizer: Tokenizer) -> int:
    """An id to pad with, always masked: the tokenizer's own or, failing that, end-of-sequence."""
    padding = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None else padding


@torch.no_grad()
def _check_head(model: PreTrainedModel, name: str) -> None:
    if model.get_output_embeddings() is None:
        raise UserError(f"model {name!r} ({type(model).__name__}) has no language-model head")
    ids = torch.arange(4, device=model.device)[None]
    mask = torch.ones_like(ids)
    try:
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        states = body_states(model, input_ids=ids, attention_mask=mask)
        actual = lm_logits(model, states[-1]).float()
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"model {name!r} ({type(model).__name__}) does not give hidden states: "
            f"{one_line(error)}"
        ) from None
    precise = model.dtype == torch.float32
    tolerance = (1e-4 if precise else 3e-2) * expected.abs().max().clamp(min=1e-3)
    if actual.shape != expected.shape or not bool(((actual - expected).abs() <= tolerance).all()):
        raise UserError(
            f"model {name!r} ({type(model).__name__}): its logits are not its head applied to the "
            "last hidden state"
        )
    widths = {state.shape[-1] for state in states}
    if widths != {width(model)}:
        raise UserError(
            f"model {name!r} ({type(model).__name__}): its hidden states are {sorted(widths)} "
            f"wide, its config says {width(model)}"
        )


def one_line(error: Any) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."
