"""Many processes: what FSDP2 shards, and the shipped configurations of accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

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


def test_configurations_are_shipped() -> None:
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind
