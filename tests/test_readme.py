"""The README's own words: its four lines train, and its commands are those that CI runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    found = [b for b in blocks if containing in b]
    assert len(found) == 1, f"{containing!r} should stand in one block of the README"
    return found[0]


def test_the_four_lines_train():
    lines = block("python", "l2l.load(").splitlines()
    loading = [line for line in lines if "load(" in line or line.startswith("import")]
    stepping = [line for line in lines if "optimizer.update" in line or "apply_updates" in line]
    scope = {"params": {"w": jnp.zeros(3)}}
    exec("\n".join(loading), scope)
    exec(next(line for line in lines if ".init(" in line), scope)

    def loss(p):
        return jnp.sum((p["w"] - 1.0) ** 2)

    for _ in range(100):
        scope["gradients"] = jax.grad(loss)(scope["params"])
        exec("\n".join(stepping), scope)
    assert loss(scope["params"]) < 0.5 * 3.0


def test_the_guard_as_written_takes_over():
    """The README's call, around an optimizer that only diverges."""
    call = re.search(r"`(l2l\.guard\(optimizer, .*?\))`", README)[1]
    scope = {"optimizer": optax.sgd(-1.0), "optax": optax}
    exec(f"import l2l\nguarded = {call}", scope)
    params = {"w": jnp.ones(3)}
    state = scope["guarded"].init(params)
    for _ in range(100):
        loss, gradients = jax.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
        updates, state = scope["guarded"].update(gradients, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    assert state.falls > 0


@pytest.mark.parametrize("job", ["l2l.launch", "pytest"])
def test_a_command_is_what_ci_runs(job):
    """Each part of it is a line there, which may go on with a smaller budget."""
    lines = CI.splitlines()
    for part in block("sh", f"python -m {job}").strip().split(" && "):
        assert any(line == part or line.startswith(f"{part} --") for line in lines), part


def test_one_page_whose_links_lead_somewhere():
    assert len(README.splitlines()) <= 90
    links = re.findall(r"\]\((?!https:)([^)#]*)", README)
    assert len(links) >= 8
    for link in links:
        assert (ROOT / link).is_file(), link
