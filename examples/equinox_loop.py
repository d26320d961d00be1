"""An equinox classifier of scikit-learn's digits, trained by l2l's released optimizer.

    pip install l2l equinox && python examples/equinox_loop.py

Half a minute on a CPU. What is l2l's is one line, `l2l.guard(l2l.load(…))`, and that `value=` is
told to the optimizer; all else is any equinox training script.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import l2l

BATCH_SIZE = 128


def loss_of(model, images, labels):
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(num_steps: int = 1000, seed: int = 0) -> tuple[list[float], float]:
    """Trains and prints; returns (the loss of every step, accuracy on the held-out quarter)."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    split = train_test_split(images, labels, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(seed))
    learned = l2l.guard(l2l.load("mlp", num_steps=num_steps), adam=optax.adam(1e-2))
    state = learned.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(model, state, images, labels):
        loss, gradients = eqx.filter_value_and_grad(loss_of)(model, images, labels)
        params = eqx.filter(model, eqx.is_inexact_array)
        # A learned optimizer looks at the parameters, and the guard watches the loss.
        updates, state = learned.update(gradients, state, params, value=loss)
        return eqx.apply_updates(model, updates), state, loss

    losses, key = [], jax.random.key(seed)
    for step in range(1, num_steps + 1):
        batch = jax.random.randint(jax.random.fold_in(key, step), (BATCH_SIZE,), 0, len(train_x))
        model, state, loss = train_step(model, state, train_x[batch], train_y[batch])
        losses.append(float(loss))
        if step % 100 == 0 or step == num_steps:
            accuracy = float(jnp.mean(jax.vmap(model)(test_x).argmax(-1) == test_y))
            print(f"step {step:5}  loss {losses[-1]:.4f}  held-out accuracy {accuracy:.3f}")
    print(f"Adam had to take over {int(state.falls)} times.")
    return losses, accuracy


if __name__ == "__main__":
    main()
