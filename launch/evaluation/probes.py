"""Probes: quantities measured along every curve of a meta-test, for `Scenario.probe`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

import ml3_jax


def gradient_cosine(problem: ml3_jax.Problem, learned_loss: ml3_jax.LearnedLoss) -> Callable[..., dict[str, Array]]:
    """A probe: the cosine between the learned loss's gradient and the plain loss's at the optimizee of each step.

    A loss that only rescales the gradient has a cosine of 1 everywhere. Both are taken as at inner step 0, on data of
    their own where the problem collects them: a probe, like evaluate, does not know the step.

    Args:
      problem: the scenario's problem.
      learned_loss: the experiment's learned loss.

    Returns:
      A function for `Scenario.probe` whose output is named "gradient_cosine".
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
        # Where either gradient is zero there is no angle: NaN, which the results show as null.
        return {"gradient_cosine": jnp.dot(*gradients) / (norms[0] * norms[1])}

    return probe
