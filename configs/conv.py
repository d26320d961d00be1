"""Meta-trains `lstm` on small convolutional networks on scikit-learn's digits, without download.

python -m l2l.launch --config=configs/conv.py
python -m l2l.launch --config=configs/conv.py --config.task.dataset=cifar10

Not run to its end so far: started on 2 busy cores of an EPYC, its first 50 meta-steps took more
than a minute, so that all of them take 20 minutes or more.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="conv",
        dataset="digits",
        channels=(8, 8),
        kernel=3,
        dense=(16,),
        activations=("relu", "tanh", "sigmoid", "gelu"),
        initial_scale=(0.5, 2.0),
        subset=(0.25, 1.0),
        batch_size=64,
    )
    config.augmentations = ()
    config.optimizer = dict(name="lstm", hidden_size=8, layers=1, learning_rate=3e-3, eps_root=1e-8)
    config.objective = dict(on="both", form="log", cap=1e4, validation_weight=0.98)
    config.inner = dict(length=50, stagger=True, hide_horizon_probability=0.25)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=100, longest=2000, start=200, growth=0.5)
    config.imitation = dict(weight=0.0, until=0.5, learning_rate=1e-3)
    config.meta = dict(
        steps=1000,
        num_problems=16,
        group=50,
        clip=1.0,
        max_bad=20,
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=3e-3)
        ),
    )
    config.evaluation = dict(horizons=(200, 500), num_problems=8, every=500)
    config.checkpoint = dict(every=200, keep=3)
    return config
