"""Splits that never change, and files that are what they say."""

import gzip
import os
import struct
import urllib.error

import numpy as np
import pytest
import sklearn.datasets

from l2l.console.errors import UserError
from l2l.data import datasets

needs_files = pytest.mark.skipif(
    not os.path.isdir(os.environ.get("L2L_DATA_DIR", "")),
    reason="L2L_DATA_DIR holds no data sets",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, and no network."""
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    return tmp_path


def idx(array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, part, rows, pattern="{}-{}-idx{}-ubyte", pack=bytes):
    folder.mkdir(exist_ok=True)
    images = np.random.RandomState(rows).randint(0, 256, (rows, 28, 28)).astype(np.uint8)
    labels = (np.arange(rows) % 10).astype(np.uint8)
    (folder / pattern.format(part, "images", 3)).write_bytes(pack(idx(images)))
    (folder / pattern.format(part, "labels", 1)).write_bytes(pack(idx(labels)))
    return images, labels


def cifar_records(rows, seed=0):
    records = np.random.RandomState(seed).randint(0, 256, (rows, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    return records


# --- sklearn and text ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_sklearn_splits(name):
    dataset, spec = datasets.load(name), datasets.spec(name)
    labels = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)[1]
    sizes = [len(split.labels) for split in dataset]
    assert sum(sizes) == len(labels) and sizes[1] == sizes[2] == -(-len(labels) // 5)
    for split in dataset:
        assert split.inputs.shape == (len(split.labels), *spec.shape)
        assert split.inputs.dtype == np.float32
    if spec.classes:
        # Every row is there once, with its label, and every split has the classes' shares.
        whole = np.concatenate([split.labels for split in dataset])
        np.testing.assert_array_equal(np.bincount(whole), np.bincount(labels))
        shares = np.bincount(labels) / len(labels)
        for split in dataset:
            got = np.bincount(split.labels) / len(split.labels)
            np.testing.assert_allclose(got, shares, atol=1.5 / len(split.labels))
    else:
        np.testing.assert_allclose(dataset.train.labels.mean(), 0, atol=1e-6)
    if name != "digits":
        np.testing.assert_allclose(dataset.train.inputs.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(dataset.train.inputs.std(0), 1, rtol=1e-4)


def test_digits_are_the_same_everywhere():
    train = datasets.load("digits").train
    assert train.inputs.min() == 0 and train.inputs.max() == 1
    # The first ten labels of the fixed shuffle: another split is another benchmark.
    assert train.labels[:10].tolist() == [3, 1, 5, 6, 4, 9, 7, 0, 2, 8]
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    (row,) = np.flatnonzero((images == train.inputs[0].ravel() * 16).all(1))
    assert labels[row] == train.labels[0]


def test_loaded_arrays_are_shared_and_read_only():
    assert datasets.load("wine") is datasets.load("wine")
    with pytest.raises(ValueError, match="read-only"):
        datasets.load("wine").train.inputs[0] = 0


def test_text_predicts_the_next_character():
    dataset = datasets.load("pydoc")
    for split in dataset:
        assert split.inputs.dtype == np.uint8 and split.inputs.max() < 128
        np.testing.assert_array_equal(split.inputs[1:], split.labels[:-1])
    assert dataset.train.labels[-1] == dataset.validation.inputs[0]


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "pattern", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte", "{}-{}-idx{}-ubyte.gz"]
)
def test_mnist_files(folder, pattern, pack):
    images, labels = write_mnist(folder / "mnist", "train", 60, pattern, pack)
    test_images, _ = write_mnist(folder / "mnist", "t10k", 7, pattern, pack)
    train, validation, test = datasets.load("mnist")
    assert train.inputs.dtype == np.uint8 and train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.inputs[..., 0], images[:54])
    np.testing.assert_array_equal(validation.inputs[..., 0], images[54:])
    np.testing.assert_array_equal(validation.labels, labels[54:])
    np.testing.assert_array_equal(test.inputs[..., 0], test_images)


def test_mnist14_is_the_mean_of_four_pixels(folder):
    images, _ = write_mnist(folder / "mnist", "train", 20)
    small = datasets.load("mnist14").train.inputs
    assert small.shape == (16, 14, 14, 1)
    assert small[3, 5, 6, 0] == int(images[3, 10:12, 12:14].mean())


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion-mnist"])
def test_a_test_set_alone_is_split(folder, name):
    images, _ = write_mnist(folder / name, "t10k", 100)
    dataset = datasets.load("fashion_mnist")
    assert [len(split.labels) for split in dataset] == [80, 10, 10]
    together = np.concatenate([split.inputs[..., 0] for split in dataset])
    np.testing.assert_array_equal(together, images)


@pytest.mark.parametrize("name", ["cifar10", "cifar-10-batches-bin"])
def test_cifar_files(folder, name):
    (folder / name).mkdir()
    first, third = cifar_records(20, 1), cifar_records(20, 3)
    (folder / name / "data_batch_1.bin").write_bytes(first.tobytes())
    (folder / name / "data_batch_3.bin.gz").write_bytes(gzip.compress(third.tobytes()))
    dataset = datasets.load("cifar10")
    assert [len(split.labels) for split in dataset] == [32, 4, 4]
    # Planes of red, green, blue become the last axis.
    assert dataset.train.inputs[2, 5, 7, 1] == first[2, 1 + 1024 + 32 * 5 + 7]
    assert dataset.test.labels[-1] == third[-1, 0]


def test_cifar_test_batch_is_kept(folder):
    (folder / "cifar10").mkdir()
    (folder / "cifar10" / "data_batch_1.bin").write_bytes(cifar_records(20).tobytes())
    (folder / "cifar10" / "test_batch.bin").write_bytes(cifar_records(5, 9).tobytes())
    assert [len(split.labels) for split in datasets.load("cifar10")] == [18, 2, 5]


def damage(folder, change):
    write_mnist(folder / "mnist", "train", 20)
    path = folder / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b[:-1], "15,679 bytes of data where its header promises 15,680"),
        (lambda b: b + b"0", "15,681 bytes"),
        (lambda b: b"\0\0\x09" + b[3:], "does not start like an IDX file of 3-dimensional"),
        (lambda b: b[:9], "does not start like"),
        (lambda b: b"", "does not start like"),
        (lambda b: gzip.compress(b)[:-40], "not a whole gzip file"),
        (lambda b: gzip.compress(b)[:5], "not a whole gzip file"),
        (lambda b: idx(np.zeros((20, 8, 8), np.uint8)), "images of 8×8, not 28×28"),
        (lambda b: idx(np.zeros((19, 28, 28), np.uint8)), "20 labels for 19 images"),
    ],
)
def test_damaged_mnist(folder, change, message):
    damage(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load("mnist")
    assert "\n" not in str(caught.value) and "fetch it again" in str(caught.value)


def test_impossible_labels(folder):
    write_mnist(folder / "mnist", "train", 20)
    labels = folder / "mnist" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(20, 10, np.uint8)))
    with pytest.raises(ValueError, match="the label 10 where 0 to 9"):
        datasets.load("mnist")


@pytest.mark.parametrize("content", [b"", b"1234", bytes(3073 * 2 + 1)])
def test_damaged_cifar(folder, content):
    (folder / "cifar10").mkdir()
    (folder / "cifar10" / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(ValueError, match="not a multiple of a record's 3,073"):
        datasets.load("cifar10")


def test_images_without_labels(folder):
    write_mnist(folder / "mnist", "train", 20)
    (folder / "mnist" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="but not train-labels-idx1-ubyte"):
        datasets.load("mnist")


# --- downloads -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "mnist14", "fashion_mnist", "cifar10"])
def test_absent_and_offline(folder, name):
    with pytest.raises(UserError, match=r"put its published files there.*with a network"):
        datasets.load(name)


def test_absent_text(folder):
    with pytest.raises(UserError, match="or use 'pydoc'"):
        datasets.load("tinyshakespeare")


@pytest.mark.parametrize("name, size", [("mnist", 784), ("cifar10", 3072)])
def test_download_is_kept(folder, monkeypatch, name, size):
    calls = []

    def fetch(*args, **kwargs):
        calls.append(args)
        inputs = np.arange(10_020)[:, None] % np.full((1, size), 251.0)
        return inputs, (np.arange(10_020) % 10).astype(str)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    first = datasets.load(name)
    datasets._load.cache_clear()
    again = datasets.load(name)
    assert len(calls) == 1
    assert [len(split.labels) for split in again] == [18, 2, 10_000]
    np.testing.assert_array_equal(first.test.labels, again.test.labels)
    assert again.test.inputs[0].max() == 20 and again.test.labels[0] == 0
    kept = folder / name / "openml.npz"
    kept.write_bytes(kept.read_bytes()[:1000])
    datasets._load.cache_clear()
    with pytest.raises(ValueError, match=r"not a whole \.npz file"):
        datasets.load(name)


def test_data_dir(monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", "/somewhere")
    assert str(datasets.data_dir()) == "/somewhere"
    monkeypatch.delenv("L2L_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(datasets.data_dir()) == "/cache/l2l/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(datasets.data_dir()) == "/home/me/.cache/l2l/data"


def test_misspelt_names():
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        datasets.load("fashion-mnist")
    with pytest.raises(ValueError, match=r"There is no data set named 'x': choose from adult"):
        datasets.load("x")


# --- the published files ---------------------------------------------------------------------


@needs_files
@pytest.mark.parametrize(
    "name, sizes",
    [("mnist", [55_000, 5_000, 10_000]), ("tinyshakespeare", [892_315, 111_539, 111_539])],
)
def test_published_sizes(name, sizes):
    try:
        dataset = datasets.load(name)
    except UserError as error:
        pytest.skip(str(error))
    assert [len(split.labels) for split in dataset] == sizes
    if name == "mnist":
        assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert dataset.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


# --- reserved tables -------------------------------------------------------------------------

ADULT = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, "
    "2174, 0, 40, United-States, <=50K"
)
HOUSE = "-122.2,37.8,41.0,880.0,129.0,322.0,126.0,8.3,452600.0,NEAR BAY"
WINE = "7.4;0.7;0;1.9;0.076;11;34;0.9978;3.51;0.56;9.4;5"


def write_tables(root, rows=20):
    """Synthetic files in the published layouts; row i has i in some of its numbers."""
    adult, housing, wine = (root / "reserved" / n for n in ("adult", "housing", "winequality"))
    for folder in (adult, housing, wine):
        folder.mkdir(parents=True)
    lines = [ADULT.replace("39", str(20 + i), 1) for i in range(rows)]
    lines[1] = lines[1].replace("State-gov", "?").replace("<=50K", ">50K")
    (adult / "adult.data").write_text("\n".join(lines) + "\n\n")
    (adult / "adult.test").write_text("|1x3 Cross validator\n" + ".\n".join(lines) + ".\n")
    houses = [HOUSE.replace("880.0", f"{i}.0").replace("4526", f"45{i:02}") for i in range(rows)]
    houses[2] = houses[2].replace("129.0", "").replace("NEAR BAY", "INLAND")
    (housing / "housing.csv").write_text("names\n" + "\n".join(houses))
    for colour, score in (("red", 5), ("white", 7)):
        wines = [WINE.replace("7.4", str(i), 1)[:-1] + str(score) for i in range(rows)]
        (wine / f"winequality-{colour}.csv").write_text('"names"\n' + "\n".join(wines))


def test_tables_as_published(folder):
    assert not any(datasets.present(name) for name in ("adult", "housing", "winequality"))
    write_tables(folder)
    for name, sizes in {
        "adult": [16, 4, 20],
        "housing": [12, 4, 4],
        "winequality": [24, 8, 8],
    }.items():
        assert datasets.present(name)
        dataset, spec = datasets.load(name), datasets.spec(name)
        assert [len(split.labels) for split in dataset] == sizes
        assert dataset.train.inputs.shape[1:] == spec.shape and np.isfinite(dataset.train[0]).all()
        assert dataset.train.inputs.dtype == np.float32
        assert dataset.train.labels.dtype == (np.int32 if spec.classes else np.float32)
        if not spec.classes:
            np.testing.assert_allclose(dataset.train.labels.mean(), 0, atol=1e-6)
    train, validation, test = datasets.load("adult")
    assert sum(train.labels) + sum(validation.labels) == 1 and test.labels.tolist().index(1) == 1
    # Test rows are standardised by the training split: ages 20 to 39 are a line of known slope.
    slope = np.diff(test.inputs[:, 0])
    np.testing.assert_allclose(slope, slope[0], rtol=1e-4)
    # age, 8 classes of work with State-gov the sixth, unknown for row 1.
    assert test.inputs[0, 1:9].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert test.inputs[1, 1:9].tolist() == [0] * 8
    houses = np.concatenate([split.inputs for split in datasets.load("housing")])
    assert houses[:, 8:].sum(0).tolist() == [0, 1, 0, 19, 0]
    assert (houses[houses[:, 9] == 1, 4] == 0).all()  # The blank is at the mean.
    wines = datasets.load("winequality")
    colours = np.concatenate([split.inputs[:, -1] for split in wines])
    scores = np.concatenate([split.labels for split in wines])
    assert sorted(set(colours)) == [0, 1] and (scores[colours == 1] > scores[colours == 0][0]).all()


@pytest.mark.parametrize(
    "name, file, change, message",
    [
        ("adult", "adult.data", lambda t: t.replace("State-gov", "Sate-gov"), "value 'Sate-gov'"),
        ("adult", "adult.data", lambda t: t.replace("77516", "x"), "not a number"),
        ("adult", "adult.test", lambda t: "\n".join(t.split("\n")[:5]), "only 4 records"),
        ("housing", "housing.csv", lambda t: t[:-30], "values in record 20, not 10"),
        ("housing", "housing.csv", lambda t: "", "has only 0 records"),
        ("winequality", "winequality-red.csv", lambda t: t.replace(";", ","), "not 12"),
    ],
)
def test_damaged_tables(folder, name, file, change, message):
    write_tables(folder)
    path = folder / "reserved" / name / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(name)
    assert "\n" not in str(caught.value) and "fetch it again" in str(caught.value)


@pytest.mark.parametrize("name", ["adult", "housing", "winequality"])
def test_absent_tables(folder, name):
    with pytest.raises(UserError, match=r"reserved/.* is missing, and l2l does not download"):
        datasets.load(name)


def test_reserved_images(folder):
    images, _ = write_mnist_at(folder / "reserved" / "fashion-mnist")
    assert datasets.present("fashion_mnist14") and not datasets.present("mnist14")
    small = datasets.load("fashion_mnist14").train.inputs
    assert small.shape == (80, 14, 14, 1)
    assert small[3, 5, 6, 0] == int(images[3, 10:12, 12:14].mean())


def write_mnist_at(path):
    path.parent.mkdir(parents=True)
    return write_mnist(path, "t10k", 100)


@needs_files
@pytest.mark.parametrize(
    "name, sizes, average",
    [
        ("adult", [26_048, 6_513, 16_281], 0.24),
        ("housing", [12_384, 4_128, 4_128], 0),
        ("winequality", [3_897, 1_300, 1_300], 0),
    ],
)
def test_published_tables(name, sizes, average):
    if not datasets.present(name):
        pytest.skip(f"{name} is not present below {datasets.data_dir()}")
    dataset = datasets.load(name)
    assert [len(split.labels) for split in dataset] == sizes
    np.testing.assert_allclose(dataset.train.labels.mean(), average, atol=2e-3)
    numbers = dataset.train.inputs[:, 0]
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0, 1], atol=1e-4)
