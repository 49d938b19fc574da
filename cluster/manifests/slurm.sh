#!/usr/bin/env bash
# A training on SLURM: Ray's head and workers from srun, on the nodes of one job.
#
#     sbatch cluster/manifests/slurm.sh
#
# Fill in: the #SBATCH lines; ONEWARP, an environment with onewarp in it, and DATA, RUNS and NAME below. All three places
#          lie on file systems that all nodes see.
# Tried: not on a SLURM cluster. A test checks its command line against the command itself, and its syntax.
#
# Near the end of its time SLURM sends SIGTERM to this script, which hands it on: all workers write a checkpoint after the
# same step, and the job goes back into the queue. It then goes on from there. When a job is preempted SLURM does so where its
# PreemptParameters hold send_user_signal; elsewhere the run goes on from its last checkpoint (--checkpoint-every).

#SBATCH --job-name=onewarp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

ONEWARP=${ONEWARP:-$HOME/onewarp/.venv}
DATA=${DATA:-$HOME/photographs}
RUNS=${RUNS:-$HOME/runs}
NAME=${NAME:-photographs}

export PATH="$ONEWARP/bin:$PATH"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export RAY_USAGE_STATS_ENABLED=0
# Whoever reaches Ray's ports runs what they like, and other users' jobs can: a token that lives as long as the job.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
# A node that does not answer for two seconds is given up.
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=500
export RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))
address=$(srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" hostname --ip-address | awk '{print $1}'):$port
gpus=${SLURM_GPUS_ON_NODE:-0}
# Workers take a GPU each, or where there is none all cores of a node.
common=(--block --num-cpus $((gpus > 0 ? SLURM_CPUS_PER_TASK : 1)) --num-gpus "$gpus" --disable-usage-stats)

srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" \
    ray start --head --node-ip-address "${address%:*}" --port "$port" --include-dashboard false "${common[@]}" &
started=($!)
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT
until ray health-check --address "$address" 2>/dev/null; do
    kill -0 "${started[0]}" && ((SECONDS < 300)) || { echo "Ray's head did not start on ${nodes[0]}." >&2; exit 1; }
    sleep 1
done
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --overlap -w "$others" \
        ray start --address "$address" "${common[@]}" &
    started+=($!)
fi

workers=$((${#nodes[@]} * (gpus > 0 ? gpus : 1)))
onewarp train --data "$DATA" --runs "$RUNS" --name "$NAME" --address "$address" --workers "$workers" --grace 60 &
training=$!
trap 'kill -TERM "$training" 2>/dev/null || true' TERM

code=0
wait "$training" || code=$?
# A signal ends the waiting, not the training.
while kill -0 "$training" 2>/dev/null; do
    code=0
    wait "$training" || code=$?
done
if ((code == 143)); then
    scontrol requeue "$SLURM_JOB_ID" # there is a checkpoint, and the run's name goes on from it
fi
exit "$code"
