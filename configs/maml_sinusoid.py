r"""MAML on sinusoids (Finn et al. 2017): the start of a 1-40-40-1 network, learned through SGD.

python -m l2l.launch --config=configs/maml_sinusoid.py
python -m l2l.launch --config=configs/maml_sinusoid.py --config.optimizer.name=adam \
    --config.optimizer.learning_rate=1.0 --config.optimizer.eps=100.0 --config.optimizer.b1=0.0

2 minutes 40 of meta-training on 2 cores of an EPYC shared with much other work (40 seconds of
processor time). Seed 0, mean squared error on 600 new sinusoids after 0, 1, 5, 10 steps: learned
3.17, 0.357, 0.121, 0.097; pretrained 3.16, 2.67, 2.16, 1.97; random 6.68, 5.70, 4.65, 4.50. The
paper has some 0.5 after one step and 0.1 after nine, of 70,000 meta-steps. No meta-gradient was
left out. The paper's meta-batch is 25, which 2 cores do not share evenly.

The line with Adam inside, whose eps_root is 1e-8, has 0.348, 0.124, 0.097 after 1, 5 and 10 steps,
of 40,000 meta-steps (--config.meta.steps=40000; as many with SGD: 0.332, 0.127, 0.099). At an eps
so far above the gradients Adam takes SGD's steps; nearer to Adam it learns worse, which
docs/maml.md explains.
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
