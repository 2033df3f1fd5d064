#!/usr/bin/env bash
# Two processes on a machine without GPUs: bash launch/two_cpu_processes.sh trainer.train --shards DIR --out RUN ...
# (`accelerate launch --cpu --num_processes 2` starts one process and says nothing.)
set -euo pipefail
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec accelerate launch --config_file "$(dirname "$0")/../accelerate_config.yaml" --multi_gpu --num_processes 2 -m "$@"
