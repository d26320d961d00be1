"""What the documentation says was measured is what `docs/results/` holds."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from l2l.evaluation import statistics, stored

RESULTS = Path(__file__).parent.parent / "docs" / "results"
FILES = sorted(RESULTS.glob("*.json"))


def test_the_tables_are_made_of_the_stored_results_alone():
    text, found = stored.page(RESULTS)
    assert sorted(found) == [path.stem for path in FILES]
    assert text == (RESULTS / stored.PAGE).read_text(), (
        "docs/results/tables.md is not what its JSON files give: run "
        "`python -m l2l.evaluate --from=docs/results`."
    )
    figures = set(re.findall(r"\]\((\S+\.png)\)", text))
    assert figures == {path.name for path in RESULTS.glob("*.png")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ratios_are_those_of_the_stored_losses(path):
    """To the first tuned baseline as it is stored, also where a row was measured anew."""
    rows, first = json.loads(path.read_text())["rows"], {}
    for row in rows:
        if row["setting"] is not None:
            first.setdefault((row["cell"], row["steps"]), row)
    for row in rows:
        pair = row, first[row["cell"], row["steps"]]
        final = (np.array([float(run[-1]) for run in x["each"]["train_loss"]]) for x in pair)
        found = statistics.interval(statistics.ratio(*final))
        stored = [np.nan if x is None else float(x) for x in (row["ratio"], *row["interval"])]
        # Logarithms, which the ends of wide intervals are made of.
        np.testing.assert_allclose(np.log(stored), np.log(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_command_can_be_typed_elsewhere(path):
    command = json.loads(path.read_text())["command"]
    assert command[0] == "l2l.evaluate" and len(command) > 1
    assert not [part for part in command if re.search(r"(^|=|,)[/~]", part)]
