"""What the documentation says was measured is what `docs/results/` holds."""

import json
import re
from pathlib import Path

import pytest

from l2l.evaluation import stored

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
def test_a_stored_command_can_be_typed_elsewhere(path):
    command = json.loads(path.read_text())["command"]
    assert command[0] == "l2l.evaluate" and len(command) > 1
    assert not [part for part in command if re.search(r"(^|=|,)[/~]", part)]
