"""The tasks of the examples, lines with outliers, and a loss that is meta-trained on them. The others start from here."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import ml3_jax
from ml3_jax.problems import supervised

MODEL = ml3_jax.networks.MLP((1,))  # a line: one weight and one bias


def sample_task(key: jax.Array, context: Any = None) -> supervised.SupervisedTask:
    """A line. A third of the training samples lies 5 above it; only meta-training sees the clean split."""
    del context
    line_key, x_key, outlier_key = jax.random.split(key, 3)
    slope, offset = jax.random.normal(line_key, (2,))
    x = jax.random.uniform(x_key, (64, 1), minval=-1.0, maxval=1.0)
    clean = slope * x + offset
    seen = clean + 5.0 * jax.random.bernoulli(outlier_key, 0.3, clean.shape)
    return supervised.SupervisedTask(supervised.Examples(x, seen), supervised.Examples(x, clean))


def meta_train(model: Any = MODEL, steps: int = 500) -> Callable[..., jax.Array]:
    """A loss function (predictions, targets) -> [N], meta-trained on a model of any library."""
    loss = ml3_jax.losses.mlp(hidden=(32, 32), activation="elu", bias=True)
    meta = ml3_jax.make_meta_learner(
        supervised.make_problem(model, sample_task),
        loss,
        inner_optimizer=optax.sgd(0.3),
        meta_optimizer=optax.adam(1e-2),
        num_tasks=16,
        inner_steps=20,
    )
    state, _ = meta.run(meta.init(jax.random.key(0)), steps)
    return ml3_jax.as_loss_fn(loss, state.loss_params)


def compare(fit: Callable[..., float], learned: Callable[..., jax.Array]) -> dict[str, float]:
    """The errors of `fit(loss function, task)` on a new task: by the squared error and by the learned loss."""
    task = sample_task(jax.random.key(2))
    errors = {"squared error": fit(optax.squared_error, task), "learned loss": fit(learned, task)}
    print({name: round(error, 4) for name, error in errors.items()})
    return errors
