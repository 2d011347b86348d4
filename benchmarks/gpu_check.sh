#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes: are the kernels right, and how fast are they.
#
#   benchmarks/gpu_check.sh [FOLDER]      # or OUT=FOLDER; otherwise ./gpu-check
#
# Needs torch with CUDA, Triton and a C compiler; downloads nothing. pytest is used where it is installed, gemlite and
# GPTQModel too. Each part has its own time limit and its own files, so what comes after a part that fails still runs;
# the exit code is 1 where one did, 3 where there is no such GPU. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${1:-${OUT:-gpu-check}}")
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton-cache}"
: > "$out/summary.txt"
failed=0

part() {  # part NAME SECONDS COMMAND...: runs it, keeps its output, and goes on
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
# Shares of eight minutes; the second number is when a part is ended that did not end by itself.
part correctness 110 "$python" benchmarks/check_cuda.py --budget 90 --out "$out"
if "$python" -c 'import pytest, hypothesis' 2> /dev/null; then
  part tests 75 "$python" -m pytest -m gpu -p no:cacheprovider tests
else
  echo "tests: left out, pytest or hypothesis is not installed" | tee -a "$out/summary.txt"
fi
part matmul 170 "$python" benchmarks/bench_matmul_cuda.py --budget 140 --out "$out"
part solver 45 "$python" benchmarks/bench_solver_cuda.py --budget 25 --out "$out"
part tuning 70 "$python" benchmarks/tune_cuda.py --budget 50 --out "$out/tuning"
[ -n "${KEEP_CACHE:-}" ] || rm -rf "$out/triton-cache"
exit "$failed"
