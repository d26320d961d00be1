"""RNNprop as published (Lv et al. 2017), on the MNIST network that it was trained on.

Two LSTMs of 20 units over m̂/√v̂ and g/√v̂ (β = 0.95), output 0.1 · tanh; each coordinate rescaled
by exp(U(−3, 3)); a convex term added to the loss; runs of 100 steps cut into windows of 20, the
loss after the last step of each. Four things are ours, as in `l2l_dm.py`: an outer rate of 1e-3
that goes to zero along a cosine, in place of a constant 1e-4; the way back takes one coordinate in
16; theta is tried on fixed problems every 250 meta-steps; and the best is kept.

    python -m l2l.launch --config=configs/rnnprop.py

31 minutes of a busy core. Seed 0, final training loss over that of tuned Adam (0.353, 0.288): 1.08
after 100 steps, 1.00 after 200. The theta that is kept is that of meta-step 1,000.
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
    config.estimator = dict(name="first_order", every=16)
    config.horizon = dict(name="stages", horizons=(100,), every=250, patience=3, num_problems=8)
    config.imitation = dict(weight=0.0, until=0.5, learning_rate=1e-3)
    config.meta = dict(
        steps=4000,
        num_problems=2,
        group=50,
        clip=1e6,
        max_bad=20,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=1e-3)
        ),
    )
    config.evaluation = dict(horizons=(100, 200), num_problems=4, every=0)
    config.checkpoint = dict(every=1000, keep=3)
    return config
