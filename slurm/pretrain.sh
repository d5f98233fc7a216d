#!/usr/bin/env bash
# sbatch slurm/pretrain.sh CONFIG [section.key=value ...]: one task per GPU, or per --ntasks-per-node without GPUs.
#
# Options given to sbatch override those below, such as --nodes=4 --gpus-per-node=8 --ntasks-per-node=8. On USR1 or USR2
# (5 minutes before the time limit, at a preemption, or by hand) the ranks save and exit with 75; then, and only then,
# this script asks Slurm to run the job again: the same run folder, from the same step. docs/operations.md has the rest.
#SBATCH --job-name=msm-dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# The ranks get their signals themselves. What comes to this shell alone (--signal=B:USR1@300, scancel --full) is
# remembered until there are ranks, and then passed on to them.
asked=0
trap 'asked=1' USR1 USR2
trap : TERM

if [ "$#" -eq 0 ]; then
  echo "usage: sbatch slurm/pretrain.sh CONFIG.yaml [section.key=value ...]" >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "slurm/pretrain.sh is started by sbatch; without Slurm: deepspeed --module msm_dist.pretrain $*" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
# A signal that comes before Python has its handlers stays pending until then.
hold=(env --block-signal=USR1,USR2)
if ! "${hold[@]}" true 2>/dev/null; then
  echo "note       env lacks --block-signal (coreutils 8.31): a USR1 or USR2 during the start is lost"
  # shellcheck disable=SC2016
  hold=(bash -c 'trap "" USR1 USR2; exec "$@"' hold)
fi
if ! "${hold[@]}" python -c 'import msm_dist' 2>/dev/null; then
  echo "python here ($(command -v python || echo none)) has no msm_dist: submit from the project's folder after" \
    "\`make setup\`, or activate the environment that has it before sbatch" >&2
  exit 2
fi

tasks=${SLURM_NTASKS_PER_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-1}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  # Ranks share what the node gives: --ntasks-per-node=<GPUs> asks for --cpus-per-task CPUs for each of them.
  cpus=$((${SLURM_CPUS_ON_NODE:-$cpus} / SLURM_GPUS_ON_NODE))
  if [ "$cpus" -eq 0 ]; then cpus=1; fi
  tasks=$SLURM_GPUS_ON_NODE
fi
ranks=$((SLURM_JOB_NUM_NODES * tasks))
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((12000 + SLURM_JOB_ID % 18000)) # below the ports that Linux gives away by itself
export MASTER_ADDR MASTER_PORT
# With sbatch --export=NONE srun would start the ranks without an environment.
unset SLURM_EXPORT_ENV

echo "== $(date -Is) ======"
WORLD_SIZE=$ranks "${hold[@]}" python -m msm_dist.allocation begins "$@"
echo "tasks      $SLURM_JOB_NUM_NODES nodes x $tasks tasks x $cpus CPUs, ${SLURM_GPUS_ON_NODE:-no} GPUs a node"

# Ranks that srun has not started yet don't hear a signal; of one that is repeated they have heard the first.
pass_on() {
  if [ -z "$teller" ]; then
    {
      trap '' USR1 USR2
      while kill -0 "$srun" 2>/dev/null; do
        scancel --signal=USR1 "$SLURM_JOB_ID" || true
        sleep 10
      done
    } &
    teller=$!
  fi
}

code=75
if [ "$asked" -eq 0 ]; then
  # Where nodes can't reach each other srun would wait for the others' tasks until the time limit.
  "${hold[@]}" python -m msm_dist.guard &
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
    --kill-on-bad-exit=1 "${hold[@]}" python -u -m msm_dist.pretrain "$@" &
  srun=$!
  teller=
  trap pass_on USR1 USR2
  if [ "$asked" -ne 0 ]; then pass_on; fi # it came since the look above
  while :; do # a signal to this shell ends `wait`, not srun
    code=0
    wait "$srun" || code=$?
    if ! kill -0 "$srun" 2>/dev/null; then break; fi
  done
fi
trap '' USR1 USR2
# Says how it ended; after a 75 asks for the requeue, and ends with 0 if Slurm grants it.
python -m msm_dist.allocation ended "$code" "$@"
