#!/usr/bin/env bash
# What srun starts on a node; the launchers say how.
#   node.sh run FILE [argument ...]        one Python process
#   node.sh torchrun FILE [argument ...]   torchrun, with one process a GPU; srun starts one such task on every node
#   node.sh engine [argument ...]          the task's rollout engine, started again when it dies
# The environment brings PYTHON, GPUS_PER_NODE, MASTER_ADDR, MASTER_PORT; an engine needs what rollout_and_train.sh sets.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/node_env.sh
. launch/node_env.sh

# The launcher sends USR1 to every process of the job. torchrun has no handler and would die of it; ranks set their own.
trap '' USR1

run() { exec "$PYTHON" "$@"; }

torchrun() {
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_PROCID" --nproc-per-node="$GPUS_PER_NODE" \
        --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0 "$@"
}

# One engine with its share of the node's GPUs. Whatever ends it but this task's own end or a wrong setting (exit code 2),
# it starts again, up to ENGINE_RESTARTS times.
engine() {
    local addresses address first start=0 code
    read -ra addresses <<<"$ENGINE_ADDRESSES"
    address=${addresses[SLURM_NODEID]}
    if [[ $ENGINE_INTERFACE ]]; then
        address=$(ip -oneline -4 address show dev "$ENGINE_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
        if [[ -z $address ]]; then
            echo "error: ENGINE_INTERFACE=$ENGINE_INTERFACE of $SLURMD_NODENAME has no IPv4 address." >&2
            exit 2
        fi
    fi
    first=$((SLURM_LOCALID * ENGINE_GPUS))
    CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + ENGINE_GPUS - 1)))
    export CUDA_VISIBLE_DEVICES
    child='' stopping=''
    trap 'stopping=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
    while [[ -z $stopping ]]; do
        "$PYTHON" launch/serve.py --bind "$address" --port $((ENGINE_PORT + SLURM_LOCALID)) "$@" &
        child=$!
        while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a trap ends a wait early
        code=0
        wait "$child" || code=$?
        child=''
        if [[ $stopping ]] || ((code == 2)); then exit "$code"; fi
        if ((start++ == ENGINE_RESTARTS)); then
            echo "error: engine $SLURM_PROCID on $SLURMD_NODENAME ended with exit code $code," \
                "and ENGINE_RESTARTS=$ENGINE_RESTARTS are used up." >&2
            exit $((code ? code : 1))
        fi
        echo "engine $SLURM_PROCID on $SLURMD_NODENAME ended with exit code $code: restart $start of $ENGINE_RESTARTS" >&2
    done
}

case ${1:-} in
    run | torchrun | engine) "$@" ;;
    *) echo "error: node.sh is started by the launchers in slurm/." >&2 && exit 2 ;;
esac
