"""Bias, variance and cost of every meta-gradient estimator on a configuration.

    python benchmarks/estimators.py --config=configs/quadratic.py [--windows=5] [--problems=32]
        [--sigma=0.01] [--json] [--config.inner.length=10]

The truth is the exact gradient through whole runs of `windows` windows: of the mean, over windows,
of the meta-loss of `objective`. Estimators see the same runs (the first family of the config, the
same keys, truncated to the same windows), and the mean of their estimates along a run is compared:

    bias       ‖mean of (estimate − truth)‖ / ‖mean truth‖ over the runs, ± what sampling alone
               gives: a bias of that size is none
    cosine     between the mean estimate and the mean truth
    deviation  √(mean ‖estimate − mean estimate‖²) / ‖mean truth‖ of one run: problems and noise
    ms, MB     of one window of one problem on this device; temporary memory of the compiled step

Exact gradients of long runs may explode: the truth is then nothing to follow, and its own deviation
shows it. The weights are the untrained ones, moved at random by 0.05: at zero output layers most of
a gradient is zero.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from l2l.core import base, unroll
from l2l.estimators import autodiff, first_order, objective, pes
from l2l.training.experiment import build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", "configs/quadratic.py", "A file of configs/.")
_WINDOWS = flags.DEFINE_integer("windows", 5, "Windows of a run.", lower_bound=1)
_PROBLEMS = flags.DEFINE_integer("problems", 32, "Runs that are averaged.", lower_bound=2)
_SIGMA = flags.DEFINE_float("sigma", 0.01, "Of evolution strategies.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def estimators(inner, losses) -> dict[str, base.MetaGradient]:
    out = {
        "truncated, first order": autodiff.truncated(inner, losses),
        "truncated, exact": autodiff.truncated(inner, losses, order="exact"),
        f"ES, sigma {_SIGMA.value:g}": pes.es(inner, losses, sigma=_SIGMA.value),
        f"PES, sigma {_SIGMA.value:g}": pes.pes(inner, losses, sigma=_SIGMA.value),
    }
    if inner.optimizer.rule is not None:
        out = {"first_order (the engine)": first_order.first_order(inner, losses), **out}
    return out


def whole_runs(inner, losses, num_windows):
    """(theta, keys, data, stage) -> exact gradients through whole runs, one row a run."""

    def one(theta, key, data, stage):
        start = unroll.fresh(inner, key, theta, stage)

        def loss(theta):
            @jax.checkpoint
            def step(run, _):
                run, value, _ = autodiff.window(inner, losses, theta, run, data, segments=True)
                return run, value

            return jnp.mean(jax.lax.scan(step, start, None, num_windows)[1])

        return jax.grad(loss)(theta)

    return jax.jit(
        lambda theta, keys, data, stage: rows(
            jax.lax.map(lambda key: one(theta, key, data, stage), keys)
        )
    )


def rows(gradients) -> jax.Array:
    """[runs, size of theta]."""
    leaves = jax.tree.leaves(gradients)
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], 1)


def measure(estimator, num_windows, theta, keys, data, stage):
    """(mean gradients along the runs [runs, size], seconds a window and problem, bytes)."""
    state = jax.jit(estimator.init)(keys, theta, stage)
    step = jax.jit(estimator.estimate).lower(theta, state, data, stage).compile()
    total, seconds = 0.0, []
    for _ in range(num_windows):
        began = time.perf_counter()
        gradients, state, _ = jax.block_until_ready(step(theta, state, data, stage))
        seconds.append(time.perf_counter() - began)
        total += np.asarray(rows(gradients), np.float64) / num_windows
    return total, min(seconds) / len(keys), step.memory_analysis().temp_size_in_bytes


def compare(name, estimates, truth, seconds=None, temporary=None) -> dict:
    size = np.linalg.norm(truth.mean(0))
    off = estimates - truth
    mean = estimates.mean(0)
    return {
        "estimator": name,
        "bias": np.linalg.norm(off.mean(0)) / size,
        "bias_noise": np.sqrt(off.var(0, ddof=1).sum() / len(off)) / size,
        "cosine": mean @ truth.mean(0) / (np.linalg.norm(mean) * size),
        "deviation": np.sqrt(estimates.var(0, ddof=1).sum()) / size,
        "milliseconds": seconds and 1e3 * seconds,
        "temporary_megabytes": temporary and temporary / 1e6,
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
    made = build_experiment(_CONFIG.value)
    inner = made.inners[0]._replace(stagger=False)
    losses = objective.objective(**made.config.get("objective", {}))
    horizon = jnp.float32(_WINDOWS.value * inner.length)
    stage = base.Stage(horizon, horizon, jnp.float32(0))
    data = jax.device_put(inner.family.data())
    theta = made.optimizer.init(jax.random.key(made.seed))
    moves = pes.gaussian(jax.random.key(made.seed + 1), theta)
    theta = jax.tree.map(lambda x, e: x + 0.05 * e, theta, moves)
    keys = jax.random.split(jax.random.key(made.seed + 2), _PROBLEMS.value)
    exact = np.asarray(whole_runs(inner, losses, _WINDOWS.value)(theta, keys, data, stage))
    exact = exact.astype(np.float64)
    found = [compare("exact, whole run (truth)", exact, exact)]
    for name, estimator in estimators(inner, losses).items():
        estimates, *cost = measure(estimator, _WINDOWS.value, theta, keys, data, stage)
        found.append(compare(name, estimates, exact, *cost))
    if _JSON.value:
        about = {"windows": _WINDOWS.value, "length": inner.length, "problems": len(keys)}
        print(json.dumps({"device": jax.devices()[0].device_kind, **about, "rows": found}))
        return
    print(
        f"{inner.family.name}, {_WINDOWS.value} windows of {inner.length} steps, {len(keys)} runs, "
        f"{base.count(theta)} weights, {jax.devices()[0].device_kind}\n"
    )
    print(f"{'estimator':27}{'bias':>9}{'±':>9}{'cosine':>9}{'deviation':>11}{'ms':>9}{'MB':>9}")
    for row in found:
        print("{estimator:27}{bias:9.3f}{bias_noise:9.3f}{cosine:9.3f}".format(**row), end="")
        cost = [row["milliseconds"], row["temporary_megabytes"]]
        print(f"{row['deviation']:11.2f}" + "".join(f"{x:9.2f}" for x in cost if x is not None))


if __name__ == "__main__":
    app.run(main)
