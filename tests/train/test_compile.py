"""torch.compile of the student's body: one graph, whatever the losses read of it; trackers."""

from __future__ import annotations

import os

import pytest
import torch

from cot2align.train.config import DistillConfig, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import build_distiller
from cot2align.train.losses.mined import TokenAligner
from cot2align.train.models import body_of, load_tokenizer
from tests.conftest import cli, log_of


@pytest.mark.parametrize(
    ("lora_r", "kds"), [(0, ("none", "kl", "uld", "mined", "dskd")), (2, ("uld",))]
)
def test_every_loss_with_a_compiled_student(
    lora_r, kds, distill_settings, workspace, tmp_path
) -> None:
    """Losses and gradients as without; aot_eager traces as inductor does, and compiles nothing."""
    torch.compiler.reset()
    for kd in kds:
        teacher = workspace.sibling if kd == "kl" else workspace.teacher
        changed = {"teacher": teacher, "kd": kd, "token_maps": str(tmp_path), "lora_r": lora_r}
        settings = {**distill_settings, **changed, "output": "unused", "device": "cpu"}
        config = build(DistillConfig, settings)
        tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
        aligner = TokenAligner(*tokenizers, config.token_maps) if kd == "mined" else None
        distiller = build_distiller(config, *tokenizers, aligner)
        encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
        rows = read_rows(config.train)[:4]
        examples, _ = encode_rows(rows, *encoders, same_vocabulary=kd == "kl", align=aligner)
        batch = collate(examples)
        trained = [p for p in distiller.parameters() if p.requires_grad]

        def terms(distiller=distiller, batch=batch, trained=trained) -> list[torch.Tensor]:
            loss = distiller(**batch)["loss"]
            return [loss, *torch.autograd.grad(loss, trained)]

        expected = terms()
        body_of(distiller.student).compile(backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(terms(), expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


@pytest.mark.skipif(
    os.environ.get("COMPILE_ALL") != "1", reason="COMPILE_ALL=1 compiles for a minute"
)
def test_a_compiled_run(distill_settings, tmp_path) -> None:
    for name in ("true", "false"):
        settings = {**distill_settings, "torch_compile": name}
        assert cli("distill", output=tmp_path / name, **settings) == 0
    for ours, theirs in zip(log_of(tmp_path / "true"), log_of(tmp_path / "false"), strict=True):
        for name in ("loss", "ce", "ot", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("comet_ml", "the package of 'comet_ml' is not installed"),
    ],
)
def test_trackers_are_refused(given, said, distill_settings, tmp_path, capsys) -> None:
    assert cli("distill", output=tmp_path / "out", report_to=given, **distill_settings) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
