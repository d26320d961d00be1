#!/bin/bash
# One run on all GPUs of this machine, restarted after every interruption for as long as it gets on.
#
#   launch/gpus.sh configs/mlp.py runs/mlp [--config.meta.num_problems=64 ...]
#
# CUDA_VISIBLE_DEVICES chooses the GPUs. num_problems must be a multiple of their number.
# Ctrl-C and SIGTERM save and stop the run, and this script with it; the same command goes on. Three
# crashes in a row without a new checkpoint between them end it too, with the code of the last.
set -u
config="${1:?usage: launch/gpus.sh CONFIG WORKDIR [overrides]}"
workdir="${2:?usage: launch/gpus.sh CONFIG WORKDIR [overrides]}"
shift 2
newest() { ls "$workdir/checkpoints" 2> /dev/null | grep -E '^[0-9]+$' | sort -n | tail -1; }
child=
stopped=
hand_on() {
  stopped="$1"
  kill "-$1" "$child" 2> /dev/null
}
trap 'hand_on INT' INT
trap 'hand_on TERM' TERM HUP # Runs know no SIGHUP, that of a terminal that closes.
fruitless=0
while true; do
  before="$(newest)"
  # With `set -m` in a process group of its own, so that Ctrl-C reaches it through here, and once: a
  # second signal makes a run leave unsaved.
  set -m
  python -m l2l.launch --config="$config" --workdir="$workdir" "$@" &
  child=$!
  set +m
  [ -z "$stopped" ] || hand_on "$stopped" # It came before there was a process to hand it to.
  # A trapped signal ends `wait` before the process has ended.
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2> /dev/null || break
  done
  # 143 is SIGTERM, saved; above 128 otherwise, a kill. Ctrl-C (130) is a wish to stop.
  if [ -n "$stopped" ] || [ "$code" -le 128 ] || [ "$code" -eq 130 ]; then
    exit "$code"
  fi
  if [ "$(newest)" = "$before" ]; then
    fruitless=$((fruitless + 1))
  else
    fruitless=0
  fi
  if [ "$fruitless" -eq 3 ]; then
    echo "Run ended with code $code, the third time without a new checkpoint: not tried again." >&2
    exit "$code"
  fi
  echo "Run ended with code $code; going on from its last checkpoint."
  sleep 5 &
  child=$!
  wait "$child" || kill "$child" 2> /dev/null
  [ -z "$stopped" ] || exit "$code"
done
