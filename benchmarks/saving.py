"""What saving adds to training: blocks of meta-steps with a save and without, in turns.

    python benchmarks/saving.py [--config configs/mlp.py] [--every 100] [--pairs 20] [--json]

The program and the saves of `python -m l2l.launch --config=…`, in one process. A block is one call
of the program (a group of meta-steps). In every pair one block begins with a save, as the loop
makes it, and ends once that is on the disk, so that it pays both for what holds the loop up and for
what the writing threads take from the meta-steps; which of the two comes first alternates. Added is
the difference of a pair over the time of --every meta-steps, at the pace of its block without a
save. Wall time, and the processor time of the whole process, to which other jobs of the machine
matter less: medians over pairs and, in brackets, quartiles.

The difference of two long blocks is noisy on a machine with other jobs. So saves are measured by
themselves as well, from the call until all is on the disk, with nothing to overlap with. That
counts waiting for the disk, which training does not see, and leaves out what the two do to each
other.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from devices import ALL, prepare

SAVES = 20  # By themselves.


def now() -> tuple[float, float]:
    """(wall, processor) seconds; the latter of all threads."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    return tuple(after - before for after, before in zip(now(), began, strict=True))


def measure(config: str, every: int, pairs: int, folder: Path) -> dict:
    loop = prepare(config, ALL)

    from l2l.storage import checkpoint

    experiment = loop.experiment
    saver = checkpoint.Saver(folder, experiment.saving.keep)
    loop.compile()

    def save(step: int):
        saver.save(step, loop.snapshot())

    def plain():
        began = now()
        loop.advance()
        return since(began)

    held, late = [], 0

    def written(step: int):
        while not (folder / str(step)).exists():  # Orbax renames it when it is whole.
            time.sleep(0.002)

    def saving(step: int):
        nonlocal late
        began = now()
        save(step)
        held.append(since(began)[0])
        loop.advance()
        late += not (folder / str(step)).exists()
        written(step)
        return since(began)

    def lone(step: int):
        began = now()
        save(step)
        written(step)
        return since(began)

    for _ in range(2):
        loop.advance()
    # The first compiles, and as many as are kept delete none: no part of this.
    first = experiment.saving.keep + 1
    alone_saves = [lone(step) for step in range(first + SAVES)][first:]
    groups = every / experiment.running.group
    without, added = [], []
    for i in range(pairs):
        step = first + SAVES + i
        if i % 2:
            with_save, alone = saving(step), plain()
        else:
            alone, with_save = plain(), saving(step)
        without.append(alone)
        added.append([(w - a) / (groups * a) for w, a in zip(with_save, alone, strict=True)])
    saver.close()
    files = [file for file in folder.glob(f"{step}/**/*") if file.is_file()]
    row = {
        "pairs": pairs,
        "meta-steps a block": experiment.running.group,
        "bytes of a checkpoint": sum(file.stat().st_size for file in files),
        "saves that outlasted their block": late,
        "seconds that a save holds the loop up": quartiles(held),
    }
    for i, name in enumerate(("wall", "processor")):
        whole = groups * statistics.median(seconds[i] for seconds in without)
        row[f"{name} seconds of a save by itself"] = quartiles([x[i] for x in alone_saves])
        row[f"its share of {every} meta-steps, {name}, %"] = quartiles(
            [100 * x[i] / whole for x in alone_saves]
        )
        row[f"{name} seconds a block, no save"] = quartiles([seconds[i] for seconds in without])
        row[f"added a save every {every}, {name}, %"] = quartiles([100 * x[i] for x in added])
    return row


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mlp.py")
    parser.add_argument("--every", type=int, default=100, help="meta-steps between saves")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(flags.config, flags.every, flags.pairs, Path(folder) / "checkpoints")
    if flags.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        if isinstance(value, tuple):
            value = "{:.3g} [{:.3g} to {:.3g}]".format(*value)
        print(f"{name:42} {value}")


if __name__ == "__main__":
    main()
