"""MAML on few-shot digits: five turned and shifted classes, five images of each, any labels.

python -m l2l.launch --config=configs/few_shot_digits.py
python -m l2l.launch --config=configs/few_shot_digits.py --config.estimator.order=first

49 seconds of processor time on 2 cores of an EPYC shared with other work. Seed 0, accuracy on 200
new problems after 1, 5 and 10 steps: 0.457, 0.959, 0.986 (query loss 2.89, 0.141, 0.062); from a
random start, with thrice the rate, 0.740, 0.731, 0.919; pretrained 0.666, 0.941, 0.777. The first
step is not what it was trained for. FOMAML, the second line: 0.246, 0.939, 0.975 (40.7, 0.238,
0.121). No meta-gradient was left out.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.task = dict(
        name="few_shot", dataset="digits", ways=5, shots=5, queries=10, hidden=(64,), shift=1.0
    )
    config.theta = dict(start=True)
    config.optimizer = dict(name="sgd", learning_rate=0.4)
    config.objective = dict(on="validation", form="last")
    config.inner = dict(length=5, stagger=False)
    config.horizon = dict(name="log_uniform", shortest=5, longest=5, start=5)
    config.estimator = dict(name="truncated", order="exact", segments=False)
    config.meta = dict(
        steps=3000,
        num_problems=8,
        group=100,
        clip=10.0,
        max_bad=20,
        optimizer=dict(name="adam", learning_rate=1e-3),
    )
    config.evaluation = dict(horizons=(1, 5, 10), num_problems=200, every=1000)
    config.checkpoint = dict(every=500, keep=3)
    return config
