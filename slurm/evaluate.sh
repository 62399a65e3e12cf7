#!/bin/bash
# Samples the benchmarks with a Hugging Face checkpoint on one node of 8 GPUs. The same command again goes on where it was
# stopped, and a lost node requeues the job, so it needs no signal before the time limit.
#   sbatch slurm/evaluate.sh model.path=runs/qwen7b_id/hf output_dir=runs/qwen7b_id/evaluation [key=value ...]
#   bash slurm/evaluate.sh --dry-run model.path=... output_dir=...
# Settings by environment variable: docs/slurm.md
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
NAME=slurm/evaluate.sh
CONFIG=${CONFIG:-configs/evaluation.yaml}

# sbatch runs a copy of this file from its spool folder, beside which nothing of ours lies.
ROOT=${FEC_ROOT:-$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")}
[[ -r $ROOT/$NAME ]] || ROOT=${SLURM_SUBMIT_DIR:-$ROOT}
[[ -r $ROOT/$NAME ]] || { echo "error: no $NAME below $ROOT. Submit from the repository, or set FEC_ROOT to it." >&2 && exit 2; }
# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh"

read_arguments "$@"
prepare
srun_on all 1 torchrun launch/evaluate.py --config "$CONFIG" "${OVERRIDES[@]}"
[[ -z $DRY_RUN ]] || { show evaluate "${SRUN[@]}" && exit 0; }
run_step
exit "$CODE"

