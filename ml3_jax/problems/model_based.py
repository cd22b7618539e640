"""Model-based control: a policy is to bring a system to a goal, and learns through a model of it.

`make_problem` builds the Problem from a system, a policy and a function that predicts; the learned model that the latter
reads, and its refit, are those of `ml3_jax.problems.model_learning` (Bechtle et al. 2020, algorithm 2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax.inner import check_choice
from ml3_jax.problems import model_learning
from ml3_jax.problems.model_learning import System
from ml3_jax.rollout import Trajectory, rollout, rollout_along
from ml3_jax.types import Context, LossParams, Params, Problem

ADAPT_ON = ("model", "real")
FEATURES = ("state", "goal", "time", "final_distance")


class Policy(NamedTuple):
    """A deterministic policy; its action is in units of the system's limit, beyond which it is clipped.

    Attributes:
      init: (key) -> params.
      apply: (params, x [S], goal [G]) -> action [A].
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]


class ControlTask(struct.PyTreeNode):
    """From where to where; and what shall not be known at meta-test."""

    start: jax.Array  # [S]
    goal: jax.Array  # [G]
    extra: Any = None  # for task_loss alone, for example a goal on the way
    states: jax.Array | None = None  # [T + 1, S] of this inner step's rollout on the real system: adapt_on="real"


class Refresh(NamedTuple):
    """How the model is renewed.

    Attributes:
      refit: (context, trajectories [B, ...], key) -> context.
      rollouts: B, rollouts on the real system that it gets; half of current policies, half of fresh ones.
      exploration: standard deviation of the noise on their actions, in units of the limit.
    """

    refit: Callable[[Context, Trajectory, jax.Array], Context]
    rollouts: int
    exploration: float = 0.0


# (states [T + 1, S], actions [T, A] in units of the limit, goal [G], extra) -> scalar
CostFn = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def make_problem(
    system: System,
    policy: Policy,
    predict: Callable[[Context, jax.Array, jax.Array], jax.Array],
    *,
    sample_start: Callable[[jax.Array], jax.Array],
    sample_goal: Callable[[jax.Array], jax.Array],
    cost: CostFn,
    evaluate: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]],
    horizon: int,
    extra: Any = None,
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    features: Sequence[str] = ("state", "goal"),
    state_scale: jax.Array | None = None,
    adapt_on: str = "model",
    detach_states: bool = False,
    refresh: Refresh | None = None,
) -> Problem:
    """The problem of bringing a system from a start to a goal within a fixed horizon.

    The inner loss and the task loss see rollouts in the model; what is reported is one on the real system, through which
    no gradient ever flows.

    Args:
      system: the real system.
      policy: the optimizee.
      predict: (context, x [S], action [A] in the system's units) -> the next state, differentiable: the model.
      sample_start: key -> [S].
      sample_goal: key -> [G].
      cost: (states [T + 1, S], actions [T, A], goal, extra) -> scalar: the task loss of a rollout; with extra None it is
        the plain loss, which a person would descend.
      evaluate: (states [T + 1, S], goal) -> {name: scalar}, of a rollout on the real system.
      horizon: T, steps.
      extra: what the task loss alone may see, the same in every task; None: nothing.
      distance: (x [S], goal [G]) -> scalar; for the feature "final_distance".
      features: what the learned loss sees of each step beside the action, some of `FEATURES`: "state" (scaled), "goal",
        "time" (the fraction of the horizon), "final_distance" (of the whole rollout, in every row).
      state_scale: [S] what states are divided by in the features; None: 1.
      adapt_on: what the inner loss sees. "model": a rollout in the model. "real": the states of a rollout on the real
        system with the model's Jacobians along them (Heess et al. 2015, arXiv:1510.09142).
      detach_states: whether the learned loss's gradient reaches the policy through its actions alone, and not through the
        states that they lead to. The plain loss always keeps both.
      refresh: how the model is renewed; None: never.

    Returns:
      A Problem whose observe is [T, F]: the features, and last the action [A] before clipping, in units of the limit.

    Raises:
      ValueError: a horizon below 1, an unknown choice, or no feature.
    """
    check_choice("adapt_on", adapt_on, ADAPT_ON)
    if horizon < 1:
        raise ValueError(f"horizon: expected at least 1 step, got {horizon}")
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(f"features: expected some of {', '.join(FEATURES)}, got {tuple(features)}")
    if "final_distance" in features and distance is None:
        raise ValueError('features: "final_distance" needs distance=, a function of a state and a goal')
    if refresh is not None and refresh.rollouts < 1:
        raise ValueError(f"refresh.rollouts: expected at least 1 for a fit, got {refresh.rollouts}")
    if state_scale is not None and jnp.shape(state_scale) != (system.observation_size,):
        raise ValueError(f"state_scale: expected shape ({system.observation_size},), got {jnp.shape(state_scale)}")
    scale = jnp.ones(system.observation_size) if state_scale is None else jnp.asarray(state_scale)

    def actor(params: Params, goal: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def act(x: jax.Array, key: jax.Array) -> jax.Array:
            del key  # the policy is deterministic
            return policy.apply(params, x, goal)

        return act

    def model_step(context: Context) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, action: predict(context, x, system.action_limit * jnp.clip(action, -1.0, 1.0))

    def in_model(params: Params, task: ControlTask, context: Context, key: jax.Array, detached: bool) -> Trajectory:
        return rollout(actor(params, task.goal), model_step(context), task.start, key, horizon=horizon, detach_states=detached)

    def on_real(act: Callable[[jax.Array, jax.Array], jax.Array], task: ControlTask, key: jax.Array) -> Trajectory:
        return model_learning.real_rollout(system, act, task.start, task.goal, key, horizon=horizon)

    def seen(params: Params, task: ControlTask, context: Context, key: jax.Array, detached: bool) -> Trajectory:
        """The rollout that an inner step learns from."""
        if task.states is None:
            return in_model(params, task, context, key, detached)
        if not detached:
            return rollout_along(actor(params, task.goal), model_step(context), task.states, key)
        actions = jax.vmap(policy.apply, in_axes=(None, 0, None))(params, task.states[:-1], task.goal)
        return Trajectory(task.states, actions)

    def sample_task(key: jax.Array, context: Context) -> ControlTask:
        del context
        start_key, goal_key = jax.random.split(key)
        return ControlTask(sample_start(start_key), sample_goal(goal_key), extra)

    def init(key: jax.Array, task: ControlTask) -> Params:
        del task
        return policy.init(key)

    def columns(trajectory: Trajectory, goal: jax.Array) -> dict[str, jax.Array]:
        states = trajectory.states[:-1]
        made = {
            "state": states / scale[None],
            "goal": jnp.broadcast_to(goal, (horizon, *goal.shape)),
            "time": jnp.arange(horizon)[:, None] / horizon,
        }
        if distance is not None:
            made["final_distance"] = jnp.full((horizon, 1), distance(trajectory.states[-1], goal))
        return made

    def observe(params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del step
        trajectory = seen(params, task, context, key, detach_states)
        made = columns(trajectory, task.goal)
        return jnp.concatenate([*(made[name] for name in features), trajectory.actions], axis=-1)

    def plain_loss(params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del step
        trajectory = seen(params, task, context, key, False)
        return cost(trajectory.states, trajectory.actions, task.goal, None)

    def task_loss(params: Params, task: ControlTask, context: Context, key: jax.Array) -> jax.Array:
        trajectory = in_model(params, task, context, key, False)
        return cost(trajectory.states, trajectory.actions, task.goal, task.extra)

    def measure(params: Params, task: ControlTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context
        return dict(evaluate(on_real(actor(params, task.goal), task, key).states, task.goal))

    def collect(params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> ControlTask:
        del context, step
        return task.replace(states=on_real(actor(params, task.goal), task, key).states)

    def renew(context: Context, loss_params: LossParams, params: Params, tasks: ControlTask, key: jax.Array) -> Context:
        del loss_params
        assert refresh is not None
        exploration = refresh.exploration
        refit_key, *keys = jax.random.split(key, 3)
        count = tasks.start.shape[0]

        def explore(key: jax.Array, params: Params, task: ControlTask) -> Trajectory:
            act = actor(params, task.goal)

            def noisy(x: jax.Array, key: jax.Array) -> jax.Array:
                noise = jax.random.normal(key, (system.action_size,))
                return act(x, key) + exploration * noise

            return on_real(noisy, task, key)

        # Of M tasks, as many as are wanted, in turn; each with its current policy or with a fresh one, since inner steps
        # start from the latter and end near the former.
        which = jnp.arange(refresh.rollouts) // 2 % count
        chosen, current = jax.tree.map(lambda leaf: leaf[which], (tasks, params))
        fresh = jax.vmap(policy.init)(jax.random.split(keys[0], refresh.rollouts))
        newborn = jnp.arange(refresh.rollouts) % 2 == 1
        mixed = jax.tree.map(lambda old, new: jnp.where(newborn.reshape(-1, *[1] * (new.ndim - 1)), new, old), current, fresh)
        trajectories = jax.vmap(explore)(jax.random.split(keys[1], refresh.rollouts), mixed, chosen)
        return refresh.refit(context, trajectories, refit_key)

    return Problem(
        sample_task=sample_task,
        init=init,
        observe=observe,
        task_loss=task_loss,
        evaluate=measure,
        plain_loss=plain_loss,
        collect=collect if adapt_on == "real" else None,
        refresh=None if refresh is None else renew,
        samples_per_step=horizon if adapt_on == "real" else 0,
    )
