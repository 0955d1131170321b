#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU and no network, within ten minutes.
#
# Needs python3 with torch (CUDA), pytest and hypothesis, and nvcc and c++ for the compiled kernels (without them Triton
# and the references are measured). Writes benchmarks/results/<gpu>.jsonl, and copies it and the log of the tests to
# $OUT if that is set. Operators join by name: tests/test_<op>.py and benchmarks/bench_<op>.py; NeRN's step comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS=0
LIMIT=${LIMIT:-570}  # seconds for everything

$PYTHON - <<'CHECK' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("on_gpu.sh: torch must see a GPU; it does not. Check nvidia-smi, and that torch is a CUDA build.")
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
CHECK

capability=$($PYTHON -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
[ "$capability" = 90 ] && capability=90a
export FASTWS_CUDA_ARCHS=${FASTWS_CUDA_ARCHS:-$capability}
# a library from another machine may not load here
rm -f fastws/*.so
$PYTHON -m pip install -q --no-index --no-deps --no-build-isolation -e . || exit 1
$PYTHON -m fastws doctor 2>/dev/null || $PYTHON -c "from fastws.doctor import report; print(report())"
echo "built after ${SECONDS} s"

ops=$(ls fastws/ops | sed -n 's/^\([a-z].*\)\.py$/\1/p')
log=${OUT:-build}/tests.log
mkdir -p "$(dirname "$log")"
workers=$($PYTHON -c "import xdist" 2>/dev/null && echo "-n 4")
timeout 240 $PYTHON -m pytest -q $workers -p no:cacheprovider -k cuda \
  $(for op in $ops; do echo "tests/test_$op.py"; done) 2>&1 | tee "$log" | tail -40
tests=${PIPESTATUS[0]}
echo "tested after ${SECONDS} s, exit status $tests"

for op in $ops nern_step; do
  left=$((LIMIT - SECONDS))
  [ $left -lt 20 ] && echo "no time left for bench_$op" && continue
  timeout $left $PYTHON "benchmarks/bench_$op.py" || echo "bench_$op failed or ran out of time"
done
[ -n "${OUT:-}" ] && cp benchmarks/results/*.jsonl "$OUT"
echo "done after ${SECONDS} s"
exit "$tests"
