"""The page on starts and eps_root: its program prints the table that it shows."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

import l2l

PAGE = (Path(__file__).parent.parent / "docs" / "maml.md").read_text()


def numbers(text: str) -> np.ndarray:
    """The rows of numbers of a table, [rows, columns]."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return np.array([[float(x) for x in row] for row in rows if re.match(r"[\d.e-]+$", row[0])])


@pytest.fixture(scope="module")
def printed() -> np.ndarray:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program, {"__name__": "page"})
    return numbers(said.getvalue())


def test_the_program_prints_the_table(printed):
    """To the two digits that other processors agree on."""
    shown = numbers(PAGE)
    assert shown.shape == printed.shape == (4, 4)
    np.testing.assert_allclose(printed, shown, rtol=0.05)


def test_the_meta_gradient_is_nan_without_eps_root_alone(printed):
    by_root = dict(zip(printed[:, 0], printed[:, 1:], strict=True))
    slope, largest, loss = by_root[0.0]
    assert np.isnan(slope) and np.isnan(largest) and np.isfinite(loss)
    for root in (1e-16, 1e-12, 1e-8):
        assert np.isfinite(by_root[root]).all()
        # At a gradient of zero the first update is −α g / (√eps_root + 1e-8).
        np.testing.assert_allclose(by_root[root][0], 1e-2 / (root**0.5 + 1e-8), rtol=1e-2)


def test_what_it_names_is_there():
    for name in re.findall(r"`(configs/\w+\.py)`", PAGE):
        assert (Path(__file__).parent.parent / name).is_file()
    for name in re.findall(r"`l2l\.(\w+)", PAGE):
        assert hasattr(l2l, name)
