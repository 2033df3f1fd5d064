#!/usr/bin/env bash
# Two processes on a machine without GPUs: bash launch/two_cpu_processes.sh trainer.train --shards DIR --out RUN ...
# (`accelerate launch --cpu --num_processes 2` starts one process and says nothing.)
set -euo pipefail
if [ $# -eq 0 ]; then echo "error: name a module: bash $0 trainer.train --shards DIR --out RUN ..." >&2; exit 2; fi
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec accelerate launch --config_file "$(dirname "$0")/../accelerate_config.yaml" --multi_gpu --num_processes 2 -m "$@"
