"""setup.py as pip calls it: what is built, said and refused, in a tree made from the sdist.

Where only the logic is tested the compilers are a shell script that makes empty files, so the real
sources are compiled once, by the installation that runs these tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (
    *("csrc", "cot2align", "tests", "recipes", "benchmarks", "docs", ".ci"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt", "Makefile"),
    *("LICENSE", "README.md", "CONTRIBUTING.md"),
)
COMPILER = """#!/bin/sh
[ "$1" = --list-gpu-arch ] && { printf 'compute_80\\ncompute_90\\n'$NEWER; exit; }
case "$NO_OPENMP$*" in yes*-fopenmp*) exit 1 ;; esac
[ -n "$REFUSED" ] && case "$*" in *$REFUSED*) echo "nvcc fatal   : $REFUSED?" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2 ;; -MF) dep=$2 ;; -c) source=$2 ;; esac
  shift
done
headers=$(sed -n 's/^#include "\\(.*\\)"/csrc\\/\\1/p' "$source")
[ -z "$dep" ] || echo "$out: $source" $headers > "$dep"
echo > "$out"
"""


def hook(tree: Path, name: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a hook of the build backend, e.g. build_wheel, with nothing set but `env`."""
    ours = ("COT2ALIGN_", "CUDA_HOME", "CXX", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    code = f"from setuptools import build_meta; build_meta.{name}('dist')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=inherited | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree unpacked from the sdist of a copy of this one."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=unwanted)
        elif source.exists():
            shutil.copy(source, folder / name)
    done = hook(folder, "build_sdist", {"COT2ALIGN_NATIVE": "1", "PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    return tree


@pytest.fixture
def tree(sdist: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdist, tmp_path / "tree"))


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that makes empty files, as c++ and as $CUDA_HOME/bin/nvcc."""
    script = tmp_path / "cuda" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(COMPILER)
    script.chmod(0o755)
    return script


def build(tree: Path, **env: str) -> subprocess.CompletedProcess:
    return hook(tree, "build_wheel", env)


def wheel(tree: Path) -> zipfile.ZipFile:
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def edges(tree: Path) -> str:
    (path,) = (tree / "build").glob("native-*/build.ninja")
    return path.read_text()


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """The build failed, and its last line says so in plain words."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("cot2align: ")
    assert all(word in line for word in words), line


def test_the_sdist_has_what_a_build_needs(sdist: Path) -> None:
    for name in SHIPPED:
        if (ROOT / name).exists():
            assert (sdist / name).exists(), name
    assert set(os.listdir(sdist / "csrc")) == set(os.listdir(ROOT / "csrc"))


def test_without_the_native_part_the_wheel_is_pure_python(tree: Path) -> None:
    done = build(tree, COT2ALIGN_NATIVE="0", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    with wheel(tree) as packed:
        assert Path(str(packed.filename)).match("*-py3-none-any.whl")
        names = packed.namelist()
        assert "cot2align/py.typed" in names
        assert all(name.startswith("cot2align") for name in names)
        assert not any(name.endswith(".so") for name in names)
        metadata = packed.read(next(n for n in names if n.endswith("METADATA"))).decode()
    for extra in ("train", "bench", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    for line in metadata.splitlines():
        if line.startswith("Requires-Dist:") and "cot2align[" not in line:
            assert re.search("==|>=.*<|<.*>=", line), f"no lower or upper bound: {line}"
            # Of PyPI's builds of torch, each accepts one version of Triton.
            assert "triton" not in line or "extra ==" in line
            # Triton has no wheels for macOS, and liger-kernel requires it.
            assert not re.search("triton|liger", line) or "sys_platform ==" in line


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PATH": "/nowhere"}, ["no C++ compiler", "COT2ALIGN_NATIVE=0"]),
        ({"CXX": "no-such-compiler"}, ["CXX=no-such-compiler", "COT2ALIGN_NATIVE=0"]),
        ({"COT2ALIGN_CUDA": "1", "CUDA_HOME": "/nowhere"}, ["no nvcc", "CUDA_HOME=/nowhere"]),
        ({"COT2ALIGN_CUDA": "yes"}, ["COT2ALIGN_CUDA=yes", "auto, 1, 0"]),
        ({"COT2ALIGN_NATIVE": "off"}, ["COT2ALIGN_NATIVE=off", "1, 0"]),
    ],
)
def test_what_cannot_be_built_fails_in_one_line(
    tree: Path, env: dict[str, str], words: list[str]
) -> None:
    assert_one_line(build(tree, **env), *words)


def test_a_missing_compiler_is_said_before_anything_is_fetched(tree: Path) -> None:
    done = hook(tree, "prepare_metadata_for_build_wheel", {"PATH": "/nowhere"})
    assert_one_line(done, "COT2ALIGN_NATIVE=0")
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_architecture_fails_in_one_line(tree: Path, compiler: Path) -> None:
    env = {"CXX": str(compiler), "CUDA_HOME": str(compiler.parents[1])}
    assert_one_line(build(tree, **env, TORCH_CUDA_ARCH_LIST="8.0;Hopper"), "Hopper", "9.0")


def test_broken_sources_fail_the_build(tree: Path) -> None:
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    done = build(tree, COT2ALIGN_CUDA="0")
    assert_one_line(done, "did not compile")
    assert "broken on purpose" in done.stdout
    assert not (tree / "dist").exists() or not any((tree / "dist").iterdir())


def test_only_what_changed_is_built_again(tree: Path, compiler: Path) -> None:
    def compiled() -> list[str]:
        done = build(tree, CXX=str(compiler), CUDA_HOME=str(compiler.parents[1]))
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("[")]
        return sorted(Path(words[2]).name for words in lines if words[1] in ("cxx", "nvcc"))

    assert "bindings.o" in compiled()
    assert compiled() == []
    os.utime(tree / "csrc" / "device_query.h", (2**32, 2**32))
    assert compiled() == ["bindings.o", "device_query.cu.o"]


def test_no_nvcc_is_said_once_and_leaves_the_cpu_part(tree: Path, compiler: Path) -> None:
    tools = compiler.parent / "tools"
    tools.mkdir()
    for tool in ("sh", "sed"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = build(tree, CXX=str(compiler), PATH=str(tools))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no nvcc on PATH and no CUDA_HOME: CPU part only") == 1
    assert "device_query" not in edges(tree)


def test_an_unusable_nvcc_is_said_once_and_leaves_the_cpu_part(tree: Path, compiler: Path) -> None:
    env = {"CXX": str(compiler), "CUDA_HOME": str(compiler.parents[1]), "REFUSED": "sm_90"}
    done = build(tree, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nvcc: fatal   : sm_90?: CPU part only") == 1
    assert "rule nvcc" not in edges(tree)
    assert_one_line(build(tree, **env, COT2ALIGN_CUDA="1"), "nvcc: fatal   : sm_90?", "CUDA=1")


def test_an_nvcc_that_fails_comes_with_what_to_do(tree: Path, compiler: Path) -> None:
    env = {"CXX": str(compiler), "CUDA_HOME": str(compiler.parents[1]), "REFUSED": "sinkhorn.cu"}
    done = build(tree, **env)
    assert_one_line(done, "did not compile", "COT2ALIGN_CUDA=0")
    assert "sinkhorn.cu?" in done.stdout


def test_words_and_spaces(tree: Path, compiler: Path) -> None:
    home = compiler.parents[1].rename(compiler.parents[2] / "cuda 13")
    shutil.copy(home / "bin" / "nvcc", home.parent / "c++")
    done = build(tree, CXX=f"env -u NAME {home.parent / 'c++'}", CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert f"command = env -u NAME {home.parent / 'c++'} -O3" in edges(tree)
    assert f"command = '{home}/bin/nvcc' -ccbin {home.parent / 'c++'} -O3" in edges(tree)


def test_no_openmp_is_said_once_and_leaves_one_thread(tree: Path, compiler: Path) -> None:
    done = build(tree, CXX=str(compiler), COT2ALIGN_CUDA="0", NO_OPENMP="yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-fopenmp does not work: one thread only") == 1
    assert "-fopenmp" not in edges(tree)


def test_cuda_sources_are_built_for_what_nvcc_knows(tree: Path, compiler: Path) -> None:
    env = {"CXX": str(compiler), "CUDA_HOME": str(compiler.parents[1])}
    assert build(tree, **env).returncode == 0
    text = edges(tree)
    assert "flags = -gencode=arch=compute_90,code=[sm_90,compute_90]\n" in text
    assert "-cudart static" in text
    assert build(tree, **env, NEWER="compute_100").returncode == 0
    both = "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_100,code=sm_100"
    assert f"flags = {both}\n" in edges(tree)
    assert build(tree, **env, TORCH_CUDA_ARCH_LIST="7.5 9.0a").returncode == 0
    assert "arch=compute_75,code=sm_75 -gencode=arch=compute_90a,code=sm_90a\n" in edges(tree)


def test_no_object_is_built_for_the_machine_at_hand(tree: Path, compiler: Path) -> None:
    assert build(tree, CXX=str(compiler), COT2ALIGN_CUDA="0").returncode == 0
    text = edges(tree)
    assert "-march=native" not in text
    (link,) = (line for line in text.splitlines() if "_native.so: link" in line)
    objects = [Path(name).name for name in link.split()[3:]]
    isas = [name for name in objects if name.startswith("sinkhorn.")]
    assert objects[-len(isas) :] == isas
    assert isas[0] == "sinkhorn.baseline.o"
