"""How XLA compiles in tests: quickly."""

from importlib.metadata import version


def xla_flags(devices: int) -> str:
    """For a process with so many CPU devices, in which sums are taken in one order."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_cpu_multi_thread_eigen=false",
    ]
    # XLA's former way to emit kernels compiles in two thirds of the time. jaxlib 0.11 dropped it,
    # and a process ends at a flag that XLA does not know.
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
