"""A learned loss with equinox: meta-trained on an equinox module, then used in a loop over eqx.apply_updates."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from examples import outliers


def make_model(key: jax.Array) -> eqx.Module:
    """A line for one sample. `supervised.make_problem` vmaps equinox modules over samples."""
    return eqx.nn.Linear(1, 1, key=key)


def fit(loss_fn: Any, task: Any, steps: int = 100) -> float:
    """Fits a line by a loss function; returns the error to the clean line."""
    model: Any = make_model(jax.random.key(1))
    optimizer = optax.sgd(0.3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def train_step(model: Any, opt_state: Any) -> tuple[Any, Any]:
        slope = eqx.filter_grad(lambda m: loss_fn(jax.vmap(m)(task.train.inputs), task.train.targets).mean())(model)
        updates, opt_state = optimizer.update(slope, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    for _ in range(steps):
        model, opt_state = train_step(model, opt_state)
    return float(jnp.mean((jax.vmap(model)(task.test.inputs) - task.test.targets) ** 2))


if __name__ == "__main__":
    outliers.compare(fit, outliers.meta_train(make_model))
