"""A learned loss in a loop over flax's TrainState."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from examples import outliers


def fit(loss_fn: Any, task: Any, steps: int = 100) -> float:
    """Fits a line by a loss function (predictions, targets) -> [N]; returns the error to the clean line."""
    params = outliers.MODEL.init(jax.random.key(1), task.train.inputs)
    state = TrainState.create(apply_fn=outliers.MODEL.apply, params=params, tx=optax.sgd(0.3))

    @jax.jit
    def train_step(state: TrainState) -> TrainState:
        def loss_of(params: Any) -> jax.Array:
            return loss_fn(state.apply_fn(params, task.train.inputs), task.train.targets).mean()

        return state.apply_gradients(grads=jax.grad(loss_of)(state.params))

    for _ in range(steps):
        state = train_step(state)
    return float(jnp.mean((state.apply_fn(state.params, task.test.inputs) - task.test.targets) ** 2))


if __name__ == "__main__":
    outliers.compare(fit, outliers.meta_train())
