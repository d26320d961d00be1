"""Rules that depend on which coordinates they are given are refused, and no others."""

import jax
import jax.numpy as jnp
import pytest

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import adam, coordinates, halves, published
from l2l.optimizers.by_parameter import by_parameter
from l2l.optimizers.lstm import lstm


def own(gradient, accumulators, params, step):
    m = 0.9 * accumulators["m"] + gradient
    return jnp.stack([m, gradient / (1.0 + jnp.abs(params))]), {"m": m}


def layer(theta, rows, context, hidden):
    hidden = 0.5 * hidden + jnp.tanh(theta["w"] @ rows)
    return theta["v"] @ hidden, hidden


def made(observe=own, propose=layer, accumulators=None, **settings):
    def init(key):
        return {"w": jnp.ones((3, 2)), "v": jnp.zeros(3), "trained": jnp.int32(0)}

    def zeros(params, dtype):
        return {"m": jnp.zeros(base.count(params), dtype)}

    rule = base.Rule(
        accumulators=accumulators or zeros,
        context=lambda step, num_steps: jnp.zeros(0),
        observe=observe,
        hidden=lambda theta, n: jnp.zeros((3, n)),
        propose=propose,
        features=("m", "g"),
        **settings,
    )
    return coordinates.optimizer(init, rule)


def normalised(gradient, accumulators, params, step):
    return own(gradient / jnp.sqrt(jnp.mean(gradient**2)), accumulators, params, step)


def summed(gradient, accumulators, params, step):
    """Features are each coordinate's own; what is kept is not."""
    rows, kept = own(gradient, accumulators, params, step)
    return rows, {"m": kept["m"] + jnp.max(jnp.abs(params))}


def clipped(theta, rows, context, hidden):
    updates, hidden = layer(theta, rows, context, hidden)
    return updates / jnp.linalg.norm(updates), hidden


def mixed(theta, rows, context, hidden):
    return layer(theta, rows, context, hidden - jnp.mean(hidden, axis=1, keepdims=True))


@pytest.mark.parametrize(
    "halved, said",
    [
        ({"observe": normalised}, "observe"),
        ({"observe": summed}, "observe"),
        ({"propose": clipped}, "propose"),
        ({"propose": mixed}, "propose"),
    ],
)
def test_a_statistic_over_coordinates_is_refused(halved, said):
    with pytest.raises(UserError, match=f"`{said}` of this rule gives other numbers for half"):
        made(**halved)


def test_what_treats_each_coordinate_alike_is_built():
    learned = made()
    for whole, parts in halves._compared(learned.init, learned.rule):
        assert jax.tree.leaves(whole) and halves._alike(whole, parts)


def test_a_rule_that_fails_on_its_numbers_fails_where_it_is_used():
    def failing(*arguments):
        raise ZeroDivisionError

    learned = made(observe=failing)
    params = {"w": jnp.ones(2)}
    transform = learned.bind(learned.init(jax.random.key(0)))
    with pytest.raises(ZeroDivisionError):
        transform.update(params, transform.init(params), params)


def test_nothing_is_tried_while_a_program_is_traced():
    calls = []

    def observe(*arguments):
        calls.append(arguments)
        return own(*arguments)

    @jax.jit
    def program(x):
        made(observe=observe)
        return x

    program(jnp.zeros(()))
    assert not calls
    made(observe=observe)
    assert calls


OURS = {
    "dm": lambda: published.dm(hidden_size=2),
    "rnnprop": lambda: published.rnnprop(hidden_size=2),
    "adam": adam.adam,
    "lstm": lambda: lstm(hidden_size=2),
    "lstm with all": lambda: lstm(hidden_size=2, tensor_size=2, matrix_size=4),
    "by_parameter": lambda: by_parameter({"a": published.dm(hidden_size=2)}, [("*", "a")]),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_rules_would_pass_and_take_no_time(name, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(halves, "_compared", lambda *arguments: calls.append(arguments) or ())
        learned = OURS[name]()
    assert not calls
    for whole, parts in halves._compared(learned.init, learned.rule):
        assert halves._alike(whole, parts)
