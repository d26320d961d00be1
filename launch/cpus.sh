#!/bin/bash
# One run on the cores of this machine: a process a core, each kept to its own (Linux).
#
#   launch/cpus.sh configs/release.py runs/release [--config.seed=1 ...]
#
# Faster than one process with a device a core, in which small operations hop between cores
# (benchmarks/devices.py says by how much). CORES=4 takes that many; num_problems must be a multiple.
# Ctrl-C and SIGTERM save and stop all of them; the same command goes on.
set -u
config="${1:?usage: launch/cpus.sh CONFIG WORKDIR [overrides]}"
workdir="${2:?usage: launch/cpus.sh CONFIG WORKDIR [overrides]}"
shift 2
mapfile -t cores < <(python -c 'import os; print(*sorted(os.sched_getaffinity(0)), sep="\n")')
count="${CORES:-${#cores[@]}}"
if [ "$count" -gt "${#cores[@]}" ]; then
  echo "CORES=$count, but this shell may use ${#cores[@]}: ask for as many or fewer." >&2
  exit 2
fi
joining=()
if [ "$count" -gt 1 ]; then
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  joining=(--coordinator_address="127.0.0.1:$port" --num_processes="$count")
fi
members=()
trap 'kill -TERM "${members[@]}" 2> /dev/null' INT TERM
for ((i = 0; i < count; i++)); do
  number=()
  if [ "$count" -gt 1 ]; then
    number=(--process_id="$i")
  fi
  taskset -c "${cores[i]}" python -m l2l.launch --config="$config" --workdir="$workdir" \
    ${joining[@]+"${joining[@]}"} ${number[@]+"${number[@]}"} "$@" &
  members+=($!)
done
code=0
for member in "${members[@]}"; do
  # A trapped signal ends `wait` before the process has ended.
  while true; do
    wait "$member"
    ended=$?
    kill -0 "$member" 2> /dev/null || break
  done
  [ "$code" -ne 0 ] || code=$ended
done
exit "$code"
