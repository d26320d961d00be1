"""Remote paths: exports are read there, runs are not written there, and both are said clearly."""

import jax
import numpy as np
import pytest

from l2l.console.errors import UserError
from l2l.optimizers import registry
from l2l.storage import exports, loading
from l2l.training.experiment import build_experiment
from l2l.training.run import train


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_a_remote_workdir_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is remote.*mount the bucket"):
        train(build_experiment(tiny), path)
    assert not list(tmp_path.iterdir())


def test_a_remote_export_is_loaded_through_etils(tmp_path, monkeypatch):
    """From a store in memory, which stands in for the cloud below etils and fsspec."""
    fsspec = pytest.importorskip("fsspec")
    backend = pytest.importorskip("etils.epath.backend")
    specification = {"name": "lstm", "hidden_size": 2}
    theta = registry.optimizer(specification).init(jax.random.key(0))
    local = exports.export(tmp_path / exports.EXPORT, specification, theta)
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: Cloud(store))
    store.pipe("/bucket/run/" + exports.EXPORT, local.read_bytes())
    store.pipe("/bucket/half", local.read_bytes()[:99])
    for path in ("s3://bucket/run", f"s3://bucket/run/{exports.EXPORT}"):
        jax.tree.map(np.testing.assert_array_equal, exports.read(loading.locate(path))[1], theta)
    with pytest.raises(ValueError, match="s3://bucket/half is not a complete export"):
        loading.load("s3://bucket/half")
    with pytest.raises(ValueError, match="There is no optimizer at s3://bucket/nothing"):
        loading.load("s3://bucket/nothing")


class Cloud:
    """A store in memory under s3://."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return lambda path, **more: getattr(self.store, name)(str(path)[len("s3:/") :], **more)


def test_what_a_remote_path_lacks_is_said(monkeypatch):
    backend = pytest.importorskip("etils.epath.backend")

    def fails(error):
        def fs(self, path):
            raise error

        monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", fs)

    fails(ImportError("Please install gcsfs"))
    with pytest.raises(ValueError, match=r"\(Please install gcsfs\): pip install gcsfs"):
        loading.load("gs://bucket/run")
    fails(RuntimeError("no credentials"))
    with pytest.raises(UserError, match=r"gs://bucket/run could not be read \(no credentials\)"):
        loading.load("gs://bucket/run")
    with pytest.raises(ValueError, match="remote paths begin with gs://, s3://"):
        loading.load("ftp://host/run")
