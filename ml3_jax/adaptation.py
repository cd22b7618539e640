"""Meta-test: an optimizee descends a learned loss (`adapt`) or the plain loss (`baseline`), with its history.

Both are one compiled scan and pure. Callers can vmap them over tasks and step sizes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ml3_jax.arguments import check_count, check_key, check_kind, check_optimizer
from ml3_jax.descent import check_real, descend
from ml3_jax.inner import collected, inner_loss
from ml3_jax.inner_gradient import InnerFn
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
    """Trains one optimizee with a frozen learned loss; the task loss is not needed.

    Args:
      problem: the problem; its observe must return the features of the meta-training.
      learned_loss: the loss.
      loss_params: its parameters.
      task: one task (no task axis).
      context: the context of the problem's functions.
      key: a typed key; the same key gives `baseline` the same initialisation, data and evaluation.
      optimizer: any optax optimizer of the optimizee. Each optimizer object compiles once: build it once. Of a learned one,
        `ml3_jax.optimizers.LearnedOptimizer.make(optimizer_params)`.
      steps: inner steps, at least 1.
      params: the first parameters, such as a learned initialisation; None draws problem.init.
      evaluate_every: updates from one evaluation to the next, at least 1; it may be traced. The start and the end are
        always evaluated. Between two evaluations the trace repeats the earlier one. Use it for evaluations that simulate.

    Returns:
      Adaptation(params, trace): trace[name] is [steps + 1], index 0 before any update.

    Raises:
      TypeError: an argument of another kind, such as a number for an optimizer.
      ValueError: steps or evaluate_every below 1, or features of another shape than the learned loss takes.
    """
    source = "as ml3_jax.losses has them (ml3_jax.baseline descends the plain loss)"
    check_kind("learned_loss", learned_loss, LearnedLoss, source)
    steps, every = _checked(problem, optimizer, key, steps, evaluate_every)
    descended = _Descended(problem.for_inner_steps(steps), learned_loss)
    return _descend(descended, optimizer, steps, every, loss_params, task, context, key, params)


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
    """Trains one optimizee with the problem's plain loss, or with task_loss if it has none; otherwise as `adapt`.

    Args, Returns, Raises: as `adapt`. The same key gives the same initialisation and the same data.
    """
    steps, every = _checked(problem, optimizer, key, steps, evaluate_every)
    return _descend(_Descended(problem.for_inner_steps(steps), None), optimizer, steps, every, None, task, context, key, params)


def _checked(problem: Any, optimizer: Any, key: Any, steps: Any, evaluate_every: Any) -> tuple[int, Any]:
    """The numbers of steps, after a check of the arguments that `adapt` and `baseline` share."""
    check_kind("problem", problem, Problem, "as ml3_jax.problems makes them")
    check_optimizer("optimizer", optimizer)
    check_key("key", key)
    return check_count("steps", steps), _check_every(evaluate_every)


def _check_every(evaluate_every: Any) -> Any:
    """None if every update is evaluated, else the number. A traced number is not checked."""
    if isinstance(evaluate_every, jax.Array) and jnp.issubdtype(evaluate_every.dtype, jnp.integer) and evaluate_every.ndim == 0:
        if isinstance(evaluate_every, Tracer):
            return evaluate_every
        evaluate_every = int(evaluate_every)
    every = check_count("evaluate_every", evaluate_every)
    return None if every == 1 else every


class _Descended(NamedTuple):
    """The loss of the inner steps, hashable by its functions so that equal calls share one compilation."""

    problem: Problem
    learned_loss: LearnedLoss | None

    def loss(self) -> InnerFn:
        return inner_loss(self.problem, self.learned_loss)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(
    descended: _Descended,
    optimizer: optax.GradientTransformation,
    steps: int,
    evaluate_every: int | jax.Array | None,
    loss_params: LossParams,
    task: Task,
    context: Context,
    key: jax.Array,
    params: Params | None,
) -> Adaptation:
    problem, loss = descended.problem, descended.loss()
    init_key, inner_key, evaluate_key = jax.random.split(key, 3)
    first: Any = problem.init(init_key, task) if params is None else params
    check_real("init" if params is None else "params", first)

    def evaluate(params: Params) -> dict[str, jax.Array]:
        # One key for all evaluations: a stochastic evaluation sees the same draws before and after an update.
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

        def value_fn(params: Params) -> jax.Array:
            return loss(loss_params, params, data, context, step_key, step)

        value, grads = jax.value_and_grad(value_fn)(params)
        params, opt_state = descend(optimizer, grads, opt_state, params, value_fn, value)
        latest = evaluate_after(step, params, latest)
        return (params, opt_state, latest), latest

    start = evaluate(first)
    carry = (first, optimizer.init(first), start)
    (params, _, _), after = jax.lax.scan(inner_step, carry, jnp.arange(steps, dtype=jnp.int32))
    trace = jax.tree.map(lambda value, values: jnp.concatenate([value[None], values]), start, after)
    return Adaptation(params, trace)
