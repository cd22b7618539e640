"""Meta-test: an optimizee descends a learned loss (`adapt`) or the plain one (`baseline`), and its history is kept.

Both are one compiled scan, pure, so that callers can vmap them over tasks and step sizes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ml3_jax.inner import InnerFn, collected, observed_loss, plain_loss
from ml3_jax.types import Adaptation, Context, LearnedLoss, LossParams, Params, Problem, Task


def adapt(
    problem: Problem,
    learned_loss: LearnedLoss,
    loss_params: LossParams,
    task: Task,
    context: Context,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    params: Params | None = None,
    evaluate_every: int | jax.Array = 1,
) -> Adaptation:
    """Trains one optimizee with a learned loss whose parameters are frozen; the task loss is not needed.

    Args:
      problem: the problem; its observe must give what the loss was meta-trained on.
      learned_loss: the loss.
      loss_params: its parameters.
      task: one task (no task axis).
      context: what the problem's functions get as context.
      key: a typed key; the same key gives `baseline` the same initialisation, data and evaluation.
      optimizer: any optax optimizer of the optimizee. One compilation for each optimizer object: build it once.
      steps: inner steps, at least 1.
      params: where to start; None draws problem.init.
      evaluate_every: updates from one evaluation to the next, at least 1; it may be traced. The start and the end are
        always evaluated; between two evaluations the trace repeats the earlier one. What an evaluation costs counts where
        it samples a system.

    Returns:
      Adaptation(params, trace): trace[name] is [steps + 1], index 0 before any update.

    Raises:
      ValueError: steps or evaluate_every below 1, or features of another shape than the learned loss takes.
    """
    _check_steps(steps)
    every = _checked_every(evaluate_every)
    return _descend(_Descended(problem, learned_loss), optimizer, int(steps), loss_params, task, context, key, params, every)


def baseline(
    problem: Problem,
    task: Task,
    context: Context,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    params: Params | None = None,
    evaluate_every: int | jax.Array = 1,
) -> Adaptation:
    """Trains one optimizee with the problem's plain loss (task_loss where it has none); otherwise as `adapt`.

    Args, Returns, Raises: as `adapt`; the same key gives the same initialisation and the same data.
    """
    _check_steps(steps)
    every = _checked_every(evaluate_every)
    return _descend(_Descended(problem, None), optimizer, int(steps), None, task, context, key, params, every)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, got {steps!r}")


def _checked_every(evaluate_every: Any) -> Any:
    """None where every update is evaluated; else the number. The value of one that is traced is the caller's to check."""
    if isinstance(evaluate_every, jax.Array) and jnp.issubdtype(evaluate_every.dtype, jnp.integer) and evaluate_every.ndim == 0:
        if isinstance(evaluate_every, Tracer):
            return evaluate_every
        evaluate_every = int(evaluate_every)
    if not isinstance(evaluate_every, (int, np.integer)) or isinstance(evaluate_every, bool) or evaluate_every < 1:
        raise ValueError(f"evaluate_every: expected a whole number of at least 1, got {evaluate_every!r}")
    return None if evaluate_every == 1 else evaluate_every


class _Descended(NamedTuple):
    """What is descended, hashable by its functions so that equal calls share one compilation."""

    problem: Problem
    learned_loss: LearnedLoss | None

    def gradient(self) -> InnerFn:
        loss = plain_loss(self.problem) if self.learned_loss is None else observed_loss(self.problem, self.learned_loss)
        return jax.grad(loss, argnums=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(
    descended: _Descended,
    optimizer: optax.GradientTransformation,
    steps: int,
    loss_params: LossParams,
    task: Task,
    context: Context,
    key: jax.Array,
    params: Params | None,
    evaluate_every: int | jax.Array | None,
) -> Adaptation:
    problem, gradient = descended.problem, descended.gradient()
    init_key, inner_key, evaluate_key = jax.random.split(key, 3)
    first: Any = problem.init(init_key, task) if params is None else params

    def evaluate(params: Params) -> dict[str, jax.Array]:
        # One key for the whole history: a stochastic evaluation then sees the same draws before and after an update.
        return dict(problem.evaluate(params, task, context, evaluate_key))

    def evaluate_after(step: jax.Array, params: Params, before: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if evaluate_every is None:
            return evaluate(params)
        due = ((step + 1) % evaluate_every == 0) | (step + 1 == steps)
        return jax.lax.cond(due, lambda: evaluate(params), lambda: before)

    def inner_step(carry: tuple[Params, Any, dict[str, jax.Array]], step: jax.Array):
        params, opt_state, latest = carry
        step_key = jax.random.fold_in(inner_key, step)
        data = collected(problem, params, task, context, step_key, step)
        grads = gradient(loss_params, params, data, context, step_key, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        latest = evaluate_after(step, params, latest)
        return (params, opt_state, latest), latest

    start = evaluate(first)
    carry = (first, optimizer.init(first), start)
    (params, _, _), after = jax.lax.scan(inner_step, carry, jnp.arange(steps, dtype=jnp.int32))
    trace = jax.tree.map(lambda value, values: jnp.concatenate([value[None], values]), start, after)
    return Adaptation(params, trace)
