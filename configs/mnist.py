"""Meta-trains `lstm` on the 784-20-10 sigmoid network of L2L and RNNprop on MNIST.

MNIST is read from a local directory or downloaded (see `l2l.data.datasets`).

    python -m l2l.launch --config=configs/mnist.py

15 minutes on 2 cores of an EPYC shared with other work. Seed 0, final training loss over that of
tuned Adam (0.364, 0.177): 1.04 after 100 steps, 1.02 after 1,000.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="mnist", hidden=(20,), activation="sigmoid", batch_size=128, stddev=0.01
    )
    config.augmentations = (dict(name="rescale", per="tensor", magnitude=1.5, probability=0.5),)
    config.optimizer = dict(name="lstm", hidden_size=8, layers=1, learning_rate=3e-3, eps_root=1e-8)
    config.objective = dict(on="both", form="log", cap=1e4, validation_weight=0.98)
    config.inner = dict(length=50, stagger=True, hide_horizon_probability=0.25)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=100, longest=2000, start=200, growth=0.5)
    config.imitation = dict(weight=0.0, until=0.5, learning_rate=1e-3)
    config.meta = dict(
        steps=400,
        num_problems=8,
        group=20,
        clip=1.0,
        max_bad=20,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=3e-3)
        ),
    )
    config.evaluation = dict(horizons=(100, 1000), num_problems=4, every=0)
    config.checkpoint = dict(every=200, keep=3)
    return config
