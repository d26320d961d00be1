#!/bin/bash
# One meta-training run on all hosts of a Cloud TPU slice, started from your own machine.
#
#   gcloud compute tpus tpu-vm create l2l --zone=ZONE --accelerator-type=v5litepod-16 --version=VERSION
#   launch/tpu.sh l2l ZONE 'pip install "l2l[tpu] @ git+https://…"'        # Once: on every host.
#   launch/tpu.sh l2l ZONE 'python3 -m l2l.launch --config=$HOME/mlp.py --workdir=/mnt/runs/mlp'
#
# JAX finds the hosts of the slice by itself. The command's output is that of every host; only the
# first one speaks. Checkpoints, metrics and the export: --workdir, on a disk or bucket that every host
# has mounted at the same place. To go on after a preemption, also on a new slice of another size: the
# same command; it takes the last checkpoint.
set -u
name="${1:?usage: launch/tpu.sh NAME ZONE COMMAND}"
zone="${2:?usage: launch/tpu.sh NAME ZONE COMMAND}"
command="${3:?usage: launch/tpu.sh NAME ZONE COMMAND}"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
