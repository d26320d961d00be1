"""Meta-trains an LSTM over whole tensors on top of the numbers of the released `lstm`.

    python -m l2l.launch --config=configs/release.py

The direction and the numbers of the schedule are settings, found by whole runs; what is trained is
a network that says how far to depart from them. Every window is a whole run of 400 steps. On tasks
that it has not seen it takes nothing off validation losses, by first-order or by exact gradients
(--config.estimator.name=truncated --config.estimator.order=exact), so that the release is the
numbers alone; docs/journal.md has the table. Ten minutes of a core, and four of compiling. Compute
is added to the same theta, on any machine, by --config.start=DIRECTORY and another --config.seed.
"""

from ml_collections import ConfigDict

RANGES = dict(initial_scale=(0.5, 2.0), subset=(0.25, 1.0))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.start = ""
    digits = dict(name="mlp", dataset="digits", **RANGES)
    images = dict(digits, dataset="mnist14")
    config.task = (
        dict(digits, hidden=(32,), batch_size=32),
        dict(images, hidden=(48, 48), batch_size=64),
        dict(images, hidden=(32, 32), batch_size=128, layer_norm=True),
        dict(images, hidden=(32, 32), batch_size=256),
        dict(name="autoencoder", batch_size=64, **RANGES),
        dict(name="logistic", dataset="mnist14", batch_size=64, init=0.0, **RANGES),
        dict(name="transformer", width=16, layers=1, heads=2, context=16, batch_size=16),
    )
    # Which rate is best differs by as much from problem to problem: it has to be read off evidence.
    config.augmentations = (dict(name="rescale", per="tensor", magnitude=1.0, probability=0.5),)
    config.optimizer = dict(name="per_tensor", hidden_size=16, reach=0.7, learn="network")
    # The end of a run counts most, and below 0.01 nothing is gained by memorising.
    config.objective = dict(
        on="both", form="log", cap=1e3, validation_weight=0.95, floor=1e-2, emphasis=4.0
    )
    config.inner = dict(length=400, stagger=False)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=400, longest=400)
    config.imitation = dict(weight=0.0, final=0.0)
    config.meta = dict(
        steps=120,
        num_problems=1,
        group=5,
        clip=0.3,
        max_bad=20,
        # All the way it lowers training losses further, and pays with validation losses.
        blend=0.5,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=3e-3)
        ),
    )
    config.evaluation = dict(horizons=(200,), num_problems=2, every=0)
    config.checkpoint = dict(every=20, keep=3)
    return config
