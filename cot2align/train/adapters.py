"""Low-rank adapters (LoRA) through peft, and weights of few bits through bitsandbytes.

A student with adapters is a PeftModel: its own weights are frozen, its head and embeddings are read
where everything else reads them, with their adapters where they have any. What is saved is what
peft saves, and an adapter's folder may be named wherever a model may: its base is loaded and the
adapter merged into it, or put beside it where the base is quantised.

Tied embeddings have no adapters: they would change the head and the table apart, and a merged model
could not hold both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
)
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file

from cot2align.train.config import TrainConfig, UserError, nearest

ADAPTER_FOLDER = "adapter"


def base_of(name: str) -> str | None:
    """The base model that an adapter's folder or hub name gives; None where it is no adapter.

    Raises UserError for an adapter that names none.
    """
    try:
        path = find_adapter_config_file(name)
    except (OSError, ValueError):  # No such name: what loads it next says so.
        return None
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError):
        raise UserError(f"adapter {name!r}: its adapter_config.json names no base model") from None


def add_lora(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """`model` with trainable adapters of the config, its own weights frozen.

    Raises UserError for target modules that do not exist, cannot have adapters or are tied.
    """
    modules = dict(model.named_modules())
    targets = [name for name in config.target_modules if name != "auto"]
    if targets and "auto" in config.target_modules:
        raise UserError("setting 'target_modules': auto and names of modules do not go together")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for target in targets:
        found = [m for name, m in modules.items() if f".{name}".endswith(f".{target}")]
        if not found:
            leaves = {name.rsplit(".", 1)[-1] for name, m in modules.items() if not [*m.children()]}
            raise UserError(
                f"setting 'target_modules': no module {target!r}{nearest(target, leaves)}"
            )
        if head.weight is table.weight and any(m is head or m is table for m in found):
            raise UserError(
                f"setting 'target_modules': {target!r} is tied, head and embeddings are one matrix"
            )
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets or "all-linear",
        # For GPT-2's Conv1D, whose weights are transposed; peft would correct it with a warning.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in modules.values()),
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"setting 'target_modules': {error}") from None


def with_adapter(model: PreTrainedModel, name: str) -> Any:
    """`model` with the adapter of `name`: merged, or as a PeftModel where it is quantised."""
    adapted = PeftModel.from_pretrained(model, name)
    if getattr(model, "is_quantized", False):
        return adapted
    return adapted.merge_and_unload()


def save_student(student: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """A plain model, or the adapters of a PeftModel; state: of the student, where it is sharded."""
    options: dict[str, Any] = {} if state is None else {"state_dict": state}
    if isinstance(student, PeftModel):
        # peft would ask the hub whether the embeddings have grown; ours never do.
        options["save_embedding_layers"] = False
    student.save_pretrained(folder, **options)


def saved_tensors(student: Any, folder: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of `student` that a folder of `save_student` holds, with what it holds."""
    if isinstance(student, PeftModel):
        ours = get_peft_model_state_dict(student, save_embedding_layers=False)
        saved = load_peft_weights(folder, device="cpu")
    else:
        ours = student.state_dict()
        saved = type(student).from_pretrained(folder, dtype=student.dtype).state_dict()
    return ((ours[name], saved[name]) for name in ours)


def set_adapter_aside(folder: Path) -> Path:
    """Moves the adapter's files of `folder` into a folder of their own; returns it."""
    aside = folder / ADAPTER_FOLDER
    aside.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "README.md", "adapter_config.json"):
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    return aside


def quantization(bits: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs for weights of "8bit" or "4bit" (NF4), on the CPU or on this
    process's GPU.

    "none": nothing. Raises UserError without bitsandbytes.
    """
    if bits == "none":
        return {}
    if not is_bitsandbytes_available():
        raise UserError(
            f"weights of {bits.removesuffix('bit')} bits need the package bitsandbytes: "
            "pip install 'cot2align[quantized]'"
        )
    compute = torch.float32
    place: str | int = "cpu"
    if device.type == "cuda":
        compute = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        place = torch.cuda.current_device()
    settings = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": settings, "device_map": {"": place}}


def set_up_4bit(model: PreTrainedModel) -> None:
    """Make 4-bit weights on a CPU fit for training; those on a GPU are.

    With bfloat16 instructions, bitsandbytes packs them anew at the first inference, and no gradient
    passes through packed ones. Raises UserError for rows that are not whole blocks, which it reads
    with the scales of other rows.
    """
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is None or module.weight.device.type != "cpu":
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % state.blocksize:
            raise UserError(
                f"weights of 4 bits on a CPU: {name} has {module.in_features} inputs, expected a "
                f"multiple of {state.blocksize}"
            )
