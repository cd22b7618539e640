"""Probes: further quantities along every curve of a meta-test, for `Scenario.probe`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

import ml3_jax


def gradient_cosine(problem: ml3_jax.Problem, learned_loss: ml3_jax.LearnedLoss) -> Callable[..., dict[str, Array]]:
    """A probe: the cosine between the gradients of the learned and the plain loss along a curve.

    A loss that only rescales the gradient has a cosine of 1 everywhere. A probe does not know the inner step: both losses
    are evaluated at step 0, and a problem with `collect` collects data for the probe.

    Returns:
      A function for `Scenario.probe` with the output "gradient_cosine".
    """

    def probe(loss_params: Any, params: Any, task: Any, context: Any, key: Array) -> dict[str, Array]:
        step = jnp.zeros((), jnp.int32)
        data = task if problem.collect is None else problem.collect(params, task, context, key, step)

        def learned(params: Any) -> Array:
            return learned_loss.apply(loss_params, problem.observe(params, data, context, key, step))

        def plain(params: Any) -> Array:
            if problem.plain_loss is None:
                return problem.task_loss(params, data, context, key)
            return problem.plain_loss(params, data, context, key, step)

        gradients = [ravel_pytree(jax.grad(loss)(params))[0] for loss in (learned, plain)]
        norms = [jnp.linalg.norm(gradient) for gradient in gradients]
        # The angle of a zero gradient is NaN, null in the results.
        return {"gradient_cosine": jnp.dot(*gradients) / (norms[0] * norms[1])}

    return probe
