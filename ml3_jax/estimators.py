"""Estimators of the meta-gradient d(objective)/d(phi), of an objective that is a function of phi.

An estimator is `(objective, loss_params, key) -> ((value, aux), gradient)`; `objective(loss_params)` returns
(scalar, aux). A `PersistentEvolutionStrategy` is none: it has a state for each task, which `persistent` carries. The outer
loop takes the name of an estimator, or your own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax.arguments import check_count
from ml3_jax.types import LossParams

Objective = Callable[[LossParams], tuple[jax.Array, Any]]
Estimator = Callable[[Objective, LossParams, jax.Array], tuple[tuple[jax.Array, Any], LossParams]]


def backprop() -> Estimator:
    """The exact gradient, in reverse mode through the inner steps."""

    def estimate(objective: Objective, loss_params: LossParams, key: jax.Array) -> tuple[tuple[jax.Array, Any], LossParams]:
        del key
        return jax.value_and_grad(objective, has_aux=True)(loss_params)

    return estimate


def evolution_strategy(sigma: float = 0.01, pairs: int = 8) -> Estimator:
    """Antithetic evolution strategies (Salimans et al. 2017, arXiv:1703.03864): no derivative of the inner loop.

    The gradient of the objective smoothed by a Gaussian of width sigma, from `pairs` mirrored perturbations. Unbiased
    for the smoothed objective; its variance grows with the number of loss parameters.

    Args:
      sigma: standard deviation of a perturbation, in units of phi; positive.
      pairs: mirrored pairs; at least 1.

    Raises:
      ValueError: sigma is not positive or pairs is below 1.
    """
    _check_perturbations(sigma, pairs)

    def estimate(objective: Objective, loss_params: LossParams, key: jax.Array) -> tuple[tuple[jax.Array, Any], LossParams]:
        def one_pair(key: jax.Array) -> LossParams:
            noise = standard_normal(key, loss_params)

            def shifted(sign: float) -> jax.Array:
                return objective(jax.tree.map(lambda p, e: p + sign * sigma * e, loss_params, noise))[0]

            slope = (shifted(1.0) - shifted(-1.0)) / (2.0 * sigma)
            return jax.tree.map(lambda e: slope * e, noise)

        gradients = jax.lax.map(one_pair, jax.random.split(key, pairs))
        return objective(loss_params), jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

    return estimate


@dataclasses.dataclass(frozen=True)
class PersistentEvolutionStrategy:
    """The settings of `persistent_evolution_strategy`; `ml3_jax.persistent` has the algorithm."""

    sigma: float
    pairs: int


def persistent_evolution_strategy(sigma: float = 0.01, pairs: int = 8) -> PersistentEvolutionStrategy:
    """Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021, arXiv:2112.13835), for inner loops in several unrolls.

    As `evolution_strategy`, without the bias of a truncated unroll. Each task carries `pairs` mirrored pairs of perturbed
    optimizees through its inner loop. Every unroll perturbs phi anew, and an objective is credited to the sum of all
    perturbations so far. Perturbations are independent between tasks.

    Unbiased for the smoothed objective of the whole inner loop while phi is constant; a meta-step changes phi little. The
    variance grows with the number of unrolls and of loss parameters. A task carries 2 * pairs optimizees, and a sum of the size
    of phi for each pair.

    Args:
      sigma: standard deviation of a perturbation, in units of phi; positive.
      pairs: mirrored pairs a task; at least 1.

    Raises:
      ValueError: sigma is not positive or pairs is below 1.
    """
    _check_perturbations(sigma, pairs)
    return PersistentEvolutionStrategy(sigma, pairs)


def _check_perturbations(sigma: float, pairs: int) -> None:
    if not sigma > 0.0:
        raise ValueError(f"sigma: expected a positive number, got {sigma}")
    check_count("pairs", pairs)


def standard_normal(key: jax.Array, loss_params: LossParams) -> LossParams:
    """Standard normal numbers with the structure, shapes and dtypes of phi."""
    leaves, treedef = jax.tree.flatten(loss_params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, jnp.shape(leaf), jnp.result_type(leaf)) for k, leaf in zip(keys, leaves, strict=True)]
    )


def score_surrogate(losses: jax.Array, log_probs: jax.Array, others: jax.Array | None = None) -> jax.Array:
    """The mean loss, with the gradient of its expectation over data whose distribution depends on the parameters.

    d E[L] = E[dL + L d log p]: the pathwise gradient plus the score-function term, as in DiCE (Foerster et al. 2018,
    arXiv:1802.05098). The baseline of each task is the mean loss of the other tasks. They are independent of it, so the
    estimate stays unbiased and has less variance.

    Args:
      losses: [M, n], of M tasks drawn independently.
      log_probs: [M, n], log-probability of all data that each loss depends on.
      others: [M, n], the mean loss of the other tasks, if there are more than these M. None: of the other M - 1.

    Returns:
      [] the mean of the losses.
    """
    if others is None:
        others = mean_of_others(losses, jnp.sum(losses, axis=0), losses.shape[0])
    # Cuts the gradient of the weight: the first term has the gradient of the loss.
    credit = jax.lax.stop_gradient(losses - others)
    # Cuts the gradient of the copy: the score has value 0 and the gradient of the log-probability.
    score = log_probs - jax.lax.stop_gradient(log_probs)
    return jnp.mean(losses + credit * score)


def mean_of_others(losses: jax.Array, total: jax.Array, num_tasks: int) -> jax.Array:
    """[M, n], for each task the mean loss of all other tasks; 0 if there is no other.

    Args:
      losses: [M, n], of some of the tasks.
      total: [n], the sum over all tasks.
      num_tasks: number of all tasks.
    """
    return (total[None] - losses) / (num_tasks - 1) if num_tasks > 1 else jnp.zeros_like(losses)


ESTIMATORS: dict[str, Callable[..., Estimator | PersistentEvolutionStrategy]] = {
    "backprop": backprop,
    "es": evolution_strategy,
    "pes": persistent_evolution_strategy,
}


def resolve(estimator: str | Estimator | PersistentEvolutionStrategy) -> Estimator | PersistentEvolutionStrategy:
    """Returns the named estimator with its defaults, or the given one.

    Raises:
      ValueError: the name is unknown.
    """
    if callable(estimator) or isinstance(estimator, PersistentEvolutionStrategy):
        return estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(sorted(ESTIMATORS))} or a function, got {estimator!r}")
    return ESTIMATORS[estimator]()
