"""What a step of an optimizer costs on an accelerator: the shapes of GPT-2 (124 M parameters).

    python benchmarks/gpt2.py [--load lstm] [--tokens 32768] [--rounds 7]

Updates of synthetic gradients, beside `optax.adamw` on the same arrays, medians over rounds in
which each is timed in turn; the share of the memory bandwidth, which is measured by a copy, that
an AdamW of 7 words a parameter would reach in that time; and, for scale, one pass forward and back
of the network itself in bfloat16 at so many tokens: goal is a whole step of at most 1.5 times
AdamW's.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l2l
from l2l.core import base

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 768, 12, 12, 1024, 50_257
LINEAR = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}  # In widths.


def parameters(key):
    def normal(i, *shape):
        return 0.02 * jax.random.normal(jax.random.fold_in(key, i), shape)

    def layer(i):
        out = {"norms": {n: jnp.ones(WIDTH) for n in ("g1", "g2")}}
        out["norms"] |= {n: jnp.zeros(WIDTH) for n in ("b1", "b2")}
        for j, (name, (m, n)) in enumerate(LINEAR.items()):
            kernel = normal(10 * i + j, m * WIDTH, n * WIDTH)
            out[name] = {"w": kernel, "b": jnp.zeros(n * WIDTH)}
        return out

    return {
        "tokens": normal(1000, VOCABULARY, WIDTH),
        "places": normal(1001, CONTEXT, WIDTH),
        "layers": [layer(i) for i in range(LAYERS)],
        "norm": {"g": jnp.ones(WIDTH), "b": jnp.zeros(WIDTH)},
    }


def loss(params, tokens):
    """Mean cross-entropy of the next token, [rows, CONTEXT + 1] tokens; computed in bfloat16."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def norm(x, g, b):
        return g * jax.nn.standardize(x, epsilon=1e-5) + b

    def layer(x, p):
        def linear(name, x):
            return x @ p[name]["w"] + p[name]["b"]

        n = p["norms"]
        q, k, v = jnp.split(linear("qkv", norm(x, n["g1"], n["b1"])), 3, -1)
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        mixed = jax.nn.dot_product_attention(
            q.reshape(heads), k.reshape(heads), v.reshape(heads), is_causal=True
        )
        x = x + linear("out", mixed.reshape(x.shape))
        return x + linear("down", jax.nn.gelu(linear("up", norm(x, n["g2"], n["b2"]))))

    x = half["tokens"][tokens[:, :-1]] + half["places"]
    for p in half["layers"]:
        x = jax.checkpoint(layer)(x, p)
    x = norm(x, half["norm"]["g"], half["norm"]["b"])

    def row(total, pair):  # One row at a time: all logits at once are gigabytes.
        x, wanted = pair
        logits = (x @ half["tokens"].T).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return total + jnp.sum(losses), None

    total, _ = jax.lax.scan(jax.checkpoint(row), 0.0, (x, tokens[:, 1:]))
    return total / (tokens.shape[0] * CONTEXT)


def timed(run, count: int) -> float:
    """Seconds of one of `count` runs."""
    begun = time.perf_counter()
    for _ in range(count):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - begun) / count


def stepping(transform, params, gradients):
    """run(): one update, applied; the optimizer's state and parameters are written over."""
    held = [jax.tree.map(jnp.copy, params), jax.jit(transform.init)(params)]

    def step(params, state, gradients):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1))

    def run():
        held[:] = program(*held, gradients)
        return held

    begun = time.perf_counter()
    jax.block_until_ready(run())
    size = sum(x.nbytes for x in jax.tree.leaves(held[1])) / base.count(params)
    return run, time.perf_counter() - begun, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    params = jax.jit(parameters)(jax.random.key(0))
    gradients = jax.tree.map(lambda x: 1e-2 * jnp.sin(1e3 * x + 1), params)
    rivals = {
        "optax.adamw": optax.adamw(1e-3),
        "l2l.soap": l2l.soap(1e-3),
        flags.load: l2l.load(flags.load, num_steps=10_000),
    }
    runs, seconds = {}, {}
    for name, transform in rivals.items():
        runs[name], compiling, size = stepping(transform, params, gradients)
        print(
            f"{name}: first step {compiling:.1f} s, state {size:.1f} bytes a parameter", flush=True
        )
    for run in runs.values():
        timed(run, 20)  # Bases move in every one of the first steps.
    for _ in range(flags.rounds):
        for name, run in runs.items():  # A multiple of 20: as often as bases move.
            seconds.setdefault(name, []).append(timed(run, 20))
    flat = jnp.zeros(1 << 28)
    copy = jax.jit(lambda x: x + 1)
    timed(lambda: copy(flat), 5)
    bandwidth = 2 * flat.nbytes / timed(lambda: copy(flat), 20)
    words = 7 * 4 * base.count(params)
    for name, each in seconds.items():
        took = float(np.median(each))
        ratio = float(np.median(np.divide(each, seconds["optax.adamw"])))
        share = words / took / bandwidth
        print(
            f"{name}: {1e3 * took:.2f} ms a step, {ratio:.2f} of AdamW's, {share:.0%} of a copy's"
        )
    print(f"a copy: {bandwidth / 1e12:.2f} TB/s")
    shape = (flags.tokens // CONTEXT, CONTEXT + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCABULARY)
    both = jax.jit(jax.value_and_grad(loss))
    jax.block_until_ready(both(params, tokens))
    whole = float(np.median([timed(lambda: both(params, tokens), 1) for _ in range(flags.rounds)]))
    adamw = np.median(seconds["optax.adamw"])
    print(f"forward and back at {flags.tokens:,} tokens: {1e3 * whole:.0f} ms")
    for name, each in seconds.items():
        print(
            f"{name}: a whole step is {(whole + np.median(each)) / (whole + adamw):.2f} of AdamW's"
        )


if __name__ == "__main__":
    main()
