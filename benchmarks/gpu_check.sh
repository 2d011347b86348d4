#!/usr/bin/env bash
# Check and measure everything on a GPU, in four calls of less than ten minutes: see gpu_check/command.py.
#
#   benchmarks/gpu_check.sh probe|matmul|tuning|models [--out FOLDER] [--budget SECONDS] [--cache FILE] [--toy]
#
# PYTHON sets the interpreter; TRITON_CACHE_DIR the folder of compiled kernels (default: build/triton-cache).
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$root/build/triton-cache}" TRITON_STORE_BINARY_ONLY=1
case " $* " in *" --toy "*) export TRITON_INTERPRET=1 ;; esac
mkdir -p "$TRITON_CACHE_DIR"
exec "${PYTHON:-python3}" -m gpu_check "$@"
