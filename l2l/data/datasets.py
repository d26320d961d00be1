"""Real data by name: `load("digits")` gives NumPy arrays, split once and for all.

    >>> load("digits").train.inputs.shape
    (1077, 8, 8, 1)

| name                   | inputs                             | labels            | from       |
|------------------------|------------------------------------|-------------------|------------|
| digits                 | float32 [n, 8, 8, 1] in [0, 1]     | int32 [n], 10     | sklearn    |
| breast_cancer, wine    | float32 [n, 30], [n, 13], standard | int32 [n], 2 and 3| sklearn    |
| diabetes               | float32 [n, 10], standard          | float32 [n]       | sklearn    |
| mnist, fashion_mnist   | uint8 [n, 28, 28, 1]               | int32 [n], 10     | IDX files  |
| mnist14                | uint8 [n, 14, 14, 1], mean-pooled  | int32 [n], 10     | as mnist   |
| cifar10                | uint8 [n, 32, 32, 3]               | int32 [n], 10     | .bin files |
| fashion_mnist14        | uint8 [n, 14, 14, 1], mean-pooled  | int32 [n], 10     | as above   |
| adult                  | float32 [n, 105], standard, 0 or 1 | int32 [n], 2      | UCI files  |
| housing, winequality   | float32 [n, 13], [n, 12], likewise | float32 [n]       | .csv files |
| pydoc, tinyshakespeare | uint8 [n], characters below 128    | uint8 [n], next   | text       |

Files are looked for under `data_dir()`. `load` keeps what it read in memory, read-only. What lies
in its folder `reserved/` (Adult, housing, Wine Quality, and Fashion-MNIST if you put it there) is
for held-out evaluation alone: nothing is meta-trained, tuned or selected on it.
"""

import difflib
import functools
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2l.console.errors import UserError
from l2l.data import image_files, table_files


class Split(NamedTuple):
    """Row i of `inputs` belongs to row i of `labels`."""

    inputs: Any
    labels: Any


class Dataset(NamedTuple):
    """Three disjoint splits. The rows of `train` are shuffled: a window of it is a fair sample."""

    train: Split
    validation: Split
    test: Split


class Spec(NamedTuple):
    """What is known before anything is read: the shape of one input, and the number of classes
    (0 for regression). Characters have the shape () and their vocabulary as classes."""

    shape: tuple[int, ...]
    classes: int


SPECS = {
    "digits": Spec((8, 8, 1), 10),
    "breast_cancer": Spec((30,), 2),
    "wine": Spec((13,), 3),
    "diabetes": Spec((10,), 0),
    "mnist": Spec((28, 28, 1), 10),
    "mnist14": Spec((14, 14, 1), 10),
    "fashion_mnist": Spec((28, 28, 1), 10),
    "fashion_mnist14": Spec((14, 14, 1), 10),
    "adult": Spec((table_files.ADULT,), 2),
    "housing": Spec((table_files.HOUSING,), 0),
    "winequality": Spec((table_files.WINE,), 0),
    "cifar10": Spec((32, 32, 3), 10),
    "pydoc": Spec((), 128),
    "tinyshakespeare": Spec((), 128),
}
# Below `data_dir()`; the first folder is also where a download is kept.
_FOLDERS = {
    "mnist": ("mnist",),
    "fashion_mnist": ("fashion_mnist", "fashion-mnist", "reserved/fashion-mnist"),
    "cifar10": ("cifar10", "cifar-10-batches-bin"),
}
_HALVED = {"mnist14": "mnist", "fashion_mnist14": "fashion_mnist"}
_OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR_10"}


def spec(name: str, kind: str = "any") -> Spec:
    """The `Spec` of a data set; UserError for a name that is not in the table, or of the wrong
    kind ("any", "vector" for what an MLP reads, "image", "text")."""
    fits = {
        "any": lambda s: True,
        "vector": lambda s: len(s.shape) > 0,
        "image": lambda s: len(s.shape) == 3,
        "text": lambda s: s.shape == (),
    }[kind]
    known = [known for known, s in SPECS.items() if fits(s)]
    return SPECS[check_name("data set" if kind == "any" else f"{kind} data set", name, known)]


def check_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Gives `name` back if it is known, else a UserError that suggests the nearest."""
    known = sorted(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}."
    raise UserError(f"There is no {kind} named {name!r}: {hint}")


def data_dir() -> Path:
    """`$L2L_DATA_DIR`, else `$XDG_CACHE_HOME/l2l/data`, else `~/.cache/l2l/data`."""
    if os.environ.get("L2L_DATA_DIR"):
        return Path(os.environ["L2L_DATA_DIR"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "l2l" / "data"


def present(name: str) -> bool:
    """Whether `load` would find the data set here, without a network; whether it can be read is
    not looked into."""
    spec(name)
    root, name = data_dir(), _HALVED.get(name, name)
    if name in _FOLDERS:
        kept = (root / _FOLDERS[name][0] / "openml.npz").is_file()
        return kept or any((root / folder).is_dir() for folder in _FOLDERS[name])
    if name in table_files.READERS:
        return (root / "reserved" / name).is_dir()
    return name != "tinyshakespeare" or (root / name / "input.txt").is_file()


def load(name: str) -> Dataset:
    """Reads a data set (table above), the same arrays in the same order on every machine.

    Splits. sklearn: a fixed shuffle, stratified by class, 3/5 train, 1/5 validation, 1/5 test;
    inputs (and the target of diabetes) standardised by the training split. Images: the published
    test set; validation is the end of the published training set, a tenth but no more than 5,000.
    Where only one of the two published sets is there (CIFAR-10 with some data_batch files and no
    test_batch, Fashion-MNIST with t10k alone) its last tenth is the test split, and the tenth
    before that the validation split. Tables: as sklearn's; of Adult, adult.test is the test split.
    Text: 80 %, 10 %, 10 % in reading order.

    Raises:
      UserError: an unknown name, or a file that is corrupt or too short.
      UserError: no file below `data_dir()`, and no download.
    """
    spec(name)
    return _load(name, data_dir())


@functools.lru_cache(maxsize=16)
def _load(name: str, root: Path) -> Dataset:
    if name in ("digits", "breast_cancer", "wine", "diabetes"):
        dataset = _sklearn(name)
    elif name in ("pydoc", "tinyshakespeare"):
        dataset = _text(name, root)
    elif name in _HALVED:
        dataset = Dataset(*(Split(_halve(x), y) for x, y in _load(_HALVED[name], root)))
    elif name in table_files.READERS:
        dataset = _table(name, root / "reserved" / name)
    else:
        dataset = _images(name, root)
    for split in dataset:
        for array in split:
            array.flags.writeable = False  # The cache is shared by every caller.
    return dataset


# --- sklearn and tables ----------------------------------------------------------------------


def _sklearn(name: str) -> Dataset:
    from sklearn import datasets  # Imported here: it costs a second, and files do not need it.

    inputs, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = _stratified(labels if SPECS[name].classes else np.zeros_like(labels))
    inputs, labels = inputs[order], labels[order]
    fifth = -(-len(inputs) // 5)
    if name != "digits":
        return _standardised(inputs, labels, fifth, fifth, SPECS[name].classes)
    inputs = (inputs / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    return _cut(inputs, labels.astype(np.int32), fifth, fifth)


def _standardised(inputs, labels, validation: int, test: int, classes: int) -> Dataset:
    """Cut, with inputs (and a target that is no class) of mean 0 and deviation 1 over the training
    split. A blank (NaN) becomes the mean. Columns of zeros and ones stay as they are: a rare
    category would become a number in the hundreds."""
    train = slice(0, len(inputs) - validation - test)

    def standard(x):
        flag = np.all((x == 0) | (x == 1), axis=0)
        mean = np.where(flag, 0, np.nanmean(x[train], axis=0))
        deviation = np.nanstd(x[train], axis=0)
        deviation = np.where(flag | (deviation == 0), 1, deviation)
        return np.nan_to_num((x - mean) / deviation, nan=0.0).astype(np.float32)

    labels = labels.astype(np.int32) if classes else standard(labels)
    return _cut(standard(inputs), labels, validation, test)


def _table(name: str, folder: Path) -> Dataset:
    """A reserved table; see `table_files.py`."""
    classes = SPECS[name].classes
    if name == "adult":
        (inputs, labels), test = (
            table_files.adult(folder / f"adult.{p}") for p in ("data", "test")
        )
        order = _stratified(labels)
        inputs = np.concatenate([inputs[order], test[0]])
        labels = np.concatenate([labels[order], test[1]])
        return _standardised(inputs, labels, -(-len(order) // 5), len(test[1]), classes)
    inputs, labels = table_files.READERS[name](
        folder / "housing.csv" if name == "housing" else folder
    )
    order = _stratified(np.zeros_like(labels))
    fifth = -(-len(order) // 5)
    return _standardised(inputs[order], labels[order], fifth, fifth, classes)


def _stratified(labels: np.ndarray) -> np.ndarray:
    """A fixed shuffle in which every stretch holds the classes in (nearly) their proportions."""
    order = np.random.RandomState(0).permutation(len(labels))  # This stream is frozen by NumPy.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        mine = np.flatnonzero(labels[order] == label)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return order[np.argsort(place, kind="stable")]


def _cut(inputs: np.ndarray, labels: np.ndarray, validation: int, test: int) -> Dataset:
    a, b = len(inputs) - validation - test, len(inputs) - test
    return Dataset(*(Split(inputs[s], labels[s]) for s in np.s_[:a, a:b, b:]))


# --- images ----------------------------------------------------------------------------------


def _images(name: str, root: Path) -> Dataset:
    read = _cifar if name == "cifar10" else _mnist
    found = (read(root / folder) for folder in _FOLDERS[name])
    train, test = next(filter(any, found), None) or _openml(name, root)
    if train and test:
        inputs, labels = map(np.concatenate, zip(train, test, strict=True))
        return _cut(inputs, labels, min(5000, len(train.labels) // 10), len(test.labels))
    only = train or test
    assert only is not None  # What is downloaded is one table.
    tenth = len(only.labels) // 10
    return _cut(*only, min(5000, tenth), tenth)


def _halve(images: np.ndarray) -> np.ndarray:
    n, h, w, c = images.shape
    return images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4), np.float32).astype(np.uint8)


def _mnist(folder: Path) -> list[Split | None]:
    return [_mnist_part(folder, "train"), _mnist_part(folder, "t10k")]


def _mnist_part(folder: Path, part: str) -> Split | None:
    stems = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    images, labels = (image_files.find(folder, stem) for stem in stems)
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        missing = stems[0] if images is None else stems[1]
        raise UserError(
            f"{folder} holds {images or labels} but not {missing}[.gz], and one is of no use "
            "without the other: put the missing file beside it."
        )
    pixels = image_files.read_idx(images, 3)
    if pixels.shape[1:] != (28, 28):
        size = f"{pixels.shape[1]}×{pixels.shape[2]}"
        raise image_files.broken(images, f"holds images of {size}, not 28×28")
    return Split(*image_files.checked(labels, pixels[..., None], image_files.read_idx(labels, 1)))


def _cifar(folder: Path) -> list[Split | None]:
    train = [image_files.find(folder, f"data_batch_{i}.bin") for i in range(1, 6)]
    test = [image_files.find(folder, "test_batch.bin")]
    return [_cifar_part([path for path in paths if path]) for paths in (train, test)]


def _cifar_part(paths: list[Path]) -> Split | None:
    splits = [Split(*image_files.read_cifar(path)) for path in paths]
    return Split(*map(np.concatenate, zip(*splits, strict=True))) if splits else None


def _openml(name: str, root: Path) -> list[Split | None]:
    """OpenML's copy, kept as one .npz: parsing its text takes minutes, once."""
    kept = root / _FOLDERS[name][0] / "openml.npz"
    if not kept.is_file():
        from sklearn.datasets import fetch_openml

        try:
            # This parser needs no pandas.
            inputs, labels = fetch_openml(
                _OPENML[name], version=1, return_X_y=True, as_frame=False, parser="liac-arff",
                data_home=str(root / "openml"),
            )  # fmt: skip
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f"openml.{os.getpid()}.npz")
            np.savez_compressed(
                partial, inputs=inputs.astype(np.uint8), labels=labels.astype(np.uint8)
            )
            partial.replace(kept)
        except OSError as error:
            raise UserError(
                f"{name} is neither in {kept.parent} nor could it be downloaded ({error}): put its "
                f"published files there (L2L_DATA_DIR moves the folder), or run this once with a "
                "network."
            ) from error
    try:
        with kept.open("rb") as file, np.load(file) as arrays:
            inputs, labels = arrays["inputs"], arrays["labels"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise image_files.broken(kept, f"is not a whole .npz file ({error})") from error
    images = image_files.planes(inputs) if name == "cifar10" else inputs.reshape(-1, 28, 28, 1)
    whole = Split(*image_files.checked(kept, images, labels))
    # OpenML appends the published 10,000 test images to the training images.
    return [Split(*(a[:-10_000] for a in whole)), Split(*(a[-10_000:] for a in whole))]


# --- text ------------------------------------------------------------------------------------


def _text(name: str, root: Path) -> Dataset:
    if name == "pydoc":
        # Some 700 kB of English in every CPython; its wording follows the version of Python.
        from pydoc_data.topics import topics

        content = "\n".join(topics[key] for key in sorted(topics)).encode()
    else:
        path = root / "tinyshakespeare" / "input.txt"
        if not path.is_file():
            raise UserError(
                f"{path} is missing, and l2l does not download it: put Karpathy's char-rnn file "
                "tinyshakespeare/input.txt there, or use 'pydoc', which comes with Python."
            )
        content = image_files.read(path)
        if len(content) < 1000:
            raise image_files.broken(path, f"has only {len(content)} characters")
    characters = np.minimum(np.frombuffer(content, np.uint8), 127)
    tenth = (len(characters) - 1) // 10
    # Copies, so that `labels` is a row of its own rather than a view one byte on.
    return _cut(characters[:-1].copy(), characters[1:].copy(), tenth, tenth)
