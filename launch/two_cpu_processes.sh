#!/usr/bin/env bash
# Two processes on a machine without GPUs: bash launch/two_cpu_processes.sh trainer.train --shards DIR --out RUN ... [--mixed_precision no]
# (`accelerate launch --cpu --num_processes 2` starts one process and says nothing.) --mixed_precision is the launcher's, the rest the trainer's.
set -euo pipefail
if [ $# -eq 0 ]; then echo "error: name a module: bash $0 trainer.train --shards DIR --out RUN ..." >&2; exit 2; fi
precision=()
rest=()
while [ $# -gt 0 ]; do
  case "$1" in
    --mixed_precision) precision=(--mixed_precision "${2:?error: --mixed_precision needs bf16 or no}"); shift 2 ;;
    --mixed_precision=*) precision=("$1"); shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec accelerate launch --quiet --config_file "$(dirname "$0")/../accelerate_config.yaml" --multi_gpu --num_processes 2 ${precision[@]+"${precision[@]}"} -m "${rest[@]}"
