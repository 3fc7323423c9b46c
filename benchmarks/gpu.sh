#!/usr/bin/env bash
# On a machine with a GPU: builds, checks every backend against float64, then measures. No network is
# needed: torch, triton, pybind11, ninja, setuptools, pytest, hypothesis and tqdm must be there, which
# `pip install -e '.[test,bench,peers]'` brings, with the peers. Results go to FOLDER.
#
#     bash benchmarks/gpu.sh [FOLDER [STEP...]]        STEP: build compile check measure sanitize
#
# PYTHON=python3 (.venv/bin/python after `make doctor`). With TORCH_CUDA_ARCH_LIST=9.0 the build takes a third of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}
steps=("${@:2}")
[ ${#steps[@]} -gt 0 ] || steps=(build compile check measure sanitize)

# The kernels' own tests, on the GPU; they also fill Triton's cache, in parallel with pytest-xdist.
compile() {
  local parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)")
  "$python" -m pytest -q "${parallel[@]}" tests/kernels/test_triton.py \
    tests/kernels/test_triton_streamed.py tests/kernels/test_cuda.py
}
build() {
  "$python" -m pip install -q --no-build-isolation --no-deps -e . &&
    "$python" -m cot2align.doctor --sizes 64x64 128x128 512x512 4096x4096 | tee "$folder/gpu-doctor.txt"
}
check() { "$python" -m benchmarks check --device cuda 2>&1 | tee "$folder/gpu-check.txt"; }
measure() {
  "$python" -m benchmarks run gpu-64x512x512 --device cuda --out "$folder/gpu-512.csv" &&
    "$python" -m benchmarks run gpu --device cuda --out "$folder/gpu.csv"
}
# PyTorch's cache would hide what lies just outside a tensor.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 "$python" -m pytest -q \
    tests/kernels/test_cuda.py -k gpu 2>&1 | tee "$folder/gpu-sanitizer.txt"
}

failed=()
for step in "${steps[@]}"; do
  echo "== $step"
  "$step" || failed+=("$step")  # what is broken must not keep the rest from being seen
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
