"""The inner loop: gradient steps of one optimizee, differentiable with respect to the learned loss, start and step sizes.

`make_segment` unrolls inner steps and ends in the meta-objective. It is written for one task: `meta_gradient` adds the task
axis. `inner_gradient` has the direction of a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.arguments import check_choice
from ml3_jax.descent import descend
from ml3_jax.inner_gradient import InnerFn, make_inner_gradient, with_gradient
from ml3_jax.optimizers import LearnedOptimizer
from ml3_jax.types import COLLECT_GRADIENTS, OBJECTIVES, Context, LearnedLoss, LossParams, Params, Problem, PyTree, Task
from ml3_jax.unroll import unrolled

# (loss_params, params, opt_state, task, context, keys, age, optimizer_params=None) -> (objective, (params, opt_state))
Segment = Callable[..., tuple[Any, tuple[Params, optax.OptState]]]


class StepKeys(NamedTuple):
    """Keys of one unroll; the key of a step is folded from them and from the number of the step."""

    inner: jax.Array  # [] shared by collect, observe and plain_loss of one step
    outer: jax.Array  # [] for the task loss


class Sampled(NamedTuple):
    """The task losses of one unroll, and the log-probability of the data behind each.

    Only the gradient of the log-probabilities matters; `ml3_jax.estimators.score_surrogate` turns both into a scalar.
    """

    losses: jax.Array  # [n], n = 1: after the last inner step; n = K: after each of them
    log_probs: jax.Array  # [n], of all data that collect drew before


class _Objective(NamedTuple):
    """The parts of one inner step besides the descent."""

    collect: Callable[[Params, Task, Context, jax.Array, jax.Array], Task]
    log_prob: Callable[[Params, Task, Context, jax.Array, jax.Array], jax.Array]
    task_loss: Callable[[Params, Task, Context, jax.Array], jax.Array]
    reuse: bool  # the task loss after a step reads the data that the next step learns from


def split_keys(key: jax.Array) -> StepKeys:
    """Splits one key into the keys of the inner steps and of the task loss."""
    inner, outer = jax.random.split(key)
    return StepKeys(inner, outer)


def as_scalar(value: jax.Array, name: str) -> jax.Array:
    """Returns `value` if it is a scalar array; else raises ValueError with `name` and the shape."""
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must return a scalar, got shape {jnp.shape(value)}: reduce it, for example with jnp.mean")
    return value


def observed_loss(problem: Problem, learned_loss: LearnedLoss) -> InnerFn:
    """The scalar that an inner step descends: the learned loss of the observed features."""

    def loss(
        loss_params: LossParams, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        features = problem.observe(params, task, context, key, step)
        return as_scalar(learned_loss.apply(loss_params, features), "the learned loss's apply")

    return loss


def plain_loss(problem: Problem) -> InnerFn:
    """The scalar that the baseline descends, with the signature of `observed_loss`; it ignores loss_params."""

    def loss(
        loss_params: LossParams, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        del loss_params
        if problem.plain_loss is None:
            return as_scalar(problem.task_loss(params, task, context, key), "the problem's task_loss")
        return as_scalar(problem.plain_loss(params, task, context, key, step), "the problem's plain_loss")

    return loss


def inner_loss(problem: Problem, learned_loss: LearnedLoss | None) -> InnerFn:
    """The scalar that an inner step descends: the learned loss, or the plain loss without one."""
    return plain_loss(problem) if learned_loss is None else observed_loss(problem, learned_loss)


def collected(problem: Problem, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> Task:
    """The task with the data of this inner step."""
    if problem.collect is None:
        return task
    # Cuts d(data)/d(theta): the system behind the data has no gradient. An estimator with log_prob accounts for the effect
    # of theta on the distribution of the data.
    params = jax.lax.stop_gradient(params)
    return jax.lax.stop_gradient(problem.collect(params, task, context, key, step))


def make_segment(
    problem: Problem,
    learned_loss: LearnedLoss | None,
    optimizer: optax.GradientTransformation | LearnedOptimizer,
    *,
    steps: int,
    gradient: str,
    objective: str,
    collect_gradient: str = "cut",
) -> Segment:
    """An unroll of `steps` inner steps of one optimizee, and the task loss at its end.

    Args:
      problem: the problem; `observe`, `collect` and `task_loss` are used.
      learned_loss: the loss that the optimizee descends; None for the plain loss.
      optimizer: the inner optimizer, fixed or learned.
      steps: inner steps to unroll, at least 1.
      gradient: a member of `GRADIENT_MODES`.
      objective: "last" (the task loss after the last step) or "mean" (over the steps).
      collect_gradient: "cut" (collected data are constants) or "score" (the segment also returns their log-probability).

    Returns:
      segment(loss_params, params, opt_state, task, context, keys, age, optimizer_params=None) -> (objective, (params,
      opt_state)). age: [] int32, inner steps already taken. The objective is a scalar, or for "score" a `Sampled`.

    Raises:
      ValueError: an unknown choice, "score" for a problem without collect and log_prob, or a problem that has
        reused_rollout_loss and no collect.
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("collect_gradient", collect_gradient, COLLECT_GRADIENTS)
    _check_collect(problem, collect_gradient)
    step_once = _make_step(problem, learned_loss, optimizer, gradient)
    collect, log_prob, task_loss, reuse = _make_objective(problem, gradient, objective, collect_gradient)

    def segment(loss_params, params, opt_state, task, context, keys: StepKeys, age, optimizer_params=None):
        learned = (loss_params, optimizer_params)

        def collect_at(params: Params, step: jax.Array) -> Task:
            return collect(params, task, context, jax.random.fold_in(keys.inner, step), step)

        def inner_step(carry: tuple[Params, optax.OptState, jax.Array, Task], step: jax.Array):
            params, opt_state, likely, data = carry
            key = jax.random.fold_in(keys.inner, step)
            data = data if reuse else collect_at(params, step)
            likely = likely + log_prob(params, data, context, key, step)
            params, opt_state = step_once(learned, params, opt_state, data, context, key, step)
            data = collect_at(params, step + 1) if reuse else None
            if objective == "last":
                return (params, opt_state, likely, data), None
            value = task_loss(params, data if reuse else task, context, jax.random.fold_in(keys.outer, step))
            return (params, opt_state, likely, data), Sampled(value, likely)

        steps_taken = age + jnp.arange(steps, dtype=jnp.int32)
        start = (params, opt_state, jnp.zeros(()), collect_at(params, age) if reuse else None)
        (params, opt_state, likely, _), after = unrolled(inner_step, start, steps_taken, gradient, params)
        if after is None:
            value = task_loss(params, task, context, jax.random.fold_in(keys.outer, age + steps - 1))
            after = Sampled(value[None], likely[None])
        return after if collect_gradient == "score" else jnp.mean(after.losses), (params, opt_state)

    return segment


def trace_features(problem: Problem, params: PyTree, task: Task, context: Context, key: jax.Array) -> PyTree:
    """Shapes of the features at the first inner step, without computing them; arguments may be shapes."""

    def first(params, task, context, key):
        step = jnp.zeros((), jnp.int32)
        return problem.observe(params, collected(problem, params, task, context, key, step), context, key, step)

    return jax.eval_shape(first, params, task, context, key)


def _check_collect(problem: Problem, collect_gradient: str) -> None:
    if collect_gradient == "score" and (problem.collect is None or problem.log_prob is None):
        raise ValueError(
            'collect_gradient="score" needs a problem that has collect and log_prob: give it log_prob=, the log-probability '
            'of the data that collect drew, or choose "cut"'
        )
    if problem.reused_rollout_loss is not None and problem.collect is None:
        raise ValueError(
            "the problem has reused_rollout_loss and no collect: expected both or neither; give it collect=, or leave "
            "reused_rollout_loss out"
        )


def _make_step(
    problem: Problem,
    learned_loss: LearnedLoss | None,
    optimizer: optax.GradientTransformation | LearnedOptimizer,
    gradient: str,
):
    """((loss_params, optimizer_params), params, opt_state, data, context, key, step) -> (params, opt_state) after a step."""
    loss = inner_loss(problem, learned_loss)
    inner_gradient = make_inner_gradient(loss, gradient)

    def step_once(learned, params, opt_state, data, context, key, step):
        loss_params, optimizer_params = learned

        def value_fn(params: Params) -> jax.Array:
            return loss(loss_params, params, data, context, key, step)

        grads = inner_gradient(loss_params, params, data, context, key, step)
        made = optimizer.make(optimizer_params) if isinstance(optimizer, LearnedOptimizer) else optimizer
        return descend(made, grads, opt_state, params, value_fn)

    return jax.checkpoint(step_once) if gradient == "remat" else step_once


def _make_objective(problem: Problem, gradient: str, objective: str, collect_gradient: str) -> _Objective:
    """The functions of the problem as the inner step calls them; all but "reverse" save memory."""
    reused_loss = problem.reused_rollout_loss if objective == "mean" else None

    def collect(params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> Task:
        return collected(problem, params, task, context, key, step)

    def log_prob(params: Params, data: Task, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        if collect_gradient == "cut" or problem.log_prob is None:
            return jnp.zeros(())
        return as_scalar(problem.log_prob(params, data, context, key, step), "the problem's log_prob")

    def task_loss(params: Params, task: Task, context: Context, key: jax.Array) -> jax.Array:
        if reused_loss is not None:
            return as_scalar(reused_loss(params, task, context), "the problem's reused_rollout_loss")
        return as_scalar(problem.task_loss(params, task, context, key), "the problem's task_loss")

    if gradient != "reverse" and collect_gradient == "score":
        log_prob = jax.checkpoint(log_prob)
    if gradient != "reverse" and objective == "mean":
        task_loss = with_gradient(task_loss)  # else the activations of every step are stored until the backward pass
    return _Objective(collect, log_prob, task_loss, reused_loss is not None)
