"""The shapes that signatures state are held to in tests (tests/conftest.py installs the hook)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from l2l.core import base, unroll
from l2l.estimators.objective import Objective
from l2l.evaluation import statistics
from l2l.optimizers import features

STEP = jnp.int32(3)


WRONG = {
    "two axes for one": lambda: features.log_and_sign(jnp.ones((2, 3)), 5.0),
    "gradients of two runs": lambda: features.update_moments(
        jnp.ones((2, 3)), features.zero_moments(1, 3), STEP, decays=(0.9,), second_decay=0.99
    ),
    "integers": lambda: features.norm(jnp.ones(3, jnp.int32)),
    "a step that is no integer": lambda: features.time_context(jnp.float32(1.0), STEP),
    "other lengths": lambda: Objective().value(jnp.ones(4), jnp.ones(5)),
    "many steps for one": lambda: Objective().weights(jnp.ones(2, jnp.int32), STEP, 4),
    "three axes for two": lambda: statistics.smooth(np.ones((2, 3, 4))),
    "no function": lambda: base.lift("init", lambda theta: None),
    "nothing": lambda: unroll.fresh(None, jax.random.key(0), (), None),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_shape_or_type_is_refused(what):
    with pytest.raises(TypeCheckError):
        WRONG[what]()


@pytest.mark.parametrize("module", [features, unroll])
def test_public_functions_say_what_they_return(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_"):
            assert "return" in function.__annotations__, name
