# Shared parts of the launchers; sourced by them, never executed. The launcher has set ROOT, the repository.
# shellcheck shell=bash
#
# Settings, all by environment variable; a job inherits the environment that it was submitted from.
#   CONFIG           the configuration file; each launcher has its own default
#   RUN_DIR          the run folder, on a file system that all nodes share (default: run_dir of CONFIG)
#   PYTHON           the interpreter on the nodes (default: .venv/bin/python of the repository, else python3)
#   GPUS_PER_NODE    processes a node (default: the job's GPUs a node); on a CPU cluster any number
#   MASTER_PORT      of the rendezvous (default: 6000 to 6999, by job; below the ephemeral ports)
#   REQUEUE          on | off: whether a job that stopped early puts itself back into the queue (default: on)
#   MAX_RESTARTS     how often a job may start again, whoever requeued it (default: 20)
#   DOCTOR           on | off: the preflight on every node (default: on)
#   CONTAINER_IMAGE  runs every process in this pyxis image; CONTAINER_MOUNTS adds mounts to the repository's
#   SRUN_OPTIONS     more options of every srun, separated by spaces

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# USR1 comes before the time limit (--signal) and, where the site says so, at a preemption; TERM at scancel and at a
# requeue by others. Trapped before anything else: a USR1 without a trap would end the job.
STOP_REQUESTED='' TERMINATED=''
trap 'STOP_REQUESTED=yes; echo "USR1: asking all ranks to stop at a checkpoint"' USR1
trap 'TERMINATED=yes; echo "TERM: waiting for the ranks to save"' TERM

# ------------------------------------------------------------------ what was asked for

# Sets DRY_RUN, OVERRIDES and, for a dry run outside a job, NUM_NODES.
read_arguments() {
    DRY_RUN='' NUM_NODES=$(header nodes) OVERRIDES=()
    local argument
    for argument in "$@"; do
        case $argument in
            --dry-run) DRY_RUN=yes ;;
            --nodes=*) NUM_NODES=${argument#*=} ;;
            -h | --help)
                sed -n '2,/^#SBATCH/ { /^#SBATCH/d; s/^# \{0,1\}//p }' "$0"
                exit 0
                ;;
            -*) fail "$argument is not an option of $NAME. Options of sbatch stand before the script, settings are key=value." ;;
            *=*) OVERRIDES+=("$argument") ;;
            *) fail "argument $argument must have the form key=value, such as trainer.max_steps=4." ;;
        esac
    done
    if [[ -z ${SLURM_JOB_ID:-} && -z $DRY_RUN ]]; then
        fail "this is no Slurm job. Submit it (sbatch $NAME), or add --dry-run to see what it would do."
    fi
    if [[ ${SLURM_JOB_ID:-} && " $* " == *" --nodes="* ]]; then
        fail "--nodes stands before the script: sbatch --nodes=N $NAME."
    fi
}

# header OPTION: its value in the #SBATCH lines of the launcher.
header() { sed -n "s/^#SBATCH --$1=//p" "$0"; }

# override_of KEY: the value of the last override of this key.
override_of() {
    local override value=
    for override in "${OVERRIDES[@]}"; do
        if [[ $override == "$1="* ]]; then value=${override#*=}; fi
    done
    printf '%s' "$value"
}

whole_number() { # whole_number NAME LEAST
    if ! [[ ${!1} =~ ^[0-9]{1,5}$ ]] || ((10#${!1} < $2)); then fail "$1=${!1} must be a whole number from $2."; fi
}

on_or_off() {
    [[ ${!1} == on || ${!1} == off ]] || fail "$1=${!1} must be on or off."
}

# Checks the settings and sets NODES, GPUS_PER_NODE, JOB, RESTART, MASTER_ADDR, MASTER_PORT and PYTHON.
prepare() {
    cd -- "$ROOT" || exit
    [[ -f $CONFIG ]] || fail "CONFIG=$CONFIG does not exist. The project's own are in configs/."
    : "${REQUEUE:=on}" "${MAX_RESTARTS:=20}" "${DOCTOR:=on}" "${CONTAINER_IMAGE:=}" "${CONTAINER_MOUNTS:=}"
    on_or_off REQUEUE
    on_or_off DOCTOR
    whole_number MAX_RESTARTS 0
    [[ -z $CONTAINER_MOUNTS || $CONTAINER_IMAGE ]] || fail "CONTAINER_MOUNTS=$CONTAINER_MOUNTS needs CONTAINER_IMAGE."
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        if [[ -z $CONTAINER_IMAGE && -x .venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
    fi
    if [[ ${SLURM_JOB_ID:-} ]]; then
        # The quotes matter: unquoted, a list such as n[1-2] is a glob pattern.
        mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        ((${#NODES[@]})) || fail "scontrol show hostnames gives no node for SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST."
        : "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-}}"
    else
        if ! [[ $NUM_NODES =~ ^[1-9][0-9]{0,4}$ ]]; then fail "--nodes=$NUM_NODES must be a whole number from 1."; fi
        mapfile -t NODES < <(seq -f 'node%g' "$NUM_NODES")
        : "${GPUS_PER_NODE:=$(header gpus-per-node)}"
    fi
    [[ $GPUS_PER_NODE ]] || fail "the job has no GPUs. Ask for them (--gpus-per-node=8), or set GPUS_PER_NODE (processes a node)."
    whole_number GPUS_PER_NODE 1
    # The base job's id stands for all tasks of an array, so a task is named by its own.
    JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    JOB=${JOB:-${SLURM_JOB_ID:-}}
    RESTART=${SLURM_RESTART_COUNT:-0} # not set on the first run
    : "${MASTER_PORT:=$((6000 + ${SLURM_JOB_ID:-0} % 1000))}"
    whole_number MASTER_PORT 1
    MASTER_ADDR=${NODES[0]} # never inherited: a requeued job may get other nodes
    export PYTHON GPUS_PER_NODE MASTER_ADDR MASTER_PORT
}

# The run folder, known to launcher and trainer alike: RUN_DIR, the override, or the file's own.
choose_run_dir() {
    local chosen
    chosen=$(override_of trainer.run_dir)
    chosen=${chosen:-${RUN_DIR:-$(sed -nE "s/^ +run_dir: *[\"']?([^\"'#]*[^\"'# ]).*/\1/p" "$CONFIG")}}
    RUN_DIR=${chosen:-runs/$(basename "$CONFIG" .yaml)}
    if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
        RUN_DIR=$RUN_DIR/seed_$SLURM_ARRAY_TASK_ID
        OVERRIDES+=("trainer.seed=$SLURM_ARRAY_TASK_ID")
    fi
    OVERRIDES+=("trainer.run_dir=$RUN_DIR")
}

# ------------------------------------------------------------------ what is run

# srun_on NODES TASKS_PER_NODE COMMAND...: sets SRUN to the command line. NODES is a list with commas, or "all".
srun_on() {
    local nodes=$1 tasks=$2 count=${#NODES[@]}
    shift 2
    # --kill-on-bad-exit: one failed task ends all. --export: also where the job was submitted with another.
    SRUN=(srun --label --kill-on-bad-exit=1 --export=ALL)
    if [[ $nodes != all ]]; then
        SRUN+=("--nodelist=$nodes")
        count=$(tr -cd , <<<"$nodes" | wc -c)
        count=$((count + 1))
    fi
    SRUN+=("--nodes=$count" "--ntasks=$((count * tasks))" "--ntasks-per-node=$tasks")
    # srun does not take it over from sbatch.
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then SRUN+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
    if [[ $CONTAINER_IMAGE ]]; then
        SRUN+=("--container-image=$CONTAINER_IMAGE")
        SRUN+=("--container-mounts=$ROOT:$ROOT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" "--container-workdir=$ROOT")
    fi
    local more=()
    read -ra more <<<"${SRUN_OPTIONS:-}"
    SRUN+=("${more[@]}" bash "$ROOT/slurm/node.sh" "$@")
}

show() { # show TITLE WORD...: the words as a shell would take them
    local title=$1
    shift
    printf '%s:' "$title"
    printf ' %q' "$@"
    printf '\n'
}

# Seconds since 1970 at which the job's time is over; nothing without a limit.
end_of_job() {
    local end=${SLURM_JOB_END_TIME:-} # Slurm 23.02 and newer
    [[ $end ]] || end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$JOB" --format=%e 2>/dev/null) || true
    if [[ $end =~ ^[0-9]+$ ]]; then printf '%s' "$end"; fi
}

# Waits until one of these processes has ended. A stop that was asked for is passed on to all processes of all steps, again
# and again: ranks that are still starting ignore it. The signal of a trap does not end a sleep, so sleeps are short.
await_one() {
    local pid asked=0
    while :; do
        for pid in "$@"; do kill -0 "$pid" 2>/dev/null || return 0; done
        if [[ $STOP_REQUESTED ]] && ((asked++ % 5 == 0)); then
            scancel --signal=USR1 "$JOB" 2>/dev/null || true # between two steps there is nobody to signal
        fi
        sleep 1 || true
    done
}

# Runs SRUN to its end; CODE is its exit code. In the background, since a trap would wait for a foreground command.
run_step() {
    local pid
    "${SRUN[@]}" &
    pid=$!
    await_one "$pid"
    CODE=0
    wait "$pid" || CODE=$?
}

preflight() {
    [[ $DOCTOR == on ]] || return 0
    srun_on all 1 run launch/doctor.py --config "$CONFIG" "${OVERRIDES[@]}"
    [[ -z $DRY_RUN ]] || { show preflight "${SRUN[@]}" && return 0; }
    run_step
    stop_before_training "$CODE"
    if ((CODE)); then
        echo "error: the preflight found a fault (exit code $CODE); it is named above. DOCTOR=off skips the preflight." >&2
        exit "$CODE"
    fi
}

# ------------------------------------------------------------------ how it ends

# conclude CODE: the end of a training job. The trainer leaves DONE in the run folder when there is nothing left to do;
# exit code 0 without it means that it stopped at a checkpoint.
conclude() {
    local code=$1
    if [[ $TERMINATED ]]; then
        echo "job $JOB: ended from outside, exit code $code"
    elif ((code)); then
        echo "job $JOB: failed with exit code $code"
    elif [[ -e $RUN_DIR/DONE ]]; then
        echo "job $JOB: finished"
    else
        again
    fi
    exit "$code"
}

# stop_before_training CODE: ends a job that was told to stop before its trainer. DONE may be of an earlier, shorter run then: only
# the trainer knows, and removes it.
stop_before_training() {
    [[ $STOP_REQUESTED$TERMINATED ]] || return 0
    if [[ $TERMINATED ]] || (($1)); then conclude "$1"; fi
    again
}

# Puts the job back into the queue; never returns.
again() {
    local state
    state=$(squeue --noheader --jobs="$JOB" --format=%T)
    # A job that is being cancelled or requeued by others must not come back through us.
    [[ $state == RUNNING ]] || { echo "job $JOB: stopped at a checkpoint; it is $state" && exit 0; }
    if [[ $REQUEUE == off ]]; then
        echo "job $JOB: stopped at a checkpoint; REQUEUE=off leaves the rest to the next job"
        exit 0
    fi
    if ((RESTART >= MAX_RESTARTS)); then
        echo "error: stopped at a checkpoint; MAX_RESTARTS=$MAX_RESTARTS allows no other restart. Submit the job again." >&2
        exit 1
    fi
    echo "job $JOB: stopped at a checkpoint; back into the queue for restart $((RESTART + 1)) of $MAX_RESTARTS"
    trap - USR1 TERM
    scontrol requeue "$JOB" || { echo "error: the job cannot be requeued here. Submit it again: it resumes." >&2 && exit 1; }
    exit 0 # the controller has marked the job already
}

# One job at a time trains in a run folder. One that was cancelled may still be saving: that is waited for.
claim_run_dir() {
    local other state
    mkdir -p -- "$RUN_DIR" || fail "RUN_DIR=$RUN_DIR cannot be made. Choose a folder of your own."
    other=$(cat -- "$RUN_DIR/slurm_job" 2>/dev/null) || true
    while [[ $other && $other != "$JOB" ]]; do
        state=$(squeue --noheader --jobs="$other" --states=RUNNING,COMPLETING --format=%T 2>/dev/null) || true
        if [[ -z $state ]]; then break; fi # ended, waiting in the queue, or unknown by now
        if [[ $state == RUNNING ]]; then
            fail "job $other trains in $RUN_DIR. Use another RUN_DIR, or start after it: sbatch --dependency=afterany:$other."
        fi
        echo "job $other is ending in $RUN_DIR; waiting for it"
        sleep 5 || true
    done
    printf '%s\n' "$JOB" >"$RUN_DIR/slurm_job"
}

# What a training job says first; ends it after too many restarts, or where another job trains.
begin() {
    echo "job $JOB, restart $RESTART: ${#NODES[@]} nodes (${NODES[*]}) x $GPUS_PER_NODE, rendezvous at $MASTER_ADDR:$MASTER_PORT"
    echo "configuration $CONFIG, run folder $RUN_DIR"
    local end lead
    end=$(end_of_job)
    lead=$(header signal)
    lead=${lead##*@}
    if [[ $end ]] && ((end - $(date +%s) < lead)); then
        echo "warning: the job has less time than the $lead s of --signal in $NAME, so Slurm may ask for a stop at once." \
            "Give it more --time, or a shorter --signal=B:USR1@SECONDS." >&2
    fi
    # Node failures and preemptions requeue without asking us, so the bound is checked here too.
    if ((RESTART > MAX_RESTARTS)); then
        echo "error: this is restart $RESTART, and MAX_RESTARTS=$MAX_RESTARTS. Submit the job again if that is meant." >&2
        exit 1
    fi
    claim_run_dir
}

# ------------------------------------------------------------------ the launchers

# A training job on all nodes.
launch_training() {
    read_arguments "$@"
    prepare
    choose_run_dir
    local arguments=(--config "$CONFIG" "${OVERRIDES[@]}") end
    [[ -z $DRY_RUN ]] || dry_run_of_training "${#NODES[@]}" "${arguments[@]}"
    [[ $DRY_RUN ]] || begin
    preflight
    end=$(end_of_job)
    srun_on all 1 torchrun launch/train.py ${end:+--end-time "$end"} "${arguments[@]}"
    if [[ $DRY_RUN ]]; then
        show train "${SRUN[@]}"
        exit 0
    fi
    run_step
    conclude "$CODE"
}

# dry_run_of_training NODES ARGUMENT...: what launch/train.py says about the run; a wrong setting ends the dry run here.
dry_run_of_training() {
    local nodes=$1
    shift
    "$PYTHON" launch/train.py --dry-run --nodes "$nodes" --gpus-per-node "$GPUS_PER_NODE" "$@"
}
