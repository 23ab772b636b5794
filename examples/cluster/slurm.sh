#!/bin/bash
# Up to four nodes of 8 GPUs train; rollout servers run elsewhere, at the addresses in SERVERS.
#
#   SERVERS='["http://node4:8100", "http://node4:8101"]' EXGRPO_FAST_KEY=... sbatch slurm.sh
#
# A worker that fails, or hangs for `--deadline` seconds (300): torchrun ends all workers and starts
# them again from the newest checkpoint, three times. A node that is lost: the same, on the others.
# A pre-emption, a time limit, the loss of the first node: Slurm puts the job back into the queue, and
# it goes on from there.

#SBATCH --job-name=exgrpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

set -u
RUN=${RUN:-/shared/runs/mine}          # the same path on every node
SERVERS=${SERVERS:?addresses of the rollout servers, as a JSON list}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 300 s before the time limit: a checkpoint, then the queue again. Slurm's own SIGTERM (pre-emption)
# reaches the workers by srun and torchrun, 30 s before SIGKILL; with PreemptMode=REQUEUE the job
# comes back by itself.
stop_and_requeue() {
    kill -TERM "$STEP"
    wait "$STEP"
    scontrol requeue "$SLURM_JOB_ID"
}
trap stop_and_requeue USR1

srun --no-kill --kill-on-bad-exit=0 torchrun \
    --nnodes "1:$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m exgrpo_fast train exgrpo --out "$RUN" --resume auto \
    --model.name /shared/models/mine --data.train /shared/data/train.jsonl \
    --rollout.engine vllm_server --rollout.server.urls "$SERVERS" \
    --rollout.server.weights broadcast --rollout.server.host "$HEAD" &
STEP=$!
wait "$STEP"
