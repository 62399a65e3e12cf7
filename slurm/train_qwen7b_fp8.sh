#!/bin/bash
# Trains Qwen2.5-7B with FP8 layers on one node of 8 H100; sbatch --nodes=N takes more. docs/fp8.md says what that changes.
#   sbatch slurm/train_qwen7b_fp8.sh [key=value ...]
#   bash slurm/train_qwen7b_fp8.sh --dry-run [--nodes=N] [key=value ...]
# Settings by environment variable, chains and arrays: docs/slurm.md
#SBATCH --job-name=qwen7b_fp8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
NAME=slurm/train_qwen7b_fp8.sh
CONFIG=${CONFIG:-configs/qwen7b_id_fp8.yaml}

# sbatch runs a copy of this file from its spool folder, beside which nothing of ours lies.
ROOT=${FEC_ROOT:-$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")}
[[ -r $ROOT/$NAME ]] || ROOT=${SLURM_SUBMIT_DIR:-$ROOT}
[[ -r $ROOT/$NAME ]] || { echo "error: no $NAME below $ROOT. Submit from the repository, or set FEC_ROOT to it." >&2 && exit 2; }
# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh"

launch_training "$@"
