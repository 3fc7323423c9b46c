#!/usr/bin/env bash
# On a machine with a GPU: builds, checks every backend against float64, then measures. No network is
# needed: torch, triton, pybind11, ninja and setuptools must be there. Results: CSV and logs in FOLDER.
#
#     bash benchmarks/gpu.sh [FOLDER]        PYTHON=python3
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}

echo "== building"
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m cot2align.doctor --sizes 64x64 128x128 512x512 4096x4096 | tee "$folder/gpu-doctor.txt"

echo "== checking"
"$python" -m benchmarks check --device cuda 2>&1 | tee "$folder/gpu-check.txt"
if command -v compute-sanitizer >/dev/null; then
  # Without PyTorch's cache each tensor is an allocation, whose ends the sanitizer sees.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
    "$python" -m benchmarks check --device cuda --small | tee "$folder/gpu-sanitizer.txt"
fi

echo "== measuring"
"$python" -m benchmarks run gpu --device cuda --repeats 20 --out "$folder/gpu.csv"
