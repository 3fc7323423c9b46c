"""Many processes: what FSDP2 shards, and the shipped configurations of accelerate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from cot2align.train import trainer
from cot2align.train.config import UserError
from tests.conftest import in_two_processes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_two_processes_with_sharded_models_are_one(workspace, tmp_path) -> None:
    paths = [workspace.student, workspace.teacher, workspace.train, str(tmp_path)]
    in_two_processes("tests.train.sharded", *paths)
    before = AutoModelForCausalLM.from_pretrained(workspace.student)
    for name in ("ot", "dskd"):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert after.lm_head.weight is after.transformer.wte.weight
        assert after.state_dict().keys() == before.state_dict().keys()
        assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
        assert (tmp_path / name / "projections.safetensors").exists()
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")


@pytest.mark.parametrize(
    ("generate_rows", "is_fsdp2", "old", "said"),
    [
        (1, True, "", "'generate_rows' does not go with FSDP"),
        (0, False, "", "FSDP needs fsdp_version: 2"),
        (0, True, "torch", r"FSDP needs torch 2\.8 or newer"),
        (0, True, "accelerate", r"FSDP needs accelerate 1\.13 or newer"),
    ],
)
def test_what_cannot_be_sharded_is_refused(generate_rows, is_fsdp2, old, said, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "compare_versions", lambda package, *_: package == old)
    made = SimpleNamespace(
        config=SimpleNamespace(generate_rows=generate_rows),
        accelerator=SimpleNamespace(is_fsdp2=is_fsdp2),
    )
    with pytest.raises(UserError, match=said):
        trainer.DistillTrainer._prepare_for_fsdp(made)


def test_configurations_are_shipped() -> None:
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind
