"""MAML on sinusoids (Finn et al. 2017): the start of a 1-40-40-1 network, learned through SGD.

python -m l2l.launch --config=configs/maml_sinusoid.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="sinusoid", shots=10, queries=10, hidden=(40, 40), activation="relu")
    config.theta = dict(start=True)
    config.optimizer = dict(name="sgd", learning_rate=0.01)
    # The loss on the query, other points of the same sinusoid, after the last inner step.
    config.objective = dict(on="validation", form="last")
    # A run is one window of so many inner steps.
    config.inner = dict(length=1, stagger=False)
    config.horizon = dict(name="log_uniform", shortest=1, longest=1, start=1)
    config.estimator = dict(name="truncated", order="exact", segments=False)
    config.meta = dict(
        steps=20000,
        num_problems=24,
        group=500,
        clip=10.0,
        max_bad=20,
        optimizer=dict(name="adam", learning_rate=1e-3),
    )
    config.evaluation = dict(horizons=(1, 5, 10), num_problems=600, every=10000)
    config.checkpoint = dict(every=5000, keep=3)
    return config
