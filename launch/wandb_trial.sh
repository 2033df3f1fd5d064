#!/usr/bin/env bash
# One trial of launch/wandb_sweep.yaml: the agent sets the two names, and gives the flags.
set -euo pipefail
exec python -m trainer.train --out "runs/${WANDB_SWEEP_ID:-sweep}/${WANDB_RUN_ID:-trial}" "$@"
