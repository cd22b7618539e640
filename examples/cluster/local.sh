#!/usr/bin/env bash
# Meta-trains in several processes of this machine, which share its cores: to try what a cluster does.
#
#   examples/cluster/local.sh 2 --experiment=sine --workdir=runs/sine
#
# The same command resumes. Ctrl-C, or SIGTERM to any of the processes, saves and stops all of them.
set -euo pipefail
count="$1"
shift
port="$(python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
pids=()
for ((number = count - 1; number > 0; number--)); do
  python -m launch.meta_train "$@" \
    --coordinator_address="localhost:$port" --num_processes="$count" --process_id="$number" &
  pids+=("$!")
done
code=0
python -m launch.meta_train "$@" \
  --coordinator_address="localhost:$port" --num_processes="$count" --process_id=0 || code=$?
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
