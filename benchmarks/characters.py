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
import optax

import l2l
from l2l import tasks
from l2l.data import datasets

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
    problem = family.sample(jax.random.key(flags.seed))
    params = family.init(jax.random.key(flags.seed), problem)
    optimizer = l2l.load(flags.load, num_steps=flags.steps)
    state = optimizer.init(params)
    draws, held_out = jax.random.key(flags.seed + 1), jax.random.key(2)

    @jax.jit
    def advance(params, state, first, data):
        def step(carry, i):
            params, state = carry
            batch = family.batch(jax.random.fold_in(draws, i), problem, data, "train")
            loss, gradient = jax.value_and_grad(family.loss)(params, problem, batch)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, (params, state), first + jnp.arange(EVERY))
        return *carry, losses.mean()

    @jax.jit
    def validation(params, data):
        def one(i):
            batch = family.batch(jax.random.fold_in(held_out, i), problem, data, "validation")
            return family.loss(params, problem, batch)

        return jnp.mean(jax.lax.map(one, jnp.arange(BATCHES)))

    for first in range(0, flags.steps, EVERY):
        start = time.process_time()
        params, state, loss = jax.block_until_ready(advance(params, state, first, data))
        each = (time.process_time() - start) / EVERY * 1e3
        held = float(validation(params, data))
        print(f"{first + EVERY}: {loss:.3f}, validation {held:.3f}, {each:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
