#!/usr/bin/env bash
# Meta-trains on a SLURM cluster: one process on each node, which uses all GPUs of the node.
#
#   sbatch examples/cluster/slurm.sh --experiment=ant_mfrl --config.size=full --workdir=/shared/runs/ant
#
# --workdir must lie on a file system that all nodes share. JAX finds the nodes from the environment that srun sets. Two minutes
# before the time limit SLURM sends SIGTERM; all processes save, and the job is queued again and goes on.
#SBATCH --job-name=ml3_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
srun python -m launch.meta_train "$@"
code=$?
if ((code == 143)); then # stopped by SIGTERM, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
