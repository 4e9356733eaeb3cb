#!/usr/bin/env bash
# Second contact, in at most 200 s: what failed in first.sh, memcheck on small shapes, and pairs that differ in one thing.
#
#   benches/gpu/again.sh [--dry-run] FIRST OUT     FIRST: the folder that first.sh filled
#
# The files in OUT are those of first.sh, sanitizer.log beside them.
set -u
cd "$(dirname "$0")/../.." || exit

dry=
[[ ${1-} == --dry-run ]] && dry=yes && shift
FIRST=${1:?the folder that first.sh filled} OUT=${2:?a folder for what comes out}
BUDGET=${BUDGET:-185}
. benches/gpu/steps.sh
[[ $dry ]] && dry_run

library=(fusedprompt/_cuda*.so)
if [[ ! -e ${library[0]} || $dry || $(find csrc setup.py -newer "${library[0]}") ]]; then
  begin_build 90
  finish build
fi

if [[ ! -e $FIRST/tests.jsonl ]]; then
  note failed-tests "FAILED: no $FIRST/tests.jsonl"
elif mapfile -t failed < <("$PYTHON" -m benches.gpu.keep "$FIRST/tests.jsonl" tests/)
  [[ ${failed[*]} ]]; then
  tests failed-tests 60 3 "${failed[@]}"
else
  note failed-tests "none in $FIRST"
fi

for part in $(of lstm-S lstm-M triton); do
  begin "memcheck-$part" 60 sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool=memcheck --error-exitcode=9 "$PYTHON" -m benches.gpu.small "$part"
done
finish memcheck-{triton,lstm-S,lstm-M}

FUSEDPROMPT_BENCH_SECONDS=$((BUDGET - SECONDS - 10)) benches pairs "$BUDGET" benches/gpu/test_bench_pairs.py

end_of_steps
