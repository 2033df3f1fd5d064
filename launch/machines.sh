#!/usr/bin/env bash
# A run over several machines without a scheduler: the same line on each, with its own number, 0 at the address HEAD.
#   bash launch/machines.sh NUMBER OF HEAD:PORT PROCESSES_EACH trainer.train --shards DIR --out RUN --resume auto ...
# LAUNCHER=torchrun starts it by torchrun, with restarts of all processes when one dies (RESTARTS=3), else by accelerate.
# On machines without GPUs: ACCELERATE_USE_CPU=true. All of them see RUN on one file system.
set -euo pipefail
if [ $# -lt 5 ]; then echo "error: bash $0 NUMBER OF HEAD:PORT PROCESSES_EACH trainer.train ..." >&2; exit 2; fi
number=$1 of=$2 head=${3%:*} port=${3##*:} each=$4
shift 4
if [ "$head" = "$port" ]; then echo "error: HEAD:PORT, such as 10.0.0.1:29500, not $head" >&2; exit 2; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${LAUNCHER:-accelerate}" = torchrun ]; then
  # SIGUSR1 goes on to the processes, too
  export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  export ACCELERATE_MIXED_PRECISION="${ACCELERATE_MIXED_PRECISION:-bf16}"
  exec torchrun --nnodes "$of" --node_rank "$number" --nproc_per_node "$each" --master_addr "$head" \
    --master_port "$port" --max_restarts "${RESTARTS:-0}" -m "$@"
fi
exec accelerate launch --quiet --config_file "$(dirname "$0")/../accelerate_config.yaml" --multi_gpu \
  --num_machines "$of" --machine_rank "$number" --num_processes "$((of * each))" --main_process_ip "$head" \
  --main_process_port "$port" --mixed_precision "${ACCELERATE_MIXED_PRECISION:-bf16}" -m "$@"
