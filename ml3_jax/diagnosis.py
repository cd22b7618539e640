"""Where a meta-step stops being finite: which task, which inner step, which function.

`MetaLearner.diagnose` repeats the meta-step of a state, one task and one inner step at a time, and looks at every term.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml3_jax.descent import all_finite, in_float32
from ml3_jax.estimators import Estimator, PersistentEvolutionStrategy
from ml3_jax.first_operation import first_operation
from ml3_jax.inner import Sampled, Segment, StepKeys, collected, inner_loss, split_keys
from ml3_jax.inner_state import InitInner, Sizes
from ml3_jax.learned_parts import LearnedParts, not_finite
from ml3_jax.meta_gradient import make_draw, make_unroll, start_of, task_inputs
from ml3_jax.persistent import unroll_pairs
from ml3_jax.types import Context, Diagnose, InnerState, MetaState, Phi, Problem, PyTree

# The terms of an inner step in the order in which they are computed; the last two are of the objective.
TERMS = (
    "the data that collect drew",
    "the features that observe returned",
    "the learned loss",
    "the gradient of the learned loss",
    "the parameters after the update",
    "the task loss",
    "the gradient of the task loss",
)
NOTHING = "all terms of this meta-step are finite"


def make_diagnose(
    problem: Problem,
    parts: LearnedParts,
    one_step: Segment,
    segment: Segment,
    init_inner: InitInner,
    estimate: Estimator | PersistentEvolutionStrategy,
    sizes: Sizes,
    key_of: Callable[[MetaState], jax.Array],
    *,
    objective: str,
    max_norm: float,
) -> Diagnose:
    """Builds `MetaLearner.diagnose`.

    Args:
      problem: the problem.
      parts: the learned parts.
      one_step: of `ml3_jax.inner.make_segment` for one step.
      segment: the same for a full unroll.
      init_inner: of `ml3_jax.inner_state.make_init_inner`.
      estimate: the gradient estimator.
      sizes: numbers of tasks and steps.
      key_of: state -> the key of its next meta-step.
      objective: a member of `ml3_jax.types.OBJECTIVES`.
      max_norm: of a meta-gradient that does not explode.
    """
    draw, loss_of = make_draw(init_inner, sizes), inner_loss(problem, parts.learned_loss)
    terms = TERMS if parts.learned_loss is not None else tuple(term.replace("learned loss", "plain loss") for term in TERMS)

    def phi_of(state: MetaState) -> Phi:
        return parts.join(state.loss_params, state.init_params, state.optimizer_params)

    @jax.jit
    def start(state: MetaState) -> tuple[InnerState, jax.Array, jax.Array]:
        """The optimizees [M, ...] before the unroll, the keys of their steps, and those of the estimator."""
        tasks = draw(task_inputs(key_of(state), state.inner_state, sizes.num_tasks, estimate), state.context)
        return jax.vmap(lambda task: start_of(phi_of(state), task, parts, sizes))(tasks), tasks.step_keys, tasks.estimate_keys

    @jax.jit
    def step(phi: Phi, context: Context, current: InnerState, keys: StepKeys) -> tuple[jax.Array, InnerState]:
        """Which of `TERMS` are finite in one inner step, and the optimizee after it."""
        params, task, age = current.params, current.task, current.age
        loss_params, _, optimizer_params = parts.split(phi)
        key = jax.random.fold_in(keys.inner, age)
        data = collected(problem, params, task, context, key, age)
        features = () if parts.learned_loss is None else problem.observe(params, data, context, key, age)
        value = functools.partial(loss_of, loss_params)
        slope = jax.grad(value)(params, data, context, key, age)
        out, (params, opt_state) = one_step(
            loss_params, params, current.opt_state, task, context, keys, age, optimizer_params=optimizer_params
        )
        losses = out.losses if isinstance(out, Sampled) else out
        task_slope = jax.grad(problem.task_loss)(params, task, context, jax.random.fold_in(keys.outer, age))
        loss = value(current.params, data, context, key, age)
        found = (data if problem.collect is not None else (), features, loss, slope, params, losses, task_slope)
        after = current.replace(params=params, opt_state=opt_state, age=age + 1)
        return jnp.stack([_finite(term) for term in found]), after

    unroll = make_unroll(segment, parts, None, sizes)

    def meta_gradient(phi: Phi, context: Context, current: InnerState, step_key: jax.Array, key: jax.Array) -> Phi:
        if isinstance(estimate, PersistentEvolutionStrategy):
            return unroll_pairs(estimate, unroll, parts, phi, context, current, step_key, key)[0]

        def of(moved: Phi) -> tuple[jax.Array, None]:
            out = unroll(moved, context, parts.begin_newborn(moved, current), step_key)[0]
            return jnp.mean(out.losses if isinstance(out, Sampled) else out), None

        return estimate(of, phi, key)[1]

    @jax.jit
    def norm(*args: Any) -> jax.Array:
        gradient = in_float32(meta_gradient(*args))
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))
        # The squares of large numbers overflow.
        scaled = jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0.0, largest, 1.0), gradient)
        return largest * optax.tree.norm(scaled)

    def diagnose(state: MetaState, operation: bool = False) -> str:
        phi = phi_of(state)
        bad = not_finite(phi)
        if bad:
            return bad
        all_tasks = start(state)
        for number in range(sizes.num_tasks):
            current, step_key, key = jax.tree.map(lambda leaf, i=number: leaf[i], all_tasks)
            args, keys = (phi, state.context, current, step_key, key), split_keys(step_key)
            found = functools.partial(_with_operation, meta_gradient, args) if operation else str
            for index in range(sizes.unroll):
                age = int(current.age)
                finite, current = step(phi, state.context, current, keys)
                judged = objective == "mean" or index == sizes.unroll - 1
                for term, good in zip(terms if judged else terms[:5], finite.tolist(), strict=False):
                    if not good:
                        return found(f"task {number}, inner step {age} (of {sizes.inner_steps}): {term} is not finite")
            size = float(norm(*args))
            if math.isfinite(size) and size > max_norm:
                return (
                    f"task {number}: all terms are finite, and the meta-gradient explodes: its norm is {size:.3g} (at most "
                    f"{max_norm:.3g}). Scale the task loss down, shorten the unroll or lower the inner step size"
                )
            if not math.isfinite(size) and isinstance(estimate, PersistentEvolutionStrategy):
                return found(
                    f"task {number}: a perturbed copy of the optimizee is not finite, and all terms of the optimizee itself "
                    "are: choose a smaller sigma"
                )
            if not math.isfinite(size):
                return found(
                    f"task {number}: the derivative of the inner steps is not finite, and all their terms are. The inner "
                    "optimizer is the usual cause: give Adam, RMSProp and the like eps_root > 0"
                )
        return NOTHING

    return diagnose


def _with_operation(function: Callable[..., Phi], args: tuple[Any, ...], words: str) -> str:
    """The words about a term, with the first operation that is to blame."""
    named = first_operation(function, *args)
    return f"{words}. The first operation that is not finite: {named}" if named else words


def _finite(term: PyTree) -> jax.Array:
    floating = [leaf for leaf in jax.tree.leaves(term) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    return all_finite(floating) if floating else jnp.asarray(True)
