"""The command `check`: what a run needs and what its data are like, before anything is spent.

`check(config)` takes the config of `sft` or `distill`, reads all rows, loads the models and returns
what it found. Memory is predicted for one process and the largest batch of a shuffled epoch:

    weights      of student, teacher (of a cached one, its head and embeddings) and projections
    gradients    of what is trained; with several processes a second copy, in DDP's buckets
    optimizer    AdamW's two averages
    activations  what the student's forward pass leaves for the backward pass, and what that adds
    teacher run  the most that is alive in the teacher's forward pass; of a cache, the states read
    logits       a chunk of them and the gradients of the head, see token_states
    OT           the tokens, projected ones and gradients of the kernel, and one problem's matrices

The two forward passes are measured: every tensor that they make is counted, at three lengths of at
most 256 tokens, and a parabola through these gives the bytes of any batch. The others are formulas.
Not all items are alive together: the peak is the largest of the four moments teacher run, losses,
backward, optimizer. Not counted: the libraries themselves, a CUDA context, what an allocator loses.
Then two steps are run on that batch, with the optimizer, and timed; nothing is written but MinED's
maps, which the run then finds.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from cot2align.train import token_states
from cot2align.train.config import (
    CheckConfig,
    DistillConfig,
    RecipeCheck,
    SFTConfig,
    UserError,
    without_effect,
)
from cot2align.train.data import (
    Cuts,
    Example,
    Row,
    Text,
    model_batch,
    places,
)
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.mined import Vocabulary, shared_tokens
from cot2align.train.models import Tokenizer, body_states, width
from cot2align.train.study import stage_to_check
from cot2align.train.teacher import own_precision
from cot2align.train.token_states import model_inputs
from cot2align.train.trainer import DistillTrainer, set_up

LONGEST_MEASURED = 256
SHARE_OF_MEMORY = 0.9  # that a suggested batch may take
SAMPLE = 1000  # rows that tokens per character are counted on


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch as memory sees it, of each side: the longest text, the rows and their width, the
    tokens whose states are packed, and the response's."""

    length: int
    rows: int
    width: int
    tokens: int
    responses: int
    teacher_length: int
    teacher_rows: int
    teacher_width: int
    teacher_tokens: int
    teacher_responses: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Predicted bytes: of every item, and of the moments; the peak is the largest of these."""

    items: dict[str, int]
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.moments.values())


def run(config: CheckConfig | RecipeCheck) -> dict[str, Any]:
    """Print what `check` found; returns it. Raises UserError."""
    if isinstance(config, RecipeCheck):
        with stage_to_check(config) as (checked, notes):
            print("\n".join(notes), flush=True)
            return run(checked)
    found = check(config.checked(), processes=config.processes, steps=2 if config.dry_run else 0)
    print("\n".join(lines(found)))
    return found


def check(
    config: SFTConfig | DistillConfig, *, processes: int = 1, steps: int = 2
) -> dict[str, Any]:
    """What a run of `config` needs; raises UserError for what it would refuse.

    processes: data-parallel ones. steps: of the dry run. Returns {"parameters", "memory": Memory,
    "data", "vocabulary" and "alignment" (in distillation), "dry_run": [seconds] and "used": bytes
    (with steps), "batch_size" and "gradient_accumulation": suggested, "notes"}.
    """
    notes = without_effect(config)
    with tempfile.TemporaryDirectory() as nowhere:  # Trainer makes its output folder
        config = dataclasses.replace(config, output=nowhere)
        return {**_check(config, processes, steps), "notes": notes}


def _check(config: SFTConfig | DistillConfig, processes: int, steps: int) -> dict[str, Any]:
    made = set_up(config)
    trainer, rows, examples = made.trainer, made.rows, made.examples
    distiller = trainer.model
    distiller.train()

    found: dict[str, Any] = {
        "parameters": {
            name: _counts(module)
            for name, module in (("student", distiller.student), ("teacher", distiller.teacher))
            if module is not None
        },
        "data": _data(rows, examples, made.cuts),
    }
    projections = sum(p.numel() for p in distiller.projection_parameters().values())
    found["parameters"]["projections"] = (projections, projections)
    if isinstance(config, DistillConfig):
        found["vocabulary"] = _vocabulary(made.tokenizers, rows, config.texts)
        if made.align is not None:
            found["alignment"] = _aligned_share(examples)

    predict = _Predictor(trainer, examples, processes)
    found["memory"] = predict(config.batch_size)
    available = _available(trainer.args.device)
    found["available"] = available
    rows_per_step = config.batch_size * config.gradient_accumulation
    fitting = [
        size
        for size in range(1, min(rows_per_step, len(examples)) + 1)
        if rows_per_step % size == 0 and predict(size).peak <= SHARE_OF_MEMORY * available
    ]
    found["batch_size"] = max(fitting, default=0)
    found["gradient_accumulation"] = rows_per_step // max(fitting, default=1)
    if steps:
        some: Any = largest(examples, config.batch_size, trainer.layout)
        batch = trainer.data_collator(some)
        found["dry_run"], found["used"] = _dry_run(trainer, batch, steps)
        epochs = len(examples) / (rows_per_step * processes) * config.epochs
        found["steps"] = config.max_steps or round(epochs)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """What `check` found, for people."""
    memory: Memory = found["memory"]
    data = found["data"]
    shown = [*found["notes"], "parameters"]
    for name, (count, trained) in found["parameters"].items():
        if count:
            shown.append(f"  {name:<22}{count / 1e6:12.2f} million, {trained / 1e6:.2f} trained")
    shown += ["data", f"  {data['rows']} rows, {data['rationales']} with a rationale"]
    shown += [f"  {name} texts {cut}" for name, cut in data["cuts"].items()]
    if "vocabulary" in found:
        v = found["vocabulary"]
        shown += [
            "vocabularies",
            f"  student {v['student']} tokens, teacher {v['teacher']}, {v['shared']} shared",
            "  response tokens per character: "
            f"student {v['student_rate']:.3f}, teacher {v['teacher_rate']:.3f}",
        ]
    if "alignment" in found:
        shown.append(f"  mined aligns {found['alignment']:.1%} of the student's response tokens")
    shown.append("memory of one process, predicted")
    shown += [f"  {name:<22}{size / 2**20:12.1f} MiB" for name, size in memory.items.items()]
    moment = max(memory.moments, key=memory.moments.__getitem__)
    shown.append(f"  {f'peak, at {moment}':<22}{memory.peak / 2**20:12.1f} MiB")
    shown.append(f"  {'available':<22}{found['available'] / 2**20:12.1f} MiB")
    if found["batch_size"]:
        shown.append(
            f"suggested: batch_size {found['batch_size']}, gradient_accumulation "
            f"{found['gradient_accumulation']} (the same rows per step)"
        )
    else:
        shown.append("suggested: a smaller model or max_length; one row does not fit")
    if "dry_run" in found:
        seconds = found["dry_run"]
        shown.append(
            f"dry run: steps of {', '.join(f'{s:.2f}' for s in seconds)} s on a largest batch; "
            f"{found['steps']} steps take {found['steps'] * seconds[-1] / 3600:.2f} h at most"
        )
        if found["used"] is not None:
            shown.append(f"dry run used {found['used'] / 2**20:.1f} MiB")
    return shown


class CountedBytes(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most that ever were."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.alive = self.peak = 0
        self._counted = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._counted:
                    self._counted.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return made

    def _free(self, identity: int, size: int) -> None:
        self._counted.discard(identity)
        self.alive -= size


class _Predictor:
    """batch size -> Memory."""

    def __init__(self, trainer: DistillTrainer, examples: Sequence[Example], processes: int):
        self.trainer, self.examples, self.processes = trainer, examples, processes
        self.distiller = cast(Any, trainer.model)
        self.config = cast(Any, trainer.config)
        distills = isinstance(trainer.config, DistillConfig)
        self.cached = distills and self.config.teacher_cache is not None
        longest = shape(largest(examples, 1))
        self.student_run = self._measured(self.distiller.student, longest.length, True)
        self.teacher_run: Callable[[int, int], list[int]] = lambda rows, width: [0]
        if self.distiller.teacher is not None and not self.cached:
            self.teacher_run = self._measured(self.distiller.teacher, longest.teacher_length, False)

    def __call__(self, batch_size: int) -> Memory:
        layout, tokens = self.trainer.layout, self.trainer.tokens
        size = shape(largest(self.examples, batch_size, layout), layout, tokens)
        student, teacher = self.distiller.student, self.distiller.teacher
        projections = [*self.distiller.projection_parameters().values()]
        trained = _bytes(p for p in (*student.parameters(), *projections) if p.requires_grad)
        activations, recomputed = self.student_run(size.rows, size.width)
        items = {
            "student weights": _bytes((*student.parameters(), *student.buffers())),
            "teacher weights": _bytes((*teacher.parameters(), *teacher.buffers()))
            if teacher is not None
            else 0,
            "projections": _bytes(projections),
            "gradients": trained * (2 if self.processes > 1 else 1),
            "optimizer": 2 * trained,
            "activations": activations + recomputed,
            "teacher run": self.teacher_run(size.teacher_rows, size.teacher_width)[0],
            "logits": 0,
            "OT": 0,
        }
        head_gradient, items["logits"] = self._logits(size)
        if self.distiller.cross_cot is not None:
            items["OT"] = self._ot(size)
        packed = 4 * width(student) * size.tokens
        if teacher is not None:
            layers = len({"last", *(self.config.layers if self.config.ot else ())})
            states = layers * teacher.dtype.itemsize * width(teacher) * size.teacher_tokens
            packed += states
            if self.cached:
                items["teacher run"] = states
        # DDP keeps its buckets; gradients outlive a step's first backward passes.
        buckets = trained if self.processes > 1 else 0
        held = trained if self.config.gradient_accumulation > 1 else 0
        names = ("student weights", "teacher weights", "projections", "optimizer")
        base = sum(items[name] for name in names) + buckets
        forward = base + held + activations
        moments = {
            "teacher run": forward + items["teacher run"],
            "losses": forward + packed + items["logits"] + items["OT"],
            "backward": forward + recomputed + 2 * head_gradient,
            "optimizer": base + trained,
        }
        return Memory(items, moments)

    def _logits(self, size: Shape) -> tuple[int, int]:
        """Bytes of all gradients of the head that the losses hold, and with these of a chunk."""
        head: Any = self.distiller.student.get_output_embeddings()
        vocabulary = head.weight.shape[0]
        values = size.responses * vocabulary
        calls = 1
        if self.distiller.kd is not None:
            calls = 2
            teacher_head: Any = self.distiller.teacher.get_output_embeddings()
            theirs = teacher_head.weight.shape[0]
            kd = values + size.teacher_responses * theirs
            if isinstance(self.distiller.kd, DSKD):
                kd = 2 * max(values, size.teacher_responses * theirs)
            values = max(values, kd)
        chunk = 4 * min(values, token_states.LOGITS_PER_CHUNK)
        gradient = 4 * head.weight.numel() if head.weight.requires_grad else 0
        return calls * gradient, calls * gradient + round(1.2 * chunk)

    def _ot(self, size: Shape) -> int:
        """Tokens of both sides, projected ones, their gradients, and a problem's matrices."""
        d, D = width(self.distiller.student), width(self.distiller.teacher)
        tokens = 2 * size.tokens * d + size.teacher_tokens * (D + 2 * d)
        layers = len(self.config.layers)
        return 4 * (layers * tokens + 3 * size.length * size.teacher_length)

    def _measured(
        self, model: PreTrainedModel, longest: int, trains: bool
    ) -> Callable[[int, int], list[int]]:
        """(rows, width) -> bytes: what a forward pass that trains leaves, and what its backward
        pass adds at most (checkpoints are computed again), without gradients of weights; else the
        most in a forward pass that does not train."""
        longest = min(longest, LONGEST_MEASURED)
        lengths = sorted({max(4, longest // 4), max(6, longest // 2), max(8, longest)})
        shapes = []
        known = [*model.parameters(), *model.buffers()]
        trained = [p for p in known if p.requires_grad][:1]
        found = []
        for length in lengths:
            # Two lengths, so that the attention's mask is made, as in any batch.
            texts = [Text([0] * n, 1) for n in (length, length - 1)]
            batch = model_batch(texts, layout=self.trainer.layout)
            shapes.append(batch["input_ids"].shape)
            inputs = self.trainer._prepare_inputs(model_inputs(batch))
            device = self.trainer.args.device
            precision = nullcontext() if trains else own_precision(model, device)
            with (
                torch.set_grad_enabled(trains),
                CountedBytes([*known, *inputs.values()]) as counted,
            ):
                with self.trainer.compute_loss_context_manager(), precision:
                    last = body_states(model, **inputs)[-1]
                if not trains:
                    found.append([counted.peak])
                    continue
                counted.peak = left = counted.alive
                # One gradient makes the backward pass go through all layers.
                torch.autograd.grad(last, trained, torch.ones_like(last))
                found.append([left, counted.peak - left])
            del last

        def parts(rows: int, width: int) -> list[int]:
            return [1, rows * width, rows * width**2]

        powers = torch.tensor([parts(*size) for size in shapes], dtype=torch.float64)
        fit = torch.linalg.solve(powers, torch.tensor(found, dtype=torch.float64))

        def of(rows: int, width: int) -> list[int]:
            values = torch.tensor(parts(rows, width), dtype=torch.float64) @ fit
            return [max(0, round(value)) for value in values.tolist()]

        return of


def shape(examples: Sequence[Example], layout: str = "padded", tokens: str = "response") -> Shape:
    """The Shape of a batch of these rows; layout: see `data.places`; tokens: the positions whose
    states are packed."""
    texts = [pair for example in examples for pair in example.texts]
    sides = []
    for side in ([pair.student for pair in texts], [pair.teacher for pair in texts]):
        present = [text for text in side if text is not None]
        lengths = [len(text.ids) for text in present]
        _, rows, width = places(lengths, layout) if present else ((), 0, 0)
        responses = sum(len(text.response_ids) for text in present)
        packed = sum(lengths) if tokens == "all" else responses
        sides.append((max(lengths, default=0), rows, width, packed, responses))
    return Shape(*sides[0], *sides[1])


def largest(examples: Sequence[Example], batch_size: int, layout: str = "padded") -> list[Example]:
    """Of the batches of one shuffled epoch, that with the most tokens, padding counted or not."""
    order = random.Random(0).sample(range(len(examples)), len(examples))
    batches = (
        [examples[i] for i in order[first : first + batch_size]]
        for first in range(0, len(order), batch_size)
    )

    def tokens(batch: Sequence[Example]) -> int:
        of = shape(batch, layout)
        return of.rows * of.width + of.teacher_rows * of.teacher_width

    return max(batches, key=tokens)


def _dry_run(
    trainer: DistillTrainer, batch: dict[str, Any], steps: int
) -> tuple[list[float], int | None]:
    """Seconds of every step, and on a GPU the most bytes that were in use."""
    optimizer = trainer.create_optimizer()
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(trainer.config.gradient_accumulation):
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                loss = trainer.model(**inputs)["loss"]
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, trainer.config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return seconds, used


def _data(
    rows: Sequence[Row], examples: Sequence[Example], cuts: dict[str, Cuts]
) -> dict[str, Any]:
    return {
        "rows": len(examples),
        "rationales": sum(bool(row.rationale) for row in rows),
        "cuts": cuts,
    }


def _vocabulary(tokenizers: Sequence[Tokenizer], rows: Sequence[Row], texts: str) -> dict[str, Any]:
    student, teacher = tokenizers
    try:
        shared = len(shared_tokens(Vocabulary(student), Vocabulary(teacher))[0])
    except UserError:
        shared = 0
    responses = [
        row.response(is_cot)
        for row in rows[:SAMPLE]
        for is_cot in (False, True)
        if texts in ("both", "cot" if is_cot else "standard") and (row.rationale or not is_cot)
    ]
    characters = sum(map(len, responses))
    rates = [
        sum(map(len, tokenizer(responses, add_special_tokens=False)["input_ids"])) / characters
        for tokenizer in tokenizers
    ]
    return {
        "student": len(student),
        "teacher": len(teacher),
        "shared": shared,
        "student_rate": rates[0],
        "teacher_rate": rates[1],
    }


def _aligned_share(examples: Sequence[Example]) -> float:
    places = [
        place for example in examples for pair in example.texts for place in pair.alignment or ()
    ]
    return sum(place >= 0 for place in places) / len(places)


def _counts(module: nn.Module) -> tuple[int, int]:
    """Parameters, and those of them that are trained."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _available(device: torch.device) -> int:
    """Bytes that this process has or may get: of the GPU's memory, or of the system's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 2**63
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])
