"""What an optimizer costs before its first step, and in one: processor seconds beside optax.adam.

    python benchmarks/compile.py [--json] [--load NAME_OR_PATH] [--only PART] [--rounds 9]

Run it on one core (taskset -c 0) with the compilation cache off, as it is by default. Two parts:

- compile: `init` and the trace and compilation of one update, cold, for 20, 100 and 400 tensors of
  one shape (kernels of 16 × 16 and biases) and for 100 kernels of different shapes;
- step: whole training steps of dense networks and of one large embedding, as ratios to the same
  step with `optax.adam`, medians over rounds in which each is timed in turn; and bytes of state.

The optimizers are `optax.adam`, `l2l.soap` and an untrained `per_tensor` (what it has learned does
not change its cost), or the one that --load names.
"""

import argparse
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l2l
from l2l.core import base
from l2l.optimizers.per_tensor import per_tensor

ADAM = "optax.adam"
# Name: (widths, batch size, LayerNorm, the ratio to reach).
DENSE = {
    "64-32-10, batch 128": ((64, 32, 10), 128, False, 2.0),
    "64-128-128-10, batch 128": ((64, 128, 128, 10), 128, False, 3.0),
    "64-256-256-10, batch 128": ((64, 256, 256, 10), 128, False, 3.0),
    "64-256-256-10, batch 1,024": ((64, 256, 256, 10), 1024, False, 1.4),
    "LayerNorm 784-512-512-10, batch 128": ((784, 512, 512, 10), 128, True, 3.0),
    "784-300-100-16-100-300-784, batch 128": ((784, 300, 100, 16, 100, 300, 784), 128, False, 2.5),
}
EMBEDDING = "an embedding of 50,000 × 64"


def optimizers(name: str | None) -> dict[str, optax.GradientTransformationExtraArgs]:
    if name:
        return {name: l2l.load(name, num_steps=1000)}
    learned = per_tensor()
    return {
        "l2l.soap": optax.with_extra_args_support(l2l.soap(1e-3)),
        "per_tensor": learned.bind(learned.init(jax.random.key(0))),
    }


def tensors(layers: int, width: int, vary: bool):
    return [
        {"w": jnp.full((width + (i if vary else 0), width), 0.1), "b": jnp.zeros(width)}
        for i in range(layers)
    ]


def compiling(transform, params) -> float:
    """Processor seconds of `init` and of making one update ready to run."""
    jax.clear_caches()
    begun = time.process_time()
    state = jax.block_until_ready(jax.jit(transform.init)(params))
    jax.jit(transform.update).lower(params, state, params).compile()
    return time.process_time() - begun


def dense(widths, batch_size, normalised):
    """(params, loss): a classifier, or where both ends are equal an autoencoder, of random data."""
    inputs = jax.random.normal(jax.random.key(1), (batch_size, widths[0]))
    labels = jax.random.randint(jax.random.key(2), (batch_size,), 0, 10)

    def params():
        layers = []
        for i, (m, n) in enumerate(itertools.pairwise(widths)):
            w = jax.random.normal(jax.random.key(i), (m, n)) / np.sqrt(m)
            layers.append({"w": w, "b": jnp.zeros(n), **({"g": jnp.ones(n)} if normalised else {})})
        return layers

    def loss(layers):
        x = inputs
        for layer in layers[:-1]:
            x = x @ layer["w"] + layer["b"]
            if normalised:
                x = layer["g"] * jax.nn.standardize(x)
            x = jax.nn.relu(x)
        x = x @ layers[-1]["w"] + layers[-1]["b"]
        if widths[0] == widths[-1]:
            return jnp.mean(jnp.square(x - inputs))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, labels))

    return params, loss


def embedding():
    """(params, loss): a table of which 512 rows are met."""
    rows = jax.random.randint(jax.random.key(0), (512,), 0, 50_000)
    return (
        lambda: {"e": 0.02 * jax.random.normal(jax.random.key(1), (50_000, 64))},
        lambda params: jnp.mean(jnp.square(params["e"][rows] - 1.0)),
    )


def stepping(transform, params, loss):
    """(run, bytes of state per parameter); run(n): processor seconds of a step, over n of them."""
    params = jax.jit(params)()
    state = jax.jit(transform.init)(params)

    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = transform.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / base.count(params)
    held = [params, state]

    def run(n):
        begun = time.process_time()
        for _ in range(n):
            held[:] = program(*held)
        jax.block_until_ready(held)
        return (time.process_time() - begun) / n

    run(20)  # The bases move in every one of the first steps.
    return run, size


def step_rows(transforms, rounds) -> list[dict]:
    cases = {name: (dense(*settings), goal) for name, (*settings, goal) in DENSE.items()}
    cases[EMBEDDING] = (embedding(), None)
    rows = []
    for case, ((params, loss), goal) in cases.items():
        ready = {name: stepping(x, params, loss) for name, x in transforms.items()}
        # A multiple of 20: as often as bases move, so that every turn has its share of them.
        turns = {name: 20 * max(1, round(0.1 / 20 / run(5))) for name, (run, _) in ready.items()}
        seconds = {name: [] for name in ready}
        for _ in range(rounds):
            for name, (run, _) in ready.items():
                seconds[name].append(run(turns[name]))
        for name, (_, size) in ready.items():
            rows.append(
                {
                    "part": "step",
                    "case": case,
                    "optimizer": name,
                    "milliseconds": 1e3 * float(np.median(seconds[name])),
                    "ratio": float(np.median(np.divide(seconds[name], seconds[ADAM]))),
                    "goal": None if name == ADAM else goal,
                    "state_bytes_per_parameter": size,
                }
            )
    return rows


def compile_rows(transforms) -> list[dict]:
    cases = {
        "20 tensors of one shape": (tensors(10, 16, False), 2.0),
        "100 tensors of one shape": (tensors(50, 16, False), 3.0),
        "400 tensors of one shape": (tensors(200, 16, False), 8.0),
        "100 kernels of different shapes": (tensors(100, 16, True), 10.0),
    }
    return [
        {
            "part": "compile",
            "case": case,
            "optimizer": name,
            "seconds": compiling(transform, params),
            "goal": None if name == ADAM else goal,
        }
        for case, (params, goal) in cases.items()
        for name, transform in transforms.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--load", help="a released name or an export, in place of untrained ones")
    parser.add_argument("--only", choices=("compile", "step"))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    adam = optax.with_extra_args_support(optax.adam(1e-3))
    transforms = {ADAM: adam, **optimizers(arguments.load)}
    rows = []
    if arguments.only != "step":
        rows += compile_rows(transforms)
    if arguments.only != "compile":
        rows += step_rows(transforms, arguments.rounds)
    device = jax.devices()[0]
    if arguments.json:
        print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "rows": rows}))
        return
    print(f"{device.device_kind}, JAX {jax.__version__}\n")
    for row in rows:
        print(f"{row['part']:9}{row['case']:40}{row['optimizer']:14}", end="")
        if row["part"] == "compile":
            print(f"{row['seconds']:9.1f} s", end="")
        else:
            print(f"{row['milliseconds']:9.3f} ms{row['ratio']:8.2f}", end="")
            print(f"{row['state_bytes_per_parameter']:9.1f} B", end="")
        print(f"   goal {row['goal']}" if row["goal"] else "")


if __name__ == "__main__":
    main()
