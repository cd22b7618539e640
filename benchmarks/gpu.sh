#!/bin/sh
# All benchmarks of speed on one GPU, and the ant at full size with five seeds under one vmap. It takes at most 8 minutes and needs
# no network. The most important parts come first; each has a time limit and keeps the rows that it has written.
#
#     benchmarks/gpu.sh [--quick] [FOLDER]
#
# The JSON files go to FOLDER, else to $OUT, else to benchmarks/results/gpu. They name the device. A summary is printed at the end.
# --quick is a smoke test for a CPU. $PYTHON names another interpreter than python.
set -eu
cd "$(dirname "$0")/.."

quick=
folder=${OUT:-benchmarks/results/gpu}
for argument in "$@"; do
  case $argument in
    --quick) quick=--quick ;;
    -*)
      echo "usage: benchmarks/gpu.sh [--quick] [FOLDER], got $argument" >&2
      exit 2
      ;;
    *) folder=$argument ;;
  esac
done

exec "${PYTHON:-python}" -m benchmarks.all --gpu ${quick:+"$quick"} --out="$folder"
