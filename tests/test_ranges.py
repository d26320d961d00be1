"""Settings of optimizers that are out of range: one sentence each, in place of NaN in every run."""

import pytest

import l2l
from l2l.optimizers import registry

NAN, INFINITE = float("nan"), float("inf")
WRONG = {
    "adam": [
        *({"learning_rate": -1e-3}, {"learning_rate": 0.0, "learned": True}),
        *({"b1": 1.0}, {"b2": -0.1}, {"eps": -1e-8}, {"eps_root": NAN}),
    ],
    "dm": [{"hidden_size": 0}, {"layers": 0}, {"p": 0.0}, {"scale": -0.01}],
    "learned_adam": [{"learning_rate": 0.0}, {"b1": 0.0}, {"b2": 1.0}, {"eps_root": -1e-8}],
    "learned_adamw": [
        *({"learning_rate": 0.0}, {"weight_decay": 0.0}, {"knots": 1}),
        *({"b1": 1.0}, {"b2": 1.5}, {"eps_root": -1e-8}),
    ],
    "lstm": [
        *({"learning_rate": -1.0}, {"learning_rate": 0.0}, {"decays": ()}, {"decays": (1.0,)}),
        *({"second_decay": 1.0}, {"eps_root": -1e-8}, {"weight_decay": NAN}, {"anneal": -1.0}),
        *({"hidden_size": 0}, {"layers": 1.5}, {"tensor_size": -1}, {"matrix_size": -1}),
    ],
    "per_tensor": [
        *({"learn": "everything"}, {"learning_rate": 0.0}, {"weight_decay": -0.1}),
        *({"agreement": -1.0}, {"agreement": NAN}, {"decays": ()}, {"decays": (0.9, 1.0)}),
        *({"second_decay": 1.0, "second_power": 0.0}, {"second_decay": -0.1}),
        *({"second_power": -0.6}, {"reach": 0.0}, {"reach": INFINITE}, {"smallest": -1.0}),
        *({"hidden_size": -1}, {"block_size": 0}, {"block_size": True}),
        *({"average_every": 0}, {"basis_every": 2.5}),
    ],
    "rnnprop": [
        *({"hidden_size": 1.5}, {"layers": 0}, {"scale": 0.0}),
        *({"decay": 1.0}, {"second_decay": 1.0}, {"eps_root": -1e-8}),
    ],
    "sgd": [{"learning_rate": 0.0}, {"momentum": 1.0}, {"momentum": -0.9}],
}


def test_every_optimizer_with_settings_of_its_own_is_here():
    assert WRONG.keys() == registry.OPTIMIZERS.keys() - {"by_parameter"}


@pytest.mark.parametrize(
    "name, settings", [(name, one) for name, several in WRONG.items() for one in several], ids=str
)
def test_a_setting_out_of_range_is_one_sentence(name, settings):
    with pytest.raises(l2l.UserError, match=rf"{next(iter(settings))}\b.*\.$"):
        registry.OPTIMIZERS[name](**settings)
