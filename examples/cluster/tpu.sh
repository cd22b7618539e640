#!/usr/bin/env bash
# Meta-trains on all hosts of a Cloud TPU slice, on which the project is installed below ~/ml3_jax (`jax[tpu]` in its environment).
#
#   examples/cluster/tpu.sh SLICE ZONE --experiment=ant_mfrl --config.size=full --workdir=/mnt/shared/runs/ant
#
# --workdir must lie on storage that all hosts mount. JAX finds the hosts from the metadata of the slice.
set -euo pipefail
slice="$1"
zone="$2"
shift 2
gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all \
  --command="cd ~/ml3_jax && .venv/bin/python -m launch.meta_train --distributed $(printf '%q ' "$@")"
