# The configuration of the local cluster; sourced by local_slurm.sh, whose DIR, NODES, GPUS, CPUS, MEMORY, SPANK, GRACE and
# SUBNET it reads.
# shellcheck shell=bash disable=SC2154

write_config() {
    local i
    mkdir -p "$DIR"/{etc,munge,state,spool,log,run,dev}
    chmod 0755 "$DIR/munge"
    # Slurm wants a character device for each GPU, and sets CUDA_VISIBLE_DEVICES only then.
    for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$DIR/dev/nvidia$i"; done
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/munge.key")
    slurm_conf >"$DIR/etc/slurm.conf"
    {
        echo "AutoDetect=off"
        ((GPUS == 0)) || echo "Name=gpu File=$DIR/dev/nvidia[0-$((GPUS - 1))] Flags=nvidia_gpu_env"
    } >"$DIR/etc/gres.conf"
    [[ -z $SPANK ]] || echo "required $SPANK" >"$DIR/etc/plugstack.conf"
    {
        echo "127.0.0.1 localhost"
        echo "$SUBNET.1 login"
        for ((i = 1; i <= NODES; i++)); do echo "$SUBNET.$((10 + i)) n$i"; done
    } >"$DIR/etc/hosts"
    printf 'NODES=%q\n' "$NODES" >"$DIR/run/settings"
}

slurm_conf() {
    local i
    cat <<CONF
ClusterName=local
SlurmctldHost=login($SUBNET.1)
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again (120 s by default).
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.self.pid
SlurmdPidFile=$DIR/run/slurmd.%n.self.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
# No cgroups, no binding, no limits: cores and memory are only counted.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
GresTypes=gpu
MpiDefault=none
# No accounting: finished jobs stay visible to scontrol.
AccountingStorageType=accounting_storage/none
MinJobAge=86400
# Quick decisions, for tests.
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=$GRACE
JobRequeue=1
# A preempted job gets the signal of its --signal option.
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    [[ -z $SPANK ]] || echo "PlugStackConfig=$DIR/etc/plugstack.conf"
    for ((i = 1; i <= NODES; i++)); do
        echo "NodeName=n$i NodeAddr=$SUBNET.$((10 + i)) CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:$GPUS State=UNKNOWN"
    done
    echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"
}
