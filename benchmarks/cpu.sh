#!/usr/bin/env bash
# Every CSV file and figure of benchmarks/results: a command a file, each of a few minutes on two quiet cores.
#
#     bash benchmarks/cpu.sh [STEP...]        STEP: main size problems iterations threads step plot
#
# PYTHON=python3, THREADS=2, RESULTS=benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} threads=${THREADS:-2} results=${RESULTS:-benchmarks/results}
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(main size problems iterations threads step plot)

for step in "${steps[@]}"; do
  echo "== $step"
  case $step in
    main)
      "$python" -m benchmarks run main --threads "$threads" --repeats 3 \
        --ways product naive compile bmm authors pot --out "$results/cpu.csv"
      ;;
    size | problems | iterations | threads)
      "$python" -m benchmarks run "$step" --threads "$threads" --repeats 3 --no-memory \
        --out "$results/$step.csv"
      ;;
    step) "$python" -m benchmarks.step --threads "$threads" --out "$results/step.csv" ;;
    plot)
      files=()
      for name in size problems iterations threads; do
        [ ! -f "$results/$name.csv" ] || files+=("$results/$name.csv")
      done
      "$python" -m benchmarks plot "${files[@]}" --out "$results"
      ;;
    *)
      echo "unknown step $step, expected of main size problems iterations threads step plot" >&2
      exit 2
      ;;
  esac
done
