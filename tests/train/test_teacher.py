"""A cached teacher gives the losses of the live one, and no other run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cot2align.train.config import CacheConfig, build
from cot2align.train.data import model_batch
from cot2align.train.models import load_model, load_tokenizer
from cot2align.train.teacher import TeacherCache, _texts, load_shell, teacher_states
from cot2align.train.token_states import token_states
from tests.conftest import cli, log_of, options, sample_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache_settings(workspace) -> dict:
    return {
        "teacher": workspace.teacher,
        "train": workspace.train,
        "max_length": 256,
        "max_prompt_length": 160,
        "batch_size": 4,
    }


@pytest.fixture(scope="module")
def caches(workspace, tmp_path_factory):
    """Folder of a cache in float32 of a teacher, made once."""
    made: dict[tuple, Path] = {}

    def make(teacher: str, **settings) -> Path:
        key = (teacher, *sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / "states"
            given = {"max_length": 256, "max_prompt_length": 160, "cache_dtype": "float32"}
            given |= {"teacher": teacher, "train": workspace.train, "output": made[key]}
            assert cli("cache", **{**given, **settings}) == 0
        return made[key]

    return make


@pytest.fixture
def refused(capsys, distill_settings, tmp_path):
    """The error line of a `distill` with a cache."""

    def run(cache: Path, **changed) -> str:
        settings = {**distill_settings, "output": tmp_path / "out", "teacher_cache": cache}
        assert cli("distill", **{**settings, **changed}) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("kd", "student", "teacher", "changed"),
    [
        ("none", "student", "teacher", {}),
        ("kl", "student", "sibling", {}),
        ("uld", "student", "teacher", {"layers": "last"}),
        ("mined", "student", "teacher", {"layers": "embed"}),
        ("dskd", "student", "teacher", {}),
        ("dskd", "student", "sibling", {"t2s_init": "pseudo-inverse"}),
        # The teacher has learned positions, the student another tokenizer.
        ("dskd", "teacher", "student", {"tokens": "all", "layers": "embed,last,1"}),
    ],
)
def test_losses_are_the_live_teachers(
    kd, student, teacher, changed, caches, distill_settings, workspace, tmp_path, monkeypatch
):
    names = {"student": getattr(workspace, student), "teacher": getattr(workspace, teacher)}
    settings = {**distill_settings, **names, "kd": kd, "eval": workspace.train, **changed}
    if kd == "mined":
        settings["token_maps"] = tmp_path / "maps"
    assert cli("distill", output=tmp_path / "live", **settings) == 0

    positions = {k: v for k, v in changed.items() if k == "tokens"}
    cache = caches(names["teacher"], layers="last,1" if positions else "last", **positions)
    loaded = []
    original = AutoModelForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        classmethod(lambda cls, name, **kw: loaded.append(name) or original(cls, name, **kw)),
    )
    cached = {**settings, "teacher_cache": cache}
    assert cli("distill", output=tmp_path / "cached", **cached) == 0
    assert set(loaded) == {names["student"]}

    live, cached = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("live", "cached")
    )
    for ours, theirs in zip(cached, live, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"eval_runtime", "train_runtime"}:
            if "per_second" in name or "runtime" in name:
                continue
            # Signals and errors are differences of numbers near 1.
            close = {"rel": 1e-4, "abs": 2e-6} if "signal" in name or "error" in name else {}
            assert ours[name] == pytest.approx(theirs[name], **(close or {"rel": 1e-5})), name


def _same_batches(config: CacheConfig, folder: Path):
    """(texts, what the live teacher says of them, the cache, its shell) by batches as `cache`
    ran them."""
    tokenizer = load_tokenizer(config.teacher)
    model = load_model(config.teacher, tokenizer, dtype=config.teacher_dtype, max_length=256)
    texts = _texts(config, tokenizer)
    order = sorted(texts, key=lambda key: (-len(texts[key].ids), key))
    cache, shell = TeacherCache(folder), load_shell(folder)
    for first in range(0, len(order), config.batch_size):
        some = [texts[key] for key in order[first : first + config.batch_size]]
        with torch.no_grad():
            yield some, model, cache, shell


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_states_are_bit_equal_in_the_teachers_dtype(
    dtype, side, tokens, workspace, cache_settings, tmp_path
):
    settings = {
        **cache_settings,
        "teacher": getattr(workspace, side),
        "teacher_dtype": dtype,
        "cache_dtype": dtype,
        "layers": ["embed", "last", "1"],
        "tokens": tokens,
        "output": str(tmp_path / "cache"),
        "device": "cpu",
    }
    config = build(CacheConfig, settings)
    given = {**settings, "layers": "embed,last,1"}
    given.pop("device")
    assert cli("cache", **given) == 0
    for texts, model, cache, shell in _same_batches(config, tmp_path / "cache"):
        batch = model_batch(texts, tokens)
        live = token_states(model, batch, config.layers)
        cached = teacher_states(
            shell, {**batch, "states": cache.states(texts, tokens)}, config.layers
        )
        assert live.layers.keys() == cached.layers.keys() == {"embed", "last", "1"}
        for name, states in live.layers.items():
            assert states.dtype == getattr(torch, dtype)
            assert torch.equal(states, cached.layers[name]), name
        assert torch.equal(live.hidden, cached.hidden)
        logits = [s.head(s.hidden, *s.weights) for s in (live, cached)]
        assert torch.equal(*logits)
        assert torch.equal(live.embed(live.targets), cached.embed(cached.targets))


def test_all_tokens_serve_the_response_too(caches, workspace):
    everything = TeacherCache(caches(workspace.teacher, layers="last,1", tokens="all"))
    response = TeacherCache(caches(workspace.teacher, layers="last"))
    config = build(
        CacheConfig,
        {"teacher": workspace.teacher, "train": workspace.train, "output": "unused",
         "max_length": 256, "max_prompt_length": 160},
    )  # fmt: skip
    texts = list(_texts(config, load_tokenizer(workspace.teacher)).values())[:5]
    (one,), (two, _) = (c.states(texts, "response").values() for c in (response, everything))
    assert torch.equal(one, two)


def test_int8_keeps_its_bound(caches, workspace):
    exact = TeacherCache(caches(workspace.teacher, layers="last"))
    rounded = TeacherCache(caches(workspace.teacher, layers="last", cache_dtype="int8"))
    assert exact.places.keys() == rounded.places.keys()
    files = [load_file(c.folder / c.shards[0]["file"]) for c in (exact, rounded)]
    states, levels = files[0]["2"], files[1]["2"]
    assert levels.dtype == torch.int8
    assert levels.abs().max() == 127
    error = (levels * files[1]["2.scale"][:, None] - states).abs()
    bound = states.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)
    assert bool((error <= bound).all())
    assert error.max() > 0


def test_embedding_states_that_cannot_be_split_off_are_cached(workspace, cache_settings, tmp_path):
    """A model that changes its first layer's input where the shell cannot follow."""

    original = LlamaForCausalLM.from_pretrained.__func__

    def load(cls, *args, **kwargs):
        made = original(cls, *args, **kwargs)
        model = made[0] if isinstance(made, tuple) else made
        model.model.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True
        )
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(load))
        assert cli("cache", output=tmp_path / "cache", **cache_settings) == 0
    facts = TeacherCache(tmp_path / "cache").facts
    assert facts["layers"] == ["2", "0"]


def test_a_killed_cache_goes_on(workspace, cache_settings, tmp_path, capsys):
    rows = [{**row, "instruction": f"{i}. {row['instruction']}"} for i in range(40)
            for row in sample_rows(4)]  # fmt: skip
    settings = {
        **cache_settings,
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "tokens": "all",
        "cache_dtype": "float32",
        "layers": "last,1",
        "shard_size": 1,
        "batch_size": 2,
    }
    folder = tmp_path / "killed"
    words = options(device="cpu", output=folder, **settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "cot2align.train", "cache", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    index = folder / "index.json"
    while process.poll() is None:
        if index.exists() and json.loads(index.read_text())["shards"]:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert "to cache, 0 are there: " in process.stdout.read()
    kept = json.loads(index.read_text())["shards"]
    stamps = {shard["file"]: (folder / shard["file"]).stat().st_mtime_ns for shard in kept}

    assert cli("cache", output=folder, **settings) == 2
    assert "not empty; choose another, or --resume" in capsys.readouterr().err
    assert cli("cache", output=folder, resume="true", **settings) == 0
    there = sum(len(shard["texts"]) for shard in kept)
    assert f"to cache, {there} are there: " in capsys.readouterr().out
    assert cli("cache", output=tmp_path / "whole", **settings) == 0
    for name, stamp in stamps.items():
        assert (folder / name).stat().st_mtime_ns == stamp
    resumed, whole = TeacherCache(folder, checksums=True), TeacherCache(tmp_path / "whole")
    assert resumed.places == whole.places
    for shard in whole.shards:
        assert (folder / shard["file"]).read_bytes() == (whole.folder / shard["file"]).read_bytes()
    assert not list(folder.glob("*.part"))


def test_a_cache_of_other_settings_is_refused(refused, caches, workspace, tmp_path, capsys):
    cache = caches(workspace.teacher, layers="last")
    line = refused(
        cache, prompt_format="raw", max_length=255, max_prompt_length=150, teacher_dtype="float16"
    )
    assert "prompt_format is paper in the cache and raw here" in line
    assert "max_length is 256 in the cache and 255 here" in line
    assert "max_prompt_length is 160 in the cache and 150 here" in line
    assert "teacher_dtype is float32 in the cache and float16 here" in line
    assert "model.safetensors of the teacher is not that of" in refused(
        cache, teacher=workspace.sibling
    )
    assert "tokens is all here" in refused(cache, tokens="all")
    assert "layer 1 is not in the cache, which has embed, last" in refused(cache, layers="last,1")
    assert "unknown layer 'middle'" in refused(cache, layers="middle")
    assert "no index.json there" in refused(tmp_path)
    settings = {"teacher": workspace.teacher, "train": workspace.train, "max_length": 256}
    other = {**settings, "output": cache, "max_prompt_length": 161, "resume": "true"}
    assert cli("cache", **other) == 2
    line = capsys.readouterr().err
    assert "max_prompt_length is 160 there and 161 here" in line
    assert "cache_dtype is float32 there and bfloat16 here" in line


def test_weights_trained_further_are_another_teacher(refused, caches, workspace, tmp_path):
    folder = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(workspace.teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3
    model.save_pretrained(folder)
    load_tokenizer(workspace.teacher).save_pretrained(folder)
    line = refused(caches(workspace.teacher, layers="last"), teacher=folder)
    assert "model.safetensors of the teacher is not that of" in line
    assert "tokenizer.json" not in line


def test_the_teacher_may_be_elsewhere(caches, workspace, distill_settings, tmp_path, capsys):
    cache = caches(workspace.teacher, layers="last")
    for number, name in enumerate(("/nowhere/teacher", "nobody/teacher")):
        settings = {**distill_settings, "teacher": name, "teacher_cache": cache, "max_steps": 1}
        assert cli("distill", output=tmp_path / str(number), **settings) == 0
        assert f"{name} is not here to be compared with its cache" in capsys.readouterr().out


def test_a_teacher_with_an_adapter(workspace, cache_settings, distill_settings, tmp_path):
    """It is merged, and known by its own files and its base's."""
    tuned = {**distill_settings, "model": workspace.teacher, "lora_r": 4, "learning_rate": 0.1}
    for name in ("student", "teacher", "ot_iters", "ot_tol"):
        tuned.pop(name)
    assert cli("sft", output=tmp_path / "adapter", **tuned) == 0
    teacher = tmp_path / "adapter"
    settings = {**cache_settings, "teacher": teacher, "cache_dtype": "float32"}
    assert cli("cache", output=tmp_path / "cache", **settings) == 0
    files = TeacherCache(tmp_path / "cache").facts["files"]
    assert {"adapter_model.safetensors", "model.safetensors of the base"} <= files.keys()
    given = {**distill_settings, "teacher": teacher}
    assert cli("distill", output=tmp_path / "live", **given) == 0
    cached = {**given, "teacher_cache": tmp_path / "cache"}
    assert cli("distill", output=tmp_path / "cached", **cached) == 0
    for ours, theirs in zip(log_of(tmp_path / "cached"), log_of(tmp_path / "live"), strict=True):
        assert ours["ot"] == pytest.approx(theirs["ot"], rel=1e-5)
    plain = {**given, "teacher": workspace.teacher, "teacher_cache": tmp_path / "cache"}
    assert cli("distill", output=tmp_path / "other", **plain) == 2


def test_missing_rows_are_counted_and_named(
    refused, caches, workspace, distill_settings, cache_settings, tmp_path
):
    rows = sample_rows(12)
    rows[3]["output"] = "Something else."
    rows.append({"instruction": "New.", "output": "Yes.", "id": "late"})
    changed = write_rows(tmp_path / "changed.jsonl", rows)
    cache = caches(workspace.teacher, layers="last")
    assert "lacks 2 of the 13 rows of" in (line := refused(cache, train=changed))
    assert "by id: 3, late;" in line
    assert "by id: 3, late;" in refused(cache, eval=changed)
    own = tmp_path / "own"
    assert cli("cache", output=own, **cache_settings) == 0
    assert cli("cache", output=own, **{**cache_settings, "train": changed, "resume": "on"}) == 0
    settings = {**distill_settings, "train": changed, "teacher-cache": own}
    assert cli("distill", output=tmp_path / "added", **settings) == 0


def test_faulty_shards_are_found_and_named(refused, workspace, cache_settings, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert cli("cache", output=folder, **cache_settings) == 0
    (shard,) = folder.glob("states-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    wrong = f"shard {shard.name} is truncated: {len(whole) - 7} bytes, expected {len(whole)}"
    assert wrong in refused(folder)
    shard.unlink()
    assert f"shard {shard.name} is missing" in refused(folder)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = f"shard {shard.name} is damaged: its checksum differs"
    assert damaged in refused(folder, teacher_cache_checksums="on")
    assert cli("cache", output=folder, resume="on", **cache_settings) == 0
    assert f"{damaged}; it is written again" in capsys.readouterr().out
    assert shard.read_bytes() == whole


def test_a_full_disk_is_one_line(cache_settings, tmp_path):
    """What is written beside stays beside: the index names only whole shards."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
        "from cot2align.train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    words = options(device="cpu", output=tmp_path / "cache", tokens="all", **cache_settings)
    done = subprocess.run(
        [sys.executable, "-c", script, "cache", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr.strip().splitlines()[-1]
    assert TeacherCache(tmp_path / "cache").shards == []
