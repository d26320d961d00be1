"""Several seeds, or values of settings, as one command with one summary.

    python -m l2l.sweep --config=configs/mlp.py --workdir=runs/seeds --seeds=5
    python -m l2l.sweep --config=configs/mlp.py --sweep=optimizer.learning_rate=1e-3,3e-3 --seeds=2
    python -m l2l.sweep ... --index=3    # one run: `$SLURM_ARRAY_TASK_ID` of an array job
    python -m l2l.sweep ... --gather     # the summary alone, of the runs that have finished

Each run is one of `l2l.launch`, in a directory below --workdir; they follow one another, each in a
process of its own. The same command goes on where it left off: finished runs are not repeated. When
a run fails this is reported and the others go on; Ctrl-C, SIGTERM and a terminal that closes reach
the current run, which saves, and end the sweep. Exit codes: those of `l2l.launch`; where runs
failed, the first one's; 2 where the results of a finished run cannot be read.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from l2l.console import configuration, schema
from l2l.console.commands import command
from l2l.console.errors import UserError
from l2l.storage import files
from l2l.training import sweep_summary

INTERRUPTED = (130, 143)
COMMAND = (sys.executable, "-m", "l2l.launch")


class Run(NamedTuple):
    """One run. setting: what the sweep gives it, as text; arguments: of `l2l.launch`."""

    setting: str
    seed: int
    directory: Path
    arguments: tuple[str, ...]


def plan(argv: Sequence[str]) -> tuple[Any, Path, list[Run]]:
    """(the flags, the directory of all, the runs) of a command line. All configurations are
    built, so that a mistake in any of them shows before the first is trained.

    Raises:
      UserError: a flag, key or value is wrong; or the directory of a run is another
        configuration's, finished or not.
    """
    typed = configuration.parse(argv, _flags(), _known, __doc__)
    values = typed.values
    if typed.config is None:
        raise UserError("there is nothing to train: add --config=configs/mlp.py")
    # What is not the sweep's own goes on to every run as it was typed.
    own = _flags()
    own.set_gnu_getopt()  # Flags may follow a value that stands apart, as in --config tiny.py.
    passed = own(list(argv), known_only=True)[1:]
    root = files.local(values.workdir or f"checkpoints/{typed.name}-sweep")
    first = schema.seed("config", typed.config.get("seed", 0))
    choices = [_choices(text) for text in values.sweep]
    runs = []
    for chosen in itertools.product(*choices):
        setting = ", ".join(chosen)
        for seed in range(first, first + values.seeds):
            folder = root.joinpath(*map(_plain, chosen), f"seed_{seed}")
            overrides = [*(f"--config.{one}" for one in chosen), f"--config.seed={seed}"]
            runs.append(Run(setting, seed, folder, (*passed, *overrides)))
    if len({run.directory for run in runs}) < len(runs):
        raise UserError("two runs of the sweep would share a directory: give each value once")
    if values.index is not None and values.index >= len(runs):
        raise UserError(f"--index={values.index}: the runs are 0 to {len(runs) - 1}")
    for run in runs if values.index is None else runs[values.index : values.index + 1]:
        _check(run)
    return values, root, runs


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    about = "The directory of all runs; by default checkpoints/<config>-sweep."
    flags.DEFINE_string("workdir", None, about, flag_values=values)
    about = "How many seeds, counted up from that of the configuration."
    flags.DEFINE_integer("seeds", 1, about, lower_bound=1, flag_values=values)
    about = "field=value,value; of several, all combinations are run."
    flags.DEFINE_multi_string("sweep", [], about, flag_values=values)
    about = "Does only this run; the first is 0."
    flags.DEFINE_integer("index", None, about, lower_bound=0, flag_values=values)
    flags.DEFINE_bool("gather", False, "Writes only the summary.", flag_values=values)
    return values


def _known():
    from l2l.training import sections  # It imports JAX: after `main` kept it off accelerators.

    return sections.settings_of


def _choices(text: str) -> list[str]:
    """["a.b=1", "a.b=2"] of "a.b=1,2"; commas in brackets part nothing."""
    field, equals, values = text.partition("=")
    found = configuration.split(values)
    if not equals or not found or not re.fullmatch(r"[\w.\[\]]+", field):  # Like task[0].name.
        raise UserError(f"--sweep={text} sweeps nothing: write field=value,value")
    if field == "seed":
        raise UserError("--sweep=seed: use --seeds=5")
    return [f"{field}={value}" for value in found]


def _plain(text: str) -> str:
    """Text as the name of a directory."""
    return re.sub(r"[^\w.,=+-]", "_", text)


def _check(run: Run) -> None:
    from l2l.training import experiment, run_directory

    typed = configuration.parse(["sweep", *run.arguments], flags.FlagValues(), _known, None)
    built = experiment.build_experiment(typed.config)
    run_directory.check(run.directory, built.config)


def run_all(runs: Sequence[Run], root: Path, environment, say=print) -> int:
    """Does the runs that have not finished, one after another, and keeps the summary up to date:
    the exit code."""
    codes: dict[Path, int] = {}
    for number, run in enumerate(runs):
        if not sweep_summary.finished(run.directory):
            say(f"Run {number + 1} of {len(runs)}: {run.directory}")
            command = (*COMMAND, *run.arguments, f"--workdir={run.directory}")
            codes[run.directory] = _wait(command, environment)
            sweep_summary.write(root, runs, codes)
        code = codes.get(run.directory, 0)
        if code in INTERRUPTED:
            say("Interrupted. The same command goes on from there.")
            return code
        if code:
            say(f"{run.directory} failed with code {code}; the others go on.")
    written = sweep_summary.write(root, runs, codes)
    say(written.text)
    failed = [code for code in codes.values() if code]
    if failed:
        say(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again.")
    return failed[0] if failed else (2 if written.damaged else 0)


def _wait(command, environment) -> int:
    """Runs a command to its end and hands on signals to it: its exit code."""
    process, early = None, []

    def hand_on(number, frame):
        number = signal.SIGTERM if number == signal.SIGHUP else number  # Runs know no other.
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Before the command starts: a signal in between would end the sweep and leave the run behind.
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Under `nohup`, which ignores it, a sweep is to outlive its terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {n: signal.signal(n, hand_on) for n in numbers}
    try:
        # In a group of its own, so that Ctrl-C reaches it through here, and once: a second signal
        # makes a run leave unsaved.
        process = subprocess.Popen(command, env=environment, process_group=0)
        for number in early:
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    return code if code >= 0 else 128 - code


@command
def main(argv) -> int:
    environment = dict(os.environ)  # Of the runs.
    # This process only looks at configurations: it must not hold the memory of an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    values, root, runs = plan(argv)
    if values.index is not None:
        run = runs[values.index]
        arguments = (*COMMAND, *run.arguments, f"--workdir={run.directory}")
        files.folder(run.directory.parent)
        os.execve(COMMAND[0], arguments, environment)
    files.folder(root)
    if values.gather:
        written = sweep_summary.write(root, runs, {})
        print(written.text)
        return 2 if written.damaged else 0
    return run_all(runs, root, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
