"""From a config to the objective: every setting reaches its loss; what a step runs and logs."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cot2align.kernels.ot_loss import OTSettings
from cot2align.train.config import DIVERGENCES, DistillConfig, build
from cot2align.train.data import TextEncoder, collate, encode_rows, read_rows
from cot2align.train.distiller import Distiller, build_distiller
from cot2align.train.losses import cross_cot as cross_cot_module
from cot2align.train.losses.cross_cot import CrossCoT
from cot2align.train.losses.cross_entropy import cross_entropy
from cot2align.train.losses.dskd import DSKD
from cot2align.train.losses.kl import kl
from cot2align.train.losses.mined import MinED, TokenAligner
from cot2align.train.losses.uld import uld
from cot2align.train.models import body_of, load_tokenizer
from cot2align.train.token_states import TokenStates, token_states
from cot2align.train.trainer import DistillTrainer, training_arguments
from tests.conftest import cli, log_of, sample_rows, write_rows


class Built:
    """What a config makes: the distiller, and a batch of the first rows."""

    def __init__(self, settings: dict, rows: int = 5):
        self.config = build(DistillConfig, {"output": "unused", **settings, "device": "cpu"})
        config = self.config
        self.tokenizers = load_tokenizer(config.student), load_tokenizer(config.teacher)
        mined = config.kd == "mined"
        self.aligner = TokenAligner(*self.tokenizers, config.token_maps) if mined else None
        self.distiller = build_distiller(config, *self.tokenizers, self.aligner)
        encoders = [TextEncoder.of(config, tokenizer) for tokenizer in self.tokenizers]
        self.examples, _ = encode_rows(
            read_rows(config.train)[:rows],
            *encoders,
            same_vocabulary=config.kd == "kl",
            align=self.aligner,
        )
        self.batch = collate(self.examples)

    def states(self) -> list[TokenStates]:
        layers = () if self.distiller.cross_cot is None else self.distiller.cross_cot.layers
        models = {"student": self.distiller.student, "teacher": self.distiller.teacher}
        return [token_states(model, self.batch[side], layers) for side, model in models.items()]

    def with_gradient(self, loss: Tensor) -> Tensor:
        """One vector: the loss and its gradient at all of the student's parameters."""
        gradients = torch.autograd.grad(loss, [*self.distiller.student.parameters()])
        return torch.cat([loss[None], *(g.flatten() for g in gradients)]).detach()


@pytest.fixture
def plain(workspace, tmp_path) -> dict:
    """Every setting of the objective at its default."""
    return {
        "student": workspace.student,
        "teacher": workspace.teacher,
        "train": workspace.train,
        "max_length": 256,
        "max_prompt_length": 160,
        "token_maps": str(tmp_path / "maps"),
    }


def objective(
    built: Built,
    *,
    alpha: float = 0.5,
    ot_weight: float = 1.0,
    cst: bool = True,
    crc: bool = True,
    ot_norm: str = "none",
    ot_epsilon: float = 0.1,
    ot_iters: int = 100,
    ot_tol: float = 1e-6,
    ot_grad: str = "unrolled",
    kd: str = "none",
    divergence: str = "forward_kl",
    temperature: float | None = None,
) -> Tensor:
    """Eq. 16 by the losses' own functions, with the documented defaults."""
    batch, distiller = built.batch, built.distiller
    cross_cot = CrossCoT(
        32,
        48,
        terms=["cst"] * cst + ["crc"] * crc,
        layers=("embed", "last"),
        norm=ot_norm,
        per_layer=False,
        settings=OTSettings(ot_epsilon, ot_iters, ot_tol, ot_grad),
    )
    cross_cot.projections = distiller.cross_cot.projections
    states = built.states()
    ot = cross_cot(*states, batch["text_rows"], batch["text_is_cot"], batch["num_rows"]).total
    temperature = temperature or (1.0 if kd == "uld" else 2.0)
    match kd:
        case "none":
            distance = 0.0
        case "kl":
            distance = kl(*states, divergence=divergence, temperature=temperature).total
        case "uld":
            distance = uld(*states, temperature=temperature).total
        case "mined":
            ids, equal = built.aligner.student_ids, built.aligner.equal
            distance = MinED(ids, temperature=temperature, equal=equal)(*states).total
        case "dskd":
            dskd = DSKD(32, 48, one_vocabulary=True, divergence=divergence, temperature=temperature)
            dskd.load_state_dict(distiller.kd.state_dict())
            distance = dskd(*states).total
    ce = cross_entropy(states[0])[0]
    loss = (1 - alpha) * ce + alpha * distance
    return built.with_gradient(loss / batch["num_tokens"] + alpha * ot_weight * ot)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"alpha": 0.2}, {"alpha": 0.5}),
        ({"ot_weight": 3.0}, {"ot_weight": 1.0}),
        ({"cst": False}, {"cst": True}),
        ({"crc": False}, {"crc": True}),
        ({"ot_norm": "rms"}, {"ot_norm": "none"}),
        ({"ot_epsilon": 0.5}, {"ot_epsilon": 0.1}),
        ({"ot_iters": 1}, {"ot_iters": 100}),
        ({"ot_tol": 0.5}, {"ot_tol": 1e-6}),
        ({"ot_grad": "detached"}, {"ot_grad": "unrolled"}),
        # Where it has not converged, the gradient at the fixed point is another.
        ({"ot_grad": "implicit", "ot_iters": 1}, {"ot_grad": "unrolled"}),
        *(({"kd": kd}, {"temperature": 1.0}) for kd in ("kl", "mined", "dskd")),
        *(({"kd": kd, "temperature": 4.0}, {"temperature": 2.0}) for kd in ("kl", "mined", "dskd")),
        ({"kd": "uld"}, {"temperature": 2.0}),
        ({"kd": "uld", "temperature": 4.0}, {"temperature": 1.0}),
        *(
            ({"kd": kd, "divergence": name}, {"divergence": "forward_kl"})
            for kd in ("kl", "dskd")
            for name in DIVERGENCES[1:]
        ),
    ],
    ids=str,
)
def test_a_setting_reaches_its_loss(given, other, plain, workspace) -> None:
    one_vocabulary = {"teacher": workspace.sibling} if given.get("kd") in ("kl", "dskd") else {}
    built = Built(plain | one_vocabulary | given)
    actual = built.with_gradient(built.distiller(**built.batch)["loss"])
    expected, without = objective(built, **given), objective(built, **{**given, **other})
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert (without - expected).norm() > 1e-4 * expected.norm()


def test_what_the_collator_makes_of_settings(plain) -> None:
    """Of five rows, three of them with a rationale: 8 texts, 6 of them in a crossed pair."""
    texts = [text for example in Built(plain).examples for text in example.texts]
    sides = {"student": [t.student for t in texts], "teacher": [t.teacher for t in texts]}
    responses = {side: sum(len(t.response_ids) for t in some) for side, some in sides.items()}
    tokens = {side: sum(len(t.ids) for t in some) for side, some in sides.items()}
    for given, wanted in (
        ({}, responses),
        ({"tokens": "all"}, tokens),
        ({"tokens": "all", "ot": False, "kd": "uld"}, responses),
    ):
        built = Built(plain | given)
        batch = trainer_of(built).data_collator(built.examples)
        assert {side: len(batch[side]["positions"]) for side in wanted} == wanted
    for given, rows in (({}, 8), ({"cst": False}, 6), ({"cst": False, "kd": "uld"}, 8)):
        built = Built(plain | given)
        batch = trainer_of(built).data_collator(built.examples)
        assert [len(batch[side]["input_ids"]) for side in wanted] == [8, rows]


def test_settings_of_a_term_that_is_off_refuse_nothing(plain, tmp_path, capsys) -> None:
    cache = {name: plain[name] for name in ("teacher", "train", "max_length", "max_prompt_length")}
    assert cli("cache", output=tmp_path / "cache", **cache) == 0
    run = {**plain, "kd": "uld", "max_steps": 1, "teacher_cache": tmp_path / "cache"}
    off = {"ot": "off", "tokens": "all", "ot_backend": "cuda"}
    assert cli("distill", output=tmp_path / "off", **run, **off) == 0
    assert "ot is off: no effect of tokens, ot_backend" in capsys.readouterr().out
    assert log_of(tmp_path / "off")[0]["kd"] > 0
    for name, message in (("tokens", "the response tokens only"), ("ot_backend", "'ot_backend'")):
        assert cli("distill", output=tmp_path / "on", **run, **{name: off[name]}) == 2
        assert message in capsys.readouterr().err


def test_crossed_pairs_that_no_row_has_are_refused(plain, tmp_path, capsys) -> None:
    rows = [{k: v for k, v in row.items() if k != "rationale"} for row in sample_rows(3)]
    plain["train"] = write_rows(tmp_path / "train.jsonl", rows)
    assert cli("distill", output=tmp_path / "out", **plain, cst="off") == 2
    assert "train.jsonl has a rationale: none has a crossed pair" in capsys.readouterr().err


def test_the_loss_can_be_scaled_in_place(plain) -> None:
    """As Trainer does, with several processes."""
    built = Built(plain)
    student = {name: value for name, value in built.batch.items() if name != "teacher"}
    output = Distiller(built.distiller.student)(**student)
    before = output["parts"]["ce"].item()
    output["loss"] *= 2
    assert output["parts"]["ce"].item() == before == output["loss"].item() / 2


def test_a_layer_by_its_index(plain, tmp_path) -> None:
    logs = []
    for last in ("last", "-1"):
        run = {"layers": ["embed", last], "max_steps": 1, "output": str(tmp_path / last)}
        trainer = trainer_of(Built(plain | run))
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["ot/grad_norm"] > 0
    for name in ("loss", "ot/cst", "ot/crc", "ot/grad_norm", "ot/grad_ratio", "grad_norm/student"):
        assert logs[0][name] == logs[1][name], name


@pytest.mark.parametrize("rate", [None, 3e-3])
@pytest.mark.parametrize(
    ("kd", "ot", "modules"),
    [
        ("none", True, ("cross_cot",)),
        ("dskd", True, ("cross_cot", "kd")),
        ("dskd", False, ("kd",)),
        ("uld", False, ()),
    ],
)
def test_learning_rate_of_the_projections(kd, ot, modules, rate, plain) -> None:
    given = {"kd": kd, "ot": ot, "learning_rate": 7e-4}
    given |= {} if rate is None else {"projection_learning_rate": rate}
    built = Built(plain | given)
    groups = trainer_of(built).create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    student, projections = trained(built)
    assert {name.split(".")[0] for name in projections} == set(modules)
    assert {rates.pop(id(p)) for p in projections.values()} <= {1e-3 if rate is None else rate}
    assert rates == {id(p): 7e-4 for p in student.values()}


def trained(built: Built) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters of the student, and all others that are trained."""
    parameters = {n: p for n, p in built.distiller.named_parameters() if p.requires_grad}
    student = {name: p for name, p in parameters.items() if name.startswith("student.")}
    return student, {name: p for name, p in parameters.items() if name not in student}


def trainer_of(built: Built) -> DistillTrainer:
    return DistillTrainer(
        built.distiller,
        training_arguments(built.config),
        built.config,
        built.tokenizers[0],
        train_dataset=built.examples,
    )


@pytest.mark.parametrize("kd", ["none", "kl", "uld", "mined", "dskd"])
def test_a_step_is_one_forward_of_each_model_and_one_call_of_the_kernel(
    kd, plain, workspace, tmp_path, monkeypatch
) -> None:
    """Four pairs of texts and two layers together, on a step whose gradients are measured."""
    one_vocabulary = {"teacher": workspace.sibling} if kd == "kl" else {}
    steps = {"max_steps": 1, "batch_size": 5, "output": str(tmp_path / "out")}
    built = Built({**plain, **one_vocabulary, **steps, "kd": kd})
    calls: dict[str, list[int]] = {"student": [], "teacher": [], "ot": []}
    for side in ("student", "teacher"):
        body_of(getattr(built.distiller, side)).register_forward_pre_hook(
            lambda _, args, inputs, side=side: calls[side].append(len(inputs["input_ids"])),
            with_kwargs=True,
        )
    kernel = cross_cot_module.ot_loss_terms

    def counted(*tensors, pairs, **others):
        calls["ot"].append(len(pairs))
        return kernel(*tensors, pairs=pairs, **others)

    monkeypatch.setattr(cross_cot_module, "ot_loss_terms", counted)
    trainer = trainer_of(built)
    trainer.train()
    assert trainer.state.log_history[0]["ot/grad_norm"] > 0
    # Five rows, three of them with a rationale: 8 texts, 2 + 3 x 4 pairs a layer.
    assert calls == {"student": [8], "teacher": [8], "ot": [2 * 14]}


def test_alpha_0_is_fine_tuning(plain, tmp_path) -> None:
    # Without clipping: its norm is a sum of more numbers here, zeros, and is rounded otherwise.
    run = {"batch_size": 4, "max_steps": 6, "logging_steps": 1, "learning_rate": 5e-3}
    run |= {"max_grad_norm": 0}
    run |= {name: plain[name] for name in ("train", "max_length", "max_prompt_length")}
    models = {"student": plain["student"], "teacher": plain["teacher"]}
    assert cli("distill", output=tmp_path / "distil", alpha=0, kd="dskd", **models, **run) == 0
    assert cli("sft", output=tmp_path / "sft", model=plain["student"], **run) == 0
    logs = log_of(tmp_path / "distil"), log_of(tmp_path / "sft")
    for ours, theirs in zip(*logs, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        for name in ("step", "loss", "ce", "token_accuracy", "learning_rate"):
            assert ours[name] == theirs[name], (name, ours["step"])
    assert logs[0][-1]["ce"] < logs[0][0]["ce"] - 0.5
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("distil", "sft"))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_logged_norms_of_gradients(plain, tmp_path) -> None:
    """Of one step over all rows: of the two terms without their weights, of what is trained before
    it is clipped."""
    given = {**plain, "kd": "dskd", "alpha": 0.3, "ot_weight": 2.0}
    run = {"batch_size": 12, "max_steps": 1, "max_grad_norm": 0.01}
    assert cli("distill", output=tmp_path / "out", **given, **run) == 0
    (logged,) = log_of(tmp_path / "out")
    built = Built(given, rows=12)
    student, teacher = built.states()
    batch, distiller = built.batch, built.distiller
    ce = cross_entropy(student)[0] / batch["num_tokens"]
    pairs = batch["text_rows"], batch["text_is_cot"], batch["num_rows"]
    ot = distiller.cross_cot(student, teacher, *pairs).total
    at_ce, at_ot = (
        torch.autograd.grad(term, student.layers["last"])[0].norm().item() for term in (ce, ot)
    )
    assert logged["ot/grad_norm"] == pytest.approx(at_ot, rel=1e-5)
    assert logged["ot/grad_ratio"] == pytest.approx(at_ot / at_ce, rel=1e-5)
    distiller(**batch)["loss"].backward()
    for name, parameters in zip(("student", "projections"), trained(built), strict=True):
        norm = math.hypot(*(p.grad.norm().item() for p in parameters.values()))
        assert logged[f"grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "given",
    [*({"kd": "kl", "divergence": name} for name in DIVERGENCES), {"kd": "uld"}, {"kd": "mined"}],
    ids=lambda given: given.get("divergence", given["kd"]),
)
def test_a_teacher_equal_to_the_student_teaches_nothing(given, plain) -> None:
    equal = {"teacher": plain["student"], "alpha": 1.0, "ot": "off"}
    built = Built({**plain, **equal, **given})
    output = built.distiller(**built.batch)
    gradient = built.with_gradient(output["loss"])
    scale = built.with_gradient(cross_entropy(built.states()[0])[0] / built.batch["num_tokens"])
    assert output["parts"]["kd"].abs() <= 1e-6
    assert gradient.norm() <= 1e-6 * scale.norm()
