#!/usr/bin/env bash
# The runs that need a GPU for hours, one after the other, in as many calls as it takes: each goes on where it was.
#
#   experiments/on_gpu.sh            all of them, in this order
#   experiments/on_gpu.sh nern       ResNet-20 in NeRNs of three widths: the published 68,600 steps each, in bf16
#   experiments/on_gpu.sh zoo        1,000 networks on MNIST, 50 epochs
#   experiments/on_gpu.sh hyperreps  hyper-representations of that zoo, in the published configuration and the later one
#
# DATA is a folder with mnist, cifar10 and teacher.safetensors (from nern_teacher.py), RUNS where everything is written.
# A call keeps to BUDGET seconds. It ends with 0 when all is done, with 3 when the same command has to be given again,
# and with 1 where something failed. What the runs found is copied to $OUT if that is set. Needs no more than torch,
# numpy, pyarrow, pillow, safetensors, einops and tqdm: the command line and its libraries are not used.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DATA=${DATA:-data}
RUNS=${RUNS:-runs}
BUDGET=${BUDGET:-3600}
SAVING=30  # seconds that a run may take to save what it has
SECONDS=0
failed=0 unfinished=0

START='from sys import argv; from fastws.terminal import one_sentence'
NERN="$START; from fastws.train.nern.train import Config, run
with one_sentence('nern'):
    options = {'architecture': 'cifar-resnet20-a', 'precision': 'bf16', 'device': 'cuda'}
    run(Config(preset=argv[1], weights=argv[2], images=argv[3], out=argv[4], **options))"
ZOO="$START; from fastws.zoo.making.make import Config, run
with one_sentence('zoo'):
    run(Config(preset='mnist-s-seed', networks=1000, epochs=50, data=argv[1], out=argv[2], device='cuda'))"
HYPERREPS="$START; from fastws.train.ae.train import Config, run
with one_sentence('hyperreps'):
    run(Config(preset=argv[1], epochs=(21, 25), zoo=argv[2], out=argv[3], device='cuda'))"

# long NAME CODE ARGUMENTS..: runs it for what is left of the budget; SIGTERM makes it save
long() {
  local name=$1 limit=$((BUDGET - SECONDS - SAVING))
  shift
  [ -e "$RUNS/$name/done" ] && echo "$name: was done before" && return
  [ "$limit" -lt 5 ] && echo "$name: no time left" && unfinished=1 && return
  timeout --kill-after="$SAVING" "$limit" "$PYTHON" -c "$@"
  local status=$?
  case $status in
    0) mkdir -p "$RUNS/$name" && touch "$RUNS/$name/done" && echo "$name: done after ${SECONDS} s" ;;
    124 | 137 | 143) echo "$name: goes on when the same command is given again" && unfinished=1 ;;
    *) echo "$name: exit status $status" && failed=1 ;;
  esac
  [ -n "${OUT:-}" ] && for file in results.json log.jsonl; do
    [ -e "$RUNS/$name/$file" ] && mkdir -p "$OUT/$name" && cp "$RUNS/$name/$file" "$OUT/$name"
  done
}

nern() {
  local width
  for width in 160 180 200; do
    long "nern-resnet20-$width" "$NERN" "cifar10-resnet20-$width-crossfilter" "$DATA/teacher.safetensors" \
      "$DATA/cifar10" "$RUNS/nern-resnet20-$width"
  done
}

zoo() { long mnist-s-seed "$ZOO" "$DATA/mnist" "$RUNS/mnist-s-seed"; }

hyperreps() {
  local preset
  for preset in mnist-seed generative; do
    long "hyperrep-$preset" "$HYPERREPS" "$preset" "$RUNS/mnist-s-seed" "$RUNS/hyperrep-$preset"
  done
}

case ${1:-all} in
  all) nern && zoo && hyperreps ;;
  nern | zoo | hyperreps) "$1" ;;
  *) echo "on_gpu.sh: the run must be nern, zoo or hyperreps, got $1" && exit 2 ;;
esac
[ "$failed" = 1 ] && exit 1
[ "$unfinished" = 1 ] && exit 3
exit 0
