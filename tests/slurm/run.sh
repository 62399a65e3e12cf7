#!/usr/bin/env bash
# Installs Slurm from Debian packages where it is missing, and runs the tests that need a cluster. Without root, apt or
# namespaces it says so in one line and ends well: there is nothing to test with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
    echo "test-slurm: SKIPPED, $*"
    exit 0
}

((EUID == 0)) || skip "a local Slurm needs root."
packages=(slurm-wlm munge libslurm-dev gcc libc6-dev iproute2 util-linux)
if ! command -v slurmctld slurmd munged sbatch ip nsenter cc >/dev/null || [[ ! -e /usr/include/slurm/spank.h ]]; then
    command -v apt-get >/dev/null || skip "apt-get is not there to install ${packages[*]}."
    echo "test-slurm: installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get install -y --no-install-recommends "${packages[@]}" ||
        { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        skip "${packages[*]} cannot be installed; the whole log is $log."
    fi
    rm "$log"
fi
network='ip link add bridge0 type bridge && ip link add one type veth peer name two'
unshare --net --uts --ipc --mount --pid --fork --mount-proc sh -c "$network" 2>/dev/null ||
    skip "namespaces with a network of their own cannot be made here."

exec .venv/bin/python -m pytest -ra --durations=0 --durations-min=1 tests/slurm/cluster_*.py "$@"
