"""RNNprop as published (Lv et al. 2017), on the MNIST network that it was trained on.

Two LSTMs of 20 units over m̂/√v̂ and g/√v̂ (β = 0.95), output 0.1 · tanh; each coordinate rescaled
by exp(U(−3, 3)); a convex term added to the loss; runs of 100 steps cut into windows of 20, the
loss after the last step of each; Adam at 1e-4.

    python -m l2l.launch --config=configs/rnnprop.py

19 minutes on 2 cores of an EPYC shared with other work: a fraction of the authors' training.
Seed 0, final training loss over that of tuned Adam (0.364, 0.283): 1.85 after 100 steps, 1.23 after
200.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="mnist", hidden=(20,), activation="sigmoid", batch_size=128, stddev=0.01
    )
    config.augmentations = (
        dict(name="rescale", per="coordinate", magnitude=3.0),
        dict(name="convex", dimension=20),
    )
    config.optimizer = dict(
        name="rnnprop",
        hidden_size=20,
        layers=2,
        decay=0.95,
        second_decay=0.95,
        scale=0.1,
        eps_root=1e-8,
    )
    config.objective = dict(on="train", form="last", cap=1e4)
    config.inner = dict(length=20, stagger=False, hide_horizon_probability=0.0)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=100, longest=100, start=100, growth=0.0)
    config.imitation = dict(weight=0.0, until=0.5, learning_rate=1e-3)
    config.meta = dict(
        steps=1200,
        num_problems=2,
        group=20,
        clip=1e6,
        max_bad=20,
        optimizer=dict(name="adam", learning_rate=1e-4),
    )
    config.evaluation = dict(horizons=(100, 200), num_problems=4, every=0)
    config.checkpoint = dict(every=200, keep=3)
    return config
