"""Killed at any instant: fifty `kill -9`, half of them in runs of two processes.

    python -m pytest -m slow tests/test_killed.py

takes about half an hour on two cores. A few of the kind are in `test_cluster.py`.
"""

import random
import time

import jax
import pytest
from together import Command, assert_same_theta, experiment

from l2l.training.callbacks import DONE
from l2l.training.run import train

KILLS = 25
STEPS = 1200


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_no_kill_costs_more_than_the_steps_since_the_last_save(tmp_path, count):
    """One run, killed again and again. It saves every group of meta-steps, so that most of the
    time a save is under way; one kill in four comes before the first meta-step."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(experiment(STEPS), whole, jax.devices()[:2]) == DONE
    chance, kills, newest = random.Random(count), 0, 0

    def start():
        return Command(
            *(tmp_path, killed),
            count=count,
            devices=2 // count,
            steps=STEPS,
            every=3,
        )

    while kills < KILLS:
        with start() as run:
            victims = run.processes
            if kills and chance.random() < 0.25:  # All: one that never joins is waited for longer.
                time.sleep(chance.uniform(0, 10))
            else:
                run.until(lambda: (run.saved() or [0])[-1] > newest)
                time.sleep(chance.uniform(0, 2))
                if chance.random() < 0.7:
                    victims = [chance.choice(run.processes)]
            for process in victims:
                process.kill()
            began = time.monotonic()
            assert all(run.codes()), run.said()  # None ended by itself, and none hangs.
            kills += 1
            assert not run.began() or run.began() == newest, run.said()
            print(
                f"kill {kills}: {len(victims)} of {count}, at meta-step {newest}–{run.saved()[-1]},"
                f" gone after {time.monotonic() - began:.1f} s",
                flush=True,
            )
            newest = run.saved()[-1]
    with start() as run:
        # Hundreds of saves take longer than other tests wait.
        assert not any(run.codes(within=1800)), run.said()
        assert run.began() == newest
    assert_same_theta(whole, killed)
