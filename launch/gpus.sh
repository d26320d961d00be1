#!/bin/bash
# One run on all GPUs of this machine, restarted after every interruption until it has ended.
#
#   launch/gpus.sh configs/mlp.py runs/mlp [--config.meta.num_problems=64 ...]
#
# CUDA_VISIBLE_DEVICES chooses the GPUs. num_problems must be a multiple of their number.
set -u
config="${1:?usage: launch/gpus.sh CONFIG WORKDIR [overrides]}"
workdir="${2:?usage: launch/gpus.sh CONFIG WORKDIR [overrides]}"
shift 2
while true; do
  python -m l2l.launch --config="$config" --workdir="$workdir" "$@"
  code=$?
  # 143 is SIGTERM, saved; above 128 otherwise, a kill. Ctrl-C (130) is a wish to stop.
  if [ $code -le 128 ] || [ $code -eq 130 ]; then
    exit $code
  fi
  echo "Run ended with code $code; going on from its last checkpoint."
  sleep 5
done
