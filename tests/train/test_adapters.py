"""LoRA: what is trained, saved, merged and resumed; adapters wherever a model may be named; models
of few bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cot2align.train.config import DistillConfig, UserError, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import build_distiller
from cot2align.train.models import load_model, load_tokenizer
from cot2align.train.token_states import token_states
from tests.conftest import (
    MAX_LENGTH,
    byte_level_bpe,
    cli,
    log_of,
    save_gpt2,
    save_llama,
    unigram,
)

LORA = {"lora_r": 4, "lora_alpha": 32, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A Llama whose rows are whole blocks of 4-bit weights."""
    return save_llama(tmp_path_factory.mktemp("base"), unigram(), width=64)


@pytest.fixture(scope="module")
def adapter(base, workspace, tmp_path_factory) -> str:
    """The base fine-tuned with adapters of all its linear modules."""
    output = tmp_path_factory.mktemp("adapter") / "tuned"
    settings = {"max_length": MAX_LENGTH, "max_prompt_length": 160, "batch_size": 6, "max_steps": 3}
    assert cli("sft", model=base, train=workspace.train, output=output, **LORA, **settings) == 0
    return str(output)  # fmt: skip


@pytest.fixture
def lora_settings(distill_settings) -> dict:
    return {**distill_settings, **LORA, "lora_dropout": 0.1}


@pytest.fixture
def qlora_settings(lora_settings, tmp_path) -> dict:
    student = save_gpt2(tmp_path / "student", byte_level_bpe(), width=64)
    return {**lora_settings, "student": student, "load_in_4bit": "true"}


@pytest.fixture(params=["lora_settings", "qlora_settings"])
def any_lora_settings(request) -> dict:
    return request.getfixturevalue(request.param)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None]).logits


def test_peft_reads_the_adapter_and_we_read_it_as_a_model(adapter, base) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, adapter)), expected)
    assert (expected - before).norm() > 0.1 * before.norm()

    loaded = load_model(adapter, load_tokenizer(adapter), dtype="float32", max_length=MAX_LENGTH)
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_tokenizer_has_its_base_s(adapter, workspace, tmp_path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{adapter}/{name}", tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == load_tokenizer(adapter).get_vocab()


def test_a_teacher_and_a_test_model_may_be_adapters(adapter, lora_settings, workspace, tmp_path):
    lora_settings["teacher"] = adapter
    assert cli("distill", output=tmp_path / "student", **lora_settings) == 0
    first, *_, last = log_of(tmp_path / "student")
    assert last["ce"] < first["ce"]
    scores = {"data": workspace.test, "max_length": MAX_LENGTH, "max_new_tokens": 4}
    assert cli("evaluate", model=adapter, output=tmp_path / "scores", **scores) == 0


def test_only_adapters_and_projections_are_trained(lora_settings, tmp_path) -> None:
    config = build(DistillConfig, {**lora_settings, "output": "unused", "device": "cpu"})
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in distiller.named_parameters() if "lora_" in name or "projections" in name
    }
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sum(".lora_A." in name for name in trained) == 2 * len(linear)
    student = distiller.student
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_merged_folder_is_a_plain_model(any_lora_settings, tmp_path) -> None:
    merged = tmp_path / "merged"
    assert cli("distill", output=merged, merge="true", **any_lora_settings) == 0
    assert not (merged / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not any("lora" in name for name in plain.state_dict())
    adapted = AutoPeftModelForCausalLM.from_pretrained(merged / "adapter")
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4)
    assert set(load_file(merged / "checkpoint-3" / "adapter_model.safetensors")) == set(
        load_file(merged / "adapter" / "adapter_model.safetensors")
    )
    assert (merged / "projections.safetensors").exists()


def test_resumed_run_is_the_unbroken_one(any_lora_settings, tmp_path) -> None:
    settings = {**any_lora_settings, "max_steps": 5, "save_steps": 2, "checkpoints": 3}
    runs = {name: tmp_path / name for name in ("unbroken", "broken")}
    for output in runs.values():
        assert cli("distill", output=output, **settings) == 0
    for checkpoint in ("checkpoint-5", "checkpoint-4"):
        shutil.rmtree(runs["broken"] / checkpoint)
    assert cli("distill", output=runs["broken"], resume="true", **settings) == 0
    assert log_of(runs["broken"]) == log_of(runs["unbroken"])
    for name in ("adapter_model.safetensors", "projections.safetensors"):
        assert (runs["broken"] / name).read_bytes() == (runs["unbroken"] / name).read_bytes()


def test_gradient_checkpointing_changes_nothing(any_lora_settings, tmp_path) -> None:
    for name in ("false", "true"):
        again = {**any_lora_settings, "lora_dropout": 0, "gradient_checkpointing": name}
        assert cli("distill", output=tmp_path / name, **again) == 0
    for ours, theirs in zip(log_of(tmp_path / "true"), log_of(tmp_path / "false"), strict=True):
        for name in ("loss", "ce", "ot", "grad_norm", "ot/grad_ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.parametrize("kd", ["uld", "dskd"])
def test_adapters_of_an_untied_head_and_table_are_in_the_losses(kd, workspace, tmp_path) -> None:
    """The loss is that of the merged model, and its gradients reach the head's adapters."""
    student = save_llama(tmp_path / "untied", unigram())
    config = build(
        DistillConfig,
        {
            **{"student": student, "teacher": workspace.teacher, "train": workspace.train},
            **{"output": "unused", "device": "cpu", "kd": kd, "max_length": MAX_LENGTH},
            **{"max_prompt_length": 160, "lora_r": 4, "ot_iters": 5},
            "target_modules": "lm_head,embed_tokens,q_proj",
        },
    )
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    adapters = {n: p for n, p in distiller.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.05)
    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    batch = collate(encode_rows(read_rows(config.train)[:3], *encoders)[0])
    loss = distiller(**batch)["loss"]
    loss.backward()
    for name, p in adapters.items():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    adapted = read(distiller.student, batch)
    distiller.student = distiller.student.merge_and_unload()
    assert distiller(**batch)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    merged = read(distiller.student, batch)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


def read(student, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and embeddings, as the losses read them."""
    states = token_states(student, batch["student"])
    assert states.vocabulary == student.config.vocab_size
    return states.head(states.hidden, *states.weights), states.embed(states.inputs)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"target_modules": "c_atn"}, "no module 'c_atn'; did you mean 'c_attn'?"),
        ({"target_modules": "wte"}, "'wte' is tied, head and embeddings are one matrix"),
        ({"target_modules": "ln_1"}, "'target_modules': Target module LayerNorm"),
        ({"target_modules": "auto,c_fc"}, "auto and names of modules do not go together"),
        ({"target_modules": ""}, "'target_modules' is empty"),
        ({"lora_r": 0, "load_in_4bit": "true"}, "weights of 4 bits cannot be trained"),
        ({"load_in_4bit": "true"}, "attn.c_attn has 32 inputs, expected a multiple of 64"),
    ],
)
def test_mistakes(changed, said, lora_settings, tmp_path, capsys) -> None:
    settings = {**lora_settings, "output": tmp_path / "out", **changed}
    assert cli("distill", **settings) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_on_an_adapter_is_refused(adapter, workspace) -> None:
    config = build(
        DistillConfig,
        {
            **{"student": adapter, "teacher": workspace.teacher, "train": workspace.train},
            **{"output": "unused", "lora_r": 2, "max_length": MAX_LENGTH, "max_prompt_length": 160},
        },
    )
    tokenizer = load_tokenizer(adapter)
    with pytest.raises(UserError, match="is an adapter, and 'lora_r' asks for another"):
        build_distiller(config, tokenizer, tokenizer)


def test_qlora_has_the_gradients_of_the_same_weights_in_32_bits(qlora_settings) -> None:
    """Also after an inference, at which bitsandbytes would pack the weights for good."""
    settings = {**qlora_settings, "lora_dropout": 0, "output": "unused", "device": "cpu"}
    config = build(DistillConfig, settings)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    adapters = [p for n, p in distiller.named_parameters() if "lora_" in n]
    with torch.no_grad():
        for p in adapters:
            p.normal_(std=0.05)
    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    batch = collate(encode_rows(read_rows(config.train)[:3], *encoders)[0])
    logits(distiller.student)
    found = []
    for _ in range(2):
        distiller.train()
        loss = distiller(**batch)["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, adapters)])
        of_few_bits = [m for m in distiller.modules() if isinstance(m, Linear4bit)]
        assert len(of_few_bits) == (4 * 2 if len(found) == 1 else 0)
        for module in list(distiller.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear4bit) and name == "base_layer":
                    setattr(module, name, in_32_bits(child))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def in_32_bits(quantized: Linear4bit) -> torch.nn.Linear:
    linear = torch.nn.Linear(quantized.in_features, quantized.out_features)
    weight = dequantize_4bit(quantized.weight.data, quantized.weight.quant_state)
    linear.weight, linear.bias = torch.nn.Parameter(weight, False), quantized.bias
    return linear


@pytest.mark.parametrize(("bits", "share", "error"), [("8bit", 1 / 4, 0.1), ("4bit", 1 / 8, 0.5)])
def test_a_teacher_of_few_bits(
    bits, share, error, adapter, base, distill_settings, tmp_path
) -> None:
    """Layers of fewer bytes, nearly the same losses; an adapter stays beside such a base."""
    load = {"dtype": "float32", "max_length": MAX_LENGTH, "device": "cpu"}
    tokenizer = load_tokenizer(base)
    for name in (base, adapter):
        whole, small = (load_model(name, tokenizer, bits=b, **load) for b in ("none", bits))
        expected, found = logits(whole), logits(small)
        assert 0 < (found - expected).norm() < error * expected.norm()
        sizes = [
            next(p for n, p in m.named_parameters() if "up_proj" in n).nbytes
            for m in (whole, small)
        ]
        assert sizes[1] == share * sizes[0]
        if bits == "4bit" and name == base:
            ours, theirs = (m.model.layers[0].mlp.up_proj for m in (small, whole))
            # NF4's error for normally distributed weights; the layers add it up.
            difference = in_32_bits(ours).weight - theirs.weight
            share_lost = (difference.norm() / theirs.weight.norm()).item()
            assert share_lost == pytest.approx(0.09, rel=0.1)
    settings = {**distill_settings, "teacher": adapter, "kd": "dskd", "max_steps": 1}
    for folder in ("none", bits):
        chosen = {"teacher_quantization": folder, "output": tmp_path / folder}
        assert cli("distill", **settings, **chosen) == 0
    ((found,), (expected,)) = (log_of(tmp_path / folder) for folder in (bits, "none"))
    for name in ("kd", "ot"):
        assert found[name] == pytest.approx(expected[name], rel=0.05)
        assert found[name] != expected[name]


def test_few_bits_without_their_package(lora_settings, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("cot2align.train.adapters.is_bitsandbytes_available", lambda: False)
    for setting, value, bits in (("load_in_4bit", "true", 4), ("teacher_quantization", "8bit", 8)):
        assert cli("distill", **lora_settings, output=tmp_path / "out", **{setting: value}) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"error: weights of {bits} bits need the package bitsandbytes: pip")
