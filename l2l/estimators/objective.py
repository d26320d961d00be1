"""Meta-losses: what is to be small along a window of inner training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Below this a loss is as good as zero in float32, and its logarithm would be noise.
FLOOR = 1e-7


class Objective(NamedTuple):
    """The meta-loss of a window of K steps, L = Σₖ wₖ ρ(ℓₖ), over the losses ℓ₁ … ℓ_K that follow
    each update (ℓ₀ is nobody's doing).

    on:   "train" (the batches the optimizer will see next), "validation" (held-out batches) or
          "both".
    share: of the validation losses under "both". A meta-loss on training batches alone teaches an
          optimizer to memorise.
    form: "plain" (ρ = ℓ, mean over the window; Andrychowicz et al. 2016 sum), "log" (ρ = log ℓ,
          scale-free) or "last" (ρ = ℓ at the end of the window alone; Lv et al. 2017).
    cap:  losses above it count as `cap` and pull no gradient; the share of capped losses is
          reported as the metric `capped`.
    """

    on: str = "train"
    form: str = "log"
    cap: float = 1e4
    share: float = 0.5

    @property
    def shares(self) -> tuple[float, float]:
        """The weights of (training, validation) losses."""
        validation = {"train": 0.0, "validation": 1.0, "both": self.share}[self.on]
        return 1.0 - validation, validation

    def value(self, losses: jax.Array) -> jax.Array:
        """L of losses [K] after each update. Non-finite losses stay non-finite."""
        losses = jnp.where(losses > self.cap, self.cap, losses)
        if self.form == "last":
            return losses[-1]
        return jnp.mean(jnp.log(losses + FLOOR) if self.form == "log" else losses)


def objective(
    *, on: str = "train", form: str = "log", cap: float = 1e4, share: float = 0.5
) -> Objective:
    """An `Objective`; raises ValueError for an unknown `on` or `form` or a share outside [0, 1]."""
    if on not in ("train", "validation", "both"):
        raise ValueError(f"Unknown meta-loss split {on!r}: choose train, validation or both.")
    if form not in ("plain", "log", "last"):
        raise ValueError(f"Unknown form of meta-loss {form!r}: choose plain, log or last.")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share={share} of the validation losses is outside [0, 1].")
    return Objective(on, form, cap, share)
