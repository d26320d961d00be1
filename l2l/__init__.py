"""l2l: learned optimizers that install, train and load.

    optimizer = l2l.load("checkpoints/mlp")  # an optax transformation

Names are imported when they are first used, so that `import l2l` costs nothing.
"""

import importlib

_CONTENTS = {
    "l2l.core.base": (
        "InnerState",
        "LearnedOptimizer",
        "MetaGradient",
        "MetaState",
        "Rule",
        "Stage",
        "TaskFamily",
        "fixed",
        "lift",
    ),
    "l2l.training.experiment": ("experiment",),
    "l2l.storage.exports": ("export", "load", "read", "released"),
    "l2l.optimizers.guard": ("guard",),
    "l2l.optimizers.lstm": ("dm", "lstm", "rnnprop"),
    "l2l.training.loop": ("run",),
    "l2l.core.unroll": ("Inner",),
}
_HOME = {name: module for module, names in _CONTENTS.items() for name in names}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"Package l2l has no {name!r}: it offers {', '.join(__all__)}.")


def __dir__():
    return [*__all__, "__version__"]
