#!/usr/bin/env bash
# Run every GPU check in one call of less than eight minutes: correctness and speed of the kernels.
#
#   benchmarks/gpu_check.sh [FOLDER]      # or OUT=FOLDER; otherwise ./gpu-check
#
# Needs torch with CUDA, Triton and a C compiler; downloads nothing. pytest, gemlite and GPTQModel are used if they are
# installed. Each part has its own time limit and files, so a failed part does not stop the others. The exit code is 1 if
# a part failed and 3 if there is no supported GPU. PYTHON sets the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-${OUT:-gpu-check}}")
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton-cache}"
: > "$out/summary.txt"
failed=0

part() {  # part NAME SECONDS COMMAND...: run a command and keep its output; a failure does not stop the script
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  tail -n 25 "$out/$name.log"
  echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
  [ "$code" -eq 0 ] || failed=1
}

"$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import cuda_common; cuda_common.require_device()' || exit 3
nvidia-smi > "$out/nvidia-smi.txt" 2>&1 || true
# The second argument is the timeout of a part.
part correctness 110 "$python" benchmarks/check_cuda.py --budget 90 --out "$out"
if "$python" -c 'import pytest, hypothesis' 2> /dev/null; then
  part tests 75 "$python" -m pytest -m gpu -p no:cacheprovider tests
else
  echo "tests: skipped, pytest or hypothesis is not installed" | tee -a "$out/summary.txt"
fi
part matmul 170 "$python" benchmarks/bench_matmul_cuda.py --budget 140 --out "$out"
part solver 45 "$python" benchmarks/bench_solver_cuda.py --budget 25 --out "$out"
part tuning 70 "$python" benchmarks/tune_cuda.py --budget 50 --out "$out/tuning"
[ -n "${KEEP_CACHE:-}" ] || rm -rf "$out/triton-cache"
exit "$failed"
