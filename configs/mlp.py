"""Meta-trains an LSTM over whole tensors, and the numbers of its schedule, on small MLPs of
scikit-learn's digits: the default product, without download.

    python -m l2l.launch --config=configs/mlp.py

Batches of 16 to 512, widths of 32 and 64, data sizes and initial scales are drawn. Some three
minutes on 2 cores, four more for the comparison; docs/results.md says what came out."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    digits = dict(
        name="mlp",
        dataset="digits",
        activations=("relu", "tanh", "sigmoid", "gelu"),
        initial_scale=(0.5, 2.0),
        subset=(0.25, 1.0),
    )
    # Batches of 16 to 512 examples, as far as the noise of their gradients goes.
    config.task = (
        dict(digits, hidden=(32,), batch_size=512, distinct=(1 / 32, 1.0)),
        dict(digits, hidden=(64,), batch_size=64, distinct=(0.25, 1.0)),
    )
    config.augmentations = ()
    # A rate far too low to begin with. Unlike `lstm` it does not slow down where gradients fall.
    config.optimizer = dict(
        name="per_tensor",
        hidden_size=16,
        learning_rate=0.01,
        weight_decay=0.5,
        decay_fall=0.0,
        decay_noise=0.0,
        fitted_decay=0.0,
        fall_power=0.0,
        quiet=0.0,
        overshoot=0.0,
        reach=0.7,
        learn="all",
    )
    config.objective = dict(
        on="both", form="log", cap=1e4, validation_weight=0.8, floor=1e-3, emphasis=4.0
    )
    config.inner = dict(length=400, stagger=False)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=400, longest=400)
    config.imitation = dict(weight=0.0, final=0.0)
    config.meta = dict(
        steps=200,
        num_problems=4,
        group=10,
        clip=0.3,
        max_bad=20,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=3e-3)
        ),
    )
    whole = dict(initial_scale=(1.0, 1.0), subset=(1.0, 1.0), distinct=(1.0, 1.0))
    config.evaluation = dict(
        horizons=(500, 1000),
        num_problems=6,
        every=0,
        tasks=tuple(dict(batch_size=b, **whole) for b in (32, 64, 128, 512)),
    )
    config.checkpoint = dict(every=50, keep=3)
    return config
