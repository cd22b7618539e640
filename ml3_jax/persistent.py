"""Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021, arXiv:2112.13835): perturbed optimizees that are carried.

`estimators.persistent_evolution_strategy` has the settings. `meta_gradient` calls `unroll_pairs` for each task; the copies of
the optimizee are reset with it (`inner_state.reset_finished`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax.estimators import PersistentEvolutionStrategy, standard_normal
from ml3_jax.inner_state import Sizes, with_particles
from ml3_jax.learned_parts import LearnedParts
from ml3_jax.types import Context, InnerState, Particles, PersistentInnerState, Phi

# (phi, context, start, key) -> (objective, auxiliary loss or None, end), for one task
Unroll = Callable[[Phi, Context, InnerState, jax.Array], tuple[Any, jax.Array | None, InnerState]]


def shift_like(phi: Phi, pairs: int) -> Phi:
    """Shapes [P, ...] of `Particles.shift` of one task."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((pairs, *jnp.shape(leaf)), jnp.result_type(leaf)), phi)


def with_first_particles(inner_state: InnerState, phi: Phi, pairs: int) -> PersistentInnerState:
    """The first inner loops [M, ...] with equal copies of their optimizees."""
    shift = shift_like(phi, pairs)
    return jax.vmap(lambda start: with_particles(start, shift))(inner_state)


def unroll_pairs(
    strategy: PersistentEvolutionStrategy,
    unroll: Unroll,
    parts: LearnedParts,
    phi: Phi,
    context: Context,
    start: InnerState,
    step_key: jax.Array,
    key: jax.Array,
) -> tuple[Phi, Particles]:
    """The meta-gradient of one task, from one unroll of its mirrored pairs.

    Each pair unrolls under phi + sigma e and phi - sigma e, with e ~ N(0, I) drawn anew, from the copies that earlier
    perturbations left. With s, the sum of all e of this inner loop, the estimate is the mean over pairs of
    (L+ - L-) / (2 sigma) s: the paper's estimate from mirrored pairs, with s in units of sigma. Both members have the same task
    and keys. The auxiliary loss knows nothing of earlier perturbations, so its difference is credited to e alone. A learned
    initialisation is perturbed once an inner loop, at its start.

    Args:
      strategy: the settings.
      unroll: the inner steps of one task and its objective.
      parts: the learned parts.
      phi: their parameters.
      context: shared by all tasks.
      start: the inner loop of one task; without particles, copies of its optimizee start here.
      step_key: of the inner steps and the task loss; equal for all copies.
      key: of the perturbations.

    Returns:
      (gradient, particles after the unroll [P, ...]).
    """
    if not isinstance(start, PersistentInnerState):
        start = with_particles(start, shift_like(phi, strategy.pairs))
    task, age, end = start.task, start.age, start.end

    def one(moved: Phi, params: Any, opt_state: Any) -> tuple[jax.Array, jax.Array | None, Any, Any]:
        begun = parts.begin_newborn(moved, InnerState(params, opt_state, task, age, end))
        value, auxiliary, after = unroll(moved, context, begun, step_key)
        return value, auxiliary, after.params, after.opt_state

    def slope(values: jax.Array) -> jax.Array:
        return (values[0] - values[1]) / (2.0 * strategy.sigma)

    def add_pair(total: Phi, inputs: tuple[jax.Array, Particles]) -> tuple[Phi, Particles]:
        key, pair = inputs
        noise = standard_normal(key, phi)
        both = jax.tree.map(lambda p, e: jnp.stack([p + strategy.sigma * e, p - strategy.sigma * e]), phi, noise)
        values, auxiliary, params, opt_state = jax.vmap(one)(both, pair.params, pair.opt_state)
        noise = parts.credited(noise, age)
        shift = jax.tree.map(jnp.add, pair.shift, noise)
        gradient = jax.tree.map(lambda s: slope(values) * s, shift)
        if auxiliary is not None:
            gradient = jax.tree.map(lambda g, e: g + slope(auxiliary) * e, gradient, noise)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)
        return total, Particles(params, opt_state, shift)

    zeros = jax.tree.map(jnp.zeros_like, phi)
    total, particles = jax.lax.scan(add_pair, zeros, (jax.random.split(key, strategy.pairs), start.particles))
    return jax.tree.map(lambda t: t / strategy.pairs, total), particles


def check_carried(inner_state: InnerState | None, strategy: PersistentEvolutionStrategy, sizes: Sizes) -> None:
    """Checks that a state carries the perturbed optimizees of this estimator.

    Raises:
      ValueError: the state is of a learner with another estimator, or with another number of pairs.
    """
    if sizes.full_unroll:
        return
    carried = 0
    if isinstance(inner_state, PersistentInnerState):
        carried = jax.tree.leaves(inner_state.particles.shift)[0].shape[1]
    if carried != strategy.pairs:
        raise ValueError(
            f'state: expected {strategy.pairs} pairs of perturbed optimizees a task for estimator="pes", got {carried}: take '
            "the state from this learner's init, and give it the loss_params that you have"
        )
