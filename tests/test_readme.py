"""The README's own words: its task and its config run as written, and its four lines too."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(containing: str) -> str:
    found = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in b]
    assert len(found) == 1, f"{containing!r} should stand in one block of the README"
    return found[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder in which the README's own task was trained, by the README's command, but shorter."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_task.py").write_text(block("def rosenbrock"))
    (folder / "my_config.py").write_text(block("my_task.py:rosenbrock"))
    command = re.search(r"python (-m l2l.launch --config=my_config.py \S+)", README)[1].split()
    done = subprocess.run(
        [sys.executable, *command, "--config.meta.steps=40", "--config.evaluation.num_problems=1"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_own_task_and_config_run_as_written(run):
    assert (run / "runs/rosenbrock/optimizer.safetensors").is_file()
    assert "rosenbrock" in (run / "runs/rosenbrock/table.md").read_text()


def test_the_four_lines_train():
    lines = block("l2l.load(").splitlines()
    loading = [line for line in lines if "load(" in line or line.startswith("import")]
    stepping = [line for line in lines if "optimizer.update" in line or "apply_updates" in line]
    scope = {"optax": optax, "params": {"w": jnp.zeros(3)}}
    exec("\n".join(loading), scope)
    exec(next(line for line in lines if ".init(" in line), scope)

    def loss(p):
        return jnp.sum((p["w"] - 1.0) ** 2)

    for _ in range(100):
        scope["gradients"] = jax.grad(loss)(scope["params"])
        exec("\n".join(stepping), scope)
    assert loss(scope["params"]) < 0.5 * 3.0


def test_no_placeholder_is_left():
    assert "@@" not in README
