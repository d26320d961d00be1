"""l2l: learned optimizers that install, train and load.

    optimizer = l2l.load("lstm")  # an optax transformation

This is the table of contents. A name is imported when it is first used, so that `import l2l` costs
nothing and `l2l.load` does not bring in what trains an optimizer.
"""

import importlib
from typing import TYPE_CHECKING

from l2l.version import __version__ as __version__

if TYPE_CHECKING:  # The same names as in `_CONTENTS`, for editors and type checkers.
    from l2l import estimators, evaluation, optimizers, tasks
    from l2l.console.errors import UserError
    from l2l.core.base import LearnedOptimizer, Rule, TaskFamily, fixed, learner, lift
    from l2l.optimizers.guard import guard
    from l2l.optimizers.soap import soap
    from l2l.storage.exports import export
    from l2l.storage.exports import read as read_export
    from l2l.storage.loading import load, released, start
    from l2l.training.experiment import build_experiment
    from l2l.training.run import train

__all__ = [
    "LearnedOptimizer",
    "Rule",
    "TaskFamily",
    "UserError",
    "build_experiment",
    "estimators",
    "evaluation",
    "export",
    "fixed",
    "guard",
    "learner",
    "lift",
    "load",
    "optimizers",
    "read_export",
    "released",
    "soap",
    "start",
    "tasks",
    "train",
]
# Where each is at home, and what it is called there; a package is named alone.
_CONTENTS = {
    "LearnedOptimizer": ("l2l.core.base", "LearnedOptimizer"),
    "Rule": ("l2l.core.base", "Rule"),
    "TaskFamily": ("l2l.core.base", "TaskFamily"),
    "UserError": ("l2l.console.errors", "UserError"),
    "build_experiment": ("l2l.training.experiment", "build_experiment"),
    "estimators": ("l2l.estimators", None),
    "evaluation": ("l2l.evaluation", None),
    "export": ("l2l.storage.exports", "export"),
    "fixed": ("l2l.core.base", "fixed"),
    "guard": ("l2l.optimizers.guard", "guard"),
    "learner": ("l2l.core.base", "learner"),
    "lift": ("l2l.core.base", "lift"),
    "load": ("l2l.storage.loading", "load"),
    "optimizers": ("l2l.optimizers", None),
    "read_export": ("l2l.storage.exports", "read"),
    "released": ("l2l.storage.loading", "released"),
    "soap": ("l2l.optimizers.soap", "soap"),
    "start": ("l2l.storage.loading", "start"),
    "tasks": ("l2l.tasks", None),
    "train": ("l2l.training.run", "train"),
}


def __getattr__(name: str):
    if name not in _CONTENTS:
        raise AttributeError(f"Package l2l has no {name!r}: it offers {', '.join(__all__)}.")
    module, attribute = _CONTENTS[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__():
    return [*__all__, "__version__"]
