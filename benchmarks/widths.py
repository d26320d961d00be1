"""How the best rate of an untrained `per_tensor` moves with the width of a network.

    python benchmarks/widths.py [--widths 16,64,256,512] [--steps 300] [--seeds 1] [--json]

Networks 64-width-width-10 on scikit-learn's digits, batches of 128; the rate is the default one
times 1/4 … 4 in steps of 2, with the rule's own annealing. Printed: the mean training loss over
the last tenth of the run for each, and the multiplier of the best.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.core import unroll
from l2l.evaluation import curves
from l2l.optimizers.per_tensor import per_tensor
from l2l.tasks.mlp import mlp

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)


def ends(width: int, steps: int, seeds: int) -> list[float]:
    """The loss at the end for each multiplier."""
    family = mlp(hidden=(width, width), activations=("relu",), initial_scale=(1, 1), subset=(1, 1))
    data = jax.device_put(family.data())
    learned = per_tensor()
    theta = learned.init(jax.random.key(0))
    transform = learned.bind(theta)

    @jax.jit
    def end(seed, multiplier):
        scaled = optax.chain(transform, optax.scale(multiplier))
        run = curves.beginning(family, jax.random.key(seed))
        losses = unroll.unroll(curves.opened(scaled, run, steps), data, family, scaled, steps)[1]
        return jnp.mean(losses[-max(steps // 10, 1) :])

    return [
        float(np.mean([end(seed, multiplier) for seed in range(seeds)]))
        for multiplier in MULTIPLIERS
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", default="16,64,256,512")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON, a row a line")
    flags = parser.parse_args()
    for width in map(int, flags.widths.split(",")):
        losses = ends(width, flags.steps, flags.seeds)
        row = {
            "width": width,
            "loss by multiplier": dict(zip(MULTIPLIERS, losses, strict=True)),
            "best": MULTIPLIERS[int(np.argmin(losses))],
        }
        if flags.json:
            print(json.dumps(row), flush=True)
            continue
        shown = "  ".join(f"×{m:g} {x:.4g}" for m, x in row["loss by multiplier"].items())
        print(f"width {width:4}  {shown}  best ×{row['best']:g}", flush=True)


if __name__ == "__main__":
    main()
