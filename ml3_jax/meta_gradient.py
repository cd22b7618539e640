"""The meta-gradient: reset finished optimizees, unroll inner steps, task loss, gradient with respect to phi, mean over tasks.

`outer` updates phi with it. Chunks of tasks and devices are the business of `task_map`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ml3_jax import chunks
from ml3_jax.descent import in_float32
from ml3_jax.estimators import Estimator, PersistentEvolutionStrategy, mean_of_others, score_surrogate
from ml3_jax.inner import Sampled, Segment, as_scalar, split_keys
from ml3_jax.inner_state import InitInner, Sizes, reset_finished
from ml3_jax.learned_parts import LearnedParts
from ml3_jax.persistent import Unroll, check_carried, unroll_pairs
from ml3_jax.task_map import MeanGradient, mean_over_tasks
from ml3_jax.types import Context, InnerState, LossParams, PersistentInnerState, Phi, Problem, Task

# (loss_params, task, context, key) -> scalar
AuxiliaryLoss = Callable[[LossParams, Task, Context, jax.Array], jax.Array]

# (phi, context, inner_state, key, mesh) -> ((mean objective, TaskOutputs), gradient)
MetaGradient = Callable[[Phi, Context, InnerState | None, jax.Array, Mesh | None], MeanGradient]

_AUXILIARY = 2**32 - 1  # folded into the key of the auxiliary loss; no inner step has this number


class TaskInputs(NamedTuple):
    """One meta-step's inputs of each task; without the axis M, of one task."""

    inner_state: InnerState | None  # [M, ...] of the last meta-step
    fresh: Any  # [M] keys; after the draw an InnerState [M, ...]
    step_keys: jax.Array  # [M]
    estimate_keys: jax.Array  # [M], all equal if an estimator draws the same for every chunk of tasks


class TaskOutputs(NamedTuple):
    """One meta-step's outputs of each task."""

    inner_state: InnerState | None  # [M, ...] after the unroll, None unless it is carried
    auxiliary: jax.Array | None  # [M] auxiliary losses, None without one
    left_out: jax.Array | None = None  # [M] bool, tasks that are not finite; None if none is left out


def task_inputs(
    key: jax.Array, inner_state: InnerState | None, num_tasks: int, estimate: Estimator | PersistentEvolutionStrategy
) -> TaskInputs:
    """The inputs of the tasks of one meta-step, before their draws; `key` is that of the meta-step."""
    task_keys, estimate_keys = jax.random.split(key, (2, num_tasks))
    keys = jax.vmap(jax.random.split)(task_keys)
    if not isinstance(estimate, PersistentEvolutionStrategy):
        estimate_keys = jnp.broadcast_to(estimate_keys[0], estimate_keys.shape)
    return TaskInputs(inner_state, keys[:, 0], keys[:, 1], estimate_keys)


def start_of(phi: Phi, task: TaskInputs, parts: LearnedParts, sizes: Sizes) -> InnerState:
    """The optimizee of one task before the unroll: the carried one, or a fresh one if that has finished."""
    fresh = parts.begin(phi, task.fresh)
    if task.inner_state is None or sizes.full_unroll:
        return fresh
    return parts.begin_newborn(phi, reset_finished(fresh, task.inner_state))


def make_draw(init_inner: InitInner, sizes: Sizes) -> Callable[[TaskInputs, Context], TaskInputs]:
    """Builds the function that starts a fresh inner loop for each task; it is used if the current one has finished."""

    def draw(tasks: TaskInputs, context: Context) -> TaskInputs:
        end = jnp.asarray(sizes.inner_steps, jnp.int32)
        return tasks._replace(fresh=jax.vmap(init_inner, in_axes=(0, None, None))(tasks.fresh, context, end))

    return draw


def make_unroll(segment: Segment, parts: LearnedParts, auxiliary_loss: AuxiliaryLoss | None, sizes: Sizes) -> Unroll:
    """Builds the unroll of one task: its inner steps, the objective, and the auxiliary loss if there is one."""

    def unroll(phi: Phi, context: Context, start: InnerState, key: jax.Array) -> tuple[Any, jax.Array | None, InnerState]:
        loss_params, _, optimizer_params = parts.split(phi)
        keys, optimizee = split_keys(key), (start.params, start.opt_state)
        value, (params, opt_state) = segment(
            loss_params, *optimizee, start.task, context, keys, start.age, optimizer_params=optimizer_params
        )
        end = start.replace(params=params, opt_state=opt_state, age=start.age + sizes.unroll)
        if auxiliary_loss is None:
            return value, None, end
        key = jax.random.fold_in(keys.outer, _AUXILIARY)
        return value, as_scalar(auxiliary_loss(loss_params, start.task, context, key), "auxiliary_loss"), end

    return unroll


def make_meta_gradient(
    problem: Problem,
    parts: LearnedParts,
    segment: Segment,
    init_inner: InitInner,
    estimate: Estimator | PersistentEvolutionStrategy,
    sizes: Sizes,
    *,
    collect_gradient: str,
    keep_inner_state: bool,
    auxiliary_loss: AuxiliaryLoss | None,
    leave_out: bool,
    max_norm: float,
) -> MetaGradient:
    """The gradient of the mean objective over `sizes.num_tasks` tasks after one unroll of each.

    Args:
      problem: the problem, for the cost of its inner step.
      parts: the learned parts.
      segment: of `ml3_jax.inner.make_segment`.
      init_inner: of `ml3_jax.inner_state.make_init_inner`.
      estimate: the gradient estimator (`ml3_jax.estimators`).
      sizes: numbers of tasks and steps.
      collect_gradient: of the segment.
      keep_inner_state: whether the inner state is carried to the next meta-step.
      auxiliary_loss: see `ml3_jax.make_meta_learner`.
      leave_out: whether tasks that are not finite are left out of the mean.
      max_norm: of the gradient of a task that is not left out.

    Returns:
      (phi, context, inner_state, key, mesh) -> ((mean objective, TaskOutputs), gradient).
    """
    inner_step_cost = chunks.inner_step_cost(problem, parts.learned_loss)
    draw, unroll = make_draw(init_inner, sizes), make_unroll(segment, parts, auxiliary_loss, sizes)

    def unroll_task(phi: Phi, context: Context, task: TaskInputs) -> tuple[Any, TaskOutputs]:
        """One task: reset a finished optimizee, unroll inner steps, and take the task loss."""
        value, auxiliary, end = unroll(phi, context, start_of(phi, task, parts, sizes), task.step_keys)
        return value, TaskOutputs(end if keep_inner_state else None, auxiliary)

    def unroll_tasks(phi: Phi, context: Context, tasks: TaskInputs) -> tuple[Any, TaskOutputs]:
        if tasks.step_keys.shape[0] > 1:
            return jax.vmap(unroll_task, in_axes=(None, None, 0))(phi, context, tasks)
        # Without the axis: XLA copies an optimizee [1, L, ...] to scan over its layers L.
        alone = unroll_task(phi, context, jax.tree.map(lambda x: x[0], tasks))
        return jax.tree.map(lambda x: x[None], alone)

    def of_objective(
        estimate: Estimator, tasks: TaskInputs, phi: Phi, context: Context, total: jax.Array | None
    ) -> MeanGradient:
        """The gradient of the mean objective over some tasks, with respect to phi; total: of `sum_of_losses`, of all tasks."""

        def objective(moved: Phi) -> tuple[jax.Array, TaskOutputs]:
            values, outputs = unroll_tasks(moved, context, tasks)
            if isinstance(values, Sampled):
                others = None if total is None else mean_of_others(values.losses, total, sizes.num_tasks)
                value = score_surrogate(values.losses, values.log_probs, others)
            else:
                value = jnp.mean(values)
            if outputs.auxiliary is not None:
                value = value + jnp.mean(outputs.auxiliary)
            return value, outputs

        return estimate(objective, phi, tasks.estimate_keys[0])

    if isinstance(estimate, PersistentEvolutionStrategy):
        strategy, members, gradient_of = estimate, 2, _persistent_gradient(estimate, unroll, unroll_task, parts, sizes)
    else:
        strategy, members, gradient_of = None, 1, functools.partial(of_objective, estimate)

    def sum_of_losses(tasks: TaskInputs, phi: Phi, context: Context) -> jax.Array:
        """[n], for the baseline of the score function, which is a mean over tasks."""
        return jnp.sum(unroll_tasks(phi, context, tasks)[0].losses, axis=0)

    def cost(task: TaskInputs, phi: Phi, context: Context) -> tuple[int, bool]:
        start = task.fresh if parts.loss_alone else jax.eval_shape(parts.begin, phi, task.fresh)
        amount, simulates = inner_step_cost(start, parts.split(phi)[0], context, task.step_keys)
        return members * amount, simulates

    def meta_gradient(
        phi: Phi, context: Context, inner_state: InnerState | None, key: jax.Array, mesh: Mesh | None
    ) -> MeanGradient:
        if strategy is not None:
            check_carried(inner_state, strategy, sizes)
        tasks = task_inputs(key, inner_state, sizes.num_tasks, estimate)
        options: dict[str, Any] = {"draw": draw, "cost": cost, "mesh": mesh, "at_once": sizes.tasks_at_once}
        if leave_out:
            mean = mean_over_tasks(_zero_unless_finite(gradient_of, max_norm), tasks, phi, context, **options)
            return _mean_of_finite(mean, sizes.num_tasks)
        sum_first = sum_of_losses if collect_gradient == "score" else None
        return mean_over_tasks(gradient_of, tasks, phi, context, sum_first=sum_first, **options)

    return meta_gradient


def _persistent_gradient(
    strategy: PersistentEvolutionStrategy,
    unroll: Unroll,
    unroll_task: Callable[[Phi, Context, TaskInputs], tuple[Any, TaskOutputs]],
    parts: LearnedParts,
    sizes: Sizes,
) -> Callable[..., MeanGradient]:
    """The mean gradient over some tasks, from the perturbed copies of each; the value is that of the unperturbed optimizees."""

    def gradient_of(tasks: TaskInputs, phi: Phi, context: Context, total: None) -> MeanGradient:
        def of_one(task: TaskInputs) -> MeanGradient:
            value, outputs = unroll_task(phi, context, task)
            start, keys = start_of(phi, task, parts, sizes), (task.step_keys, task.estimate_keys)
            gradient, particles = unroll_pairs(strategy, unroll, parts, phi, context, start, *keys)
            if isinstance(outputs.inner_state, PersistentInnerState):
                outputs = outputs._replace(inner_state=outputs.inner_state.replace(particles=particles))
            return (value if outputs.auxiliary is None else value + outputs.auxiliary, outputs), gradient

        (values, outputs), gradients = jax.vmap(of_one)(tasks)
        return (jnp.mean(values), outputs), jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

    return gradient_of


def _zero_unless_finite(gradient_of: Callable[..., MeanGradient], max_norm: float) -> Callable[..., MeanGradient]:
    """The mean over some tasks, with zeros for the value and the gradient of each task that is not finite or explodes."""

    def gradient_without(tasks: TaskInputs, phi: Phi, context: Context, total: None) -> MeanGradient:
        def of_one(task: TaskInputs) -> tuple[MeanGradient, jax.Array]:
            (value, outputs), gradient = gradient_of(jax.tree.map(lambda x: x[None], task), phi, context, total)
            finite = jnp.isfinite(value) & (optax.tree.norm(in_float32(gradient)) <= max_norm)
            made = (value, outputs._replace(inner_state=None)), gradient
            (value, rest), gradient = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), made)
            outputs = rest._replace(inner_state=outputs.inner_state)
            return ((value, jax.tree.map(lambda x: x[0], outputs)), gradient), finite

        ((values, outputs), gradients), finite = jax.vmap(of_one)(tasks)
        gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        return (jnp.mean(values), outputs._replace(left_out=~finite)), gradient

    return gradient_without


def _mean_of_finite(mean: MeanGradient, num_tasks: int) -> MeanGradient:
    """The mean over the finite tasks, from that over all tasks with zeros for the others; NaN if none is finite."""
    (value, outputs), gradient = mean
    kept = num_tasks - jnp.sum(outputs.left_out)
    scale = jnp.where(kept > 0, num_tasks / jnp.maximum(kept, 1), jnp.nan)
    auxiliary = None if outputs.auxiliary is None else scale * outputs.auxiliary
    gradient = jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradient)
    return (scale * value, outputs._replace(auxiliary=auxiliary)), gradient
