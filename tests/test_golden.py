"""The first updates of the released optimizers, held to recorded numbers.

What is recorded in golden.json belongs to the settings, weights and versions of rules it names.
After a change that is meant, see `l2l/optimizers/versions.py`, and then write the file anew:

    python tests/test_golden.py

It refuses to record other updates of the same settings and weights under the versions of before.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l2l
from l2l.storage import exports

pytestmark = pytest.mark.usefixtures("optimised")
FILE = Path(__file__).with_name("golden.json")
SHAPES = {"kernel": (2, 2, 2, 2), "matrix": (4, 3), "vector": (5,)}
# Past the horizon, and past step 10, where the bases begin to follow in every tenth step only.
STEPS, HORIZON = 12, 9
# Rounding that differs between machines and versions is amplified by recurrence and by small
# denominators: 3.5e-4 has been seen. Constants changed by a few hundredths moved 4.6e-3 and more.
TOLERANCE = 1e-3


def at(step: int, gradient: bool) -> dict[str, jax.Array]:
    """Gradients of sizes from 1e-3 to 1 that turn slowly, a coordinate of each tensor without any;
    parameters that drift. No random numbers: their generators change too."""
    out = {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        i = np.arange(np.prod(shape))
        if gradient:
            x = 10.0 ** (-3 * ((7 * i + k) % 11) / 10) * np.sin(1.0 + 2.3 * i + k + 0.4 * step)
            x[1] = 0.0
        else:
            x = 0.3 * np.cos(1.7 * i + k) + 0.01 * step * np.sin(1.0 + i)
        out[name] = jnp.asarray(x.reshape(shape), jnp.float32)
    return out


def updates(name: str, told: bool) -> np.ndarray:
    """[STEPS, all coordinates], of the released optimizer of that name."""
    optimizer = l2l.load(name, num_steps=HORIZON if told else None)
    state, out = optimizer.init(at(0, gradient=False)), []
    for step in range(STEPS):
        update, state = optimizer.update(at(step, gradient=True), state, at(step, gradient=False))
        out.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)]))
    return np.stack(out)


def origin(name: str) -> dict:
    """What its file says: its settings, the versions of its rules, the digest of its weights."""
    about = exports.read(l2l.released()[name])[2]
    rule = {key: about["optimizer"][key] for key in ("settings", "rules")}
    return {**rule, "sha256": about["sha256"]}


def apart(ours: np.ndarray, recorded) -> float:
    """The largest difference, in units of the root mean square of the recorded updates."""
    recorded = np.asarray(recorded)
    return float(np.abs(ours - recorded).max() / np.sqrt(np.mean(recorded**2)))


@pytest.mark.parametrize("told", ["untold", "told"])
@pytest.mark.parametrize("name", sorted(l2l.released()))
def test_first_updates_are_those_recorded(name, told):
    golden = json.loads(FILE.read_text())[name]
    assert golden.items() >= origin(name).items(), (
        "recorded for other settings, weights or versions: python tests/test_golden.py"
    )
    ours = updates(name, told == "told")
    assert apart(ours, golden[told]) < TOLERANCE, (
        f"{name} does other than it did: see the docstring of l2l/optimizers/versions.py"
    )


def test_a_horizon_matters_to_what_listens_to_one():
    """Else "told" would hold nothing that "untold" does not."""
    golden = json.loads(FILE.read_text())
    differ = {name: apart(np.asarray(x["told"]), x["untold"]) > 0.01 for name, x in golden.items()}
    assert differ == {"dm": False, "lstm": True, "mlp": True, "rnnprop": False}


def record() -> int:
    """Writes golden.json; the exit code."""
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    golden = {}
    for name in sorted(l2l.released()):
        golden[name], old = origin(name), before.get(name, {})
        same = old.items() >= golden[name].items()
        for told in ("untold", "told"):
            ours = updates(name, told == "told")
            golden[name][told] = [[float(f"{x:.6g}") for x in row] for row in ours]
            if same and not apart(ours, old[told]) < TOLERANCE:
                print(f"{name} does other than it did under {old['rules']}: raise its version in")
                print("l2l/optimizers/versions.py first. Nothing is recorded.")
                return 1
    FILE.write_text(json.dumps(golden, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(record())
