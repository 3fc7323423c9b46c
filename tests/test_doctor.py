"""The doctor's facts on this machine, and its choices and advice on machines that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cot2align import doctor

ROOT = Path(__file__).parents[1]
H200 = {
    "device": "cuda:0",
    "name": "NVIDIA H200",
    "capability": "9.0",
    "memory_gib": 139.8,
    "multiprocessors": 132,
}


def machine(**changes: Any) -> doctor.Facts:
    """Facts of a machine with one GPU where everything fits, with one entry or another changed."""
    facts: doctor.Facts = {
        "versions": {"cot2align": "0.1.0", "python": "3.11.7", "transformers": "5.0.0"},
        "native": {
            "file": "_native.so",
            "error": None,
            "build": {
                "version": doctor.cot2align.__version__,
                "compiler": "12.2.0",
                "instruction_set": "avx2",
                "openmp": True,
                "cuda": True,
                "cuda_archs": "9.0 10.0",
            },
        },
        "torch": {"cuda": "13.0", "devices": [H200], "error": None},
        "cuda": {"driver": "13.0", "runtime": "13.0", "reason": None},
        "devices": [H200],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        entry = facts
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
    facts["backends"] = doctor.backends(facts)
    facts["advice"] = doctor.advice(facts)
    return facts


@pytest.fixture(scope="module")
def here() -> doctor.Facts:
    return doctor.gather()


def test_it_prints_this_machine_and_exits_0() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cot2align.doctor"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == ["Versions", "Built", "Devices", "CUDA", "Backends", "What to do"]


def test_json_is_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == set(machine())
    assert facts["versions"]["cot2align"] == doctor.cot2align.__version__


def test_this_tree_is_built(here: doctor.Facts) -> None:
    assert here["native"]["build"]["version"] == doctor.cot2align.__version__
    assert here["native"]["build"]["instruction_set"] in ("baseline", "avx2", "avx512")
    assert here["backends"][0]["device"] == "cpu"
    assert here["backends"][0]["backend"] == "native"


def test_a_cuda_part_without_devices_says_why(here: doctor.Facts) -> None:
    alone = here["native"]["build"]["cuda"] and not here["devices"]
    assert bool(here["cuda"]["reason"]) == alone


def test_where_everything_fits_there_is_nothing_to_do() -> None:
    facts = machine()
    assert facts["advice"] == []
    assert "nothing is missing" in doctor.table(facts)
    assert "NVIDIA H200, compute capability 9.0, 139.8 GiB" in doctor.table(facts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch__error": "No module named 'torch'"}, ["PyTorch does not import"]),
        ({"versions__transformers": None}, ["source tree", "'.[train]'"]),
        ({"native__build": None}, ["source tree", "pip install -e ."]),
        (
            {"native__build": None, "native__error": "libgomp.so.1"},
            ["libgomp.so.1", "does not load"],
        ),
        ({"native__build__version": "0.0.1"}, ["0.0.1", "build it again"]),
        ({"native__build__openmp": False}, ["one thread", "OpenMP"]),
        ({"native__build__cuda": False}, ["nvcc", "CUDA_HOME"]),
        ({"cuda__driver": "12.4"}, ["12.4", "13.0", "update the driver"]),
        ({"torch__devices": [], "torch__cuda": None}, ["for the CPU only"]),
        ({"torch__devices": []}, ["CUDA 13.0", "does not see"]),
        ({"native__build__cuda_archs": "8.0"}, ["9.0", "TORCH_CUDA_ARCH_LIST=9.0"]),
    ],
)
def test_what_is_missing_comes_with_what_to_do(changes: dict[str, Any], words: list[str]) -> None:
    (line,) = machine(**changes)["advice"]
    assert all(word in line for word in words), line
    assert line in doctor.table(machine(**changes))


def test_a_package_without_its_native_part_is_built_from_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.cot2align, "__file__", str(tmp_path / "cot2align" / "__init__.py"))
    (line,) = machine(native__build=None)["advice"]
    assert "not compiled" in line
    assert line.endswith("tree COT2ALIGN_NATIVE=1 pip install --force-reinstall --no-deps .")


@pytest.mark.parametrize("built", [{"cuda": False, "cuda_archs": ""}, {"cuda_archs": "9.0 10.0"}])
@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_no_cuda_part_is_advised_that_would_not_serve(capability: str, built: Any) -> None:
    devices = [H200 | {"capability": capability}]
    changes = {f"native__build__{name}": value for name, value in built.items()}
    assert machine(devices=devices, torch__devices=devices, **changes)["advice"] == []


def test_no_cuda_part_is_advised_for_gpus_of_amd() -> None:
    assert machine(native__build__cuda=False, torch__cuda=None)["advice"] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["native", "triton", "cuda", "cuda", "triton"]),
        ({"devices": [H200 | {"capability": "8.0"}]}, ["native", *["triton"] * 4]),
        ({"devices": [H200 | {"capability": "7.5"}]}, ["native", *["reference"] * 4]),
        ({"torch__error": "No module named 'torch'"}, ["none", "none"]),
        ({"native__error": "libgomp.so.1"}, ["none", "none"]),
        ({"torch__devices": []}, ["native", "none"]),
    ],
)
def test_each_device_and_size_gets_a_backend(changes: dict[str, Any], expected: list[str]) -> None:
    if not doctor.gather()["native"]["build"]["cuda"]:
        expected = ["triton" if name == "cuda" else name for name in expected]
    chosen = machine(**changes)["backends"]
    assert [entry["backend"] for entry in chosen] == expected
    assert {entry["device"] for entry in chosen} == {"cpu", "cuda:0"}
    for entry in chosen:
        assert entry["why"]
        assert all(other["why"] for other in entry["others"])
        if entry["backend"] != "none":
            named = {entry["backend"], *(other["backend"] for other in entry["others"])}
            assert named == {"native", "triton", "cuda", "reference"}


def test_the_reason_for_each_backend_that_was_passed_over(capsys: Any) -> None:
    lines = doctor.table(machine(devices=[H200 | {"capability": "8.0"}])).splitlines()
    large = lines.index(next(line for line in lines if "4096x4096" in line))
    assert "triton: streams the matrix" in lines[large]
    others = "\n".join(lines[large + 1 : large + 4])
    assert "then reference: plain PyTorch" in others
    assert "not native: it takes CPU tensors" in others
    assert "not cuda: " in others

    with pytest.raises(SystemExit) as stop:
        doctor.main(["--sizes", "64by64"])
    assert stop.value.code == 2
    assert "'64by64' is not like 64x128" in capsys.readouterr().err
