"""Meta-losses: what is to be small along a window of inner training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l2l.console.errors import UserError

# Below this a loss is as good as zero in float32, and its logarithm would be noise.
FLOOR = 1e-7


class Objective(NamedTuple):
    """The meta-loss of a window of K steps, L = Σₖ wₖ ρ(ℓₖ), over the losses ℓ₁ … ℓ_K that follow
    each update (no update has led to ℓ₀).

    on:   "train" (the batches the optimizer will see next), "validation" (held-out batches) or
          "both".
    validation_weight, late_validation_weight: of the validation losses under "both" when a run
          begins and when it ends, linear in t/T between (None: the same throughout). A meta-loss on
          training batches alone teaches an optimizer to memorise; one on validation batches alone,
          to stop.
    form: "plain" (ρ = ℓ, mean over the window; Andrychowicz et al. 2016 sum), "log" (ρ =
          log(ℓ + floor), scale-free) or "last" (ρ = ℓ at the end of the window alone; Lv et al.
          2017). "log" is for losses that cannot be negative. Such a loss may be computed as
          slightly less than 0, and then counts as 0 (see `least`); a loss that is really negative
          has no logarithm, and its meta-loss is NaN.
    floor: losses well below it all count the same under "log": there is nothing to gain from
          memorising further.
    emphasis: e; a loss after step t of T counts (1 + e)(t/T)ᵉ. A window in the middle of a run is
          best served by a small rate, which the run pays for later (short-horizon bias; Wu et al.
          2018): with a positive e such windows weigh little, and the end of a run most.
    cap:  losses above it count as `cap` and give no gradient; their share of the losses that the
          meta-loss reads is reported as the metric `capped`.
    """

    on: str = "train"
    form: str = "log"
    cap: float = 1e4
    validation_weight: float = 0.5
    late_validation_weight: float | None = None
    floor: float = FLOOR
    emphasis: float = 0.0

    @property
    def reads_train(self) -> bool:
        return self.on != "validation"

    @property
    def reads_validation(self) -> bool:
        return self.on != "train"

    def weights(
        self, step: Int[Array, ""], num_steps: Int[Array, ""], length: int
    ) -> tuple[Float[Array, " *K"], Float[Array, " *K"]]:
        """The weights of (training, validation) losses in a window that begins at `step`: [length]
        each, or scalars where they are the same throughout a run."""
        if self.on != "both":
            return jnp.float32(self.on == "train"), jnp.float32(self.on == "validation")
        early, late = self.validation_weight, self.late_validation_weight
        if late is None or late == early:
            validation = jnp.float32(early)
        else:
            validation = early + (late - early) * _progress(step, num_steps, length)
        return 1.0 - validation, validation

    def emphases(
        self, step: Int[Array, ""], num_steps: Int[Array, ""], length: int
    ) -> Float[Array, " {length}"]:
        """What each loss of a window that begins at `step` counts: [length]."""
        return (1 + self.emphasis) * _progress(step, num_steps, length) ** self.emphasis

    def least(self, dtype) -> float:
        """The least loss of that dtype that the form can take: any for "plain" and "last".

        For "log" it is −√ε, ε being the dtype's relative precision (−3.5e-4 in float32). A loss
        that is a difference of terms up to 1/√ε in size, and should be 0, can be computed as that;
        a loss further below 0 is no rounding error. With a floor of 0 even a loss of 0 has no
        logarithm.
        """
        if self.form != "log":
            return -float("inf")
        limits = jnp.finfo(dtype)
        return -(float(limits.eps) ** 0.5) if self.floor else float(limits.tiny)

    def at(self, step: Int[Array, ""], num_steps: Int[Array, ""], length: int) -> "MetaLoss":
        """The meta-loss of the window of `length` steps that begins at `step`."""
        place = (step, num_steps, length)
        return MetaLoss(self, *self.weights(*place), self.emphases(*place))

    def value(self, losses: Float[Array, " K"], emphases: Float[Array, " K"]) -> Float[Array, ""]:
        """L of losses [K] after each update, in float32 at least. It is not finite if one of them
        is NaN or −∞, or below `least`; +∞ is above the cap."""
        least = self.least(losses.dtype)
        losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
        losses = jnp.where(losses > self.cap, self.cap, losses)
        if self.form == "last":
            return losses[-1] * emphases[-1]
        return jnp.mean(emphases * (self._log(losses, least) if self.form == "log" else losses))

    def _log(self, losses, least):
        zero = (losses <= 0) & (losses >= least)
        logs = jnp.log(jnp.where(zero, 0, losses) + self.floor)
        # Explicitly NaN: with a large floor, a negative loss would have a finite logarithm.
        return jnp.where(losses < least, jnp.nan, logs)

    def metrics(
        self,
        meta_loss: Float[Array, ""],
        training: Float[Array, " K"],
        validation: Float[Array, " K"] | tuple,
    ) -> dict[str, Float[Array, ""]]:
        """What every estimator reports of a window: scalars, from the losses [K] after each
        update."""
        read = self._read(training, validation)
        return {
            "meta_loss": meta_loss,
            "loss": training[-1],
            "capped": jnp.mean((read > self.cap).astype(read.dtype)),
            "lowest": self.lowest(training, validation),
        }

    def lowest(
        self, training: Float[Array, " K"], validation: Float[Array, " K"] | tuple
    ) -> Float[Array, ""]:
        """The lowest of the losses that the meta-loss of a window reads, NaN left out: a scalar,
        for the caller to hold against `least`."""
        losses = self._read(training, validation)
        return jnp.min(jnp.where(jnp.isnan(losses), jnp.inf, losses))

    def _read(self, training, validation) -> Float[Array, " R"]:
        """The losses of a window that the meta-loss reads."""
        read: list = [training] * self.reads_train + [validation] * self.reads_validation
        return jnp.concatenate([x[-1:] if self.form == "last" else x for x in read])


class MetaLoss(NamedTuple):
    """The meta-loss of one window of K steps: an objective, and what the losses of the window weigh
    in it. on_train, on_validation: as of `Objective.weights`; emphases: of `Objective.emphases`.

    Its arguments are the losses after each update, [K]; `validation` may be () where the objective
    reads none.
    """

    objective: Objective
    on_train: Float[Array, " *K"]
    on_validation: Float[Array, " *K"]
    emphases: Float[Array, " K"]

    def value(
        self, training: Float[Array, " K"], validation: Float[Array, " K"] | tuple
    ) -> Float[Array, ""]:
        """L of both."""
        total = jnp.zeros((), jnp.promote_types(training.dtype, jnp.float32))
        if self.objective.reads_train:
            total += self._part(training, self.on_train)
        if self.objective.reads_validation:
            total += self._part(validation, self.on_validation)
        return total

    def _part(self, losses, weight):
        if weight.ndim:
            # In float64 where losses are, as are weights times slopes.
            exact = weight.astype(jnp.promote_types(losses.dtype, weight.dtype))
            return self.objective.value(losses, exact * self.emphases)
        return weight * self.objective.value(losses, self.emphases)

    def slopes(
        self, training: Float[Array, " K"], validation: Float[Array, " K"] | tuple
    ) -> tuple[Float[Array, " K"], Float[Array, " K"] | tuple]:
        """∂L by each of both, [K]: of training losses that are not read 0, of validation losses
        that are not read ()."""
        slope = jax.grad(self.objective.value)
        on_train, on_validation = jnp.zeros_like(training), ()
        if self.objective.reads_train:
            on_train = self.on_train * slope(training, self.emphases)
        if self.objective.reads_validation:
            on_validation = self.on_validation * slope(validation, self.emphases)
        return on_train, on_validation


def _progress(step, num_steps, length):
    """t/T after each update of a window that begins at `step`: [length]."""
    return ((step + 1 + jnp.arange(length)) / num_steps).astype(jnp.float32)


def objective(
    *,
    on: str = "train",
    form: str = "log",
    cap: float = 1e4,
    validation_weight: float = 0.5,
    late_validation_weight: float | None = None,
    floor: float = FLOOR,
    emphasis: float = 0.0,
) -> Objective:
    """An `Objective`; raises UserError for an unknown `on` or `form`, a weight of the validation
    losses outside [0, 1], a floor or an emphasis below 0, or a cap that is not above 0."""
    if on not in ("train", "validation", "both"):
        raise UserError(f"Unknown meta-loss split {on!r}: choose train, validation or both.")
    if form not in ("plain", "log", "last"):
        raise UserError(f"Unknown form of meta-loss {form!r}: choose plain, log or last.")
    if not cap > 0.0:
        raise UserError(
            f"cap={cap} leaves no loss to learn from: use a number above 0, or inf for no cap."
        )
    late = validation_weight if late_validation_weight is None else late_validation_weight
    for value in (validation_weight, late):
        if not 0.0 <= value <= 1.0:
            raise UserError(
                f"A weight {value} of the validation losses is outside [0, 1]: use the share that "
                "they are to have beside the training losses."
            )
    for name, value in (("floor", floor), ("emphasis", emphasis)):
        if not 0.0 <= value < float("inf"):
            raise UserError(f"{name}={value} is not a weight: use 0 or a positive number.")
    return Objective(on, form, cap, validation_weight, late_validation_weight, floor, emphasis)
