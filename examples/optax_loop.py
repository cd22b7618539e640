"""A learned loss in a plain optax loop, in the place of optax.squared_error."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples import outliers


def fit(loss_fn: Any, task: Any, steps: int = 100) -> float:
    """Fits a line by a loss function (predictions, targets) -> [N]; returns the error to the clean line."""
    optimizer = optax.sgd(0.3)
    params = outliers.MODEL.init(jax.random.key(1), task.train.inputs)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, opt_state = carry
        slope = jax.grad(lambda p: loss_fn(outliers.MODEL.apply(p, task.train.inputs), task.train.targets).mean())(params)
        updates, opt_state = optimizer.update(slope, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return float(jnp.mean((outliers.MODEL.apply(params, task.test.inputs) - task.test.targets) ** 2))


if __name__ == "__main__":
    outliers.compare(fit, outliers.meta_train())
