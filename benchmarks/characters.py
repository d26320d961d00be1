"""nanoGPT's model of characters for a CPU, trained by an optimizer as loaded: validation losses.

    python benchmarks/characters.py [--load lstm] [--steps 2000] [--seed 0]

The recipe's own AdamW ends at 1.906 after 2,000 steps of this model and data, and at three times
its rate at 1.781 (measured for this project over 200 fixed batches, as here). Four minutes of a
core; needs tinyshakespeare, and says so where it takes other text.
"""

import argparse
import time

import jax
import jax.numpy as jnp

import l2l
from l2l import tasks
from l2l.core import unroll
from l2l.data import datasets
from l2l.evaluation import curves

BATCHES, EVERY = 200, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if not datasets.present("tinyshakespeare"):
        print(f"tinyshakespeare is not below {datasets.data_dir()}: another text in its place.")
    family = tasks.nanogpt()
    data = jax.device_put(family.data())
    optimizer = l2l.load(flags.load, num_steps=flags.steps)
    run = curves.beginning(family, jax.random.key(flags.seed))
    state = curves.opened(optimizer, run, flags.steps)
    held_out = jax.random.split(jax.random.key(2), BATCHES)

    @jax.jit
    def advance(state, data):
        return unroll.unroll(state, data, family, optimizer, EVERY)

    @jax.jit
    def validation(state, data):
        def one(key):
            batch = family.batch(key, state.problem, data, "validation")
            return family.loss(state.params, state.problem, batch)

        return jnp.mean(jax.lax.map(one, held_out))

    while int(state.step) < flags.steps:
        start = time.process_time()
        state, losses = jax.block_until_ready(advance(state, data))
        each = (time.process_time() - start) / EVERY * 1e3
        loss, held = float(losses.mean()), float(validation(state, data))
        print(f"{state.step}: {loss:.3f}, validation {held:.3f}, {each:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
