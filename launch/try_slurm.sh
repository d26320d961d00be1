#!/bin/bash
# Tries slurm.sbatch on a Slurm cluster of this one machine (Debian, as root): two tasks, one run;
# interrupted in three ways, resumed, and compared with an uninterrupted run.
#
#   launch/try_slurm.sh            # `python` must be one that has l2l; a few minutes.
#
# It installs slurm-wlm where that is missing, listens on loopback alone, and stops what it started.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
command -v slurmctld > /dev/null || { apt-get update -qq; apt-get install -y -qq slurm-wlm; }

folder="$(mktemp -d)"
host="$(hostname -s)"
export SLURM_CONF="$folder/slurm.conf"
stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" || true; fi
  done
  echo "Logs and runs: $folder"
}
trap stop EXIT

mkdir "$folder/state" "$folder/spool"
# cred_expire: by default a requeued job rests two minutes.
cat > "$SLURM_CONF" << CONF
ClusterName=l2l
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=60
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=main Nodes=ALL Default=YES State=UP
CONF
head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
chmod 755 "$folder"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
slurmctld
slurmd
until sinfo -h -o %T | grep -q idle; do sleep 0.5; done

cat > "$folder/tiny.py" << 'CONFIG'
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task = dict(name="quadratic", dimension=2, batch_size=3)
    config.optimizer = dict(name="lstm", hidden_size=2, learning_rate=0.01)
    config.inner = dict(length=4)
    config.horizon = dict(name="log_uniform", shortest=4, longest=16)
    config.meta = dict(steps=900, num_problems=8, group=3)
    config.evaluation = dict(horizons=(2,), num_problems=1, every=0)
    config.checkpoint = dict(every=30, keep=2)
    return config
CONFIG
export CONFIG="$folder/tiny.py" JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"

submit() {  # WORKDIR: prints the job's number.
  WORKDIR="$1" sbatch --parsable --chdir="$folder" --output="$1.log" --ntasks-per-node=2 \
    "$here/slurm.sbatch"
}
running_beyond() {  # JOB WORKDIR STEP: waits until the run has saved a later step.
  until ls "$2/checkpoints" 2> /dev/null | grep -E '^[0-9]+$' | sort -n | tail -1 |
    awk -v least="$3" '$1 > least { found = 1 } END { exit !found }'; do
    [ -n "$(squeue -h -j "$1" 2> /dev/null)" ] || { cat "$2.log"; exit 1; }
    sleep 0.1
  done
}
newest() { ls "$1/checkpoints" | grep -E '^[0-9]+$' | sort -n | tail -1; }
state() { scontrol show job "$1" | grep -oE 'JobState=[A-Z]+'; }
ended() { while squeue -h -j "$1" -o %T 2> /dev/null | grep -q .; do sleep 0.5; done; state "$1"; }

echo "== an uninterrupted run"
job="$(submit "$folder/whole")"
ended "$job" | grep COMPLETED

echo "== preempted (SIGTERM to the tasks): saves and requeues itself"
job="$(submit "$folder/parts")"
running_beyond "$job" "$folder/parts" 0
scancel --signal=TERM "$job"
until grep -q "SIGTERM: saved" "$folder/parts.log"; do sleep 0.1; done
grep "SIGTERM: saved" "$folder/parts.log"
running_beyond "$job" "$folder/parts" "$(newest "$folder/parts")"

echo "== requeued by the operator, mid-run"
before="$(newest "$folder/parts")"
scontrol requeue "$job"
running_beyond "$job" "$folder/parts" "$((before + 30))"

echo "== cancelled by the user: stays so; the same sbatch goes on"
scancel "$job"
ended "$job" | grep CANCELLED
job="$(submit "$folder/parts")"
ended "$job" | grep COMPLETED
grep -o "Going on from meta-step [0-9]*" "$folder/parts.log"

python - "$folder" << 'COMPARE'
import sys

import jax
import numpy as np

from l2l import exports

one, two = (
    exports.read(f"{sys.argv[1]}/{name}/{exports.EXPORT}")[1] for name in ("whole", "parts")
)
jax.tree.map(np.testing.assert_array_equal, one, two)
print("The interrupted run ended with the theta of the uninterrupted one, bit for bit.")
COMPARE
