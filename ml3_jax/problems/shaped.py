"""Shaped regression: a learned loss, meta-trained with the true parameters, fits a parametric function.

Data alone say little about the frequency of a sine: the squared error has many minima over it. At meta-training the task loss
may be the distance to the *true* parameters (extra information), which shapes the learned loss. At meta-test the loss sees
predictions, targets and inputs alone (Bechtle et al. 2020, section IV-D).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax.arguments import check_callable
from ml3_jax.types import Context, Params, Problem


class ShapedTask(struct.PyTreeNode):
    """Samples of a function, and its parameters."""

    inputs: jax.Array  # [N]
    targets: jax.Array  # [N]
    extra: Params  # the true parameters, for task_loss and evaluate alone


def squared_distance(params: Params, true_params: Params) -> jax.Array:
    """Squared Euclidean distance between two pytrees of parameters, a scalar."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(true_params), strict=True)
    return jnp.sum(jnp.stack([jnp.sum((p - t) ** 2) for p, t in pairs]))


def log_squared_distance(floor: float) -> Callable[[Params, Params], jax.Array]:
    """log(squared distance + floor): an improvement by a factor has the same weight far from the truth and near it.

    Args:
      floor: where the logarithm levels off, in squared units of the parameters; positive.

    Raises:
      ValueError: floor is not positive.
    """
    if not floor > 0.0:
        raise ValueError(f"floor: expected a positive number, got {floor}")
    return lambda params, true_params: jnp.log(squared_distance(params, true_params) + floor)


def make_problem(
    predict: Callable[[Params, jax.Array], jax.Array],
    init: Callable[[jax.Array], Params],
    sample_params: Callable[[jax.Array], Params],
    sample_inputs: Callable[[jax.Array], jax.Array],
    *,
    extra_loss: Callable[[Params, Params], jax.Array] | None = squared_distance,
) -> Problem:
    """The problem of finding the parameters of a known function from samples of it.

    Args:
      predict: (params, inputs [N]) -> predictions [N].
      init: key -> the parameters at the start.
      sample_params: key -> the true parameters of a task, a pytree like those of init.
      sample_inputs: key -> inputs [N].
      extra_loss: (params, true parameters) -> scalar, the task loss with extra information; None: the squared error
        of the predictions.

    Returns:
      A Problem. observe is [N, 3] (prediction, target, input). evaluate gives "parameter_error" (the Euclidean distance to the
      true parameters) and "mse".

    Raises:
      TypeError: an argument that is no function.
    """
    functions = {"predict": predict, "init": init, "sample_params": sample_params, "sample_inputs": sample_inputs}
    for name, function in functions.items():
        check_callable(name, function)
    check_callable("extra_loss", extra_loss, optional=True)

    def sample_task(key: jax.Array, context: Context) -> ShapedTask:
        del context
        params_key, inputs_key = jax.random.split(key)
        params, inputs = sample_params(params_key), sample_inputs(inputs_key)
        return ShapedTask(inputs, predict(params, inputs), params)

    def start(key: jax.Array, task: ShapedTask) -> Params:
        del task
        return init(key)

    def observe(params: Params, task: ShapedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return jnp.stack([predict(params, task.inputs), task.targets, task.inputs], axis=-1)

    def mse(params: Params, task: ShapedTask) -> jax.Array:
        return jnp.mean((predict(params, task.inputs) - task.targets) ** 2)

    def task_loss(params: Params, task: ShapedTask, context: Context, key: jax.Array) -> jax.Array:
        del context, key
        return mse(params, task) if extra_loss is None else extra_loss(params, task.extra)

    def plain_loss(params: Params, task: ShapedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return mse(params, task)

    def evaluate(params: Params, task: ShapedTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context, key
        return {"parameter_error": jnp.sqrt(squared_distance(params, task.extra)), "mse": mse(params, task)}

    return Problem(sample_task, start, observe, task_loss, evaluate, plain_loss)
