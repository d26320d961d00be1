"""Settings of all tests: eight small CPU devices, quick compilation, strict ranks, a cache of
compiled programs."""

import gc
import os
from pathlib import Path

from quick import xla_flags

# Before JAX starts. An accelerator is used only where the caller asks for it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what most tests spend their time on, and the answers need no fast code. Those that
# do ask for it by the fixture `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

import jax
import pytest
from jaxtyping import install_import_hook

# Where shapes are part of the signatures, every call in a test is held to them.
install_import_hook(
    [
        "l2l.core",
        "l2l.optimizers.features",
        "l2l.estimators.objective",
        "l2l.evaluation.statistics",
    ],
    "beartype.beartype",
)


def pytest_configure(config):
    # What JAX has traced is kept, and looked through again and again: a twentieth of the time.
    gc.set_threshold(100_000, 50, 50)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Tests start the same tiny runs again and again, in processes of their own too: each program
    # is compiled once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """What was compiled is let go at a file's end once it is much: XLA maps memory for every
    program, and beyond the 65,530 maps that Linux allows a process its compiler aborts."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """Programs are compiled as users' are."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny(make_tiny) -> dict:
    return make_tiny()


@pytest.fixture(scope="session")
def make_tiny():
    """() -> a configuration of seconds: 12 meta-steps on two-dimensional quadratics."""
    return lambda: {
        "seed": 3,
        "task": {"name": "quadratic", "dimension": 2, "batch_size": 3},
        "optimizer": {"name": "lstm", "hidden_size": 2, "learning_rate": 0.01},
        "objective": {"on": "train", "form": "log"},
        "inner": {"length": 4},
        "horizon": {"name": "log_uniform", "shortest": 4, "longest": 16, "start": 8},
        "meta": {
            "steps": 12,
            "num_problems": 8,
            "group": 3,
            "optimizer": {"name": "adam", "learning_rate": 0.01},
        },
        "evaluation": {"horizons": (6,), "num_problems": 2, "every": 0},
        "checkpoint": {"every": 3, "keep": 3},
    }
