"""The state of inner loops: how one starts, when it is reset, and the sizes of the inner and outer loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.arguments import check_count
from ml3_jax.descent import check_real
from ml3_jax.types import Context, InnerState, Particles, PersistentInnerState, Phi, Problem

# (key, context, end) -> the start of one inner loop, with a fresh task
InitInner = Callable[[jax.Array, Context, jax.Array], InnerState]


class Sizes(NamedTuple):
    """The checked sizes of a meta-learner."""

    num_tasks: int
    inner_steps: int
    unroll: int
    refresh_every: int | None
    tasks_at_once: int | None = None  # on each device; None for a number that suits it

    @property
    def full_unroll(self) -> bool:
        """Whether one meta-step unrolls the inner loop from start to end."""
        return self.unroll == self.inner_steps


def check_sizes(
    problem: Problem,
    num_tasks: int,
    inner_steps: int,
    unroll: int | None,
    refresh_every: int | None,
    tasks_at_once: int | None = None,
) -> Sizes:
    """The sizes as ints; unroll None stands for inner_steps.

    Raises:
      ValueError: a size below 1, an unroll that does not divide inner_steps, refresh_every for a problem without refresh, more
        tasks at once than there are.
    """
    tasks, steps = check_count("num_tasks", num_tasks), check_count("inner_steps", inner_steps)
    span = steps if unroll is None else check_count("unroll", unroll)
    every = None if refresh_every is None else check_count("refresh_every", refresh_every)
    if steps % span:
        raise ValueError(
            f"unroll must divide inner_steps, got unroll={span} and inner_steps={steps}: "
            f"choose one of {[n for n in range(1, steps + 1) if steps % n == 0]}"
        )
    if every is not None and problem.refresh is None:
        raise ValueError(f"refresh_every={every} was given, but the problem has no refresh function: leave it out")
    at_once = None if tasks_at_once is None else check_count("tasks_at_once", tasks_at_once)
    if at_once is not None and at_once > tasks:
        raise ValueError(f"tasks_at_once: expected at most num_tasks={tasks}, got {at_once}: leave it out for no limit")
    return Sizes(tasks, steps, span, every, at_once)


def make_init_inner(
    problem: Problem, inner_optimizer: optax.GradientTransformation | None, draw_params: bool = True
) -> InitInner:
    """Builds the function that starts an inner loop (no task axis).

    With a learned initialisation no params are drawn; with a learned initialisation or optimizer there is no opt_state yet.
    `learned_parts.LearnedParts.begin` adds them.
    """

    def init_inner(key: jax.Array, context: Context, end: jax.Array) -> InnerState:
        task_key, init_key = jax.random.split(key)
        task = strong(problem.sample_task(task_key, context))
        params: Any = strong(problem.init(init_key, task)) if draw_params else None
        check_real("init", params)
        opt_state: Any = None if inner_optimizer is None else inner_optimizer.init(params)
        return InnerState(params, opt_state, task, jnp.zeros((), jnp.int32), end)

    return init_inner


def staggered_ends(sizes: Sizes, staggered_resets: bool) -> jax.Array:
    """[num_tasks] int32, the ages of the first reset: `inner_steps`, or staggered by one unroll from task to task."""
    if not staggered_resets or sizes.full_unroll:
        return jnp.full((sizes.num_tasks,), sizes.inner_steps, jnp.int32)
    segments = sizes.inner_steps // sizes.unroll
    return sizes.unroll * (1 + jnp.arange(sizes.num_tasks, dtype=jnp.int32) % segments)


def with_particles(start: InnerState, shift: Phi) -> PersistentInnerState:
    """An inner loop with equal copies of its optimizee, before any perturbation (no task axis).

    Args:
      start: the inner loop.
      shift: arrays or shapes of `Particles.shift`, [P, ...].
    """
    pairs = jax.tree.leaves(shift)[0].shape[0]
    optimizee = (start.params, start.opt_state)
    params, opt_state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (pairs, 2, *jnp.shape(leaf))), optimizee)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shift)
    particles = Particles(params, opt_state, zeros)
    return PersistentInnerState(start.params, start.opt_state, start.task, start.age, start.end, particles)


def reset_finished(fresh: InnerState, current: InnerState) -> InnerState:
    """The current inner loop, or the fresh one if it has reached its end or diverged (no task axis).

    A perturbed copy that diverged ends the inner loop of its task as well.
    """
    moved = [current.params]
    if isinstance(current, PersistentInnerState):
        fresh = with_particles(fresh, current.particles.shift)
        moved.append(current.particles.params)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(moved)]
    over = (current.age >= current.end) | ~functools.reduce(jnp.logical_and, finite)
    return jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, current)


def strong(tree: Any) -> Any:
    """A pytree without weak types. A step returns strong types: weakly typed inputs would compile it twice."""
    return jax.tree.map(lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, tree)
