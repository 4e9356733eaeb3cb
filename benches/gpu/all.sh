#!/usr/bin/env bash
# Everything, for people who own a card: `make gpu`. About half an hour; no failure stops it, and it ends with the list.
#
#   benches/gpu/all.sh OUT [test] [sanitize] [bench] [steps]      without a part, all four
#
# The files in OUT are those of first.sh, sanitizer.log beside them.
set -u
cd "$(dirname "$0")/../.." || exit

OUT=${1:?a folder for what comes out}
shift
BUDGET=${BUDGET:-14400}
. benches/gpu/steps.sh
parts=" ${*:-test sanitize bench steps} "

begin_build 600
finish build

if [[ $parts == *" test "* ]]; then
  step doctor 120 doctor.txt "$PYTHON" -m fusedprompt doctor
  for file in ops head_loss machinery lstm_cuda two_streams; do # what may hang is last
    tests "test-$file" 900 1 "tests/gpu/test_$file.py" -k "not compile"
  done
  each=300 tests test-compile 900 1 tests/gpu/test_machinery.py tests/gpu/test_lstm_cuda.py -k compile
fi

if [[ $parts == *" sanitize "* ]]; then
  for tool in memcheck racecheck; do
    for part in triton lstm-S lstm-M lstm-STREAM lstm-L; do
      step "$tool-$part" 300 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool=$tool --error-exitcode=9 "$PYTHON" -m benches.gpu.small "$part"
    done
  done
fi

if [[ $parts == *" bench "* ]]; then
  probe 120
  FUSEDPROMPT_BENCH_SECONDS=1700 benches bench 1800 benches/gpu
fi

if [[ $parts == *" steps "* ]]; then
  FUSEDPROMPT_BENCH_LAYERS=28 benches metamath 900 benches/test_bench_metamath.py
  benches training-steps 900 benches/test_bench_step.py
  benches generation 900 benches/test_bench_inference.py
fi

[[ -s $OUT/bench.jsonl ]] && "$PYTHON" -m benches.report "$OUT/bench.jsonl"
end_of_steps
