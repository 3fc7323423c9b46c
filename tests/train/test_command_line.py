"""A user's mistake is one line and exit code 2, before any training; help is quick."""

from __future__ import annotations

import functools
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cot2align.train import config as config_module
from cot2align.train.__main__ import COMMANDS, TRAININGS, main
from cot2align.train.config import (
    AugmentConfig,
    CacheConfig,
    DistillConfig,
    EvaluateConfig,
    JudgeConfig,
    SFTConfig,
    UserError,
)
from tests.conftest import cli, sample_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; returns its error line."""

    def run(argv: list[str]) -> str:
        assert main(argv) == 2
        error = capsys.readouterr().err
        # A progress bar of a model's loading may stand before, never a traceback.
        lines = error.strip().splitlines()
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in error
        return lines[-1]

    return run


@pytest.fixture
def distill(refused, distill_settings, tmp_path):
    """Refused `distill` with some settings changed; nothing may have been written."""

    def run(**changed: object) -> str:
        settings = {**distill_settings, "output": tmp_path / "out", "device": "cpu", **changed}
        words = [w for name, value in settings.items() for w in (f"--{name}", str(value))]
        line = refused(["distill", *words])
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        return line

    return run


def cpu_seconds_of_children() -> float:
    """What finished subprocesses used; unlike the clock it does not count a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_in_under_a_second(command: str) -> None:
    start = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "cot2align.train", *([command] if command else []), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: python -m cot2align.train" in done.stdout
    assert cpu_seconds_of_children() - start < 1


@pytest.mark.parametrize(
    "cls", [SFTConfig, AugmentConfig, CacheConfig, DistillConfig, EvaluateConfig, JudgeConfig]
)
def test_help_names_every_setting_and_the_resolved_config_reads_back(cls, capsys, tmp_path):
    with pytest.raises(SystemExit):
        config_module.parse_command_line(cls, "prog", ["--help"])
    text = capsys.readouterr().out
    required = {"model", "student", "teacher", "train", "data", "output", "server", "a", "b"}
    values = {name: "x" for name in required if name in cls.__dataclass_fields__}
    config = config_module.build(cls, values)
    for field in cls.__dataclass_fields__.values():
        assert f"--{field.name}" in text
        assert field.metadata["help"]
    saved = tmp_path / "config.yaml"
    saved.write_text(config_module.to_yaml(config))
    assert config_module.from_sources(cls, str(saved), {}) == config


def test_command_line_beats_yaml(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    # PyYAML reads 1e-3, without a point, as text.
    path.write_text("student: a\nteacher: b\ntrain: t\noutput: o\nlearning_rate: 1e-3\nseed: 1\n")
    config = config_module.parse_command_line(
        DistillConfig,
        "prog",
        [
            "--config",
            str(path),
            "--seed",
            "2",
            "--layers",
            "last,-2",
            "--bf16",
            "--max_steps",
            "5",
        ],
    )
    assert (config.learning_rate, config.seed, config.bf16) == (1e-3, 2, True)
    assert (config.layers, config.max_steps) == (["last", "-2"], 5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ot_epsillon: 0.1", "unknown setting 'ot_epsillon'; did you mean 'ot_epsilon'?"),
        ("ot_epsilon: small", "'ot_epsilon': expected number, got 'small'"),
        ("ot_epsilon: .nan", "'ot_epsilon': expected number"),
        ("batch_size: 1.5", "'batch_size': expected integer, got 1.5"),
        ("batch_size: true", "'batch_size': expected integer, got True"),
        ("resume: 1", "'resume': expected true|false, got 1"),
        ("layers: 3", "'layers': expected list of text, got 3"),
        ("kd: kll", "'kd': unknown value 'kll'; did you mean 'kl'?"),
        ("alpha: 1.5", "'alpha' must be at most 1, got 1.5"),
        ("train: {a]", "line 1 not valid YAML"),
        ("- a", "expected `name: value` lines, got a list"),
        ("batch_size: 4", "setting 'train' is missing"),
    ],
)
def test_bad_yaml(content: str, said: str, refused, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content + "\n")
    assert said in refused(["distill", "--config", str(path)])


def test_bad_words(refused) -> None:
    assert "did you mean 'distill'?" in refused(["distil"])
    assert "--ot_epsillon; did you mean 'ot_epsilon'?" in refused(["distill", "--ot_epsillon", "1"])
    assert "config file x: No such file" in refused(["sft", "x"])
    assert "unexpected argument 'x'" in refused(["sft", "--seed", "1", "x"])
    assert "config file nowhere.yaml: No such file" in refused(["sft", "--config", "nowhere.yaml"])
    assert main([]) == 2


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - TRAININGS))
def test_only_trainings_take_several_processes(command, refused, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert f"{command} runs in one process, WORLD_SIZE is 2; only sft" in refused([command])
    monkeypatch.delenv("RANK")  # as a cluster's scheduler has it, who starts one process
    assert "WORLD_SIZE" not in refused([command, "--nonsense", "1"])


@pytest.mark.parametrize("epsilon", ["0", "-0.1"])
def test_epsilon_must_be_positive(epsilon: str, distill) -> None:
    assert f"'ot_epsilon' must be greater than 0, got {float(epsilon)}" in distill(
        ot_epsilon=epsilon
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"instruction": "a", "output": "b"', ":2: broken JSON"),
        ('["a"]', ":2: expected a JSON object, got list"),
        ('{"instruction": "a"}', ":2: field 'output' is missing"),
        ('{"output": "a"}', ":2: field 'instruction' is missing"),
        ('{"instruction": "a", "output": " "}', ":2: empty response"),
        ('{"instruction": "a", "output": []}', ":2: empty response"),
        ('{"instruction": "a", "output": ["b", ""]}', ":2: empty response"),
        ('{"instruction": "a", "output": 3}', ":2: field 'output': expected text, got int"),
        ('{"instruction": "a", "output": "b", "input": {}}', ":2: field 'input': expected text"),
        ('{"instruction": "a", "output": "b", "id": "0"}', ":2: id '0' is also on line 1"),
        ('{"instruction": "a", "output": "b", "id": 1.5}', ":2: field 'id'"),
    ],
)
def test_bad_rows(line: str, said: str, distill, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + line + "\n")
    assert str(path) + said in distill(train=path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ot": "off"}, "nothing to distil; the command sft fine-tunes"),
        ({"cst": "off", "crc": "off"}, "'cst' and 'crc' are both off; 'ot: off' turns"),
        ({"cst": "off", "texts": "cot"}, "'texts' is cot: no row has a crossed pair"),
        ({"layers": ""}, "setting 'layers' is empty; 'ot: off' turns"),
        ({"layers": "last,1,-1"}, "setting 'layers' has a layer twice: last, 1, -1"),
        ({"kd": "uld", "divergence": "js"}, "kd uld has no divergence, but 'divergence' is js"),
        ({"kd": "mined", "divergence": "js"}, "kd mined has forward_kl, but 'divergence' is js"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(changed, said, distill) -> None:
    nowhere = {"student": "/nowhere", "teacher": "/nowhere", "train": "/nowhere"}
    assert said in distill(**nowhere, **changed)


def test_settings_without_effect_are_named() -> None:
    required = {"student": "s", "teacher": "t", "train": "r", "output": "o"}

    def lines(**changed: object) -> list[str]:
        return config_module.without_effect(DistillConfig(**required, **changed))

    assert lines(kd="dskd", divergence="js", t2s_init="pseudo-inverse", ot_iters=3) == []
    assert lines(eval="e", eval_steps=5) == []
    assert lines(eval_steps=5, ot_iters=100) == ["eval is none: no effect of eval_steps"]
    assert lines(temperature=1.0, divergence="js", token_maps="m", t2s_init="pseudo-inverse") == [
        "kd is none: no effect of divergence, temperature",
        "kd is not mined: no effect of token_maps",
        "kd is not dskd: no effect of t2s_init",
    ]
    without_ot = {"kd": "uld", "ot": False, "projection_learning_rate": 1.0}
    assert lines(**without_ot, layers=["last"], cst=False, ot_tol=0.0) == [
        "ot is off: no effect of cst, layers, ot_tol",
        "nothing is projected: no effect of projection_learning_rate",
    ]
    model = SFTConfig(model="m", train="r", output="o", eval_batch_size=1)
    assert config_module.without_effect(model) == ["eval is none: no effect of eval_batch_size"]
    augment = {"model": "m", "data": "r", "output": "o", "batch_size": 1, "retries": 1}
    assert config_module.without_effect(AugmentConfig(**augment, min_answer_rouge=1)) == [
        "server is none: no effect of retries",
        "check_answer is not rouge: no effect of min_answer_rouge",
    ]
    assert config_module.without_effect(AugmentConfig(**augment, server="http://h")) == [
        "server is set: no effect of batch_size"
    ]


def test_missing_and_empty_files(distill, tmp_path) -> None:
    assert "data file nowhere.jsonl: No such file" in distill(train="nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no rows" in distill(train=tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    assert "latin.jsonl" in distill(train=tmp_path / "latin.jsonl")


def test_output_in_use(distill, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "not empty; choose another, or --resume" in distill()
    assert "is a file, expected a folder" in distill(output=tmp_path / "out" / "notes.txt")


def test_unsuitable_models(distill, workspace, tmp_path) -> None:
    assert "tokenizer of '/nowhere' cannot be loaded" in distill(teacher="/nowhere")
    assert "takes 256 tokens, fewer than max_length 512" in distill(max_length=512)
    assert "unknown layer 'middle'" in distill(layers="middle")
    assert "unknown layer '7' for a model of 2 layers" in distill(layers="last,7")
    assert "layers 'last' and '2' are the same one" in distill(layers="last,2")
    assert "kd kl needs one vocabulary" in distill(kd="kl")
    assert "max_prompt_length 256 must be below" in distill(max_prompt_length=256)
    assert "raise max_length or max_prompt_length" in distill(max_prompt_length=20, max_length=21)

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(workspace.student).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    weights.rename(copy / "elsewhere.safetensors")
    assert f"model '{copy}' cannot be loaded" in distill(student=copy)
    # Weights as a pickle are not read.
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert f"model '{copy}' cannot be loaded" in distill(student=copy)


def test_tokenizer_without_end_token(distill, workspace, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(workspace.student).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no end-of-sequence token" in distill(student=copy)


def test_slow_tokenizer(distill, monkeypatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert "is not a fast tokenizer" in distill()


def test_one_of_several_gpus_is_used(distill_settings, tmp_path, monkeypatch, capsys) -> None:
    from cot2align.train import trainer

    class TwoGPUs(trainer.TrainingArguments):
        @functools.cached_property
        def _setup_devices(self):
            device = super()._setup_devices
            self._n_gpu = 2
            return device

    monkeypatch.setattr(trainer, "TrainingArguments", TwoGPUs)
    settings = {**distill_settings, "max_steps": 1}
    assert cli("distill", output=tmp_path / "out", **settings) == 0
    assert "1 of 2 GPUs is used; torchrun starts" in capsys.readouterr().out


def test_backend_of_another_device(distill) -> None:
    assert "setting 'ot_backend': backend 'triton' cannot serve cpu" in distill(ot_backend="triton")


def test_only_cot_without_rationales(distill, tmp_path) -> None:
    rows = [{"instruction": "a", "output": "b"}]
    train = write_rows(tmp_path / "plain.jsonl", rows)
    assert "no row has a rationale" in distill(train=train, texts="cot")
    assert f"no row of {train} has a rationale" in distill(eval=train, texts="cot")


def test_generation_limits(refused, workspace, tmp_path) -> None:
    common = ["--model", workspace.teacher, "--data", workspace.test, "--device", "cpu"]
    output = ["--output", str(tmp_path / "new")]
    words = [*common, *output, "--max_length", "100", "--max_new_tokens", "100"]
    assert "max_new_tokens 100 must be below max_length 100" in refused(["augment", *words])
    (tmp_path / "old.jsonl").write_text("{}\n")
    old = ["--output", str(tmp_path / "old.jsonl")]
    assert "exists; choose another, or --resume" in refused(["augment", *common, *old])
    assert "folder, expected a file" in refused(["augment", *common, "--output", str(tmp_path)])
    assert "is not empty" in refused(["evaluate", *common, "--output", str(tmp_path)])


def test_remote_code_is_off(refused, workspace, tmp_path) -> None:
    """A folder with its own modelling code is refused, and the code not run."""
    (tmp_path / "evil").mkdir()
    for file in Path(workspace.student).glob("tokenizer*"):
        (tmp_path / "evil" / file.name).write_bytes(file.read_bytes())
    mark = tmp_path / "ran"
    (tmp_path / "evil" / "modeling.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    }
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    words = ["--model", str(tmp_path / "evil"), "--train", workspace.train]
    line = refused(["sft", *words, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert "trust_remote_code" in line
    assert not mark.exists()


def test_interrupt(workspace, monkeypatch, tmp_path, capsys) -> None:
    from cot2align.train import trainer

    def interrupted(config: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "run", interrupted)
    assert cli("sft", model=workspace.student, train=workspace.train, output=tmp_path / "o") == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos"), UserError("cannot be written")])
def test_an_error_that_an_interrupt_led_to(error, workspace, monkeypatch, tmp_path, capsys) -> None:
    """As torch.save does, which cannot close the file that it was writing."""
    from cot2align.train import trainer

    def interrupted(config: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise error from None

    monkeypatch.setattr(trainer, "run", interrupted)
    assert cli("sft", model=workspace.student, train=workspace.train, output=tmp_path / "o") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_config_of_a_run_can_be_run_again(distill_settings, tmp_path) -> None:
    settings = {**distill_settings, "max_steps": 1, "output": tmp_path / "first"}
    assert cli("distill", **settings) == 0
    saved = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["ot_epsilon"] == 0.1
    assert main(["distill", "--config", str(saved), "--output", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (
        tmp_path / "first" / "model.safetensors"
    ).read_bytes()


def test_sample_rows_mix_what_the_tests_rely_on() -> None:
    rows = sample_rows(12)
    assert sum("rationale" in row for row in rows) == 8
    assert sum(not row["input"] for row in rows) == 5
