"""Readers of the reserved tables in their published layouts: columns to numbers, nothing scaled.

All of them give (inputs float64 [n, d], labels [n]). A categorical column becomes one column for
each of its published values, in the order of its documentation, so that the shape is known before
anything is read; a value that is not known ("?" in Adult, a blank) is 0 in all of them. A blank
number is NaN: whoever standardises by the training split puts its mean there.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.data.image_files import broken

# Of adult.names, None for a number.
_ADULT = (
    None,
    "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay "
    "Never-worked",
    None,
    "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters "
    "1st-4th 10th Doctorate 5th-6th Preschool",
    None,
    "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent "
    "Married-AF-spouse",
    "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty "
    "Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing Transport-moving "
    "Priv-house-serv Protective-serv Armed-Forces",
    "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "Female Male",
    None,
    None,
    None,
    "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India "
    "Japan Greece South China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico "
    "Portugal Ireland France Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary "
    "Guatemala Nicaragua Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago Peru Hong "
    "Holand-Netherlands",
)
_OCEAN = ("<1H OCEAN", "INLAND", "ISLAND", "NEAR BAY", "NEAR OCEAN")
_ADULT_COLUMNS = tuple(names and tuple(names.split()) for names in _ADULT)
_HOUSING_COLUMNS = (None,) * 9 + (_OCEAN,)


def width(columns: Sequence) -> int:
    """The number of inputs that columns become."""
    return sum(len(column) if column else 1 for column in columns)


def adult(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """UCI Adult: adult.data or adult.test. Labels: 1 for an income above 50,000 dollars."""
    rows = [row for row in _rows(path, ",") if not row[0].startswith("|")]
    # The labels of adult.test end in a full stop.
    incomes = _one_of(path, [row[-1].rstrip(".") for row in rows], ("<=50K", ">50K"))
    return _columns(path, [row[:-1] for row in rows], _ADULT_COLUMNS), incomes


def housing(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """California housing, 1990 census. Labels: the median value of a block's houses, in dollars."""
    table = _columns(path, _rows(path, ",")[1:], _HOUSING_COLUMNS)
    return np.delete(table, 8, axis=1), table[:, 8]


def winequality(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """UCI Wine Quality, the red wines (a last input of 0) above the white (1). Labels: the
    tasters' score, 3 to 9."""
    inputs, labels = [], []
    for i, colour in enumerate(("red", "white")):
        path = folder / f"winequality-{colour}.csv"
        table = _columns(path, _rows(path, ";")[1:], (None,) * 12)
        inputs.append(np.column_stack([table[:, :-1], np.full(len(table), i)]))
        labels.append(table[:, -1])
    return np.concatenate(inputs), np.concatenate(labels)


# The inputs of each: less housing's value, more the colour of wines.
ADULT, HOUSING, WINE = width(_ADULT_COLUMNS), width(_HOUSING_COLUMNS) - 1, 11 + 1


def _rows(path: Path, delimiter: str) -> list[list[str]]:
    if not path.exists():
        raise UserError(
            f"{path} is missing, and l2l does not download it: put the published file there."
        )
    try:
        with errors.naming(path), path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter=delimiter, skipinitialspace=True))
    except UnicodeDecodeError as error:
        raise broken(path, f"is not text ({error.reason})") from None
    return [row for row in rows if row]


def _columns(path: Path, rows: Sequence[Sequence[str]], columns: Sequence) -> np.ndarray:
    if len(rows) < 10:
        raise broken(path, f"has only {len(rows)} records")
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise broken(path, f"has {len(row)} values in record {i + 1}, not {len(columns)}")
    parts = []
    for column, texts in zip(columns, zip(*rows, strict=True), strict=True):
        if column is None:
            parts.append(_numbers(path, texts)[:, None])
        else:
            index = _one_of(path, texts, column, unknown=("?", ""))
            parts.append(index[:, None] == np.arange(len(column)))
    return np.concatenate(parts, axis=1).astype(np.float64)


def _numbers(path: Path, texts: Sequence[str]) -> np.ndarray:
    try:
        return np.asarray([float(text) if text else np.nan for text in texts])
    except ValueError as error:
        raise broken(path, f"has a value that is not a number ({error})") from None


def _one_of(path: Path, texts, values: Sequence[str], unknown: Sequence[str] = ()) -> np.ndarray:
    """The index of each text among the values, -1 for those that are told as unknown."""
    known = {value: i for i, value in enumerate(values)} | dict.fromkeys(unknown, -1)
    if strange := sorted(set(texts) - set(known)):
        raise broken(path, f"has the value {strange[0]!r} where {', '.join(values[:3])}, … occur")
    return np.asarray([known[text] for text in texts], np.int64)


READERS: dict[str, Callable] = {"adult": adult, "housing": housing, "winequality": winequality}
