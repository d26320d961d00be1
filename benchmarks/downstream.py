"""What a learned optimizer costs its users: full training steps beside optax.adam.

    python benchmarks/downstream.py [--json] [--load NAME_OR_PATH] [--rounds 15]

One process, one ordinary device, default settings of XLA: what a practitioner has. Every round
times a few steps of each optimizer in turn, so that a busy machine slows all of them alike; a ratio
is the median over rounds of the time of a step over that of Adam's step in the same round, and what
the guard costs (last column) the same over the step of the optimizer that it guards. Parameters and
state are donated. The cases: an MLP of a million parameters at two batch sizes, and the bare update
of one large tensor, of five hundred tiny ones and of three coordinates.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l2l
from l2l.core import base
from l2l.optimizers import coordinates
from l2l.optimizers.lstm import lstm

WIDTHS = (784, 680, 680, 10)  # 1,003,690 parameters.
ADAM = "optax.adam"
LSTM = "lstm"
GUARDED = "lstm, guarded"
MANY = "500 tensors of 1 to 40"


class Case(NamedTuple):
    """params: () -> pytree; gradient: (params) -> (loss, pytree); goal: the ratio to reach, if
    there is one."""

    name: str
    params: Callable
    gradient: Callable
    goal: float | None = None


class Cost(NamedTuple):
    """Of one optimizer on one case. seconds: of a step, one number a round."""

    seconds: np.ndarray
    compile_seconds: float
    temporary_bytes: int
    state_bytes: int


def mlp(batch_size: int, goal: float) -> Case:
    """Softmax regression of random labels on random images, through two ReLU layers."""
    images = jax.random.normal(jax.random.key(1), (batch_size, WIDTHS[0]))
    labels = jax.random.randint(jax.random.key(2), (batch_size,), 0, WIDTHS[-1])

    def params():
        layers = []
        for i, (m, n) in enumerate(itertools.pairwise(WIDTHS)):
            w = jax.random.normal(jax.random.key(i), (m, n)) / np.sqrt(m)
            layers.append({"w": w, "b": jnp.zeros(n)})
        return layers

    def loss(layers, images, labels):
        x = images
        for layer in layers[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        logits = x @ layers[-1]["w"] + layers[-1]["b"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def gradient(layers):
        return jax.value_and_grad(loss)(layers, images, labels)

    return Case(f"MLP of 1 M parameters, batch {batch_size:,}", params, gradient, goal)


def tensors(name: str, shapes) -> Case:
    """The update alone: the gradient costs next to nothing."""

    def params():
        return [jnp.full(shape, 0.5, jnp.float32) for shape in shapes]

    def gradient(params):
        return jnp.zeros(()), jax.tree.map(lambda x: 0.1 * x, params)

    return Case(name, params, gradient)


def cases() -> list[Case]:
    return [
        mlp(128, 6.0),
        mlp(1024, 2.0),
        tensors("one tensor of 1 M", [(1000, 1000)]),
        tensors(MANY, [(1 + i % 40,) for i in range(500)]),
        tensors("3 coordinates", [(3,)]),
    ]


def prepare(case: Case, transform: optax.GradientTransformation):
    """(run, compile seconds, temporary bytes, state bytes); run(n) times a step over n of them."""

    def step(params, state):
        value, gradient = case.gradient(params)
        updates, state = transform.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    # Built inside jit: eager zeros may share one buffer, which cannot be donated twice.
    params = jax.jit(case.params)()
    state = jax.jit(transform.init)(params)
    begun = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    spent = time.perf_counter() - begun
    held = [params, state]

    def run(n):
        begun = time.perf_counter()
        for _ in range(n):
            held[:] = program(*held)
        jax.block_until_ready(held)
        return (time.perf_counter() - begun) / n

    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return run, spent, program.memory_analysis().temp_size_in_bytes, size


def compare(case: Case, transforms: dict, rounds: int) -> dict[str, Cost]:
    """The cost of every optimizer on one case, timed in turns."""
    transforms = {name: optax.with_extra_args_support(x) for name, x in transforms.items()}
    ready = {name: prepare(case, transform) for name, transform in transforms.items()}
    # A turn lasts some 30 ms: long enough to time, short enough that turns meet the same machine.
    turns = {name: max(1, round(0.03 / run(2))) for name, (run, *_) in ready.items()}
    seconds = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (run, *_) in ready.items():
            seconds[name].append(run(turns[name]))
    return {name: Cost(np.array(seconds[name]), *rest) for name, (_, *rest) in ready.items()}


def measure(transforms: dict, rounds: int) -> list[dict]:
    """One row an optimizer and case, as JSON allows."""
    rows = []
    for case in cases():
        size = base.count(jax.eval_shape(case.params))
        own = transforms
        if case.name == MANY:
            # A guard takes minutes to compile: tenths of a second for each tensor.
            own = {name: x for name, x in transforms.items() if name != GUARDED}
        costs = compare(case, own, rounds)
        for name, cost in costs.items():
            ratio = np.median(cost.seconds / costs[ADAM].seconds)
            unguarded = np.median(cost.seconds / costs[LSTM].seconds)
            rows.append(
                {
                    "case": case.name,
                    "parameters": size,
                    "optimizer": name,
                    "milliseconds": 1e3 * float(np.median(cost.seconds)),
                    "ratio": float(ratio),
                    "over_unguarded": float(unguarded) if name == GUARDED else None,
                    "goal": None if name in (ADAM, GUARDED) else case.goal,
                    "compile_seconds": cost.compile_seconds,
                    "temporary_megabytes": cost.temporary_bytes / 1e6,
                    "state_bytes_per_parameter": cost.state_bytes / size,
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--load", help="an export in place of an untrained default lstm")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    learned = lstm()
    theta = learned.init(jax.random.key(0))  # What it has learned does not change its cost.
    plain = l2l.load(arguments.load) if arguments.load else learned.bind(theta)
    transforms = {
        ADAM: optax.adam(1e-3),
        LSTM: plain,
        GUARDED: l2l.guard(plain),
        "lstm, bfloat16 state": coordinates.bind(learned.rule, theta, state_dtype=jnp.bfloat16),
    }
    rows = measure(transforms, arguments.rounds)
    device = jax.devices()[0]
    if arguments.json:
        print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "rows": rows}))
        return
    print(f"{device.device_kind}, JAX {jax.__version__}\n")
    print(f"{'case':35}{'optimizer':22}{'ms':>9}{'/ Adam':>8}{'goal':>6}", end="")
    print(f"{'compile s':>11}{'temp MB':>9}{'state B':>9}{'/ unguarded':>13}")
    for row in rows:
        print(f"{row['case']:35}{row['optimizer']:22}{row['milliseconds']:9.3f}", end="")
        print(f"{row['ratio']:8.2f}{row['goal'] or '':>6}{row['compile_seconds']:11.2f}", end="")
        print(f"{row['temporary_megabytes']:9.2f}{row['state_bytes_per_parameter']:9.1f}", end="")
        print(f"{row['over_unguarded']:13.2f}" if row["over_unguarded"] else "")


if __name__ == "__main__":
    main()
