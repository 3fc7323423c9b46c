"""Half precision: no loss gives an infinity, and what cannot run is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from cot2align.kernels.ot_loss import fused_ot_loss
from cot2align.train import check, trainer
from cot2align.train import distiller as distiller_module
from cot2align.train.__main__ import main
from cot2align.train.config import DistillConfig, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import build_distiller
from cot2align.train.losses.mined import TokenAligner
from cot2align.train.models import FLASH, load_tokenizer
from tests.conftest import cli, options


@pytest.mark.parametrize("kd", ["none", "kl", "uld", "mined", "dskd"])
def test_no_loss_overflows_in_float16(kd, distill_settings, workspace, tmp_path) -> None:
    """States as large as in big models' outlier channels, many tokens: the head's gradient in
    float16 would pass 65504."""
    teacher = workspace.sibling if kd == "kl" else workspace.teacher
    half = {"teacher": teacher, "kd": kd, "teacher_dtype": "float16", "token_maps": str(tmp_path)}
    settings = {**distill_settings, **half, "output": "unused", "device": "cpu"}
    config = build(DistillConfig, settings)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    aligner = TokenAligner(*tokenizers, config.token_maps) if kd == "mined" else None
    distiller = build_distiller(config, *tokenizers, aligner)
    with torch.no_grad():
        distiller.student.transformer.ln_f.bias.fill_(4000.0)
        # All but uniform, so that every token has a gradient.
        distiller.student.transformer.wte.weight.mul_(0.001)
    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    rows = read_rows(config.train)
    examples, _ = encode_rows(rows, *encoders, same_vocabulary=kd == "kl", align=aligner)
    batch = collate(examples)

    def terms() -> list[torch.Tensor]:
        distiller.zero_grad()
        outputs = distiller(**batch)
        outputs["loss"].backward()
        return [outputs["loss"], *(p.grad for p in distiller.parameters() if p.requires_grad)]

    with torch.autocast("cpu", torch.float16):
        half_terms = terms()
    assert all(term.isfinite().all() for term in half_terms)
    assert half_terms[0].dtype == torch.float32
    assert half_terms[0].item() == pytest.approx(terms()[0].item(), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.01, 10.0])
def test_ot_of_large_half_precision_states(dtype, epsilon) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 40, 16), (2, 50, 24), (24, 16))
    inputs = [torch.randn(*shape, generator=generator) * 2e4 for shape in shapes]
    student, teacher, projection = (
        tensor.clamp(-6e4, 6e4).to(dtype).requires_grad_() for tensor in inputs
    )
    loss = fused_ot_loss(student, teacher, projection, epsilon=epsilon)
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (student, teacher, projection))


def test_all_forward_passes_have_autocast(distill_settings, workspace, tmp_path, monkeypatch):
    """Where accelerate does not put it: around FSDP2's, in `check`, and in generation."""
    seen: dict[str, set[bool]] = {}

    def watched(owner: object, name: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args, **kwargs):
            is_bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu") and is_bf16)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    watched(trainer.DistillTrainer, "compute_loss")
    watched(trainer, "predict")
    mixed = {**distill_settings, "bf16": "true", "max_steps": 1}
    sampled = {"eval": workspace.test, "generate_rows": 1, "max_new_tokens": 2}
    assert cli("distill", output=tmp_path / "run", **mixed, **sampled) == 0
    watched(distiller_module.Distiller, "forward")
    watched(check, "body_states")
    assert cli("check", **mixed) == 0
    names = ("compute_loss", "predict", "forward", "body_states")
    assert seen == {name: {True} for name in names}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fp16": "true"}, "'fp16' needs a GPU"),
        ({"fp16": "true", "bf16": "true"}, "'bf16' and 'fp16' are both on"),
        ({"attn_implementation": FLASH}, "flash_attention_2 takes no float32"),
        ({"attn_implementation": FLASH, "bf16": "true"}, "flash_attention_2 needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do this")
def test_refused_on_a_cpu(changed, said, distill_settings, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delattr(trainer, "build_distiller")  # before any weights are loaded
    assert cli("distill", output=tmp_path / "out", **distill_settings, **changed) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_flash_attention_comes_after_what_is_checked_on_the_cpu(distill_settings, monkeypatch):
    def set_attention(model, attention):
        model.config._attn_implementation = attention
        monkeypatch.delattr(type(model), "forward")

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", set_attention)
    packed = {"attn_implementation": FLASH, "bf16": "true", "padding_free": "true"}
    config = build(DistillConfig, {**distill_settings, **packed, "output": "unused"})
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    for model in (distiller.student, distiller.teacher):
        assert model.config._attn_implementation == FLASH


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device would be the GPU")
def test_the_device_auto_without_a_gpu(distill_settings) -> None:
    """bf16 is a GPU's to Trainer, unless it is told that there is none."""
    settings = {**distill_settings, "bf16": "true", "dry_run": "off", "device": "auto"}
    assert main(["check", *options(**settings)]) == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_both_models(attention, distill_settings) -> None:
    settings = {**distill_settings, "output": "unused", "attn_implementation": attention}
    config = build(DistillConfig, settings)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    for model in (distiller.student, distiller.teacher):
        assert model.config._attn_implementation == attention
