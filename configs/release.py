"""Meta-trains the released `lstm` on a mixture of families, for tasks that it has not seen.

    launch/cpus.sh configs/release.py runs/release

6 minutes to compile and 45 to train on 2 cores of an EPYC, one process each, as the release was
made (`python -m l2l.launch --config=configs/release.py` gives the same up to rounding, slower).
Compute is added to the same theta, on any machine, by --config.start=lstm and another
--config.seed. The journal (docs/journal.md) has what came out, and what was tried before.
"""

from ml_collections import ConfigDict

RANGES = dict(initial_scale=(0.5, 2.0), subset=(0.25, 1.0))


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.start = ""
    digits = dict(name="mlp", dataset="digits", **RANGES)
    config.task = (
        dict(digits, hidden=(32,), batch_size=128),
        dict(digits, hidden=(16, 16, 16), batch_size=32),
        dict(digits, dataset="mnist14", hidden=(20,), batch_size=64),
        dict(name="logistic", dataset="digits", batch_size=64, init=0.0, **RANGES),
        dict(name="regression", inputs=10, hidden=(32,), batch_size=64, initial_scale=(0.5, 2.0)),
        dict(name="regression", inputs=30, hidden=(16, 16), batch_size=32, noise=(0.1, 1.0)),
        dict(name="autoencoder", dataset="digits", hidden=(32, 8, 32), batch_size=64, **RANGES),
        dict(name="conv", dataset="digits", channels=(6, 8), dense=(), batch_size=32, **RANGES),
        dict(name="transformer", width=12, layers=1, heads=2, context=16, batch_size=8),
        dict(name="gru", width=8, context=16, batch_size=8),
    )
    config.augmentations = (dict(name="rescale", per="tensor", magnitude=1.0, probability=0.5),)
    config.optimizer = dict(
        name="lstm",
        hidden_size=8,
        tensor_size=16,
        matrix_size=256,
        anneal=1.0,
        learning_rate=0.04,
        eps_root=1e-12,
    )
    config.objective = dict(
        on="both", form="log", cap=1e4, validation_weight=0.9, floor=3e-5, emphasis=1.0
    )
    config.inner = dict(length=250, stagger=True, hide_horizon_probability=0.25)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=250, longest=4000, start=2000, growth=0.5)
    config.imitation = dict(weight=0.0, until=0.5, learning_rate=3e-3)
    config.meta = dict(
        steps=400,
        num_problems=2,
        group=5,
        clip=1.0,
        max_bad=20,
        blend=0.55,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=2e-3)
        ),
    )
    config.evaluation = dict(horizons=(200,), num_problems=2, every=0)
    config.checkpoint = dict(every=25, keep=3)
    return config
