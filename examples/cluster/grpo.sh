#!/bin/bash
# GRPO on shared prompts: the last machine generates with vLLM, the others train, one process per GPU, weights sharded over them:
#   sbatch examples/cluster/grpo.sh MODEL --data D.jsonl --output_dir runs/grpo --use_peft
# From the folder that holds examples/. All machines must share the folder of --output_dir. As with slurm.sh, the job saves before
# its time is over and goes into the queue again; so does the same line, typed again.
#SBATCH --job-name=quietstar-grpo
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
# Sent to every process ten minutes before the time limit: those that train finish their step and save.
#SBATCH --signal=USR1@600
set -euo pipefail

model=$1
shift
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
training=$((${#nodes[@]} - 1)) gpus=$SLURM_NTASKS_PER_NODE cpus=${SLURM_CPUS_PER_TASK:-1}
server=${nodes[training]}

# TRL sends it the weights after each step. The warning would end it while the others finish theirs.
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=$((gpus * cpus)) --nodelist="$server" \
  bash -c 'trap "" USR1; VLLM_SERVER_DEV_MODE=1 exec vllm serve "$@"' serve "$model" --tensor-parallel-size "$gpus" \
  --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1 &
serving=$!

export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$((training * gpus)) LOCAL_WORLD_SIZE=$gpus OMP_NUM_THREADS=$cpus TRITON_CACHE_DIR=/tmp/triton-$SLURM_JOB_ID
list=$(IFS=,; echo "${nodes[*]:0:training}")
srun --nodes="$training" --ntasks="$WORLD_SIZE" --nodelist="$list" --kill-on-bad-exit=1 \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python examples/cluster/grpo.py "$@"' train --model_name_or_path "$model" \
  --fsdp --fsdp_config '{"state_dict_type": "SHARDED_STATE_DICT"}' \
  --use_vllm --vllm_mode server --vllm_server_host "$server" --vllm_server_timeout 1500 "$@" && code=0 || code=$?
kill "$serving" 2>/dev/null || true
if [ "$code" = 75 ]; then  # stopped by a signal, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
