"""Builds cot2align.kernels._native: C++ for every CPU, and CUDA where nvcc is found and usable.

pyproject.toml holds everything static. This file finds the compilers, writes one build.ninja and
runs it: an unchanged tree builds nothing, a changed header rebuilds what includes it. torch is not
needed, the extension takes raw pointers. The environment decides:

    COT2ALIGN_NATIVE=1|0        0: pure Python, no compiler needed
    COT2ALIGN_CUDA=auto|1|0     CUDA part where nvcc is usable | required | left out
    CXX, CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST="9.0 10.0+PTX"    as in other projects

Nothing is compiled for the machine at hand: csrc/sinkhorn.cpp is compiled once per instruction set
and the module chooses when it runs. Linux and macOS; no Windows build.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shlex import join, quote, split

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden"
# Linked after all other objects and in this order: of an inline function that several objects carry
# the linker keeps the first, which then has no instructions that its caller's CPU may lack.
ISA_FLAGS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma"
    ISA_FLAGS["avx512"] = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma"


def setting(name: str, *allowed: str) -> str:
    """The environment variable `name`; the first allowed value where it is not set."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        sys.exit(f"cot2align: {name}={value} is none of {', '.join(allowed)}")
    return value


def find_cxx() -> list[str]:
    asked, include = os.environ.get("CXX"), sysconfig.get_paths()["include"]
    candidates = [split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    cxx = next((words for words in candidates if shutil.which(words[0])), None)
    if cxx is None:
        missing = f"CXX={asked} is no program" if asked else "no C++ compiler (c++, g++, clang++)"
    elif not Path(include, "Python.h").exists():
        missing = f"no Python.h in {include} (Debian: python3-dev)"
    else:
        return cxx
    sys.exit(f"cot2align: {missing}: install one, or set COT2ALIGN_NATIVE=0 for pure Python")


def host_compiler(cxx: list[str]) -> str:
    """What nvcc calls, of "ccache g++ -m64" g++."""
    return [word for word in cxx if shutil.which(word)][-1]


def find_nvcc(cxx: list[str]) -> tuple[str | None, str]:
    """The CUDA compiler, or None and why: CUDA_HOME goes before PATH."""
    home, wanted = os.environ.get("CUDA_HOME"), setting("COT2ALIGN_CUDA", "auto", "1", "0")
    if wanted == "0":
        return None, "COT2ALIGN_CUDA=0"
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    why = f"no nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH and no CUDA_HOME"
    if nvcc:
        why = refusal(nvcc, cxx)
    if why and wanted == "1":
        sys.exit(f"cot2align: {why}, but COT2ALIGN_CUDA=1")
    return None if why else nvcc, why


def refusal(nvcc: str, cxx: list[str]) -> str:
    """Why nvcc cannot compile for the first GPUs with clusters, as where it is older than they are
    or than the C++ compiler; empty where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.touch()
        trial = subprocess.run(
            [nvcc, "-ccbin", host_compiler(cxx), "-arch=sm_90", "-E", source, "-o", os.devnull],
            capture_output=True,
            text=True,
        )
    said = re.search(r"(fatal|error)\b.*", trial.stderr)
    return f"{nvcc}: {said[0] if said else 'fails'}" if trial.returncode else ""


def cuda_archs(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else those that the kernel serves: 9.0 and 10.0."""
    asked = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if bad := [arch for arch in asked if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
        sys.exit(f"cot2align: TORCH_CUDA_ARCH_LIST: {bad[0]} is not like 9.0, 9.0a or 9.0+PTX")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return asked or (["9.0", "10.0"] if "compute_100" in known else ["9.0+PTX"])


def gencode(archs: list[str]) -> Iterator[str]:
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        yield f"-gencode=arch=compute_{number},code={code}"


def openmp_flag(cxx: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        trial = subprocess.run(
            [*cxx, "-fopenmp", source, "-o", f"{source}.out"], capture_output=True
        )
    if trial.returncode:
        print(f"cot2align: {join(cxx)} -fopenmp does not work: one thread only")
    return "" if trial.returncode else "-fopenmp"


def build_ninja(folder: Path, version: str) -> str:
    """The way from csrc/ to folder/_native.so, for ninja in the root."""
    import pybind11

    cxx = find_cxx()
    nvcc, why_not = find_nvcc(cxx)
    openmp = openmp_flag(cxx)
    if nvcc is None:
        print(f"cot2align: {why_not}: CPU part only")
    archs = cuda_archs(nvcc) if nvcc else []
    headers = folder / f"pybind11-{pybind11.__version__}"
    if not headers.exists():  # the copy's path outlives an isolated build, so ninja sees no change
        shutil.copytree(pybind11.get_include(), headers)
    bindings = f"-isystem {headers} -isystem {quote(sysconfig.get_paths()['include'])}"
    bindings += f""" '-DCOT2ALIGN_VERSION="{version}"'"""
    jobs = os.environ.get("MAX_JOBS") or 0  # architectures at a time; 0: as many as CPUs
    compilers = {"cxx": f"{join(cxx)} {CXX_FLAGS} {openmp}"}
    link = f"{join(cxx)} -shared {openmp}"
    if nvcc:
        bindings += f""" '-DCOT2ALIGN_CUDA_ARCHS="{" ".join(archs)}"'"""
        with_host = f"{quote(nvcc)} -ccbin {quote(host_compiler(cxx))}"
        compilers["nvcc"] = f"{with_host} {NVCC_FLAGS} --threads {jobs}"
        # cudart is static: no other part of the process has to agree on its version.
        link = f"{with_host} -shared -cudart static -Xcompiler='{openmp}'"
    if sys.platform == "darwin":
        link += " -undefined dynamic_lookup"

    edges = []  # (object, rule, source, flags) in link order
    for source in sorted(Path("csrc").glob("*.cpp")):
        if source.name != "sinkhorn.cpp":
            own = bindings if source.name == "bindings.cpp" else ""
            edges.append((f"{folder}/{source.stem}.o", "cxx", source, own))
    for source in sorted(Path("csrc").glob("*.cu")) if nvcc else []:
        edges.append((f"{folder}/{source.stem}.cu.o", "nvcc", source, " ".join(gencode(archs))))
    for isa, flags in ISA_FLAGS.items():
        own = f"-DCOT2ALIGN_ISA={isa} {flags}"
        edges.append((f"{folder}/sinkhorn.{isa}.o", "cxx", "csrc/sinkhorn.cpp", own))
    lines = [f"builddir = {folder}"]
    for rule, compiler in compilers.items():
        lines += [f"rule {rule}", f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {rule} $out"]
    lines += ["rule link", f"  command = {link} $in -o $out", "  description = link $out"]
    for target, rule, source, flags in edges:
        lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
    lines += [f"build {folder}/_native.so: link {' '.join(edge[0] for edge in edges)}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        os.chdir(Path(__file__).resolve().parent)
        folder = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        folder.mkdir(parents=True, exist_ok=True)
        edges = build_ninja(folder, self.distribution.get_version())
        (folder / "build.ninja").write_text(edges)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        command = [Path(ninja.BIN_DIR, "ninja"), "-f", folder / "build.ninja", *jobs]
        if subprocess.run(command).returncode:
            without = ", or set COT2ALIGN_CUDA=0" if "rule nvcc" in edges else ""
            sys.exit(
                "cot2align: the native part did not compile: "
                f"see the compiler's message above{without}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a running process keeps the file that it has mapped
        shutil.copy2(folder / "_native.so", target)


native = setting("COT2ALIGN_NATIVE", "1", "0") == "1"
if native and "dist_info" in sys.argv:  # pip asks for this before it fetches what we depend on
    find_nvcc(find_cxx())
setup(
    ext_modules=[Extension("cot2align.kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": NinjaBuild},
)
