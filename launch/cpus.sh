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
if [ "${#cores[@]}" -eq 0 ]; then
  echo "Python did not say which cores there are: activate the environment of l2l (on Linux)." >&2
  exit 2
fi
count="${CORES:-${#cores[@]}}"
if ! [[ "$count" =~ ^[1-9][0-9]*$ ]]; then
  echo "CORES=$count is not a number of processes: give 1 or more, or leave it out for all." >&2
  exit 2
fi
if ! [ "$count" -le "${#cores[@]}" ] 2> /dev/null; then
  echo "CORES=$count, but this shell may use ${#cores[@]}: ask for as many or fewer." >&2
  exit 2
fi
joining=()
if [ "$count" -gt 1 ]; then
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  joining=(--coordinator_address="127.0.0.1:$port" --num_processes="$count")
fi
members=()
hand_on() {
  kill "-$1" ${members[@]+"${members[@]}"} 2> /dev/null
}
trap 'hand_on INT' INT
trap 'hand_on TERM' TERM HUP # Runs know no SIGHUP, that of a terminal that closes.
# With `set -m` in process groups of their own, so that Ctrl-C reaches them through here, and once:
# a second signal makes a run leave unsaved.
set -m
for ((i = 0; i < count; i++)); do
  number=()
  if [ "$count" -gt 1 ]; then
    number=(--process_id="$i")
  fi
  taskset -c "${cores[i]}" python -m l2l.launch --config="$config" --workdir="$workdir" \
    ${joining[@]+"${joining[@]}"} ${number[@]+"${number[@]}"} "$@" &
  members+=($!)
done
set +m
code=0
for member in ${members[@]+"${members[@]}"}; do
  # A trapped signal ends `wait` before the process has ended.
  while true; do
    wait "$member"
    ended=$?
    kill -0 "$member" 2> /dev/null || break
  done
  [ "$code" -ne 0 ] || code=$ended
done
exit "$code"
