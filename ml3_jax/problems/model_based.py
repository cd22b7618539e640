"""Model-based control: a policy learns to bring a system to a goal through a model of the system.

`make_problem` builds the Problem from a system, a policy and a function that predicts. The learned model behind this function,
and its refit, are in `ml3_jax.problems.model_learning` (Bechtle et al. 2020, algorithm 2).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax import aliases
from ml3_jax.arguments import check_choice, check_count, check_feature_names
from ml3_jax.problems import model_learning
from ml3_jax.problems.model_learning import System
from ml3_jax.rollout import Trajectory, rollout, rollout_along
from ml3_jax.types import Context, LossParams, Params, Problem

ADAPT_ON = ("model", "real")
FEATURES = ("state", "goal", "time", "final_distance")


class Policy(NamedTuple):
    """A deterministic policy; its action is in units of the system's limit and is clipped to the limit.

    Attributes:
      init: (key) -> params.
      apply: (params, x [S], goal [G]) -> action [A].
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], jax.Array]


class ControlTask(struct.PyTreeNode):
    """A start, a goal, and extra information that meta-test does not have."""

    start: jax.Array  # [S]
    goal: jax.Array  # [G]
    extra: Any = None  # for task_loss alone, for example a goal on the way
    states: jax.Array | None = None  # [T + 1, S] of this inner step's rollout on the real system: adapt_on="real"


class Refresh(NamedTuple):
    """How the model is renewed.

    Attributes:
      refit: (context, trajectories [B, ...], key) -> context.
      rollouts: B, rollouts on the real system for a refit; half of current policies, half of fresh ones.
      exploration: standard deviation of the noise on their actions, in units of the limit.
    """

    refit: Callable[[Context, Trajectory, jax.Array], Context]
    rollouts: int
    exploration: float = 0.0


# (states [T + 1, S], actions [T, A] in units of the limit, goal [G], extra) -> scalar
CostFn = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """A distribution of tasks, and how a rollout is judged.

    Attributes:
      sample_start: key -> [S].
      sample_goal: key -> [G].
      cost: (states [T + 1, S], actions [T, A], goal, extra) -> scalar, the task loss of a rollout. With extra None, it is the
        plain loss.
      evaluate: (states [T + 1, S], goal) -> {name: scalar}, of a rollout on the real system.
      horizon: T, environment steps.
      extra: data for the task loss alone, the same in every task; None: nothing.
      distance: (x [S], goal [G]) -> scalar; for the feature "final_distance".
    """

    sample_start: Callable[[jax.Array], jax.Array]
    sample_goal: Callable[[jax.Array], jax.Array]
    cost: CostFn
    evaluate: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]]
    horizon: int
    extra: Any = None
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """The inputs of the learned loss.

    Attributes:
      features: columns of each step beside the action, some of `FEATURES`: "state" (scaled), "goal", "time" (the fraction of
        the horizon), "final_distance" (of the rollout's last state, in every row).
      state_scale: [S], the divisor of states in the features; None: 1.
      detach_states: the learned loss's gradient reaches the policy through its actions alone, not through the states that the
        actions lead to. The plain loss always keeps both.
    """

    features: Sequence[str] = ("state", "goal")
    state_scale: jax.Array | None = None
    detach_states: bool = False


@aliases.accept_old_keywords("model_based.make_problem", tasks=Tasks, observed=Observed)
def make_problem(
    system: System,
    policy: Policy,
    predict: Callable[[Context, jax.Array, jax.Array], jax.Array],
    tasks: Tasks,
    *,
    observed: Observed = Observed(),
    adapt_on: str = "model",
    refresh: Refresh | None = None,
) -> Problem:
    """The problem of bringing a system from a start to a goal within a fixed horizon.

    The inner loss and the task loss see rollouts in the model. The evaluation is of a rollout on the real system. No gradient
    flows through the real system.

    Args:
      system: the real system.
      policy: the optimizee.
      predict: (context, x [S], action [A] in the system's units) -> the next state, differentiable: the model.
      tasks: the distribution of tasks.
      observed: the inputs of the learned loss.
      adapt_on: the inner loss's data. "model": a rollout in the model. "real": the states of a rollout on the real system
        with the model's Jacobians along them (Heess et al. 2015, arXiv:1510.09142).
      refresh: how the model is renewed; None: never.

    Returns:
      A Problem. observe is [T, F]: the features, and last the action [A] before clipping, in units of the limit.

    Raises:
      ValueError: a horizon below 1, an unknown choice, or no feature.
    """
    check_choice("adapt_on", adapt_on, ADAPT_ON)
    check_count("horizon", tasks.horizon)
    check_feature_names(observed.features, FEATURES)
    if "final_distance" in observed.features and tasks.distance is None:
        raise ValueError('features: "final_distance" needs distance=, a function of a state and a goal')
    if refresh is not None:
        check_count("refresh.rollouts", refresh.rollouts)
    scale, size = observed.state_scale, system.observation_size
    if scale is not None and jnp.shape(scale) != (size,):
        raise ValueError(f"state_scale: expected shape ({size},), got {jnp.shape(scale)}")
    scale = jnp.ones(size) if scale is None else jnp.asarray(scale)
    parts = _ModelBased(system, policy, predict, tasks, tuple(observed.features), scale, observed.detach_states, refresh)
    real = adapt_on == "real"
    return Problem(
        sample_task=parts.sample_task,
        init=parts.init,
        observe=parts.observe,
        task_loss=parts.task_loss,
        evaluate=parts.evaluate,
        plain_loss=parts.plain_loss,
        collect=parts.collect if real else None,
        refresh=None if refresh is None else parts.renew,
        samples_per_step=tasks.horizon if real else 0,
    )


Act = Callable[[jax.Array, jax.Array], jax.Array]  # (x [S], key) -> action [A] in units of the limit


@dataclasses.dataclass(frozen=True, eq=False)
class _ModelBased:
    """The functions of the Problem; fields: the arguments of `make_problem`."""

    system: System
    policy: Policy
    predict: Callable[[Context, jax.Array, jax.Array], jax.Array]
    tasks: Tasks
    features: tuple[str, ...]
    state_scale: jax.Array  # [S]
    detach_states: bool
    refresh: Refresh | None

    def sample_task(self, key: jax.Array, context: Context) -> ControlTask:
        del context
        start_key, goal_key = jax.random.split(key)
        return ControlTask(self.tasks.sample_start(start_key), self.tasks.sample_goal(goal_key), self.tasks.extra)

    def init(self, key: jax.Array, task: ControlTask) -> Params:
        del task
        return self.policy.init(key)

    def collect(self, params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> ControlTask:
        del context, step
        return task.replace(states=self.on_real(self.actor(params, task.goal), task, key).states)

    def observe(self, params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del step
        trajectory = self.seen(params, task, context, key, self.detach_states)
        made = self.columns(trajectory, task.goal)
        return jnp.concatenate([*(made[name] for name in self.features), trajectory.actions], axis=-1)

    def plain_loss(self, params: Params, task: ControlTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del step
        trajectory = self.seen(params, task, context, key, False)
        return self.tasks.cost(trajectory.states, trajectory.actions, task.goal, None)

    def task_loss(self, params: Params, task: ControlTask, context: Context, key: jax.Array) -> jax.Array:
        trajectory = self.in_model(params, task, context, key, False)
        return self.tasks.cost(trajectory.states, trajectory.actions, task.goal, task.extra)

    def evaluate(self, params: Params, task: ControlTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context
        return dict(self.tasks.evaluate(self.on_real(self.actor(params, task.goal), task, key).states, task.goal))

    def renew(self, context: Context, loss_params: LossParams, params: Params, tasks: ControlTask, key: jax.Array) -> Context:
        del loss_params
        assert self.refresh is not None
        rollouts, exploration = self.refresh.rollouts, self.refresh.exploration
        refit_key, policy_key, rollout_key = jax.random.split(key, 3)

        def explore(key: jax.Array, params: Params, task: ControlTask) -> Trajectory:
            act = self.actor(params, task.goal)

            def noisy(x: jax.Array, key: jax.Array) -> jax.Array:
                noise = jax.random.normal(key, (self.system.action_size,))
                return act(x, key) + exploration * noise

            return self.on_real(noisy, task, key)

        # The rollouts take turns over the M tasks, each with the current or a fresh policy: inner steps start from a fresh
        # policy and end near the current one.
        which = jnp.arange(rollouts) // 2 % tasks.start.shape[0]
        chosen, current = jax.tree.map(lambda leaf: leaf[which], (tasks, params))
        fresh = jax.vmap(self.policy.init)(jax.random.split(policy_key, rollouts))
        is_fresh = jnp.arange(rollouts) % 2 == 1
        mixed = jax.tree.map(lambda old, new: jnp.where(is_fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old), current, fresh)
        trajectories = jax.vmap(explore)(jax.random.split(rollout_key, rollouts), mixed, chosen)
        return self.refresh.refit(context, trajectories, refit_key)

    def actor(self, params: Params, goal: jax.Array) -> Act:
        def act(x: jax.Array, key: jax.Array) -> jax.Array:
            del key  # the policy is deterministic
            return self.policy.apply(params, x, goal)

        return act

    def model_step(self, context: Context) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, action: self.predict(context, x, self.system.action_limit * jnp.clip(action, -1.0, 1.0))

    def in_model(self, params: Params, task: ControlTask, context: Context, key: jax.Array, detached: bool) -> Trajectory:
        act, step = self.actor(params, task.goal), self.model_step(context)
        return rollout(act, step, task.start, key, horizon=self.tasks.horizon, detach_states=detached)

    def on_real(self, act: Act, task: ControlTask, key: jax.Array) -> Trajectory:
        return model_learning.real_rollout(self.system, act, task.start, task.goal, key, horizon=self.tasks.horizon)

    def seen(self, params: Params, task: ControlTask, context: Context, key: jax.Array, detached: bool) -> Trajectory:
        """The rollout that an inner step learns from."""
        if task.states is None:
            return self.in_model(params, task, context, key, detached)
        if not detached:
            return rollout_along(self.actor(params, task.goal), self.model_step(context), task.states, key)
        actions = jax.vmap(self.policy.apply, in_axes=(None, 0, None))(params, task.states[:-1], task.goal)
        return Trajectory(task.states, actions)

    def columns(self, trajectory: Trajectory, goal: jax.Array) -> dict[str, jax.Array]:
        """Every feature of a rollout, each [T, W]."""
        horizon, distance = self.tasks.horizon, self.tasks.distance
        made = {
            "state": trajectory.states[:-1] / self.state_scale[None],
            "goal": jnp.broadcast_to(goal, (horizon, *goal.shape)),
            "time": jnp.arange(horizon)[:, None] / horizon,
        }
        if distance is not None:
            made["final_distance"] = jnp.full((horizon, 1), distance(trajectory.states[-1], goal))
        return made
