"""Meta-trains `lstm` on small MLPs of scikit-learn's digits: the default product, without download.

python -m l2l.launch --config=configs/mlp.py

5 minutes of meta-training on 2 cores of an EPYC, and two for the comparison. Final training loss
over that of tuned Adam, ten unseen seeds, geometric mean over ReLU, tanh and sigmoid: 0.68 at 500
steps, 0.72 at 1,000; test accuracy 0.38 and 0.20 points below the best Adam's. That is at batch
128, the only one of its training; at batch 32 it does far worse (docs/results.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="mlp",
        dataset="digits",
        hidden=(32,),
        activations=("relu", "tanh", "sigmoid", "gelu"),
        initial_scale=(0.5, 2.0),
        subset=(0.25, 1.0),
        batch_size=128,
    )
    config.augmentations = ()
    config.optimizer = dict(name="lstm", hidden_size=8, layers=1, learning_rate=3e-3, eps_root=1e-8)
    config.objective = dict(
        on="both", form="log", cap=1e4, validation_weight=0.98, late_validation_weight=0.65
    )
    config.inner = dict(length=50, stagger=True, hide_horizon_probability=0.25)
    config.estimator = dict(name="first_order")
    config.horizon = dict(name="log_uniform", shortest=100, longest=2000, start=200, growth=0.5)
    # Without it the first hundred steps are so long that test accuracy never recovers.
    config.imitation = dict(weight=0.3, until=1.0, final=0.3, learning_rate=0.015)
    config.meta = dict(
        steps=900,
        num_problems=16,
        group=20,
        clip=1.0,
        max_bad=20,
        # The schedule lasts for meta.steps unless it says otherwise.
        optimizer=dict(
            name="adam", learning_rate=dict(name="cosine_decay_schedule", init_value=3e-3)
        ),
    )
    whole = dict(initial_scale=(1.0, 1.0), subset=(1.0, 1.0))
    config.evaluation = dict(
        horizons=(500, 1000),
        num_problems=10,
        every=200,
        # Other batches than those of training too: what is learned from one may fail at another.
        tasks=(
            *(dict(activations=(a,), batch_size=128, **whole) for a in ("relu", "tanh", "sigmoid")),
            *(dict(batch_size=b, **whole) for b in (32, 512)),
        ),
    )
    config.checkpoint = dict(every=200, keep=3)
    return config
