"""The examples run as they are, and train."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_example(library, capsys):
    pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(library, EXAMPLES / f"{library}_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses, accuracy = example.main(num_steps=150)
    # Ten classes: chance is a loss of 2.3 and an accuracy of 0.1.
    assert sum(losses[-10:]) / 10 < 0.25 * losses[0]
    assert accuracy > 0.85
    printed = capsys.readouterr().out
    assert "step   100" in printed and "step   150" in printed
    assert "take over 0 times" in printed
