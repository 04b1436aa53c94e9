#!/bin/bash
# What the .sbatch files share: one torchrun on each node of the allocation, and the job queued again while it gets on.
#   bash examples/slurm/launch.sh RUN_FOLDER CONFIG... [a.b.c=value ...]     from the repository root
set -euo pipefail
run=$1
shift

source examples/slurm/environment.sh
# One file a rank when a collective hangs, where all of them can be read together.
export TORCH_FR_DUMP_TEMP_FILE="$run/flight_recorder/rank_"
mkdir -p "$run/flight_recorder"

# Any node can host the rendezvous; the port differs between jobs that share a node.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
endpoint="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"

step() { cat "$run/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }
before=$(step)

# An agent that gives up takes the step down; the others would wait for it.
if srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$SLURM_JOB_ID" \
    -m boreal_megatron train "$@" "checkpoint.folder=$run"; then
    exit 0
fi

# After SIGTERM, too, torchrun's exit code is not 0. A new checkpoint tells a run that goes on from one that cannot.
if [ "$(step)" != "$before" ]; then
    echo "launch.sh: not finished, saved step $(step) (found $before): queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
echo "launch.sh: failed without a new checkpoint (the last is of step $before): not queued again" >&2
exit 1
