#!/bin/bash
# Trains Qwen2.5-7B with the rollouts on nodes of their own, in one allocation: the last ENGINE_NODES nodes run vLLM servers, the
# others train. One node each by default; sbatch --nodes=N takes more.
#   sbatch slurm/rollout_and_train.sh [key=value ...]
#   bash slurm/rollout_and_train.sh --dry-run [--nodes=N] [key=value ...]
# ENGINE_NODES (1), ENGINE_GPUS (GPUs an engine: rollout.tensor_parallel, else 4), ENGINE_RESTARTS (3, of one engine), ENGINE_PORT
# (the first of a node), ENGINE_INTERFACE (such as ib0; default: the interface of the node's name). All else: docs/slurm.md
#SBATCH --job-name=qwen7b-rl
#SBATCH --nodes=2
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
NAME=slurm/rollout_and_train.sh
CONFIG=${CONFIG:-configs/qwen7b_id.yaml}

# sbatch runs a copy of this file from its spool folder, beside which nothing of ours lies.
ROOT=${FEC_ROOT:-$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")}
[[ -r $ROOT/$NAME ]] || ROOT=${SLURM_SUBMIT_DIR:-$ROOT}
[[ -r $ROOT/$NAME ]] || { echo "error: no $NAME below $ROOT. Submit from the repository, or set FEC_ROOT to it." >&2 && exit 2; }
# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh"

# Sets TRAINERS and ENGINES, lists with commas. The batch host trains: it sees the engine nodes as other nodes do.
split_nodes() {
    whole_number ENGINE_NODES 1
    whole_number ENGINE_GPUS 1
    whole_number ENGINE_RESTARTS 0
    local trainers=$((${#NODES[@]} - ENGINE_NODES)) IFS=,
    ((trainers > 0)) || fail "ENGINE_NODES=$ENGINE_NODES of ${#NODES[@]} nodes leave none to train on. Take more nodes (sbatch --nodes=N)."
    ((GPUS_PER_NODE % ENGINE_GPUS == 0)) || fail "ENGINE_GPUS=$ENGINE_GPUS must divide the $GPUS_PER_NODE GPUs of a node."
    TRAINERS="${NODES[*]:0:trainers}"
    ENGINES="${NODES[*]:trainers}"
}

# The addresses that the engines bind to, one a node: never all interfaces.
find_addresses() {
    local node address
    ENGINE_ADDRESSES=
    for node in ${ENGINES//,/ }; do
        address=$(getent ahostsv4 "$node" | awk 'NR == 1 { print $1 }')
        [[ $address ]] || fail "node $node has no address. Check the name service, or set ENGINE_INTERFACE."
        ENGINE_ADDRESSES+="$address "
    done
}

# RUN/engines without what an earlier start has left, and with a new key that only the owner reads.
renew_engine_folder() {
    rm -rf -- "$RUN_DIR/engines"
    mkdir -p -- "$RUN_DIR"
    mkdir -m 700 -- "$RUN_DIR/engines"
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RUN_DIR/engines/key")
}

# Ends the engines; a job's end would end them too, but a requeued job waits for its steps.
stop_engines() {
    kill -TERM "$engines" 2>/dev/null || true
    wait "$engines" || true
}

read_arguments "$@"
prepare
choose_run_dir
: "${ENGINE_NODES:=1}" "${ENGINE_RESTARTS:=3}" "${ENGINE_GPUS:=$(override_of rollout.tensor_parallel)}" "${ENGINE_GPUS:=4}"
: "${ENGINE_PORT:=$((7000 + ${SLURM_JOB_ID:-0} % 100 * 10))}" "${ENGINE_INTERFACE:=}"
split_nodes
OVERRIDES+=(rollout.engine=servers "rollout.tensor_parallel=$ENGINE_GPUS")
arguments=(--config "$CONFIG" "${OVERRIDES[@]}")
if [[ $DRY_RUN ]]; then
    dry_run_of_training "${arguments[@]}"
else
    begin
    find_addresses
fi
export ENGINE_GPUS ENGINE_PORT ENGINE_RESTARTS ENGINE_INTERFACE ENGINE_ADDRESSES

preflight
srun_on "$ENGINES" $((GPUS_PER_NODE / ENGINE_GPUS)) engine "${arguments[@]}"
engine_line=("${SRUN[@]}")
end=$(end_of_job)
srun_on "$TRAINERS" 1 torchrun launch/train.py ${end:+--end-time "$end"} "${arguments[@]}"
if [[ $DRY_RUN ]]; then
    show engines "${engine_line[@]}"
    show train "${SRUN[@]}"
    exit 0
fi

renew_engine_folder
# Each step names its own nodes, so neither waits for the other.
"${engine_line[@]}" &
engines=$!
"${SRUN[@]}" &
trainer=$!
await_one "$engines" "$trainer"
code=0
if kill -0 "$trainer" 2>/dev/null; then
    wait "$engines" || code=$?
    [[ $TERMINATED ]] || echo "error: the engines ended first (exit code $code); ending the trainer" >&2
    kill -TERM "$trainer" 2>/dev/null || true
    while kill -0 "$trainer" 2>/dev/null; do wait "$trainer" || true; done
    conclude $((code == 0 ? 1 : code))
fi
wait "$trainer" || code=$?
stop_engines
conclude "$code"

