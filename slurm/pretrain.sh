#!/usr/bin/env bash
# sbatch slurm/pretrain.sh CONFIG [section.key=value ...]: one task per GPU, or per --ntasks-per-node without GPUs.
# Options given to sbatch override those below, such as --nodes=4 --gpus-per-node=8 --ntasks-per-node=8. On USR1 (5 minutes before the time limit, or at a preemption) the
# ranks save and exit with 75; then, and only then, this script asks Slurm to run the job again: the same run folder.
#SBATCH --job-name=msm-dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch slurm/pretrain.sh CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

tasks=${SLURM_NTASKS_PER_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-1}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  # Ranks share what the node gives: --ntasks-per-node=<GPUs> asks for --cpus-per-task CPUs for each of them.
  cpus=$((${SLURM_CPUS_ON_NODE:-$cpus} / SLURM_GPUS_ON_NODE))
  if [ "$cpus" -eq 0 ]; then cpus=1; fi
  tasks=$SLURM_GPUS_ON_NODE
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $tasks tasks," \
  "master $MASTER_ADDR:$MASTER_PORT, $*"

# The tasks get the signals themselves; this shell only has to outlive them.
trap : TERM USR1 USR2
code=0
# Until Python has its handlers a task must not die of a signal that asks for a requeue.
# shellcheck disable=SC2016
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" \
  --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
  bash -c 'trap "" USR1 USR2; exec python -u -m msm_dist.pretrain "$@"' pretrain "$@" || code=$?
if [ "$code" -eq 75 ]; then
  echo "job $SLURM_JOB_ID: saved; asking Slurm to run it again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
