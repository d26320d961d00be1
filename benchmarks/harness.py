"""Speed of the harness: a space of 30 trials beside 30 runs of Adam in one compiled loop.

    python benchmarks/harness.py [--cells mlp,fashion] [--steps 1000] [--kinds adam,muon]

For every cell and kind, processor seconds of one problem: one run of Adam, compiled, with nothing
measured; all trials of the space to the same horizon as `tuning.tune` runs them, with compiling and
the measurements over whole splits; the same when compiled already; and both over 30 such runs. A
ratio below 1 is what sharing batches and loops gains; goal: at most 2 with everything in it.
"""

import argparse
import time

import jax
import optax

from l2l.core import unroll
from l2l.evaluation import baselines, curves, report, suites, tuning
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid


def one_run(family, data, steps: int) -> float:
    """Processor seconds of a run of Adam in one compiled loop, the least of three."""
    adam = optax.with_extra_args_support(optax.adam(1e-3))

    @jax.jit
    def run(key, data):
        state = curves.opened(adam, curves.beginning(family, key), steps)
        return unroll.unroll(state, data, family, adam, steps)

    took = []
    for seed in range(4):  # The first compiles.
        began = time.process_time()
        jax.block_until_ready(run(jax.random.key(seed), data))
        took.append(time.process_time() - began)
    return min(took[1:])


def tune(kind: str, family, data, steps: int) -> tuple[float, float]:
    """Processor seconds of all trials: the first time, and again with what was compiled."""
    grid = Grid(kind, extensions=0)
    device = jax.local_devices()[:1]
    search = tuning._Search(grid, family, data, Problems(jax.random.key(0), 1), (steps,), device)
    search.progress = lambda share, text: None
    took = []
    for _ in range(2):
        began = time.process_time()
        search.sweep()
        took.append(time.process_time() - began)
    return took[0], took[1]


def measured(name: str, kinds: list[str], steps: int) -> list[dict]:
    family, data = suites.CELLS[name].load()
    single = one_run(family, data, steps)
    rows = []
    for kind in kinds:
        first, again = tune(kind, family, data, steps)
        row = {"cell": name, "kind": kind, "one run of Adam": single}
        row |= {f"{tuning.TRIALS} trials": first, "compiled": again}
        row |= {"over 30 runs": first / 30 / single, "compiled, over 30 runs": again / 30 / single}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", default="mlp,fashion")
    parser.add_argument("--kinds", default="adam", help=f"of {', '.join(baselines.KINDS)}")
    parser.add_argument("--steps", type=int, default=1_000)
    values = parser.parse_args()
    rows = []
    for name in values.cells.split(","):
        rows += measured(name, values.kinds.split(","), values.steps)
    print(report.table(rows))


if __name__ == "__main__":
    main()
