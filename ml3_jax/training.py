"""Meta-training with a view: metrics for a logger of your own, and the best learned loss by held-out tasks.

`train` calls `MetaLearner.run`; the launches have a loop of their own, which saves and resumes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.adaptation import adapt, baseline
from ml3_jax.arguments import check_callable, check_count, check_key, check_kind
from ml3_jax.optimizers import LearnedOptimizer
from ml3_jax.types import (
    Context,
    LearnedLoss,
    LossParams,
    MetaLearner,
    MetaState,
    Metrics,
    OptimizerParams,
    Params,
    Problem,
)

# (loss_params, init_params=None, optimizer_params=None) -> scalar, lower is better
Validation = Callable[..., jax.Array]
# (meta-step, {name: number}) -> None
Callback = Callable[[int, Mapping[str, float]], Any]


class Trained(NamedTuple):
    """The result of `train`.

    Attributes:
      state: after the last meta-step, to go on from.
      best: the loss_params with the lowest validation, those of `state` without one.
      best_step: the meta-step of `best`.
      best_value: its validation, None without one.
      best_init_params: the learned initialisation of `best_step`, None if it is fixed.
      best_optimizer_params: the parameters of a learned inner optimizer of `best_step`, None if it is fixed.
    """

    state: MetaState
    best: LossParams
    best_step: int
    best_value: float | None
    best_init_params: Params = None
    best_optimizer_params: OptimizerParams = None


def train(
    meta: MetaLearner,
    state: MetaState,
    num_steps: int,
    *,
    every: int = 100,
    callback: Callback | None = None,
    validate: Validation | None = None,
) -> Trained:
    """Meta-trains for a number of steps, and stops every few steps to report and to validate.

    Args:
      meta: of `make_meta_learner`.
      state: of `meta.init`, or an earlier `Trained.state`.
      num_steps: meta-steps to take.
      every: meta-steps from one report to the next. With `refresh_every`, a multiple of it: each block of steps begins with a
        refresh.
      callback: gets the number of the meta-step and the means of each field of `Metrics` since the last call, with
        "validation" if there is one. For example `lambda step, metrics: wandb.log(dict(metrics), step=step)`.
      validate: of `make_validation`, or any function of loss_params; with a learned initialisation or inner optimizer, of
        (loss_params, init_params, optimizer_params). The start is validated too. Values that are not finite are never the best.

    Returns:
      Trained(state, best, best_step, best_value, best_init_params, best_optimizer_params).

    Raises:
      TypeError, ValueError: as `MetaLearner.run`.
    """
    check_kind("meta", meta, MetaLearner, "as make_meta_learner returns it")
    check_count("num_steps", num_steps)
    check_count("every", every)
    check_callable("callback", callback, optional=True)
    check_callable("validate", validate, optional=True)
    compiled = None if validate is None else jax.jit(validate)
    step, end = int(state.step), int(state.step) + num_steps
    best, best_step = _copied(_learned(state)), step
    best_value = None if compiled is None else float(compiled(*best))
    while step < end:
        state, metrics = meta.run(state, min(every, end - step))
        step = int(state.step)
        said = _means(metrics)
        if compiled is not None:
            said["validation"] = value = float(compiled(*_learned(state)))
            if math.isfinite(value) and (best_value is None or not best_value <= value or not math.isfinite(best_value)):
                best, best_step, best_value = _copied(_learned(state)), step, value
        if callback is not None:
            callback(step, said)
    if compiled is None:
        best, best_step = _copied(_learned(state)), step
    return Trained(state, best[0], best_step, best_value, *best[1:])


def make_validation(
    problem: Problem,
    learned_loss: LearnedLoss | None,
    metric: str,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation | LearnedOptimizer,
    steps: int,
    num_tasks: int = 20,
    context: Context = None,
    maximize: bool = False,
) -> Validation:
    """A function of the learned parts: the mean metric of optimizees that descended the loss on tasks of their own.

    Args:
      problem: the problem.
      learned_loss: the loss; None for the plain loss.
      metric: a name in the problem's evaluate.
      key: of tasks, initialisations and data, always the same. Use another one to report results.
      optimizer: of the optimizees; the inner optimizer of meta-training if it is learned.
      steps: inner steps; the metric is taken after the last one.
      num_tasks: tasks.
      context: of the problem's functions.
      maximize: whether a larger metric is better; the value is then negative.

    Returns:
      (loss_params, init_params=None, optimizer_params=None) -> scalar, lower is better.

    Raises:
      TypeError: `key` is none.
      ValueError: a count below 1; from the function, a metric that evaluate does not return.
    """
    check_key("key", key)
    check_count("num_tasks", num_tasks)
    check_count("steps", steps)
    task_keys, run_keys = jax.random.split(key, (2, num_tasks))

    def validate(loss_params: LossParams, init_params: Params = None, optimizer_params: OptimizerParams = None) -> jax.Array:
        made = optimizer.make(optimizer_params) if isinstance(optimizer, LearnedOptimizer) else optimizer
        how: dict[str, Any] = {"optimizer": made, "steps": steps, "evaluate_every": steps, "params": init_params}

        def one(task_key: jax.Array, run_key: jax.Array) -> jax.Array:
            task = problem.sample_task(task_key, context)
            if learned_loss is None:
                trace = baseline(problem, task, context, run_key, **how).trace
            else:
                trace = adapt(problem, learned_loss, loss_params, task, context, run_key, **how).trace
            if metric not in trace:
                raise ValueError(f"metric: expected one of {', '.join(sorted(trace))}, got {metric!r}")
            return trace[metric][-1]

        mean = jnp.mean(jax.vmap(one)(task_keys, run_keys))
        return -mean if maximize else mean

    return validate


def _learned(state: MetaState) -> tuple[Any, ...]:
    """The learned parts of a state: (loss_params,), or all three if more is learned."""
    if state.init_params is None and state.optimizer_params is None:
        return (state.loss_params,)
    return (state.loss_params, state.init_params, state.optimizer_params)


def _copied(tree: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy: with `donate` the next meta-step reuses the memory of its state."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def _means(metrics: Metrics) -> dict[str, float]:
    """{field: mean over the steps}."""
    return {name: float(jnp.mean(value)) for name, value in vars(metrics).items()}
