#!/usr/bin/env bash
# First contact with a GPU: in at most 480 s, what matters most first, whatever fails.
#
#   benches/gpu/first.sh [--dry-run] [OUT]        make gpu-first OUT=... PYTHON=python3
#
# Needs torch, Triton, nvcc, pytest, pytest-benchmark and PEFT, and no network. It may be killed at any moment. In OUT, 8 files:
#   summary.txt              each step: when it began, how and after how many seconds it ended
#   build.log probe.json     the build for this card alone; what the machine can do at most
#   doctor.txt               versions, backends and their reasons, each op held against its formula
#   tests.jsonl tests.log    each test's outcome, written at once; what the tests printed
#   bench.jsonl bench.log    each measured row, written at once: python -m benches.report OUT/bench.jsonl
# benches/gpu/again.sh goes on from there. --dry-run runs every step without a GPU, at toy sizes.
set -u
cd "$(dirname "$0")/../.." || exit

dry=
[[ ${1-} == --dry-run ]] && dry=yes && shift
OUT=${1:-${OUT:-build/gpu}}
BUDGET=${BUDGET:-465} # a step that hangs takes up to 10 s more
. benches/gpu/steps.sh
layers=28
[[ $dry ]] && dry_run && layers=2
# What hangs or compiles slowly takes no time from the numbers: a third is kept for bench-first and MetaMathQA.
numbers=$((BUDGET / 3))
BUDGET=$((BUDGET - numbers))

begin_build 150
probe 60 # alone on the card: the warm-up of Triton's cache would take bandwidth from it
step warm-up 120 build.log "$PYTHON" -m benches.gpu.small triton
finish build

step doctor 45 doctor.txt "$PYTHON" -m fusedprompt doctor
for variant in $(of S M STREAM L); do
  begin "small-lstm-$variant" 40 tests.log "$PYTHON" -m benches.gpu.small "lstm-$variant"
done
finish small-lstm-{S,M,STREAM,L}

tests test-ops 60 6 tests/gpu/test_ops.py tests/gpu/test_head_loss.py
tests test-lstm 70 3 tests/gpu/test_lstm_cuda.py -k "not ($large or compile)"

metamath() {
  FUSEDPROMPT_BENCH_LAYERS=$layers benches "metamath-$1" 60 "benches/test_bench_metamath.py::test_metamath[$1]"
}
BUDGET=$((BUDGET + numbers))
FUSEDPROMPT_BENCH_SECONDS=80 benches bench-first 90 benches/gpu/test_bench_gpu.py -k first
metamath prompt-tuning-N=200

tests test-machinery 60 3 tests/gpu/test_machinery.py -k "not compile"
tests test-lstm-large 70 3 tests/gpu/test_lstm_cuda.py -k "$large"
tests test-two-streams 75 1 tests/gpu/test_two_streams.py

[[ $dry ]] || metamath P-tuning-MLP-N=20
[[ $dry ]] || metamath P-tuning-LSTM-N=50
each=80 tests test-compile 90 1 tests/gpu/test_machinery.py tests/gpu/test_lstm_cuda.py -k compile # Inductor begins cold
FUSEDPROMPT_BENCH_SECONDS=$((BUDGET - SECONDS - 10)) benches bench-rest "$BUDGET" benches/gpu/test_bench_gpu.py -k "not first"

end_of_steps
