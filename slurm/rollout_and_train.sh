#!/bin/bash
# Trains Qwen2.5-7B with the rollouts on nodes of their own, in one allocation: the last ENGINE_NODES nodes run vLLM servers, the
# others train. One node each by default; sbatch --nodes=N takes more.
#   sbatch slurm/rollout_and_train.sh [key=value ...]
#   bash slurm/rollout_and_train.sh --dry-run [--nodes=N] [key=value ...]
# Settings by environment variable, besides those of all launchers (docs/slurm.md):
#   ENGINE_NODES 1, ENGINE_GPUS of one engine (rollout.tensor_parallel, else 4), ENGINE_RESTARTS 3 of one engine, ENGINE_SECONDS
#   1200 until all answer, ENGINE_PORT of a node's first, ENGINE_INTERFACE such as ib0 (default: that of the node's name)
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

# Sets TRAINERS and ENGINES, lists with commas, and the number of training nodes. The first node, which runs this script, trains:
# for the addresses of the engine nodes it must see them as others do.
split_nodes() {
    whole_number ENGINE_NODES 1
    whole_number ENGINE_GPUS 1
    whole_number ENGINE_RESTARTS 0
    whole_number ENGINE_PORT 1
    whole_number ENGINE_SECONDS 1
    local IFS=,
    trainers=$((${#NODES[@]} - ENGINE_NODES))
    ((trainers > 0)) ||
        fail "ENGINE_NODES=$ENGINE_NODES of ${#NODES[@]} nodes leave none to train on. Take more (sbatch --nodes=N)."
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

# Waits until every engine has left its address; an engine that ends, a stop or the deadline end the wait.
await_engines() {
    local expected=$((ENGINE_NODES * (GPUS_PER_NODE / ENGINE_GPUS))) ready deadline=$((SECONDS + ENGINE_SECONDS))
    while [[ -z $STOP_REQUESTED$TERMINATED ]] && kill -0 "$engines" 2>/dev/null; do
        ready=$(find "$RUN_DIR/engines" -name '[!.]*.json' | wc -l)
        if ((ready == expected)); then
            echo "$ready engines answer on ${ENGINES}"
            return 0
        fi
        if ((SECONDS >= deadline)); then
            echo "error: $ready of $expected engines answer after ENGINE_SECONDS=$ENGINE_SECONDS." >&2
            return 1
        fi
        sleep 1 || true
    done
    [[ $STOP_REQUESTED$TERMINATED ]] || { echo "error: an engine ended before all have answered." >&2 && return 1; }
}

# end_step PID: tells a step to end and waits for it; a requeued job would wait for its steps too.
end_step() {
    kill -TERM "$1" 2>/dev/null || true
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
}

read_arguments "$@"
prepare
choose_run_dir
: "${ENGINE_NODES:=1}" "${ENGINE_RESTARTS:=3}" "${ENGINE_GPUS:=$(override_of rollout.tensor_parallel)}" "${ENGINE_GPUS:=4}"
: "${ENGINE_PORT:=$((7000 + ${SLURM_JOB_ID:-0} % 100 * 10))}" "${ENGINE_INTERFACE:=}"
: "${ENGINE_SECONDS:=1200}"
split_nodes
# A prompt that is sent to another engine must get the same samples there; and the engines share their GPUs with nobody.
OVERRIDES=(rollout.seed_per_request=true rollout.gpu_memory_utilization=0.9 "${OVERRIDES[@]}"
    rollout.engine=servers "rollout.tensor_parallel=$ENGINE_GPUS")
arguments=(--config "$CONFIG" "${OVERRIDES[@]}")
if [[ $DRY_RUN ]]; then
    dry_run_of_training "$trainers" "${arguments[@]}"
else
    begin
    find_addresses
    export ENGINE_GPUS ENGINE_PORT ENGINE_RESTARTS ENGINE_INTERFACE ENGINE_ADDRESSES
fi

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
code=0
await_engines || code=1
if ((code)) || [[ $STOP_REQUESTED$TERMINATED ]]; then
    end_step "$engines"
    stop_before_training "$code"
    conclude "$code"
fi
"${SRUN[@]}" &
trainer=$!
await_one "$engines" "$trainer"
if kill -0 "$trainer" 2>/dev/null && [[ -z $TERMINATED ]]; then
    wait "$engines" || code=$?
    echo "error: an engine is gone for good (exit code $code); ending the trainer." >&2
    end_step "$trainer"
    conclude $((code ? code : 1))
fi
while kill -0 "$trainer" 2>/dev/null; do wait "$trainer" || true; done
wait "$trainer" || code=$?
end_step "$engines"
conclude "$code"
