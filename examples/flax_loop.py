"""A flax.nnx classifier of scikit-learn's digits, trained by l2l's released optimizer.

    pip install l2l flax && python examples/flax_loop.py

Half a minute on a CPU. What is l2l's is one line, `l2l.guard(l2l.load(…))`, and that `value=` is
told to the optimizer; all else is any nnx training script.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import l2l

BATCH_SIZE = 128


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images):  # [n, 64] to logits [n, 10]
        return self.out(nnx.relu(self.hidden(images)))


def loss_of(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, gradients = nnx.value_and_grad(loss_of)(model, images, labels)
    # nnx hands further arguments on: the guard watches the loss.
    optimizer.update(model, gradients, value=loss)
    return loss


def main(num_steps: int = 1000, seed: int = 0) -> tuple[list[float], float]:
    """Trains and prints; returns (the loss of every step, accuracy on the held-out quarter)."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    split = train_test_split(images, labels, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, split)
    model = Classifier(nnx.Rngs(seed))
    learned = l2l.guard(l2l.load("mlp", num_steps=num_steps), adam=optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, learned, wrt=nnx.Param)

    losses, key = [], jax.random.key(seed)
    for step in range(1, num_steps + 1):
        batch = jax.random.randint(jax.random.fold_in(key, step), (BATCH_SIZE,), 0, len(train_x))
        losses.append(float(train_step(model, optimizer, train_x[batch], train_y[batch])))
        if step % 100 == 0 or step == num_steps:
            accuracy = float(jnp.mean(model(test_x).argmax(-1) == test_y))
            print(f"step {step:5}  loss {losses[-1]:.4f}  held-out accuracy {accuracy:.3f}")
    print(f"Adam had to take over {int(optimizer.opt_state.falls[...])} times.")
    return losses, accuracy


if __name__ == "__main__":
    main()
