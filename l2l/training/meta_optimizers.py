"""The outer optimizers and their schedules by name: optax's own."""

import inspect
from collections.abc import Mapping

import optax

from l2l.console import schema
from l2l.console.errors import UserError

META_OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "add_decayed_weights": optax.add_decayed_weights,
    "clip": optax.clip,
    "clip_by_global_norm": optax.clip_by_global_norm,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "scale": optax.scale,
    "scale_by_adam": optax.scale_by_adam,
    "scale_by_learning_rate": optax.scale_by_learning_rate,
    "scale_by_schedule": optax.scale_by_schedule,
    "sgd": optax.sgd,
}
SCHEDULES = {
    "constant_schedule": optax.constant_schedule,
    "cosine_decay_schedule": optax.cosine_decay_schedule,
    "exponential_decay": optax.exponential_decay,
    "linear_schedule": optax.linear_schedule,
    "warmup_cosine_decay_schedule": optax.warmup_cosine_decay_schedule,
}


def meta_optimizer(settings, steps: int) -> optax.GradientTransformation:
    """One optax transformation from a section, or a chain from several. Schedules that need to know
    how long they last are told `steps` unless they say otherwise."""
    if isinstance(settings, list | tuple):
        if not settings:
            raise UserError(
                "meta.optimizer=() takes no step: name at least one transformation, like "
                'dict(name="adam", learning_rate=1e-3).'
            )
        return optax.chain(*(meta_optimizer(one, steps) for one in settings))

    def resolve(value):
        if not isinstance(value, Mapping):
            return value
        known = inspect.signature(schema.factory_of("schedule", SCHEDULES, value)[0]).parameters
        length = next((k for k in ("decay_steps", "transition_steps") if k in known), None)
        return schema.make("schedule", SCHEDULES, {**({length: steps} if length else {}), **value})

    settings = schema.named("meta-optimizer", META_OPTIMIZERS, settings)
    settings = {key: resolve(value) for key, value in settings.items()}
    return schema.make("meta-optimizer", META_OPTIMIZERS, settings)
