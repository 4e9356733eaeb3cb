#!/usr/bin/env bash
# compute-sanitizer over the LSTM kernels on small shapes: out-of-bounds and uninitialised memory, races in shared memory, and
# barriers that not all threads reach. Every variant that fits the GPU runs, forward and backward. Needs a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH="$PWD:$PWD/tests" \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name regex:lstm_ \
    "$python" tests/gpu/sanitize_lstm.py
done
