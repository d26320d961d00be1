"""Two optimizers by parameter, L2L's `simple-multi`: `dm` for x_0 and Adam at 0.1 for x_1.

python -m l2l.launch --config=configs/simple_multi.py

30 seconds on 2 cores of a busy EPYC. Seed 0, loss after 100 steps: 1.1e-5, 6.4 times that of tuned
Adam on both parameters (1.7e-6); with 1,000 meta-steps it was 100 times.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(name="simple_multi")
    config.optimizer = dict(
        name="by_parameter",
        parts=dict(
            learned=dict(name="dm", hidden_size=20, layers=2, p=5.0, scale=0.01),
            adam=dict(name="adam", learning_rate=0.1),
        ),
        labels=(("x_0", "learned"), ("x_1", "adam")),
    )
    config.objective = dict(on="train", form="plain")
    config.inner = dict(length=20, stagger=False)
    config.horizon = dict(name="log_uniform", shortest=100, longest=100, start=100)
    config.meta = dict(
        steps=20000, num_problems=2, group=100, optimizer=dict(name="adam", learning_rate=1e-3)
    )
    config.evaluation = dict(horizons=(100,), num_problems=10, every=0)
    return config
