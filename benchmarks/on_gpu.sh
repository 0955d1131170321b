#!/usr/bin/env bash
# Says, on a machine with an NVIDIA GPU and no network, whether everything works there, and then how fast it is.
#
#   benchmarks/on_gpu.sh works    loads or builds the kernels; the GPU tests of operators and trainers; memcheck
#   benchmarks/on_gpu.sh fast     the benchmarks, those that matter most first
#
# Needs python3 with torch (CUDA), pytest and hypothesis, and nvcc, c++ and ninja where the kernels must be built. Each
# part keeps to BUDGET seconds. Rows go to benchmarks/results/<gpu>.jsonl, and with the logs to $OUT if that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PART=${1:-works}
BUDGET=${BUDGET:-280}  # seconds for this part
SECONDS=0
LOGS=${OUT:-build}
mkdir -p "$LOGS"

left() { echo $((BUDGET - SECONDS)); }

# limited LIMIT NAME COMMAND..: runs it for at most LIMIT seconds and what is left of the budget
limited() {
  local limit=$1 name=$2
  shift 2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  [ "$limit" -lt 5 ] && echo "$name: no time left" && return 1
  timeout "$limit" "$@"
  local status=$?
  echo "$name: exit status $status after ${SECONDS} s"
  return $status
}

# a tree that was never installed has no fastws.kernels, which an installation maps to kernels/
loads() { $PYTHON -c "import sys, fastws.kernels; from fastws import _native; sys.exit(_native.ABSENT['cuda'] is not None)"; }

works() {
  $PYTHON - <<'CHECK' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("on_gpu.sh: torch must see a GPU; it does not. Check nvidia-smi, and that torch is a CUDA build.")
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK
  local failed=0 capability
  capability=$($PYTHON -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
  [ "$capability" = 90 ] && capability=90a
  if ! loads; then
    export FASTWS_CUDA_ARCHS=${FASTWS_CUDA_ARCHS:-$capability} FASTWS_BUILD=cuda
    rm -f fastws/*.so  # of another machine, which do not load here
    limited 150 build $PYTHON -m pip install -q --no-index --no-deps --no-build-isolation -e . || failed=1
  fi
  $PYTHON -m fastws doctor
  local files=() op
  for op in $(ls fastws/ops | sed -n 's/^\([a-z].*\)\.py$/\1/p'); do files+=("tests/test_$op.py"); done
  limited 150 operators $PYTHON -m pytest -q -p no:cacheprovider -k cuda "${files[@]}" > "$LOGS/operators.log" 2>&1 || failed=1
  tail -20 "$LOGS/operators.log"
  limited 90 trainers $PYTHON -m pytest -q -p no:cacheprovider -k cuda tests/test_train_sane.py tests/test_train_ae.py \
    tests/test_nern_train.py tests/test_zoo_make.py tests/test_waiting.py > "$LOGS/trainers.log" 2>&1 || failed=1
  tail -20 "$LOGS/trainers.log"
  if command -v compute-sanitizer > /dev/null; then
    limited 60 memcheck compute-sanitizer --error-exitcode 1 $PYTHON -m pytest -q -p no:cacheprovider \
      -k "cuda and opcheck" "${files[@]}" > "$LOGS/memcheck.log" 2>&1 || failed=1
    tail -5 "$LOGS/memcheck.log"
  fi
  exit $failed
}

# `fastws bench NAME --quick --out benchmarks/results`, which needs the library of the command line
BENCH='from pathlib import Path; from sys import argv; from fastws.benchmarks import harness, run'
BENCH+='; options = harness.Options(quick=True, out=Path("benchmarks/results")); run.run(argv[1:], options)'

fast() {
  local failed=0 first="token_views small_cnn_step nern_step coordinate_mlp" name rest
  rest=$(ls benchmarks | sed -n 's/^bench_\(.*\)\.py$/\1/p')
  for name in $first $(for name in $rest; do [[ " $first " == *" $name "* ]] || echo "$name"; done); do
    limited 60 "bench_$name" $PYTHON -c "$BENCH" "$name" || failed=1
    # what a step is made of comes before operators that matter less
    [ "$name" = coordinate_mlp ] && { limited 60 trace $PYTHON -m fastws.benchmarks.trace_sane "$LOGS" || failed=1; }
  done
  limited 60 replays $PYTHON -m fastws.benchmarks.replays token_views nt_xent masked_mse coordinate_mlp || failed=1
  [ -n "${OUT:-}" ] && cp benchmarks/results/*.jsonl "$OUT"
  exit $failed
}

case $PART in
  works | fast) $PART ;;
  *) echo "on_gpu.sh: the part must be works or fast, got $PART" && exit 2 ;;
esac
