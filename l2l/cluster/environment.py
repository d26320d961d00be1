"""Environment variables that JAX reads when it is first used, and that must be set before that."""

import logging
import os
import sys
from pathlib import Path

# Whether this process is one of l2l's commands, in which nobody else has programs.
prepared = False


def prepare(num_problems: int | None = None, member: dict | None = None) -> None:
    """One CPU device a core (or as many as divide one process's part of `num_problems`), and a
    place where compiled programs are kept between runs. What the user has set stays. For commands
    alone: it is the whole process that is set up."""
    global prepared
    prepared = True
    processes = (member or {}).get("num_processes", 1)  # As `initialize.find` found them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    devices = max(n for n in range(1, cores + 1) if (num_problems or n) // processes % n == 0)
    given = os.environ.get("XLA_FLAGS", "")
    for flag, value in (
        ("--xla_force_host_platform_device_count", devices),
        ("--xla_cpu_multi_thread_eigen", "false"),
    ):
        if flag not in given:
            given += f" {flag}={value}"
    os.environ["XLA_FLAGS"] = given.strip()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "l2l" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if "jax" in sys.modules:  # It read the environment when it was imported.
        config = sys.modules["jax"].config
        config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        least = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        config.update("jax_persistent_cache_min_compile_time_secs", least)
    # News to nobody, that look like errors to a newcomer: a backend is not installed; matplotlib
    # lists the fonts there are, once.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
