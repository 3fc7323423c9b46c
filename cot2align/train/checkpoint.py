"""What a run leaves in its folder, and reads back: student, projections, checkpoints.

A folder's files appear when all of them are written. Of a sharded distiller every process takes
part; the main one writes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from cot2align.train.adapters import save_student, saved_tensors, set_adapter_aside
from cot2align.train.config import TrainConfig, UserError
from cot2align.train.distiller import Distiller
from cot2align.train.files import refused_write
from cot2align.train.models import Tokenizer, load_model, one_line

PROJECTIONS_FILE = "projections.safetensors"
PARTIAL_FOLDER = "partial"
BEST_FOLDER = "best"
BEST_FILE = "evaluation.json"


def gathered_state(distiller: Distiller) -> dict[str, Tensor] | None:
    """What is saved, whole, by its name in `distiller`; None where nothing is sharded.

    All processes have to call it; the main one gets the copy, on its CPU, the others an empty one.
    """
    if not any(isinstance(p, DTensor) for p in distiller.student.parameters()):
        return None
    names = distiller.state_dict().keys()
    adapters_only = isinstance(distiller.student, PeftModel)
    tensors = [*distiller.named_parameters(), *distiller.named_buffers()]
    state = {}
    for name, tensor in tensors:
        if name in names and (tensor.requires_grad or not adapters_only):
            whole = unsharded(tensor.detach())
            if dist.get_rank() == 0:
                state[name] = whole.cpu()
    return state


def save_state(distiller: Distiller, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write student and projections; state: `gathered_state`."""
    student = None
    projections: dict[str, Tensor] = {**distiller.projection_parameters()}
    if state is not None:
        prefix = "student."
        student = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        projections = {
            name: state[name if name.startswith("kd.") else f"cross_cot.{name}"]
            for name in projections
        }
    save_student(distiller.student, folder, student)
    if projections:
        tensors = {name: p.detach().contiguous().cpu() for name, p in projections.items()}
        save_file(tensors, folder / PROJECTIONS_FILE)


@torch.no_grad()
def load_state(distiller: Distiller, folder: Path) -> None:
    """Read what `save_state` wrote; a sharded distiller takes its shards, on all processes."""
    pairs = list(saved_tensors(distiller.student, str(folder)))
    projections = distiller.projection_parameters()
    if projections:
        saved = load_file(folder / PROJECTIONS_FILE)
        pairs += [(parameter, saved[name]) for name, parameter in projections.items()]
    for ours, theirs in pairs:
        if isinstance(ours, DTensor):
            theirs = distribute_tensor(theirs.to(ours.device), ours.device_mesh, ours.placements)
        ours.copy_(theirs)


def unsharded(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def merge_adapter(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Turn the output folder into a plain model; the adapter goes to its own folder in it.

    The base is loaded anew, in float32: the one that was trained may be sharded or quantised.
    """
    folder = Path(config.output)
    adapter = set_adapter_aside(folder)
    model = load_model(
        str(adapter),
        tokenizer,
        dtype="float32",
        max_length=config.max_length,
        trust_remote_code=config.trust_remote_code,
    )
    with written("the merged model"), whole_folder(folder) as partial:
        model.save_pretrained(partial)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; removing an old one may have been cut short."""
    found = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write files in; they appear in `folder` when all of them are written."""
    partial = folder / PARTIAL_FOLDER
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def written(what: str) -> Iterator[None]:
    """Files that cannot be written are the user's to hear of, in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = refused_write(error) or one_line(error)
        raise UserError(f"{what} cannot be written: {reason}") from None
