# Sourced by the sbatch files: how a job's steps are started, watched, ended and continued. Each step runs one launcher a
# node, which starts that node's ranks or vLLM servers and writes their logs to run.dir/logs/JOB.RESTART.

# What the user may set:
PYTHON=${PYTHON:-$([[ -z ${CONTAINER:-} && -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
container=()
if [[ -n ${CONTAINER:-} ]]; then # an image, for pyxis and enroot
    container=(--container-image="$CONTAINER" --container-workdir="$PWD"
        --container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}")
fi

export MEGATRON_DGPO_JOB=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# The job's own, for its vLLM servers; steps inherit it, and no command line or file holds it.
MEGATRON_DGPO_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MEGATRON_DGPO_SECRET

# By then the trainer has saved and ended, when another step would not fit: see megatron_dgpo/pace.py. Empty where there
# is no limit, or SLURM does not answer. Of an array the whole of it would be listed by its first job's number.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
end=$(SLURM_TIME_FORMAT=standard squeue --noheader --job="$job" --format=%e 2>/dev/null | head -n 1)
MEGATRON_DGPO_JOB_END=${end:+$(date -d "$end" +%s 2>/dev/null)}
export MEGATRON_DGPO_JOB_END

# Where a node notes that it was the first to fail.
export MEGATRON_DGPO_FAILED_NODES=$PWD/slurm-$SLURM_JOB_ID.failed
# A job that was just requeued is pending, so that its nodes can be chosen: without those that failed, if the partition
# has enough others. Not those of a heterogeneous job, whose components are each a job to SLURM.
avoid_failed_nodes() {
    [[ -s $MEGATRON_DGPO_FAILED_NODES && -z ${SLURM_HET_SIZE:-} ]] || return 0
    local failed avoided before known up
    known=$(scontrol show job "$job" --oneliner)
    # Whoever names nodes, or what they must have, may find no others.
    [[ $known == *' ReqNodeList=(null)'* && $known == *' Features=(null)'* ]] || return 0
    failed=$(sort -u "$MEGATRON_DGPO_FAILED_NODES")
    up=$(sinfo --noheader --Node --responding --states=idle,alloc,mix,comp --partition="$SLURM_JOB_PARTITION" --format=%N)
    before=$(grep -o 'ExcNodeList=[^ ]*' <<<"$known" | grep -v '(null)')
    before=${before#ExcNodeList=}
    avoided=$failed
    [[ -z $before ]] || avoided+=$'\n'$(scontrol show hostnames "$before")
    up=$(comm -23 <(sort -u <<<"$up") <(sort -u <<<"$avoided") | wc -l)
    ((up >= SLURM_JOB_NUM_NODES)) || return 0
    echo "job $SLURM_JOB_ID avoids what failed: ${failed//$'\n'/,}"
    scontrol update JobId="$job" ExcNodeList="${failed//$'\n'/,}${before:+,$before}"
}

steps=()
# step SRUN_OPTION... COMMAND CONFIG OVERRIDE...: `megatron-dgpo COMMAND CONFIG OVERRIDE...` in the background, with %a
# replaced by the job's index in its array. When one node's launcher has ended the others get 30 seconds; not
# --kill-on-bad-exit, under which the exit status that means "continue me" would kill whoever is just writing the last of
# a checkpoint.
step() {
    local options=()
    while [[ $1 == -* ]]; do options+=("$1") && shift; done
    srun --export=ALL --ntasks-per-node=1 --wait=30 --kill-on-bad-exit=0 --disable-status "${container[@]}" \
        "${options[@]}" "$PYTHON" -m megatron_dgpo.cli "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}" &
    steps+=($!)
}

running() { kill -0 "$1" 2>/dev/null; }

# Wait until any step ends, end the others, and leave with the status of the first, which must be the trainer's.
watch() {
    local trainer=${steps[0]} cancelled='' status pid
    trap 'kill -USR1 "$trainer"' USR1 # the time limit is near: save
    trap 'cancelled=yes' TERM         # by scancel, or by SLURM, which requeues by itself if it means to
    while for pid in "${steps[@]}"; do running "$pid" || break 2; done; do sleep 1; done
    for pid in "${steps[@]}"; do running "$pid" && kill -INT "$pid"; done
    # Launchers take 10 seconds at most; the job's end kills what is left.
    for _ in {1..20}; do
        for pid in "${steps[@]}"; do running "$pid" && sleep 1 && continue 2; done
        break
    done
    kill -KILL "${steps[@]}" 2>/dev/null
    wait "$trainer"
    status=$?
    # megatron_dgpo/stop.py: it was asked to stop, and has saved; or it failed on its way, and run.restarts are left.
    if [[ ($status == 75 || $status == 76) && -z $cancelled ]]; then
        echo "job $SLURM_JOB_ID is requeued and continues the run"
        # SLURM then ends all of this step: what follows ignores it, and has until the kill.
        trap '' TERM
        scontrol requeue "$job"
        avoid_failed_nodes
    fi
    rm -f "$MEGATRON_DGPO_FAILED_NODES"
    exit "$status"
}
