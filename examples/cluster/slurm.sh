#!/bin/bash
# Four machines with 8 GPUs each, one process per GPU, weights sharded over all 32:
#   sbatch examples/cluster/slurm.sh --model M --data D --out runs/first
# One machine: sbatch --nodes 1 examples/cluster/slurm.sh ...
# All machines must share the folder of --out. Before its time is over the job saves and goes into the queue again, to continue
# from there; so does the same line, typed again.
#SBATCH --job-name=quietstar
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
# Sent to every process ten minutes before the time limit: it finishes its step and saves.
#SBATCH --signal=USR1@600
set -euo pipefail

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Triton compiles into it: on a shared disk, all processes would wait for each other.
export TRITON_CACHE_DIR=/tmp/triton-$SLURM_JOB_ID

# Without torchrun, signals reach the processes themselves; --kill-on-bad-exit ends all when one has died.
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m quietstar train "$@"' train \
  --sharding full_shard --precision bf16 --resume "$@" && code=0 || code=$?
if [ "$code" = 75 ]; then  # stopped by a signal, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
