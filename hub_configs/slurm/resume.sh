# Sourced by the batch scripts, from the repository's folder.
#
# run_and_requeue SCRIPT OPTION...: train on all nodes of the job. Before the time limit, or at a preemption that is
# announced to the batch script (SIGUSR1 or SIGTERM), ask the training to save a checkpoint and put the job back into
# the queue; it then continues, as --resume is among its options.
#
# Only rank 0 is asked, and only its main process: it tells the others after the next step. A signal to all processes
# would end the data workers too, and a training without them cannot save.

run_and_requeue() {
    export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?ask for GPUs or set PROCESSES_PER_NODE}}
    MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MAIN_ADDRESS=${MAIN_ADDRESS%%$'\n'*}  # `| head -n 1` would fail at times: the closed pipe is an error here
    export MAIN_ADDRESS MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
    STOP_FILE=$(mktemp "${TMPDIR:-/tmp}/polypseg-rank0.XXXXXX")
    export STOP_FILE
    local cpus=${SLURM_CPUS_PER_TASK:-1} stopping="" status=0
    local workers=$((cpus / PROCESSES_PER_NODE > 1 ? cpus / PROCESSES_PER_NODE - 1 : 0))
    trap 'stopping=yes; _ask_to_stop' USR1 TERM
    srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0 bash hub_configs/slurm/node.sh \
        "$@" --resume --workers "$workers" --num-processes $((SLURM_NNODES * PROCESSES_PER_NODE)) &
    local step=$!
    wait "$step" || status=$?
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ended the wait, not the step
        status=0
        wait "$step" || status=$?
    done
    rm -f "$STOP_FILE"
    if [[ -n $stopping && $status -ne 0 ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

_ask_to_stop() {
    local process
    process=$(cat "$STOP_FILE")
    if [[ -n $process ]]; then
        kill -TERM "$process" || true # it may have ended by itself
    fi
}
