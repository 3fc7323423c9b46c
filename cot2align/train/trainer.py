"""The commands `sft` and `distill`: a run from its config to the saved folder.

`DistillTrainer` is transformers.Trainer with a Distiller for a model. What it changes: the global
batch's counts hold rows beside tokens; the loss's parts are logged with the loss, over the same
steps; the projections have their own learning rate; only the student and the projections are saved;
the evaluation loss is a mean over tokens and rows. Everything else (accumulation, processes,
schedules, resume) is Trainer's.

The output folder: a plain `from_pretrained` student with its tokenizer, `projections.safetensors`,
`config.yaml` (resolved, can be run again), `metrics.jsonl` (one JSON line per log entry),
checkpoints. With `generate_rows` every evaluation also generates, greedily, for rows of `eval`, or
of each file of `generate_data`: `eval_rougeL` and `eval_exact_match`, and the texts in `samples/`.
With `keep_best` the weights of the best evaluation wait in `best/` and are what the run ends with;
`evaluation.json` names it.

A checkpoint is written beside the others and renamed when it is whole. SIGTERM lets the step end,
saves, and leaves with exit code 143. Before every optimizer step the losses of its forward passes
are read, once, on all processes together: one that is not finite stops the run, or skips the step.

At logged steps `ot/grad_norm` is the norm of dL_CCoT / d(student's last hidden states) over the
whole batch, unweighted, and `ot/grad_ratio` its ratio to the cross entropy's: one more backward
pass of the two losses, none of the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import AutocastKwargs, compare_versions, gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, Sampler
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_deepspeed_zero3_enabled,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging as transformers_logging

from cot2align.kernels.ot_loss import choose_backend
from cot2align.train.callbacks import (
    SHOWN_PARTS,
    LogCheckpoints,
    MetricsFile,
    Progress,
    Termination,
)
from cot2align.train.checkpoint import (
    BEST_FILE,
    BEST_FOLDER,
    PARTIAL_FOLDER,
    checkpoints,
    gathered_state,
    load_state,
    merge_adapter,
    save_state,
    unsharded,
    whole_folder,
    written,
)
from cot2align.train.config import (
    CONFIG_FILE,
    DistillConfig,
    SFTConfig,
    TrainConfig,
    UserError,
    nearest,
    to_yaml,
    without_effect,
)
from cot2align.train.data import (
    Cuts,
    Example,
    LengthSampler,
    Row,
    TextEncoder,
    collate,
    encode_rows,
    read_rows,
)
from cot2align.train.distiller import Distiller, build_distiller, one_vocabulary
from cot2align.train.evaluate import predict, samples_table
from cot2align.train.files import write_whole
from cot2align.train.generation import Generator
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.mined import TokenAligner
from cot2align.train.models import FLASH, Tokenizer, device_of, load_tokenizer
from cot2align.train.origin import check_training
from cot2align.train.teacher import TeacherCache

SAMPLES_FOLDER = "samples"
SIGTERM_EXIT = 128 + signal.SIGTERM


def run(config: SFTConfig | DistillConfig) -> dict[str, Any]:
    """Train and save; returns {"output", "steps", "seconds", "log": all log entries, in order}.

    Raises UserError for whatever is wrong with the config, the files or the models, before
    training, and for a loss that is not finite or a file that cannot be written, in it. Raises
    SystemExit(143) after a SIGTERM.
    """
    main_process = int(os.environ.get("RANK", "0")) == 0
    checkpoint = _open_output(config, main_process)
    if main_process:
        for line in without_effect(config):
            print(line)
    made = set_up(config, checkpoint)
    trainer, arguments = made.trainer, made.trainer.args
    rationales = sum(bool(row.rationale) for row in made.rows)
    if isinstance(config, DistillConfig) and config.ot and not config.cst and not rationales:
        raise UserError(
            f"'cst' is off and no row of {config.train} has a rationale: none has a crossed pair"
        )
    if main_process:
        print(f"{len(made.examples)} rows to train on, {rationales} with a rationale")
        print(
            f"{rows_per_step(arguments)} rows per step: batch_size {config.batch_size} x "
            f"gradient_accumulation {config.gradient_accumulation} x "
            f"{arguments.world_size} processes",
            flush=True,
        )
        if isinstance(trainer.model.kd, DSKD):
            attends = trainer.model.kd.query is not None
            print(f"dskd {'by cross-model attention' if attends else 'with one vocabulary'}")
        for name, cut in made.cuts.items():
            if cut.prompts or cut.responses:
                print(f"{name} texts {cut}", flush=True)
    start = time.perf_counter()
    with trainer.termination, trainer.progress:
        if checkpoint is None or not trainer.load_if_finished(checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    if trainer.state.global_step < trainer.state.max_steps:
        if main_process:
            print(f"stopped by SIGTERM after step {trainer.state.global_step}; --resume continues")
        trainer.accelerator.wait_for_everyone()
        raise SystemExit(SIGTERM_EXIT)
    with written("the model"):
        if config.keep_best == "none":
            trainer.save_model(config.output)
        elif main_process:
            trainer.keep_best(config.keep_best)
    if config.lora_r and config.merge and main_process:
        merge_adapter(config, made.tokenizers[0])
    # A process that leaves while another still talks to it makes gloo abort that one.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if "wandb" in config.report_to and main_process:
        import wandb

        wandb.finish()  # Or the next training of this process would go on in this one's run.
    log = trainer.state.log_history
    if main_process:
        losses = next((entry for entry in reversed(log) if "loss" in entry), {})
        shown = ", ".join(f"{name} {losses[name]:.4g}" for name in SHOWN_PARTS if name in losses)
        print(f"{trainer.state.global_step} steps in {seconds:.1f} s: {shown} -> {config.output}")
    if trainer.termination.requested:  # After the last step; a study must not go on.
        raise SystemExit(SIGTERM_EXIT)
    return {
        "output": config.output,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "log": log,
    }


@dataclass(frozen=True)
class SetUp:
    """A training before its first step; tokenizers: the student's and, in distillation, the
    teacher's."""

    trainer: DistillTrainer
    tokenizers: list[Tokenizer]
    rows: list[Row]
    examples: list[Example]
    cuts: dict[str, Cuts]
    align: TokenAligner | None
    cache: TeacherCache | None


def set_up(config: SFTConfig | DistillConfig, checkpoint: str | None = None) -> SetUp:
    """Read the rows and load the models; checkpoint: to go on from. Raises UserError for whatever
    is wrong with the config, the files or the models."""
    rows = read_rows(config.train)
    eval_rows = read_rows(config.eval) if config.eval else None
    if eval_rows and config.texts == "cot" and not any(row.rationale for row in eval_rows):
        raise UserError(
            f"no row of {config.eval} has a rationale, and texts is 'cot'; 'eval: none' leaves "
            "them out"
        )
    samples = _samples(config)
    transformers_logging.set_verbosity_error()
    set_seed(config.seed)
    load = partial(load_tokenizer, trust_remote_code=config.trust_remote_code)
    arguments = training_arguments(config)
    if checkpoint is not None:
        _check_rows_per_step(arguments, checkpoint)
    same_tokens, align, cache = False, None, None
    if isinstance(config, DistillConfig):
        if config.teacher_cache:
            cache = TeacherCache(config.teacher_cache, checksums=config.teacher_cache_checksums)
            cache.check(config)
        tokenizers = [load(config.student), load(config.teacher_cache or config.teacher)]
        same_tokens = one_vocabulary(config, *tokenizers)
        if config.ot:
            _check_backend(config, arguments.device)
    else:
        tokenizers = [load(config.model)]

    encoders = [TextEncoder.of(config, tokenizer) for tokenizer in tokenizers]
    # The others find what MinED needs on disk.
    with arguments.main_process_first():
        if isinstance(config, DistillConfig) and config.kd == "mined":
            align = TokenAligner(tokenizers[0], tokenizers[1], config.token_maps)
        options: dict[str, Any] = {"same_vocabulary": same_tokens, "align": align}
        examples, cuts = encode_rows(rows, *encoders, texts=config.texts, **options)
        eval_examples = None
        if eval_rows is not None:
            eval_examples, _ = encode_rows(eval_rows, *encoders, texts=config.texts, **options)
    if cache is not None:
        cache.check_texts(rows, examples, config.texts, config.train)
        if eval_rows and eval_examples and config.eval:
            cache.check_texts(eval_rows, eval_examples, config.texts, config.eval)
    teacher_tokenizer = tokenizers[1] if len(tokenizers) == 2 else None
    trainer = DistillTrainer(
        build_distiller(config, tokenizers[0], teacher_tokenizer, align),
        arguments,
        config,
        tokenizers[0],
        train_dataset=examples,
        eval_dataset=eval_examples,
        cache=cache,
        samples=samples,
    )
    return SetUp(trainer, tokenizers, rows, examples, cuts, align, cache)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Trainer's settings; of several GPUs one process takes one. Raises UserError for what needs a
    GPU where there is none."""
    on_cpu = device_of(config.device).type == "cpu"
    if config.fp16 and on_cpu:
        raise UserError("'fp16' needs a GPU: its loss scale is made for one; on a CPU use 'bf16'")
    if config.attn_implementation == FLASH and on_cpu:
        raise UserError(f"attn_implementation {FLASH} needs a GPU, none was found")
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
        fp16=config.fp16,
        use_cpu=on_cpu,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=config.checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps if evaluates else None,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        report_to=_trackers(config) or "none",
        disable_tqdm=False,
    )
    if arguments.n_gpu > 1:
        print(f"1 of {arguments.n_gpu} GPUs is used; torchrun starts a process for each")
        arguments._n_gpu = 1  # not nn.DataParallel
    return arguments


def rows_per_step(arguments: TrainingArguments) -> int:
    """Of all processes and forward passes of a full optimizer step."""
    a = arguments
    return a.train_batch_size * a.gradient_accumulation_steps * a.world_size


class ForwardPass(NamedTuple):
    """What is kept of a forward pass until its optimizer step: its rows, its mean cross entropy,
    and what `Distiller.forward` returned, detached."""

    ids: list[str]
    loss: Tensor
    ce: Tensor
    parts: dict[str, Tensor]
    metrics: dict[str, Tensor]


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
        samples: dict[str, list[Row]] | None = None,
    ):
        self.config = config
        self.student_tokenizer = tokenizer
        self.samples = samples or {}
        self.tokens = "response"
        if isinstance(config, DistillConfig) and config.ot:
            self.tokens = config.tokens
        self.layout = "padded"
        if config.padding_free:
            # Flash attention tells texts apart in one row only, and needs no mask there.
            self.layout = "joined" if config.attn_implementation == FLASH else "packed"
        self._parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=args.device))
        self._steps = 0
        self._passes: list[ForwardPass] = []
        self._events: list[dict[str, Any]] = []
        self._grad_norms: dict[str, Tensor] = {}
        self.termination = Termination()
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(
                collate,
                tokens=self.tokens,
                layout=self.layout,
                crossed=isinstance(config, DistillConfig)
                and config.kd == "none"
                and not config.cst,
                cached=None if cache is None else cache.states,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[MetricsFile(), LogCheckpoints(), self.termination],
        )
        self.remove_callback(ProgressCallback)
        self.progress = Progress()
        self.add_callback(self.progress)

        if self.is_fsdp_enabled:
            self._prepare_for_fsdp()
        if self.is_deepspeed_enabled:
            self._prepare_for_deepspeed()

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager:
        """Autocast around every forward pass: accelerate's own is in the forward method of a model
        that is prepared for training without FSDP2, and nowhere else."""
        # A cache would keep a whole copy of the weights that FSDP2 shards.
        kept = bool(cache_enabled) and not self.is_fsdp_enabled
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=kept))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        examples = cast(Sequence[Example], self.train_dataset)
        lengths = [max(len(pair.student.ids) for pair in example.texts) for example in examples]
        rows, seed = rows_per_step(self.args), self.args.seed
        # Not by set_epoch, which does not reach it when two processes resume within an epoch.
        return LengthSampler(lengths, rows, seed, lambda: int(self.state.epoch or 0))

    def load_if_finished(self, checkpoint: str) -> bool:
        """Load the checkpoint of the last step; Trainer would go on with one step more."""
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        per_epoch = len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps
        steps = self.config.max_steps or math.ceil(self.config.epochs * math.ceil(per_epoch))
        if state.global_step < steps:
            return False
        state.max_steps = state.global_step
        self.state = state
        self._load_from_checkpoint(checkpoint)
        return True

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
        """Trainer's loss; in training, the parts and metrics are kept for the step's end."""
        self.model.measure_gradients = self._next_step_is_logged()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            assert isinstance(num_items_in_batch, Tensor)
            self._passes.append(
                ForwardPass(
                    inputs["ids"],
                    loss.detach(),
                    outputs["parts"]["ce"] * num_items_in_batch[0] / inputs["num_tokens"],
                    outputs["parts"],
                    outputs["metrics"],
                )
            )
        return (loss, outputs) if return_outputs else loss

    def _prepare_for_fsdp(self) -> None:
        if self.config.generate_rows:
            raise UserError("'generate_rows' does not go with FSDP; evaluate the saved model")
        if not self.accelerator.is_fsdp2:
            raise UserError("FSDP needs fsdp_version: 2, see recipes/accelerate/fsdp2.yaml")
        # Before these, weights of one group had one dtype, the frozen ones as well, or were cast.
        for package, needed in (("torch", "2.8"), ("accelerate", "1.13")):
            if compare_versions(package, "<", needed):
                raise UserError(f"FSDP needs {package} {needed} or newer")
        # It would round what `forward` returns, and keep no weight in float32; autocast does.
        self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _prepare_for_deepspeed(self) -> None:
        if self.config.on_nan == "skip":
            raise UserError("'on_nan: skip' does not go with DeepSpeed, which steps by itself")
        if self.config.generate_rows and is_deepspeed_zero3_enabled():
            raise UserError("'generate_rows' does not go with ZeRO-3; evaluate the saved model")
        from deepspeed.zero import register_external_parameter

        # The losses read them outside the modules that own them, where ZeRO-3 would not gather.
        for model in filter(None, (self.model.student, self.model.teacher)):
            for module in (model.get_output_embeddings(), model.get_input_embeddings()):
                for parameter in module.parameters():
                    register_external_parameter(self.model, parameter)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; a loss that is skipped is left out of its sums."""
        loss = super().training_step(*args, **kwargs)
        return loss if self.config.on_nan == "stop" else loss.nan_to_num(0.0, 0.0, 0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; an entry of training gets the parts, averaged over its steps, and the metrics."""
        if "loss" in logs:
            parts = self._drain()
            if self.config.on_nan == "skip":
                # Trainer's mean counts the skipped steps.
                del logs["loss"]
                logs |= {"loss": self._objective(parts)} if parts else {}
            logs |= parts
            logs |= {name: norm.item() for name, norm in self._grad_norms.items()}
            if self.state.global_step == 1:
                logs["rows_per_step"] = rows_per_step(self.args)
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        due = self.control.should_log
        for event in self._events:
            self.log(event)
        self._events.clear()
        # An event is not the entry that was due.
        self.control.should_log = due
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _step_is_sound(self, grad_norm: Tensor | float | None) -> bool:
        """Reads the step's losses, on all processes alike; those of a sound step are kept for the
        next log entry.

        False: the step is to be skipped. Raises UserError where it is to stop the run.
        """
        passes, self._passes = self._passes, []
        broken = torch.stack([p.loss for p in passes]).isfinite().logical_not()
        spiked = torch.stack([p.ce for p in passes]) > self._spike_limit()
        norm = torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=broken.device)
        norm = unsharded(norm)
        # With float16 that is for the loss scale to handle.
        overflow = norm.isfinite().logical_not() & (not self.config.fp16)
        requested = torch.tensor(self.termination.requested, device=broken.device)
        flags = torch.stack([broken.any(), overflow, spiked.any(), requested]).int()
        if self.args.world_size > 1:
            flags = self.accelerator.gather(flags[None]).amax(0)
        any_broken, any_overflow, any_spiked, self.termination.agreed = map(bool, flags.tolist())
        if any_broken or any_overflow:
            self._refuse_step(passes, broken.tolist() if any_broken else None)
            return False
        if any_spiked:
            found = [(p.ids, p.ce.item()) for p, s in zip(passes, spiked, strict=True) if s]
            found = gather_object(found)
            rows = ", ".join(row for ids, _ in found for row in ids)
            self._events.append({"spike/ce": max(ce for _, ce in found), "spike/rows": rows})
        for p in passes:
            for name, value in p.parts.items():
                self._parts[name] += value
            for name, value in p.metrics.items():
                self._metrics[name] += value
        self._steps += 1
        return True

    def _refuse_step(self, passes: list[ForwardPass], broken: list[bool] | None) -> None:
        """Stop the run, or drop the step's gradients; broken: the passes to blame, None: all."""
        found = [
            (p.ids, [name for name, value in p.parts.items() if not value.isfinite()])
            for p, is_broken in zip(passes, broken or [True] * len(passes), strict=True)
            if is_broken
        ]
        found = gather_object(found)
        rows = ", ".join(row for ids, _ in found for row in ids)
        parts = ", ".join(dict.fromkeys(name for _, names in found for name in names))
        parts = parts if broken else "gradient"
        if self.config.on_nan == "stop":
            raise UserError(
                f"step {self.state.global_step + 1}: {parts} not finite, rows {rows}; "
                "'on_nan: skip' leaves such steps out"
            )
        self._events.append({"skipped/parts": parts, "skipped/rows": rows})
        # The loss scale skips the step by itself, and has to see why.
        if not self.config.fp16:
            self.model.zero_grad()

    def _spike_limit(self) -> float:
        if not self.config.spike_factor:
            return math.inf
        logged = (entry["ce"] for entry in reversed(self.state.log_history) if "ce" in entry)
        return self.config.spike_factor * next(logged, math.inf)

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
        parts = {"loss": self._objective(parts), **parts}
        if self.samples:
            parts |= self._generate_samples()
        if self.config.keep_best != "none":
            self._save_if_best(
                -parts["loss"] if self.config.keep_best == "loss" else parts["rougeL"]
            )
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in parts.items()},
            num_samples=round(rows),
        )

    def _generate_samples(self) -> dict[str, float]:
        """ROUGE-L, exact match and repetition of greedy texts, of several files the mean over the
        files; on all processes, the main one writes the texts."""
        config = self.config
        is_cot = config.generate_prompt == "cot"
        generator = Generator(
            self.model.student,
            self.student_tokenizer,
            prompt_format=config.prompt_format,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.eval_batch_size,
        )
        with self.compute_loss_context_manager():
            scores = {n: predict(generator, rows, is_cot) for n, rows in self.samples.items()}
        if self.args.should_save:
            folder = Path(config.output, SAMPLES_FOLDER)
            folder.mkdir(exist_ok=True)
            tables = [
                f"{name}\n\n{samples_table(rows, scores[name])}"
                for name, rows in self.samples.items()
            ]
            write_whole(folder / f"step-{self.state.global_step}.md", "\n".join(tables))
        names = {"rougeL": "rouge_l", "exact_match": "exact_match", "repetition": "repetition"}
        by_set = {
            name: {set_: fmean(s[key] for s in scored) for set_, scored in scores.items()}
            for name, key in names.items()
        }
        means = {name: fmean(values.values()) for name, values in by_set.items()}
        if len(scores) > 1:
            means |= {f"rougeL/{set_}": value for set_, value in by_set["rougeL"].items()}
        return means

    def _save_if_best(self, value: float) -> None:
        """Keep the weights in best/ if no evaluation before this step had a higher value."""
        note = Path(self.config.output, BEST_FOLDER, BEST_FILE)
        # A run that had ended, and goes on, has them in its output folder.
        kept = note if note.is_file() else Path(self.config.output, BEST_FILE)
        best = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        step = self.state.global_step
        if not math.isfinite(value) or (best.get("step", step) < step and best["value"] >= value):
            return
        with written("the best weights"):
            self.save_model(str(note.parent))
            if self.args.should_save:
                write_whole(note, json.dumps({"step": step, "value": value}) + "\n")

    def keep_best(self, measure: str) -> None:
        """End with the weights of best/; they are there already where the run had ended."""
        best, output = Path(self.config.output, BEST_FOLDER), Path(self.config.output)
        if (best / BEST_FILE).is_file():
            with whole_folder(output) as folder:
                shutil.copytree(best, folder, dirs_exist_ok=True)
            shutil.rmtree(best)
        if not (output / BEST_FILE).is_file():
            raise UserError(f"no evaluation had a finite {measure}; the checkpoints are kept")
        note = json.loads((output / BEST_FILE).read_text(encoding="utf-8"))
        print(f"kept the weights of step {note['step']}, {measure} {abs(note['value']):.4g}")

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(Path(self.config.output, PARTIAL_FOLDER))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, partial = Path(self.config.output), Path(self._get_output_dir())
        step = self.state.global_step
        try:
            with written(f"the checkpoint of step {step}"):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                whole = output / f"checkpoint-{step}"
                shutil.rmtree(whole, ignore_errors=True)
                os.replace(partial / whole.name, whole)
                for old in checkpoints(output)[: -self.config.checkpoints]:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)

    def _objective(self, parts: dict[str, float]) -> float:
        """Eq. 16 of its logged terms."""
        alpha = self.model.alpha
        distillation = self.model.ot_weight * parts.get("ot", 0.0) + parts.get("kd", 0.0)
        return (1 - alpha) * parts["ce"] + alpha * distillation

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student and the projections; called on all processes, the main one writes."""
        if self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, gathered_state(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        with whole_folder(Path(output_dir or self.config.output)) as folder:
            save_state(self.model, folder, state_dict)
            self.student_tokenizer.save_pretrained(folder)
            (folder / CONFIG_FILE).write_text(to_yaml(self.config), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_state(self.model, Path(resume_from_checkpoint))

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        total = super()._get_grad_norm(model, grad_norm)
        self._grad_norms = {}
        if not self._step_is_sound(total):
            return None
        if total is not None and self._next_step_is_logged():
            groups = {
                "student": [*self.model.student.parameters()],
                "projections": [*self.model.projection_parameters().values()],
            }
            norms = {
                name: unsharded(get_total_norm([p.grad for p in parameters if p.grad is not None]))
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
        if not self._steps:
            return {}
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


def _open_output(config: SFTConfig | DistillConfig, main_process: bool) -> str | None:
    """Refuse a folder in use, create a new one; returns the checkpoint to resume from."""
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {config.output} is a file, expected a folder")
    if config.resume:
        found = checkpoints(folder)
        if found:
            check_training(config, found[-1])
        return str(found[-1]) if found else None
    if main_process and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"output folder {config.output} is not empty; choose another, or --resume to continue"
        )
    return None


def _check_rows_per_step(arguments: TrainingArguments, checkpoint: str) -> None:
    log = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).log_history
    here = rows_per_step(arguments)
    there = next((entry["rows_per_step"] for entry in log if "rows_per_step" in entry), here)
    if there != here:
        raise UserError(
            f"{checkpoint} cannot be continued: a step has {there:.0f} rows there and {here} here, "
            f"by batch_size, gradient_accumulation and {arguments.world_size} processes"
        )


def _check_backend(config: DistillConfig, device: torch.device) -> None:
    try:
        choose_backend(config.ot_backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"setting 'ot_backend': {error}") from None


def _trackers(config: TrainConfig) -> list[str]:
    names = [name for name in config.report_to if name != "none"]
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = nearest(name, INTEGRATION_TO_CALLBACK)
            raise UserError(f"setting 'report_to': unknown tracker {name!r}{near}")
        if name not in installed:
            raise UserError(f"setting 'report_to': the package of {name!r} is not installed")
    return names


def _samples(config: TrainConfig) -> dict[str, list[Row]]:
    """The rows to generate for, by the name of their file."""
    if not config.generate_rows:
        return {}
    files = [Path(file) for file in config.generate_data or [config.eval or ""]]
    return {
        "/".join(file.with_suffix("").parts[-2:]): read_rows(str(file))[: config.generate_rows]
        for file in files
    }
