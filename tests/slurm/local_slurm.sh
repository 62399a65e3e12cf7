#!/usr/bin/env bash
# A real, throw-away Slurm cluster on one machine: munged, slurmctld and a slurmd a node. Each node has its own network, PID,
# mount, IPC and UTS namespace, joined by a bridge: own host name, own address, own loopback, own /dev/shm. So a node can be
# powered off, a cable pulled, MASTER_ADDR=localhost fails as on a cluster, and `down` cannot leave a process.
# GPUs and cores are fake: Slurm counts them and sets CUDA_VISIBLE_DEVICES, nothing is enforced, and jobs run on the CPU.
#
#   local_slurm.sh -d DIR up [--nodes N] [--gpus N] [--spank PLUGIN.so]     start nodes n1 to nN (3 of 8 GPUs)
#   local_slurm.sh -d DIR status           exit 0: all nodes usable; 1: not all; 3: not running
#   local_slurm.sh -d DIR exec CMD...      run CMD as a user on the login node
#   local_slurm.sh -d DIR kill-node NAME   power the node off (SIGKILL to all that runs there)
#   local_slurm.sh -d DIR start-node NAME  power it on again
#   local_slurm.sh -d DIR down             stop everything that `up` started
#
# DIR holds configuration, logs, state and pids. Two partitions: gpu, and urgent, whose jobs preempt (requeue) those of gpu.
# Needs root and the packages slurm-wlm, munge, iproute2, util-linux.
set -euo pipefail

readonly SUBNET=192.0.2 # TEST-NET-1; exists only inside the namespaces
readonly UP_TIMEOUT=60
readonly GRACE=60               # seconds from SIGTERM to SIGKILL at a preemption, scancel and the time limit
readonly CPUS=64 MEMORY=1000000 # of a node, fake, MiB

log() { printf 'local_slurm: %s\n' "$*" >&2; }
die() {
    log "$*"
    exit 1
}

# ------------------------------------------------------------------ processes

# Start time of a process in clock ticks: with the pid it names a process for good, so a pid that the system has given
# away again is never mistaken for ours.
starttime() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) } # the fields after "pid (comm) "; starttime is field 22
    cut -d' ' -f20 <<<"$stat"
}

# remember NAME PID: note a process that this script started.
remember() { printf '%s %s\n' "$2" "$(starttime "$2")" >"$DIR/run/$1.pid"; }

# pid_of NAME: its pid, if that very process still runs.
pid_of() {
    local pid start
    read -r pid start 2>/dev/null <"$DIR/run/$1.pid" || return 1
    [[ $(starttime "$pid") == "$start" ]] || return 1
    printf '%s\n' "$pid"
}

# wait_for SECONDS CMD...: until CMD succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# ------------------------------------------------------------------ the room and its nodes
# The room: an outer set of namespaces with munged, slurmctld and the bridge. Each node is an inner set with a slurmd.
# All PID namespaces nest, so the end of the room's first process is the end of everything in it.

enter_namespaces() { # enter_namespaces CMD...: as the first process of new ones
    exec setsid unshare --net --uts --ipc --mount --pid --fork --mount-proc --kill-child=KILL "$@"
}

private_files() { # this room's or node's own view of some files
    mount --bind "$DIR/etc/hosts" /etc/hosts
    mkdir -p /etc/slurm # so that even a job with an empty environment finds the configuration
    mount --bind "$DIR/etc" /etc/slurm
}

# Keeps a first process alive; bash reaps the orphans that it inherits.
idle() { while :; do sleep 3600 & wait $! || true; done; }

room_main() {
    hostname login
    private_files
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$SUBNET.1/24" dev br0
    ip link set br0 up
    munged --foreground --force --socket="$DIR/munge/munge.sock" --key-file="$DIR/munge/munge.key" \
        --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/munged.seed" \
        </dev/null >>"$DIR/log/munged.out" 2>&1 &
    wait_for 10 test -S "$DIR/munge/munge.sock"
    slurmctld -D -c -f "$DIR/etc/slurm.conf" </dev/null >>"$DIR/log/slurmctld.out" 2>&1 &
    local i
    for ((i = 1; i <= NODES; i++)); do room_start_node "n$i"; done
    idle
}

other_netns() { [[ -e /proc/$1/ns/net && $(readlink "/proc/$1/ns/net") != "$(readlink /proc/self/ns/net)" ]]; }

# In the room: starts the namespaces of a node and plugs in its network cable.
room_start_node() {
    local name=$1 pid
    ip link del "veth-$name" 2>/dev/null || true
    ip link add "veth-$name" type veth peer name "eth-$name"
    ip link set "veth-$name" master br0 up
    (enter_namespaces bash "$0" -d "$DIR" __node "$name") </dev/null >>"$DIR/log/node.$name.out" 2>&1 &
    pid=$!
    remember "node.$name" "$pid"
    wait_for 10 other_netns "$pid" || die "node $name did not start"
    ip link set "eth-$name" netns "$pid"
}

node_main() {
    local name=$1
    hostname "$name"
    private_files
    mount -t tmpfs tmpfs /dev/shm # PIDs repeat from node to node, so names made of PIDs must not meet
    ip link set lo up
    wait_for 10 ip link show "eth-$name" >/dev/null 2>&1
    ip link set "eth-$name" name eth0
    ip addr add "$SUBNET.$((10 + ${name#n}))/24" dev eth0
    ip link set eth0 up
    mkdir -p "$DIR/spool/$name"
    slurmd -D -c -N "$name" -f "$DIR/etc/slurm.conf" </dev/null >>"$DIR/log/slurmd.$name.out" 2>&1 &
    idle
}

# Runs a command in the room, from the host.
in_room() {
    local pid
    pid=$(pid_of room) || die "not running"
    # shellcheck disable=SC2016  # expanded by the inner shell
    exec nsenter --target "$pid" --net --uts --ipc --mount --pid="/proc/$pid/ns/pid_for_children" \
        bash -c 'cd "$1" && shift && exec "$@"' _ "$PWD" "$@"
}

on_login() { (export SLURM_CONF=$DIR/etc/slurm.conf && in_room "$@"); }

# ------------------------------------------------------------------ commands

is_up() {
    [[ -r $DIR/run/settings ]] || return 1
    # shellcheck source=/dev/null  # written by cmd_up
    source "$DIR/run/settings"
    pid_of room >/dev/null
}

all_usable() { (($(on_login sinfo -h -N -p urgent -t idle,alloc,mix,comp -o %N 2>/dev/null | sort -u | wc -l) == NODES)); }
show_nodes() { on_login sinfo -p urgent -N -o '%N %T cpus=%c gres=%G reason=%E'; }

cmd_up() {
    NODES=3 GPUS=8 SPANK=
    while (($# > 1)); do
        case $1 in
            --nodes) NODES=$2 ;;
            --gpus) GPUS=$2 ;;
            --spank) SPANK=$(realpath "$2") ;;
            *) die "unknown option of up: $1" ;;
        esac
        shift 2
    done
    (($# == 0)) || die "missing value for $1"
    local tool
    for tool in munged slurmctld slurmd sbatch ip nsenter unshare; do
        command -v "$tool" >/dev/null || die "$tool not found: apt-get install slurm-wlm munge iproute2 util-linux"
    done
    ((${#DIR} <= 70)) || die "path too long for Slurm's sockets (${#DIR} > 70): $DIR"
    # `up` clears old state, so it only takes a folder that is its own or empty.
    mkdir -p "$DIR"
    [[ -e $DIR/.local_slurm || -z $(ls -A "$DIR") ]] || die "neither empty nor made by this script: $DIR"
    touch "$DIR/.local_slurm"
    if (is_up); then die "already up in $DIR"; fi
    rm -rf -- "${DIR:?}"/{etc,munge,state,spool,log,run,dev}
    # shellcheck source=tests/slurm/local_slurm_config.sh
    source "$(dirname "$0")/local_slurm_config.sh"
    write_config
    (enter_namespaces bash "$0" -d "$DIR" __room) </dev/null >"$DIR/log/room.out" 2>&1 &
    remember room $!
    disown
    if ! wait_for "$UP_TIMEOUT" all_usable; then
        log "not all nodes came up; logs are in $DIR/log"
        tail -n 5 "$DIR"/log/*.out "$DIR"/log/slurm*.log >&2 || true
        cmd_down
        exit 1
    fi
    show_nodes
}

cmd_status() {
    is_up || { echo "down" && return 3; }
    show_nodes
    on_login squeue -o '%i %P %j %T %M %D %R'
    all_usable
}

room_gone() { ! [[ -e /proc/$1 ]]; }

cmd_down() {
    local pid
    is_up || return 0
    pid=$(pid_of room)
    # Killing unshare kills the room's first process (--kill-child) and so, through the PID namespace, all that ran in it.
    kill -KILL "$pid"
    wait_for 10 room_gone "$pid" || die "the room's processes did not end"
    rm -f "$DIR/run/settings" "$DIR/run"/*.pid
}

# ------------------------------------------------------------------ main

[[ ${1:-} == -d && $# -ge 3 ]] || { sed -n '2,/^set/ { /^set/d; s/^# \{0,1\}//p }' "$0" >&2 && exit 2; }
DIR=$(realpath -m -- "$2")
readonly DIR
[[ $0 == /* ]] || exec bash "$(realpath -- "$0")" "$@"
command=$3
shift 3
case $command in
    up) cmd_up "$@" ;;
    down) cmd_down ;;
    status) cmd_status ;;
    exec) is_up || die "not running" && on_login "$@" ;;
    kill-node | start-node)
        is_up || die "not running"
        on_login bash "$0" -d "$DIR" "__$command" "${1:?node name}"
        ;;
    # Not for users: run by this script inside the namespaces.
    __room | __node | __start-node | __kill-node)
        is_up || true # the settings
        case $command in
            __room) room_main ;;
            __node) node_main "$1" ;;
            __start-node) ! pid_of "node.$1" >/dev/null && room_start_node "$1" ;;
            __kill-node) pid=$(pid_of "node.$1") && kill -KILL "$pid" ;;
        esac
        ;;
    *) die "unknown command: $command" ;;
esac
