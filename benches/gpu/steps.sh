# shellcheck shell=bash
# Steps of a script that stops at no failure. Whoever sources this has set OUT, a folder, and BUDGET, seconds for all steps.
#
#   begin NAME SECONDS LOG COMMAND...   starts a command, whose output goes to OUT/LOG
#   finish NAME...                      waits for these
#   step NAME SECONDS LOG COMMAND...    both
#   end_of_steps                        what failed; gives the status of the script
#
# OUT/summary.txt gets a line when a step begins and one when it ends, so that it is true whenever the script is killed.
# A command that is not done in time, or when the budget is spent, is ended from outside with all that it started:
# a process that waits for a kernel which hangs listens to nothing but SIGKILL, and if not even to that it is left behind.

PYTHON=${PYTHON:-python3}
PATIENCE=${PATIENCE:-5}  # seconds between SIGTERM and SIGKILL, and until nobody waits any longer
slow=1
declare -A process since limit
trap 'for name in "${!process[@]}"; do kill "${process[$name]}" 2>/dev/null; done; note script "stopped by a signal"; exit 143' INT TERM

mkdir -p "$OUT" || exit
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"

note() { printf '%4d s  %-20s %s\n' "$SECONDS" "$1" "$2" | tee -a "$OUT/summary.txt"; }

of() { if [[ ${dry-} ]]; then echo "$1"; else echo "$@"; fi; }

begin() {
  local name=$1 most=$2 log=$OUT/$3 left=$((BUDGET - SECONDS))
  shift 3
  if ((left < 1)); then
    note "$name" "skipped: $BUDGET s are over"
    return
  fi
  most=$((most * slow))
  limit[$name]=$((most < left ? most : left))
  since[$name]=$SECONDS
  note "$name" "begun, has ${limit[$name]} s"
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  timeout -k "$PATIENCE" "${limit[$name]}" "$@" >>"$log" 2>&1 </dev/null &
  process[$name]=$!
}

finish() {
  local name status seconds
  for name; do
    [[ -v process[$name] ]] || continue
    while kill -0 "${process[$name]}" 2>/dev/null && ((SECONDS - since[$name] < limit[$name] + 2 * PATIENCE)); do
      sleep 0.1
    done
    status=left
    kill -0 "${process[$name]}" 2>/dev/null || { wait "${process[$name]}"; status=$?; }
    unset "process[$name]"
    seconds=$((SECONDS - since[$name]))
    case $status in
      0) note "$name" "ok, $seconds s" ;;
      124 | 137) note "$name" "FAILED: killed after $seconds s" ;;
      left) note "$name" "FAILED: does not end, and is left behind after $seconds s" ;;
      *) note "$name" "FAILED: status $status after $seconds s" ;;
    esac
  done
}

step() { begin "$@"; finish "$1"; }

end_of_steps() {
  local failed
  failed=$(awk '$4 ~ /^(FAILED|skipped)/ { printf " %s", $3 }' "$OUT/summary.txt")
  if [[ $failed ]]; then note script "did not work:$failed"; else note script "every step is ok"; fi
  [[ ! $failed ]]
}

# What the steps have in common. A card's own architecture is compiled for alone: that takes a sixth of the time.

capability() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | grep . ||
    "$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'
}

where=(--inplace)
begin_build() {
  card=$(capability)
  begin build "$1" build.log env FUSEDPROMPT_CUDA=1 FUSEDPROMPT_NATIVE=1 TORCH_CUDA_ARCH_LIST="$card" \
    "$PYTHON" setup.py build_ext "${where[@]}"
}

probe() {
  step probe "$1" build.log sh -c "nvcc -O3 -std=c++17 -arch=sm_${card/./} -o '$scratch/probe' benches/gpu/probe.cu &&
    '$scratch/probe' >'$OUT/probe.json'"
}

has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# shellcheck disable=SC2034  # used where this is sourced
large="3072 or 3073 or many_times or variant-L or long_sequences" # LSTM tests that take long
few=() device=cuda each=60
# tests NAME SECONDS WORKERS ARGUMENTS...: pytest with a time-out for each test and in parallel, where the plugins are there.
tests() {
  local name=$1 seconds=$2 workers=$3 options=()
  shift 3
  ((workers > 1)) && has xdist && options+=(-n "$workers")
  has pytest_timeout && options+=(--timeout "$each" --timeout-method thread)
  step "$name" "$seconds" tests.log "$PYTHON" -m pytest -q -p no:cacheprovider -p benches.gpu.keep \
    --keep "$OUT/tests.jsonl" "${few[@]}" "${options[@]}" "$@"
}

# benches NAME SECONDS ARGUMENTS...: one process, alone on the card.
benches() {
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" bench.log "$PYTHON" -m pytest -q -p no:cacheprovider -p benches.gpu.keep \
    --keep "$OUT/tests.jsonl" --rows "$OUT/bench.jsonl" --device "$device" --benchmark-quiet "${few[@]}" "$@"
}

# Without a GPU: Triton's interpreter, toy sizes, the first tests of each step and the first round of each loop, compilers
# that write empty files, and time for a slow machine.
dry_run() {
  export PATH="$PWD/tests/gpu_stand_ins:$PATH" CXX="$PWD/tests/gpu_stand_ins/compiler" TRITON_INTERPRET=1 \
    FUSEDPROMPT_BENCH_TOY=1 TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1
  where=(--build-lib "$scratch/lib" --build-temp "$scratch/temp")
  few=(--few 3) device=cpu slow=10
  # shellcheck disable=SC2317  # what is imported here asks it
  has() { false; } # in parallel they would take longer
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1
