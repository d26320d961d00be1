"""What JAX reads when it starts: to be set before anything imports it."""

import os
from pathlib import Path


def prepare(num_problems: int) -> None:
    """Settings that JAX reads when it starts: a CPU device a core, as many as divide the problems,
    and a place to keep compiled programs between runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = max(n for n in range(1, (cores or 1) + 1) if num_problems % n == 0)
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
