"""The commands `sft` and `distill`: a run from its config to the saved folder.

`DistillTrainer` is transformers.Trainer with a Distiller for a model. What it changes: the global
batch's counts hold rows beside tokens; the loss's parts are logged with the loss, over the same
steps; the projections have their own learning rate; only the student and the projections are saved;
the evaluation loss is a mean over tokens and rows. Everything else (accumulation, processes,
schedules, resume) is Trainer's.

The output folder: a plain `from_pretrained` student with its tokenizer, `projections.safetensors`,
`config.yaml` (resolved, can be run again), `metrics.jsonl` (one JSON line per log entry),
checkpoints.

At logged steps `ot/grad_norm` is the norm of dL_CCoT / d(student's last hidden states) over the
whole batch, unweighted, and `ot/grad_ratio` its ratio to the cross entropy's: one more backward
pass of the two losses, none of the model.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging as transformers_logging

from cot2align.kernels.ot_loss import OTSettings, choose_backend
from cot2align.train.config import (
    DistillConfig,
    SFTConfig,
    TrainConfig,
    UserError,
    to_yaml,
    without_effect,
)
from cot2align.train.data import (
    Example,
    LengthSampler,
    TextEncoder,
    collate,
    encode_rows,
    read_rows,
)
from cot2align.train.distiller import Distiller
from cot2align.train.losses import KDLoss
from cot2align.train.losses.cross_cot import CrossCoT
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.kl import kl, same_vocabulary
from cot2align.train.losses.mined import MinED, TokenAligner, Vocabulary, shared_tokens
from cot2align.train.losses.uld import uld
from cot2align.train.models import Tokenizer, check_packing, load_model, load_tokenizer, width
from cot2align.train.teacher import TeacherCache, load_shell
from cot2align.train.token_states import TokenStates, check_layers

PROJECTIONS_FILE = "projections.safetensors"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


def run(config: SFTConfig | DistillConfig) -> dict[str, Any]:
    """Train and save; returns {"output", "steps", "seconds", "log": all log entries, in order}.

    Raises UserError for whatever is wrong with the config, the files or the models, before
    training.
    """
    main_process = int(os.environ.get("RANK", "0")) == 0
    checkpoint = _open_output(config, main_process)
    if main_process:
        for line in without_effect(config):
            print(line)
    rows = read_rows(config.train)
    eval_rows = read_rows(config.eval) if config.eval else None
    transformers_logging.set_verbosity_error()
    set_seed(config.seed)
    load = partial(load_tokenizer, trust_remote_code=config.trust_remote_code)
    arguments = training_arguments(config)
    teacher_tokenizer = None
    same_tokens = False
    align = None
    cache = None
    if isinstance(config, DistillConfig):
        student_tokenizer = load(config.student)
        if config.teacher_cache:
            cache = TeacherCache(config.teacher_cache, checksums=config.teacher_cache_checksums)
            cache.check(config)
        teacher_tokenizer = load(config.teacher_cache or config.teacher)
        same_tokens = one_vocabulary(config, student_tokenizer, teacher_tokenizer)
        _check_backend(config, arguments.device)
    else:
        student_tokenizer = load(config.model)

    encode = partial(
        encode_rows,
        student=_encoder(config, student_tokenizer),
        teacher=None if teacher_tokenizer is None else _encoder(config, teacher_tokenizer),
        texts=config.texts,
        same_vocabulary=same_tokens,
    )
    # The others find what MinED needs on disk.
    with arguments.main_process_first():
        if isinstance(config, DistillConfig) and config.kd == "mined":
            assert teacher_tokenizer is not None
            align = TokenAligner(student_tokenizer, teacher_tokenizer, config.token_maps)
        examples, cuts = encode(rows, align=align)
        eval_examples = None if eval_rows is None else encode(eval_rows, align=align)[0]
    if cache is not None:
        cache.check_texts(rows, examples, config.texts, config.train)
        if eval_rows and eval_examples and config.eval:
            cache.check_texts(eval_rows, eval_examples, config.texts, config.eval)
    if main_process:
        rationales = sum(bool(row.rationale) for row in rows)
        print(f"{len(examples)} rows to train on, {rationales} with a rationale", flush=True)
        for name, cut in cuts.items():
            if cut.prompts or cut.responses:
                print(f"{name} texts {cut}", flush=True)

    trainer = DistillTrainer(
        build_distiller(config, student_tokenizer, teacher_tokenizer, align),
        arguments,
        config,
        student_tokenizer,
        train_dataset=examples,
        eval_dataset=eval_examples,
        cache=cache,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model(config.output)
    # A process that leaves while another still talks to it makes gloo abort that one.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    log = trainer.state.log_history
    if main_process:
        losses = next((entry for entry in reversed(log) if "loss" in entry), {})
        shown = ", ".join(f"{name} {losses[name]:.4g}" for name in SHOWN_PARTS if name in losses)
        print(f"{trainer.state.global_step} steps in {seconds:.1f} s: {shown} -> {config.output}")
    return {
        "output": config.output,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "log": log,
    }


def build_distiller(
    config: SFTConfig | DistillConfig,
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer | None = None,
    aligner: TokenAligner | None = None,
) -> Distiller:
    """Load the models that the config names and put the objective between them; MinED needs the
    `aligner` of the tokenizers. Raises UserError."""
    load = partial(
        load_model, max_length=config.max_length, trust_remote_code=config.trust_remote_code
    )
    if isinstance(config, SFTConfig):
        return _prepared(config, Distiller(load(config.model, student_tokenizer, dtype="float32")))
    assert teacher_tokenizer is not None
    student = load(config.student, student_tokenizer, dtype="float32")
    if config.teacher_cache:
        teacher = load_shell(Path(config.teacher_cache), config.trust_remote_code)
    else:
        teacher = load(config.teacher, teacher_tokenizer, dtype=config.teacher_dtype)
    cross_cot = None
    if config.ot:
        for model in (student, teacher):
            check_layers(model.config.get_text_config().num_hidden_layers, config.layers)
        # After the seed and before anything else random, so that a run is its config.
        cross_cot = CrossCoT(
            width(student),
            width(teacher),
            terms=[term for term in ("cst", "crc") if getattr(config, term)],
            layers=config.layers,
            norm=config.ot_norm,
            per_layer=config.projection == "per-layer",
            settings=ot_settings(config),
        )
    same_tokens = one_vocabulary(config, student_tokenizer, teacher_tokenizer)
    kd = kd_loss(config, student, teacher, same_tokens=same_tokens, aligner=aligner)
    if isinstance(kd, DSKD) and config.t2s_init == "pseudo-inverse":
        ours, theirs = shared_tokens(Vocabulary(student_tokenizer), Vocabulary(teacher_tokenizer))
        kd.start_from_heads(
            student.get_output_embeddings().weight[ours],
            teacher.get_output_embeddings().weight[theirs],
        )
    distiller = Distiller(
        student,
        teacher,
        alpha=config.alpha,
        ot_weight=config.ot_weight,
        cross_cot=cross_cot,
        kd=kd,
    )
    return _prepared(config, distiller)


def one_vocabulary(config: DistillConfig, student: Tokenizer, teacher: Tokenizer) -> bool:
    """Whether L_KD compares two models at the same tokens. Raises UserError where it would have to
    but cannot."""
    if config.kd == "kl":
        same_vocabulary(student, teacher)
        return True
    return config.kd == "dskd" and student.get_vocab() == teacher.get_vocab()


def kd_loss(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    same_tokens: bool,
    aligner: TokenAligner | None = None,
) -> Callable[[TokenStates, TokenStates], KDLoss] | None:
    """L_KD as the config names it. Raises UserError for models that it cannot take.

    same_tokens: the models are compared at the same tokens, see `one_vocabulary`. aligner: of the
    two tokenizers, for MinED.
    """
    if config.kd == "kl":
        return partial(kl, divergence=config.divergence, temperature=config.temperature or 2.0)
    if config.kd == "dskd":
        for model in (student, teacher):
            table: Any = model.get_input_embeddings().weight
            if table.shape[1] != width(model):
                raise UserError(
                    f"kd dskd needs embeddings as wide as the hidden states, but "
                    f"{type(model).__name__} has a narrower table"
                )
        return DSKD(
            width(student),
            width(teacher),
            one_vocabulary=same_tokens,
            divergence=config.divergence,
            temperature=config.temperature or 2.0,
        )
    if config.kd == "mined":
        assert aligner is not None
        return MinED(aligner.student_ids, temperature=config.temperature or 2.0)
    if config.kd == "uld":
        return partial(uld, temperature=config.temperature or 1.0)
    return None


def ot_settings(config: DistillConfig) -> OTSettings:
    """The kernel's settings. Raises UserError for those that it refuses."""
    try:
        return OTSettings(
            epsilon=config.ot_epsilon,
            num_iters=config.ot_iters,
            tol=config.ot_tol,
            grad=config.ot_grad,
            backend=config.ot_backend,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Trainer's settings. Raises UserError for several GPUs in one process (nn.DataParallel)."""
    evaluates = config.eval is not None
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=config.device == "cpu",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=config.checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps if evaluates else None,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
    )
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs in one process: start one process each with torchrun or "
            "accelerate launch, or choose one with CUDA_VISIBLE_DEVICES"
        )
    return arguments


class DistillTrainer(Trainer):
    """Trainer over a Distiller; `tokenizer` is the student's, saved with it."""

    model: Distiller

    def __init__(
        self,
        model: Distiller,
        args: TrainingArguments,
        config: TrainConfig,
        tokenizer: Tokenizer,
        *,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        cache: TeacherCache | None = None,
    ):
        self.config = config
        self.student_tokenizer = tokenizer
        self._parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=args.device))
        self._steps = 0
        self._grad_norms: dict[str, Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(
                collate,
                tokens=config.tokens if isinstance(config, DistillConfig) else "response",
                packed=config.padding_free,
                cached=None if cache is None else cache.states,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[MetricsFile(), LogCheckpoints()],
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        examples = cast(Sequence[Example], self.train_dataset)
        lengths = [max(len(pair.student.ids) for pair in example.texts) for example in examples]
        args = self.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        # Not by set_epoch, which does not reach it when two processes resume within an epoch.
        return LengthSampler(lengths, rows, args.seed, lambda: int(self.state.epoch or 0))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Student: decayed and undecayed parameters; projections: decayed, with their own rate."""
        if self.optimizer is None:
            student = self.model.student
            decayed = set(self.get_decay_parameter_names(student))
            trained = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
            decay = {"weight_decay": self.args.weight_decay}
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in trained if n in decayed], **decay},
                {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
            ]
            if isinstance(self.config, DistillConfig):
                rate = {"lr": self.config.projection_learning_rate}
                projections = list(self.model.projection_parameters().values())
                groups.append({"params": projections, **rate, **decay})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, student)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> Tensor:
        counts = torch.tensor(
            [
                sum(batch["num_tokens"] for batch in batch_samples),
                sum(batch["num_rows"] for batch in batch_samples),
            ],
            device=device,
        )
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss; in training, the parts and metrics are added up for the next log
        entry."""
        self.model.measure_gradients = self._next_step_is_logged()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name, value in outputs["parts"].items():
                self._parts[name] += value
            for name, value in outputs["metrics"].items():
                self._metrics[name] += value
            self._steps += self.accelerator.sync_gradients
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; an entry of training gets the parts, meaned over its steps, and the metrics."""
        if "loss" in logs:
            logs |= self._drain()
            logs |= {name: norm.item() for name, norm in self._grad_norms.items()}
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and parts over the whole set, each divided by all of its tokens or rows.

        With several processes, rows that even out the last batch count twice.
        """
        self.model.eval()
        counts = torch.zeros(2, device=self.args.device)
        unit = torch.ones(2, device=self.args.device)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        for batch in dataloader:
            counts += torch.tensor([batch["num_tokens"], batch["num_rows"]], device=counts.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model(**self._prepare_inputs(batch), num_items_in_batch=unit)
            for name, value in outputs["parts"].items():
                sums[name] += value
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        values = torch.stack([*counts, *sums.values()])
        if self.args.world_size > 1:
            values = self.accelerator.gather(values[None]).sum(0)
        tokens, rows, *totals = values.tolist()
        parts = {
            name: total / (rows if name.startswith("ot") else tokens)
            for name, total in zip(sums, totals, strict=True)
        }
        alpha = self.model.alpha
        distillation = self.model.ot_weight * parts.get("ot", 0.0) + parts.get("kd", 0.0)
        parts = {"loss": (1 - alpha) * parts["ce"] + alpha * distillation, **parts}
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in parts.items()},
            num_samples=round(rows),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.config.output)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.student.save_pretrained(folder)
        self.student_tokenizer.save_pretrained(folder)
        projections = self.model.projection_parameters()
        if projections:
            tensors = {name: p.detach().contiguous().cpu() for name, p in projections.items()}
            save_file(tensors, folder / PROJECTIONS_FILE)
        (folder / CONFIG_FILE).write_text(to_yaml(self.config), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        student = self.model.student
        saved = type(student).from_pretrained(resume_from_checkpoint, dtype=student.dtype)
        student.load_state_dict(saved.state_dict())
        projections = self.model.projection_parameters()
        if projections:
            tensors = load_file(Path(resume_from_checkpoint) / PROJECTIONS_FILE)
            with torch.no_grad():
                for name, parameter in projections.items():
                    parameter.copy_(tensors[name])

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        total = super()._get_grad_norm(model, grad_norm)
        if total is not None and self._next_step_is_logged():
            groups = {
                "student": [*self.model.student.parameters()],
                "projections": [*self.model.projection_parameters().values()],
            }
            norms = {
                name: get_total_norm([p.grad for p in parameters if p.grad is not None])
                for name, parameters in groups.items()
                if parameters
            }
            # Clipping has scaled all of them, `total` is the norm from before it.
            clipped = torch.stack([*norms.values()]).norm().clamp(min=torch.finfo().tiny)
            self._grad_norms = {
                f"grad_norm/{name}": norm * total / clipped for name, norm in norms.items()
            }
        return total

    def _next_step_is_logged(self) -> bool:
        step = self.state.global_step + 1
        return step in (1, self.state.max_steps) or 0 in (
            step % self.args.logging_steps,
            step % self.args.save_steps,
        )

    def _drain(self) -> dict[str, float]:
        names = [*self._parts, *self._metrics]
        values = torch.cat([torch.stack([*self._parts.values()]), *self._metrics.values()])
        if self.args.world_size > 1:
            values = self.accelerator.gather(values[None]).sum(0)
        numbers = values.tolist()
        logs = {name: numbers[i] / self._steps for i, name in enumerate(self._parts)}
        pairs = zip(numbers[len(logs) :: 2], numbers[len(logs) + 1 :: 2], strict=True)
        measured = dict(zip(names[len(logs) :], pairs, strict=True))
        squares = {name: measured.pop(f"gradient/{name}", (0.0, 0.0))[0] for name in ("ce", "ot")}
        logs |= {name: total / count for name, (total, count) in measured.items() if count}
        if squares["ce"] > 0:
            logs["ot/grad_norm"] = squares["ot"] ** 0.5
            logs["ot/grad_ratio"] = (squares["ot"] / squares["ce"]) ** 0.5
        self._parts.clear()
        self._metrics.clear()
        self._steps = 0
        return logs


SHOWN_PARTS = ("loss", "ce", "kd", "ot", "eval_loss")


class Progress(ProgressCallback):
    """Trainer's progress bar, with the parts of the loss on it instead of whole log entries."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Show the last values of SHOWN_PARTS."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.4g}" for name in SHOWN_PARTS if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


class MetricsFile(TrainerCallback):
    """Writes every log entry to metrics.jsonl; a resumed run first drops what came after its
    checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Begin with the entries of the checkpoint, none in a new run."""
        if state.is_world_process_zero:
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            Path(args.output_dir, METRICS_FILE).write_text("".join(lines), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Append one entry."""
        if state.is_world_process_zero:
            with Path(args.output_dir, METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class LogCheckpoints(TrainerCallback):
    """Logs the last step and every checkpoint's: a resumed run begins where a log entry ends."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Ask for a log entry where Trainer's own schedule has none."""
        if state.global_step >= state.max_steps or state.global_step % args.save_steps == 0:
            control.should_log = True


def _open_output(config: TrainConfig, main_process: bool) -> str | None:
    """Refuse a folder in use, create a new one; returns the checkpoint to resume from."""
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {config.output} is a file, expected a folder")
    if config.resume:
        return _last_checkpoint(folder)
    if main_process and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"output folder {config.output} is not empty; choose another, or --resume to continue"
        )
    return None


def _check_backend(config: DistillConfig, device: torch.device) -> None:
    try:
        choose_backend(config.ot_backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"setting 'ot_backend': {error}") from None


def _last_checkpoint(folder: Path) -> str | None:
    # trainer_state.json is written last: without it the checkpoint was cut short.
    whole = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if newest is None else str(newest)


def _encoder(config: TrainConfig, tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(
        tokenizer,
        prompt_format=config.prompt_format,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
    )


def _prepared(config: SFTConfig | DistillConfig, distiller: Distiller) -> Distiller:
    if config.padding_free:
        name = config.student if isinstance(config, DistillConfig) else config.model
        check_packing(distiller.student, name)
        if isinstance(config, DistillConfig) and distiller.teacher and not config.teacher_cache:
            check_packing(distiller.teacher, config.teacher)
    if config.gradient_checkpointing:
        student = distiller.student
        # transformers renamed the method in 5.x and warns about the old name.
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)()
    return distiller
