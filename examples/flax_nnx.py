"""A learned loss with flax.nnx: meta-trained on an nnx module, then used in a loop over nnx.Optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import outliers


def make_model(key: jax.Array) -> nnx.Module:
    """A line. `supervised.make_problem` takes such a function, or a module."""
    return nnx.Linear(1, 1, rngs=nnx.Rngs(params=key))


def fit(loss_fn: Any, task: Any, steps: int = 100) -> float:
    """Fits a line by a loss function; returns the error to the clean line."""
    model: Any = make_model(jax.random.key(1))
    optimizer = nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any) -> None:
        slope = nnx.grad(lambda m: loss_fn(m(task.train.inputs), task.train.targets).mean())(model)
        optimizer.update(model, slope)

    for _ in range(steps):
        train_step(model, optimizer)
    return float(jnp.mean((model(task.test.inputs) - task.test.targets) ** 2))


if __name__ == "__main__":
    outliers.compare(fit, outliers.meta_train(make_model))
