#!/usr/bin/env bash
# One process of a run under SLURM: srun starts it as often as there are tasks, one a GPU. No launcher stands between, so
# that a signal reaches the trainer itself. srun ... launch/ranks.sh trainer.train --shards DIR --out RUN --resume auto
set -euo pipefail
if [ -z "${SLURM_PROCID:-}" ]; then echo "error: no task of srun (SLURM_PROCID is not set); see launch/slurm.sbatch" >&2; exit 2; fi
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-1}}"
export LOCAL_WORLD_SIZE="${LOCAL_WORLD_SIZE%%[(,]*}"
# A port of the job's own: two jobs may share a machine
export MASTER_ADDR="${MASTER_ADDR:?error: set it to the first node, as launch/slurm.sbatch does}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}"
export ACCELERATE_MIXED_PRECISION="${ACCELERATE_MIXED_PRECISION:-bf16}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m "$@"
