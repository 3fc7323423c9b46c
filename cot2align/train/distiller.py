"""The module that is trained: student, projections, and the frozen teacher beside them.

    L = (1 - alpha) L_CE + alpha (ot_weight L_CCoT + L_KD)                (eq. 16)

`forward(batch)` runs both models over all texts of the batch and returns the loss, its parts and
the diagnostics: one forward, as data-parallel and sharding wrappers need it. L_CE and L_KD are
divided by the student response tokens, L_CCoT by the rows, of the *global* batch: all processes,
all accumulation steps. So losses and gradients depend on neither. Without a teacher this is
fine-tuning: L = L_CE.

`build_distiller` makes it from a config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cot2align.kernels.ot_loss import OTSettings
from cot2align.train.adapters import add_lora, base_of
from cot2align.train.config import DistillConfig, SFTConfig, UserError
from cot2align.train.losses import KDLoss
from cot2align.train.losses.cross_cot import CrossCoT
from cot2align.train.losses.cross_entropy import check_liger, cross_entropy, liger_cross_entropy
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.kl import kl, same_vocabulary
from cot2align.train.losses.mined import MinED, TokenAligner, Vocabulary, shared_tokens
from cot2align.train.losses.uld import uld
from cot2align.train.models import Tokenizer, body_of, load_model, width
from cot2align.train.teacher import load_shell, teacher_states
from cot2align.train.token_states import TokenStates, check_layers, token_states


class Distiller(nn.Module):
    """Student and teacher with the objective between them.

    alpha: weight of the distillation terms; cross_cot: L_CCoT with its projections, or None; kd:
    L_KD of (student, teacher), summed over tokens, or None.
    """

    # Tells Trainer to pass the global batch's counts to forward.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        alpha: float = 0.0,
        ot_weight: float = 1.0,
        cross_cot: CrossCoT | None = None,
        kd: Callable[[TokenStates, TokenStates], KDLoss] | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.alpha = alpha
        self.ot_weight = ot_weight
        self.cross_cot = cross_cot
        self.kd = kd
        # Or Liger's.
        self.cross_entropy: Callable[[TokenStates], tuple[Tensor, Tensor]] = cross_entropy
        self.measure_gradients = False
        # The layers that FSDP2 shards one by one. All else (heads, embeddings, projections) belongs
        # to this module, and is whole wherever `forward` reads it.
        self._no_split_modules = sorted(
            {
                name
                for model in (student, teacher)
                if model is not None
                for name in model._no_split_modules or ()
            }
        )
        self.register_state_dict_post_hook(_without_teacher)
        self.register_load_state_dict_post_hook(_teacher_not_missing)
        self.train(self.training)

    def forward(
        self,
        *,
        student: dict[str, Any],
        text_rows: Sequence[int],
        text_is_cot: Sequence[bool],
        num_tokens: int,
        num_rows: int,
        ids: Sequence[str] = (),
        teacher: dict[str, Any] | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Any]:
        """The batch of `data.collate` -> {"loss", "parts", "metrics"}.

        num_items_in_batch: [response tokens, rows] of the global batch; None: this batch's own.
        ids: of the rows, not used here.
        loss: float32 scalar, this batch's share of eq. 16. parts: its terms ("ce", "kd", "ot",
        "ot/cst", "ot/crc"), detached shares too. metrics: name -> [sum, count], diagnostics to be
        averaged; with `measure_gradients`, also "gradient/ce" and "gradient/ot" -> [sum of squares,
        1], of the terms' gradients at the student's last hidden states.
        """
        if num_items_in_batch is None:
            num_items_in_batch = torch.tensor([num_tokens, num_rows])
        counts = num_items_in_batch.to(student["input_ids"].device, torch.float32)
        all_tokens, all_rows = counts.unbind()

        layers = () if self.cross_cot is None else self.cross_cot.layers
        ours = token_states(self.student, student, layers)
        theirs = None
        if self.teacher is not None and teacher is not None:
            with torch.no_grad():
                theirs = teacher_states(self.teacher, teacher, layers)
        with _not_in_float16(counts.device.type):
            return self._losses(ours, theirs, text_rows, text_is_cot, all_tokens, all_rows)

    def _losses(
        self,
        ours: TokenStates,
        theirs: TokenStates | None,
        text_rows: Sequence[int],
        text_is_cot: Sequence[bool],
        all_tokens: Tensor,
        all_rows: Tensor,
    ) -> dict[str, Any]:
        # Gradients are measured by a further way through the graph, and Liger's allows one.
        aligned = self.cross_cot is not None and theirs is not None
        measured = aligned and self.measure_gradients and self.training
        total, correct = (cross_entropy if measured else self.cross_entropy)(ours)
        ce = total / all_tokens
        loss = ce
        # A copy: with several processes Trainer scales the loss in place.
        parts: dict[str, Tensor] = {"ce": ce.detach().clone()}
        metrics = {
            "token_accuracy": torch.stack([correct, torch.full_like(correct, len(ours.targets))])
        }
        if theirs is not None:
            distillation = torch.zeros_like(ce)
            if self.kd is not None:
                kd = self.kd(ours, theirs)
                parts["kd"] = kd.total.detach() / all_tokens
                parts |= {name: value / all_tokens for name, value in kd.parts.items()}
                metrics |= kd.metrics
                distillation = distillation + kd.total / all_tokens
            if self.cross_cot is not None:
                ot = self.cross_cot(ours, theirs, text_rows, text_is_cot, all_rows)
                parts |= {"ot": ot.total.detach(), **ot.parts}
                metrics |= ot.metrics
                distillation = distillation + self.ot_weight * ot.total
                if measured:
                    for name, term in (("ce", ce), ("ot", ot.total)):
                        metrics[f"gradient/{name}"] = _squared_gradient(term, ours.layers["last"])
            loss = (1 - self.alpha) * ce + self.alpha * distillation
        return {"loss": loss, "parts": parts, "metrics": metrics}

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def projection_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and saved beside the student, by name."""
        parameters = {} if self.cross_cot is None else dict(self.cross_cot.named_parameters())
        if isinstance(self.kd, nn.Module):
            parameters |= {f"kd.{name}": p for name, p in self.kd.named_parameters()}
        return parameters


def _without_teacher(
    distiller: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    """The teacher is in no checkpoint, whoever writes it."""
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]


def _teacher_not_missing(distiller: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("teacher.")]


def _not_in_float16(device: str) -> AbstractContextManager:
    """The losses' autocast: none in place of float16.

    Their gradients are made in the forward pass, summed over tokens: no loss scale reaches them in
    time, and the head's can pass 65504.
    """
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _squared_gradient(term: Tensor, states: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(term, states, retain_graph=True, allow_unused=True)
    square = torch.zeros_like(term) if gradient is None else gradient.float().square().sum()
    return torch.stack([square, torch.ones_like(square)])


def build_distiller(
    config: SFTConfig | DistillConfig,
    student_tokenizer: Tokenizer,
    teacher_tokenizer: Tokenizer | None = None,
    aligner: TokenAligner | None = None,
) -> Distiller:
    """Load the models that the config names and put the objective between them; MinED needs the
    `aligner` of the tokenizers. Raises UserError."""
    load = partial(
        load_model,
        max_length=config.max_length,
        trust_remote_code=config.trust_remote_code,
        device=config.device,
        attention=config.attn_implementation,
        packed=config.padding_free,
    )
    if config.liger:
        check_liger(config.device)
    name = config.model if isinstance(config, SFTConfig) else config.student
    if config.lora_r and base_of(name) is not None:
        raise UserError(
            f"{name!r} is an adapter, and 'lora_r' asks for another on top of it; merge it first"
        )
    bits = "4bit" if config.load_in_4bit else "none"
    student = load(name, student_tokenizer, dtype="float32", bits=bits)
    if isinstance(config, SFTConfig):
        return _prepared(config, Distiller(student))
    assert teacher_tokenizer is not None
    if config.teacher_cache:
        teacher = load_shell(Path(config.teacher_cache), config.trust_remote_code)
    else:
        teacher = load(
            config.teacher,
            teacher_tokenizer,
            dtype=config.teacher_dtype,
            bits=config.teacher_quantization,
        )
    # The projections are the same however the teacher came: to load an adapter draws numbers.
    torch.manual_seed(config.seed)
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
    kd = kd_loss(
        config,
        student,
        teacher,
        same_tokens=one_vocabulary(config, student_tokenizer, teacher_tokenizer),
        ends=(student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id),
        aligner=aligner,
    )
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
    """Whether L_KD compares two models at the same tokens: with DSKD, where their tokenizers have
    the same ids and split texts by the same rules. Raises UserError where it would have to but
    cannot."""
    if config.kd == "kl":
        same_vocabulary(student, teacher)
        return True
    if config.kd != "dskd" or student.get_vocab() != teacher.get_vocab():
        return False
    ours, theirs = student.backend_tokenizer, teacher.backend_tokenizer
    return all(
        _state(getattr(ours, stage)) == _state(getattr(theirs, stage))
        for stage in ("normalizer", "pre_tokenizer", "model")
    )


def _state(stage: Any) -> bytes | None:
    return None if stage is None else stage.__getstate__()


def kd_loss(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    same_tokens: bool,
    ends: tuple[int, int],
    aligner: TokenAligner | None = None,
) -> Callable[[TokenStates, TokenStates], KDLoss] | None:
    """L_KD as the config names it. Raises UserError for models that it cannot take.

    same_tokens: the models are compared at the same tokens, see `one_vocabulary`. ends: their
    end-of-sequence tokens. aligner: of the two tokenizers, for MinED.
    """
    temperature = config.temperature or (1.0 if config.kd == "uld" else 2.0)
    if config.kd == "kl":
        return partial(kl, divergence=config.divergence, temperature=temperature, ends=ends)
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
            temperature=temperature,
        )
    if config.kd == "mined":
        assert aligner is not None
        return MinED(aligner.student_ids, temperature=temperature, equal=aligner.equal)
    if config.kd == "uld":
        return partial(uld, temperature=temperature)
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


def _prepared(config: SFTConfig | DistillConfig, distiller: Distiller) -> Distiller:
    if config.lora_r:
        distiller.student = add_lora(distiller.student, config)  # type: ignore[assignment]
    if config.liger:
        distiller.cross_entropy = liger_cross_entropy(distiller.student)
    if config.gradient_checkpointing:
        student = distiller.student
        # transformers renamed the method in 5.x and warns about the old name.
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)()
    if config.torch_compile:
        body_of(distiller.student).compile()
    return distiller
