"""The lives of optimizees: how long they are, how one is born, and when another takes its place."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ml3_jax.types import Context, Lives, Problem

# (key, context, end) -> an optimizee with a task of its own
Newborn = Callable[[jax.Array, Context, jax.Array], Lives]


class Sizes(NamedTuple):
    """The static numbers of a meta-learner, checked."""

    num_tasks: int
    inner_steps: int
    unroll: int
    refresh_every: int | None

    @property
    def whole_lives(self) -> bool:
        """Whether a segment is a life, so that every meta-step has fresh optimizees."""
        return self.unroll == self.inner_steps


def check_sizes(problem: Problem, num_tasks: int, inner_steps: int, unroll: int | None, refresh_every: int | None) -> Sizes:
    """The sizes as whole numbers; unroll None stands for inner_steps.

    Raises:
      ValueError: a size below 1, an unroll that does not divide inner_steps, refresh_every for a problem without refresh.
    """
    unroll = inner_steps if unroll is None else unroll
    given = {"num_tasks": num_tasks, "inner_steps": inner_steps, "unroll": unroll, "refresh_every": refresh_every}
    for name, value in given.items():
        if value is None and name == "refresh_every":
            continue
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if inner_steps % unroll:
        raise ValueError(
            f"unroll must divide inner_steps, got unroll={unroll} and inner_steps={inner_steps}: "
            f"choose one of {[n for n in range(1, inner_steps + 1) if inner_steps % n == 0]}"
        )
    if refresh_every is not None and problem.refresh is None:
        raise ValueError(f"refresh_every={refresh_every} was given, but the problem has no refresh function: leave it out")
    return Sizes(int(num_tasks), int(inner_steps), int(unroll), refresh_every)


def make_newborn(problem: Problem, inner_optimizer: optax.GradientTransformation) -> Newborn:
    """How an optimizee is born (no task axis)."""

    def newborn(key: jax.Array, context: Context, end: jax.Array) -> Lives:
        task_key, init_key = jax.random.split(key)
        task = strong(problem.sample_task(task_key, context))
        params = strong(problem.init(init_key, task))
        return Lives(params, inner_optimizer.init(params), task, jnp.zeros((), jnp.int32), end)

    return newborn


def first_ends(sizes: Sizes, spread_ages: bool) -> jax.Array:
    """[num_tasks] int32, the ages at which first lives end: all the same, or staggered by a segment each."""
    if not spread_ages or sizes.whole_lives:
        return jnp.full((sizes.num_tasks,), sizes.inner_steps, jnp.int32)
    segments = sizes.inner_steps // sizes.unroll
    return sizes.unroll * (1 + jnp.arange(sizes.num_tasks, dtype=jnp.int32) % segments)


def reborn(born: Lives, life: Lives) -> Lives:
    """The life that goes on, or the new one in its place where it has ended: by age, or because it diverged (no task axis)."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(life.params)]
    over = (life.age >= life.end) | ~functools.reduce(jnp.logical_and, finite)
    return jax.tree.map(lambda new, old: jnp.where(over, new, old), born, life)


def strong(tree: Any) -> Any:
    """A pytree without weak types, which a step would not give back: the next step would be compiled anew for it."""
    return jax.tree.map(lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, tree)
