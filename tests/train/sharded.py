"""`torchrun --nproc-per-node 2 -m tests.train.sharded STUDENT TEACHER ROWS FOLDER`: student and
teacher sharded as accelerate's FSDP2 shards them, against one process with the whole batch.

Trainer cannot run it on a CPU, where accelerate makes DDP of FSDP.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cot2align.train.checkpoint import gathered_state, load_state, save_state
from cot2align.train.config import DistillConfig, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import build_distiller
from cot2align.train.models import load_tokenizer


def shard(distiller):
    """What accelerate does for `fsdp_version: 2`, in place."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True
    )
    return fsdp2_prepare_model(accelerator, distiller)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(
    student: str, teacher: str, train: str, folder: Path, tolerance: float = 1e-5, **settings
) -> None:
    """Loss, gradients, one optimizer step, saved and loaded state; raises where they differ."""
    rank = dist.get_rank()
    paths = {"student": student, "teacher": teacher, "train": train, "output": str(folder)}
    sizes = {"max_length": 256, "max_prompt_length": 160, "ot_iters": 20, "ot_tol": 0}
    config = build(DistillConfig, {**paths, **sizes, "device": "cpu", **settings})
    torch.manual_seed(0)
    tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
    distiller = build_distiller(config, *tokenizers)
    alone = copy.deepcopy(distiller)
    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    examples, _ = encode_rows(read_rows(train)[:6], *encoders)
    batch = collate(examples)
    counts = torch.tensor([batch["num_tokens"], batch["num_rows"]])

    expected = alone(**batch)["loss"]
    expected.backward()
    sharded = shard(distiller)
    # Two layers each, and the rest.
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) == 5
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert sum(p.to_local().numel() for p in sharded.parameters()) < 0.6 * sum(
        p.numel() for p in alone.parameters()
    )
    sharded.measure_gradients = True
    mine = collate(examples[:4] if rank == 0 else examples[4:])
    loss = sharded(**mine, num_items_in_batch=counts)["loss"] * dist.get_world_size()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / dist.get_world_size(), expected, rtol=tolerance, atol=0)

    trained = {n: p for n, p in alone.named_parameters() if p.requires_grad}
    ours = {n: p for n, p in sharded.named_parameters() if p.requires_grad}
    assert ours.keys() == trained.keys()
    for name, p in trained.items():
        error = (whole(ours[name].grad) - p.grad).norm()
        assert error <= tolerance * p.grad.norm() + 1e-9, (name, error / p.grad.norm())

    for parameters in (trained, ours):
        torch.optim.SGD(parameters.values(), lr=0.1).step()
    for name in get_model_state_dict(sharded):
        assert not name.startswith("teacher")
    state = gathered_state(sharded)
    assert not any(name.startswith("teacher") for name in state)
    assert bool(state) == (rank == 0)
    if rank == 0:
        for name, p in trained.items():
            torch.testing.assert_close(state[name], p, rtol=1e-4, atol=0.1 * tolerance)
        save_state(sharded, folder, state)
    dist.barrier()
    with torch.no_grad():
        for p in ours.values():
            p.zero_()
    load_state(sharded, folder)
    for name, p in trained.items():
        ours_whole = whole(ours[name].detach())
        torch.testing.assert_close(ours_whole, p.detach(), rtol=1e-4, atol=0.1 * tolerance)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    *names, output = sys.argv[1:]
    for kind, changed in {
        "ot": {"kd": "uld"},
        "dskd": {"kd": "dskd", "projection": "per-layer", "gradient_checkpointing": True},
        # The teacher's states differ in their last bits between batches of another shape.
        "lora": {"kd": "uld", "lora_r": 2, "teacher_dtype": "bfloat16", "tolerance": 2e-2},
    }.items():
        check(*names, Path(output, kind), **changed)
        print(kind, "passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
