"""What is known before the first meta-step: the compiled program, and the memory it will take."""

import time
from collections.abc import Callable

import jax

from l2l.console.progress import clock


def prepare(steps: Callable, *arguments) -> tuple[Callable, str]:
    """Compiles a jitted function for arguments like these, once and ahead of its first call.

    Returns:
      The compiled function, and a sentence about its memory on each device and the time it took.
    """
    began = time.monotonic()
    compiled = steps.lower(*arguments).compile()
    took = time.monotonic() - began
    used = compiled.memory_analysis()
    if used is None:  # Not every backend reports it.
        return compiled, f"Compiled in {took:.1f} s; this backend does not report its memory."
    # Outputs take the place of inputs only where buffers are donated.
    kept = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    total = kept + used.temp_size_in_bytes + used.generated_code_size_in_bytes
    said = (
        f"Compiled in {took:.1f} s. Estimated memory: {_size(total)} per device "
        f"({_size(kept)} state and data, {_size(used.temp_size_in_bytes)} temporaries)"
    )
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if room is None:
        return compiled, said + "."
    said += f", of {_size(room)}."
    if total > room:
        said += " That is more than there is: lower meta.num_problems, or use more devices."
    return compiled, said


def remaining(seconds: float, step: int, steps: int) -> str:
    """The time left to a run that is resumed, at its pace so far; "" for one that begins."""
    if not step:
        return ""
    return f" {clock(seconds / step * (steps - step))} left at the pace so far."


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
