"""Meta-losses: what is to be small along a window of inner training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError

# Below this a loss is as good as zero in float32, and its logarithm would be noise.
FLOOR = 1e-7


class Objective(NamedTuple):
    """The meta-loss of a window of K steps, L = Σₖ wₖ ρ(ℓₖ), over the losses ℓ₁ … ℓ_K that follow
    each update (ℓ₀ is nobody's doing).

    on:   "train" (the batches the optimizer will see next), "validation" (held-out batches) or
          "both".
    share, late_share: the weight of the validation losses under "both" when a run begins and when
          it ends, linear in t/T between (late_share None: the same throughout). A meta-loss on
          training batches alone teaches an optimizer to memorise; one on validation batches alone,
          to stop.
    form: "plain" (ρ = ℓ, mean over the window; Andrychowicz et al. 2016 sum), "log" (ρ =
          log(ℓ + floor), scale-free) or "last" (ρ = ℓ at the end of the window alone; Lv et al.
          2017).
    floor: losses well below it are all the same under "log": nothing is gained by memorising
          beyond.
    emphasis: e; a loss after step t of T counts (1 + e)(t/T)ᵉ. A window in the middle of a run is
          best served by a small rate, which the run pays for later (short-horizon bias; Wu et al.
          2018): with a positive e such windows weigh little, and the end of a run most.
    cap:  losses above it count as `cap` and pull no gradient; the share of capped losses is
          reported as the metric `capped`.
    """

    on: str = "train"
    form: str = "log"
    cap: float = 1e4
    share: float = 0.5
    late_share: float | None = None
    floor: float = FLOOR
    emphasis: float = 0.0

    @property
    def reads_train(self) -> bool:
        return self.on != "validation"

    @property
    def reads_validation(self) -> bool:
        return self.on != "train"

    def shares(self, step: jax.Array, num_steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weights of (training, validation) losses in a window that begins at `step`."""
        if self.on != "both":
            return jnp.float32(self.on == "train"), jnp.float32(self.on == "validation")
        late = self.share if self.late_share is None else self.late_share
        validation = self.share + (late - self.share) * (step / num_steps).astype(jnp.float32)
        return 1.0 - validation, validation

    def emphases(self, step: jax.Array, num_steps: jax.Array, length: int) -> jax.Array:
        """What each loss of a window that begins at `step` counts: [length]."""
        progress = (step + 1 + jnp.arange(length)) / num_steps
        return (1 + self.emphasis) * progress.astype(jnp.float32) ** self.emphasis

    def value(self, losses: jax.Array, emphases: jax.Array) -> jax.Array:
        """L of losses [K] after each update. Non-finite losses stay non-finite."""
        losses = jnp.where(losses > self.cap, self.cap, losses)
        if self.form == "last":
            return losses[-1] * emphases[-1]
        return jnp.mean(emphases * (jnp.log(losses + self.floor) if self.form == "log" else losses))


def objective(
    *,
    on: str = "train",
    form: str = "log",
    cap: float = 1e4,
    share: float = 0.5,
    late_share: float | None = None,
    floor: float = FLOOR,
    emphasis: float = 0.0,
) -> Objective:
    """An `Objective`; raises UserError for an unknown `on` or `form`, a share outside [0, 1], or a
    floor or an emphasis below 0."""
    if on not in ("train", "validation", "both"):
        raise UserError(f"Unknown meta-loss split {on!r}: choose train, validation or both.")
    if form not in ("plain", "log", "last"):
        raise UserError(f"Unknown form of meta-loss {form!r}: choose plain, log or last.")
    for value in (share, share if late_share is None else late_share):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"A share {value} of the validation losses is outside [0, 1].")
    for name, value in (("floor", floor), ("emphasis", emphasis)):
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{name}={value} is no weight: use 0 or a positive number.")
    return Objective(on, form, cap, share, late_share, floor, emphasis)
