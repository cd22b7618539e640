"""Model-free control: a stochastic policy learns from sampled trajectories, without a gradient of the system.

`collect` samples trajectories with the current policy, once an inner step. `observe` shows them to the learned loss, with the
policy's outputs at the visited states. The gradient goes through these outputs alone (Bechtle et al. 2020, algorithm 3).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax import aliases
from ml3_jax.arguments import check_count, check_feature_names
from ml3_jax.problems.model_learning import System
from ml3_jax.problems.policy_gradient import advantages, normal_log_prob, returns_to_go, scaled_loss, unscaled_loss
from ml3_jax.problems.policy_gradient import centred_returns as centred_returns
from ml3_jax.rollout import rollout
from ml3_jax.types import Context, Params, Problem

FEATURES = ("state", "goal", "updates", "reward", "return_to_go", "log_prob", "action", "mean", "std")
MORE_FEATURES = ("next_state", "time", "credits")  # known too, on request


class GaussianPolicy(NamedTuple):
    """A policy with independent normal actions, in units of the system's limit. The system clips them to the limit.

    Attributes:
      init: (key) -> params.
      apply: (params, x [S], goal [G]) -> (mean [A], log of the standard deviation [A]).
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Samples(struct.PyTreeNode):
    """B trajectories of T steps, as constants."""

    states: jax.Array  # [B, T + 1, S]
    actions: jax.Array  # [B, T, A] before clipping, in units of the limit
    rewards: jax.Array  # [B, T]


class SamplingTask(struct.PyTreeNode):
    """A goal, a system, and the trajectories of this inner step."""

    goal: jax.Array  # [G]
    dynamics: Any = None  # parameters of this task's system, for example the strength of its motors
    extra: Any = None  # for task_loss alone, for example an expert's actions
    samples: Samples | None = None


class Demonstrations(struct.PyTreeNode):
    """A context of E goals with an expert's data; sample_task draws one of them."""

    goals: jax.Array  # [E, G]
    extra: Any  # each leaf [E, ...]


# (x [S], action [A] in units of the limit, next x [S], goal [G]) -> scalar
RewardFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """A distribution of tasks, and how a trajectory is judged.

    Attributes:
      sample_start: key -> [S], drawn for each trajectory.
      sample_goal: key -> [G], drawn for each task.
      reward: reward of a transition.
      evaluate: (states [T + 1, S], goal) -> {name: scalar}. An evaluation reports its mean over trajectories.
      sample_dynamics: key -> parameters of the task's system; None: all tasks have one system.
      extra: goal -> data for the task loss alone; a context of `Demonstrations` brings its own.
      hidden_goal: the policy and the features get zeros for the goal. Only the rewards tell of it, and with
        `Sampling.rest_return_baseline` also the rewards of staying at the visited states.
    """

    sample_start: Callable[[jax.Array], jax.Array]
    sample_goal: Callable[[jax.Array], jax.Array]
    reward: RewardFn
    evaluate: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]]
    sample_dynamics: Callable[[jax.Array], Any] | None = None
    extra: Callable[[jax.Array], Any] | None = None
    hidden_goal: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The size of a sample and its returns. An inner step, a task loss and an evaluation draw one sample each.

    Attributes:
      horizon: T, steps of a trajectory.
      rollouts: B, trajectories.
      discount: of rewards, in (0, 1].
      rest_return_baseline: subtract the return of staying at the state without acting, reward(x, 0, x, goal) at every step.
        This baseline depends on the state alone. It suits rewards of the position.
      credit_discounts: the discounts of the feature "credits", each in (0, 1].
    """

    horizon: int
    rollouts: int
    discount: float = 1.0
    rest_return_baseline: bool = False
    credit_discounts: tuple[float, ...] = (0.5, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskLoss:
    """The loss that meta-training minimises.

    Attributes:
      scaled: True: its gradient is the policy gradient over T and over the scale of the advantages, of size about 1 for any
        rewards. False: its gradient is that of the expected discounted return. `collect_gradient="score"` needs False.
      reuse_rollouts: the trajectories that judge an update are also those that the next update learns from
        (`Problem.reused_rollout_loss`). This saves almost half of the simulation. It has no effect with extra_loss.
      extra_loss: (x -> (mean, log std), extra) -> scalar, a task loss with extra information, for example behavioural cloning;
        None: the policy gradient's.
    """

    scaled: bool = True
    reuse_rollouts: bool = False
    extra_loss: Callable[[Callable[[jax.Array], tuple[jax.Array, jax.Array]], Any], jax.Array] | None = None


def _state(x: jax.Array, goal: jax.Array) -> jax.Array:
    del goal
    return x


@aliases.accept_old_keywords(
    "model_free.make_problem",
    tasks=Tasks,
    sampling=Sampling,
    task_loss=TaskLoss,
)
def make_problem(
    system: System | Callable[[Any], System],
    policy: GaussianPolicy,
    tasks: Tasks,
    sampling: Sampling,
    *,
    task_loss: TaskLoss = TaskLoss(),
    features: Sequence[str] = FEATURES,
    inputs: Callable[[jax.Array, jax.Array], jax.Array] = _state,
    trajectories: bool = False,
) -> Problem:
    """The problem of learning to reach a goal from sampled trajectories.

    Args:
      system: the system to sample from; it needs no derivative. With tasks.sample_dynamics: dynamics -> system.
      policy: the optimizee.
      tasks: the distribution of tasks.
      sampling: horizon T, number of rollouts B, and how rewards become returns.
      task_loss: the loss that meta-training minimises.
      features: columns that the learned loss sees of each sample, some of `FEATURES` and `MORE_FEATURES`, in this order:
        "state" (as `inputs`), "goal", "updates" (k / (k + 1) after k of them), "reward", "return_to_go" (as an advantage, see
        `policy_gradient.advantages`), "action", and the policy's outputs at the state: "log_prob" (of the action), "mean"
        and "std". The gradient goes through these three alone. Further "next_state" (as "state"), "time" (t / T) and
        "credits" (an advantage for each of sampling.credit_discounts).
      inputs: (x, goal) -> the state feature, scaled to a size of about 1.
      trajectories: observe is [B, T, F], for learned losses that read trajectories in time.

    Returns:
      A Problem. observe is [B * T, F], or [B, T, F] with `trajectories`. The value of the task loss is minus the mean return
      of fresh trajectories of the updated policy. evaluate reports "return" and tasks.evaluate on trajectories of the policy's
      mean actions, so the exploration noise does not count. samples_per_step is B * T.

    Raises:
      ValueError: a size below 1, a discount outside (0, 1], an unknown feature, the feature "goal" of a hidden one, or a policy
        with actions of another shape than the system's.
    """
    for name in ("horizon", "rollouts"):
        check_count(name, getattr(sampling, name))
    for name, discounts in (("discount", (sampling.discount,)), ("credit_discounts", sampling.credit_discounts)):
        if not all(0.0 < discount <= 1.0 for discount in discounts):
            raise ValueError(f"{name}: expected a number in (0, 1], got {getattr(sampling, name)}")
    check_feature_names(features, (*FEATURES, *MORE_FEATURES))
    if tasks.hidden_goal:
        if features is FEATURES:
            features = tuple(name for name in FEATURES if name != "goal")
        if "goal" in features:
            raise ValueError(
                'features: expected none that is the goal, which tasks.hidden_goal hides, got "goal": leave it out'
            )
    parts = _ModelFree(system, policy, tasks, sampling, task_loss, tuple(features), inputs, trajectories)
    jax.eval_shape(parts.check_action_shapes, jax.random.key(0))
    return Problem(
        sample_task=parts.sample_task,
        init=parts.init,
        observe=parts.observe,
        task_loss=parts.outer_loss,
        evaluate=parts.evaluate,
        plain_loss=parts.plain_loss,
        collect=parts.collect,
        log_prob=parts.log_prob,
        samples_per_step=sampling.rollouts * sampling.horizon,
        reused_rollout_loss=parts.reused_rollout_loss if task_loss.reuse_rollouts and task_loss.extra_loss is None else None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _ModelFree:
    """The functions of the Problem; fields: the arguments of `make_problem`."""

    system: System | Callable[[Any], System]
    policy: GaussianPolicy
    tasks: Tasks
    sampling: Sampling
    loss: TaskLoss
    features: tuple[str, ...]
    inputs: Callable[[jax.Array, jax.Array], jax.Array]
    trajectories: bool

    def seen(self, goal: jax.Array) -> jax.Array:
        """The goal as the policy and the features get it."""
        return jnp.zeros_like(goal) if self.tasks.hidden_goal else goal

    def sample_task(self, key: jax.Array, context: Context) -> SamplingTask:
        goal_key, dynamics_key = jax.random.split(key)
        if isinstance(context, Demonstrations):
            row = jax.random.randint(goal_key, (), 0, context.goals.shape[0])
            return SamplingTask(context.goals[row], extra=jax.tree.map(lambda leaf: leaf[row], context.extra))
        goal = self.tasks.sample_goal(goal_key)
        dynamics = None if self.tasks.sample_dynamics is None else self.tasks.sample_dynamics(dynamics_key)
        return SamplingTask(goal, dynamics, None if self.tasks.extra is None else self.tasks.extra(goal))

    def init(self, key: jax.Array, task: SamplingTask) -> Params:
        del task
        return self.policy.init(key)

    def collect(self, params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> SamplingTask:
        del context, step
        return task.replace(samples=self.sample(params, task, key))

    def observe(self, params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        samples = _collected(task)
        mean, log_std = self.outputs(params, samples, task.goal)
        shape = samples.rewards.shape
        of_states = jax.vmap(jax.vmap(lambda x: self.inputs(x, self.seen(task.goal))))
        times = jnp.arange(shape[1]) / shape[1]
        makers: dict[str, Callable[[], jax.Array]] = {
            "state": lambda: of_states(samples.states[:, :-1]),
            "next_state": lambda: of_states(samples.states[:, 1:]),
            "updates": lambda: jnp.broadcast_to(step / (step + 1.0), (*shape, 1)),
            "time": lambda: jnp.broadcast_to(times[:, None], (*shape, 1)),
            "goal": lambda: jnp.broadcast_to(task.goal, (*shape, *task.goal.shape)),
            "action": lambda: samples.actions,
            "reward": lambda: samples.rewards[..., None],
            "return_to_go": lambda: advantages(self.returns_of(samples, task.goal))[..., None],
            "credits": lambda: self.credits_of(samples, task.goal),
            "log_prob": lambda: normal_log_prob(samples.actions, mean, log_std)[..., None],
            "std": lambda: jnp.exp(log_std),
            "mean": lambda: mean,
        }
        columns = jnp.concatenate([makers[name]() for name in self.features], axis=-1)
        return columns if self.trajectories else columns.reshape(shape[0] * shape[1], -1)

    def plain_loss(self, params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        samples = _collected(task)
        return scaled_loss(self.log_probs(params, samples, task.goal), self.returns_of(samples, task.goal), samples.rewards)

    def log_prob(self, params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return jnp.sum(self.log_probs(params, _collected(task), task.goal))

    def outer_loss(self, params: Params, task: SamplingTask, context: Context, key: jax.Array) -> jax.Array:
        del context
        if self.loss.extra_loss is not None:
            return self.loss.extra_loss(lambda x: self.policy.apply(params, x, self.seen(task.goal)), task.extra)
        return self.judge(params, self.sample(params, task, key), task.goal)

    def reused_rollout_loss(self, params: Params, task: SamplingTask, context: Context) -> jax.Array:
        del context
        return self.judge(params, _collected(task), task.goal)

    def evaluate(self, params: Params, task: SamplingTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context
        samples = self.sample(params, task, key, explore=False)
        values = jax.vmap(self.tasks.evaluate, in_axes=(0, None))(samples.states, task.goal)
        means = {name: jnp.mean(value) for name, value in values.items()}
        return {"return": jnp.mean(jnp.sum(samples.rewards, axis=1)), **means}

    def judge(self, params: Params, samples: Samples, goal: jax.Array) -> jax.Array:
        """The task loss without extra information."""
        log_probs, returns = self.log_probs(params, samples, goal), self.returns_of(samples, goal)
        if self.loss.scaled:
            return scaled_loss(log_probs, returns, samples.rewards)
        return unscaled_loss(log_probs, returns, samples.rewards, self.sampling.discount)

    def sample(self, params: Params, task: SamplingTask, key: jax.Array, *, explore: bool = True) -> Samples:
        """B trajectories, without any gradient."""
        # Cuts the gradient through the system and through the drawing of actions. The effect of theta on the distribution of
        # the data belongs to a score function (policy gradient, log_prob), not to backpropagation.
        params = jax.lax.stop_gradient(params)
        system, goal, reward = self.system_with(task.dynamics), task.goal, self.tasks.reward

        def act(x: jax.Array, key: jax.Array) -> jax.Array:
            mean, log_std = self.policy.apply(params, x, self.seen(goal))
            return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape) if explore else mean

        def step(state: Any, action: jax.Array) -> Any:
            return system.step(state, system.action_limit * jnp.clip(action, -1.0, 1.0))

        def one(key: jax.Array) -> Samples:
            start_key, rollout_key = jax.random.split(key)
            start = system.state_at(self.tasks.sample_start(start_key), goal)
            made = rollout(act, step, start, rollout_key, horizon=self.sampling.horizon, observation_fn=lambda s: s.obs)
            rewards = jax.vmap(reward, in_axes=(0, 0, 0, None))(made.states[:-1], made.actions, made.states[1:], goal)
            return Samples(made.states, made.actions, rewards)

        # Cuts the gradient that is left, through the start and the reward: samples are constants.
        return jax.lax.stop_gradient(jax.vmap(one)(jax.random.split(key, self.sampling.rollouts)))

    def outputs(self, params: Params, samples: Samples, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log std) of the policy at the visited states, each [B, T, A]."""
        at_states = jax.vmap(jax.vmap(self.policy.apply, in_axes=(None, 0, None)), in_axes=(None, 0, None))
        return at_states(params, samples.states[:, :-1], self.seen(goal))

    def log_probs(self, params: Params, samples: Samples, goal: jax.Array) -> jax.Array:
        """Log-densities of the sampled actions, [B, T]."""
        mean, log_std = self.outputs(params, samples, goal)
        return normal_log_prob(samples.actions, mean, log_std)

    def returns_of(self, samples: Samples, goal: jax.Array, discount: float | None = None) -> jax.Array:
        """Returns-to-go [B, T], minus those of staying at rest if `Sampling` says so; discount None: that of `Sampling`."""
        discount = self.sampling.discount if discount is None else discount
        returns = returns_to_go(samples.rewards, discount)
        if self.sampling.rest_return_baseline:
            states, no_action = samples.states[:, :-1], jnp.zeros(samples.actions.shape[-1])
            at_rest = jax.vmap(jax.vmap(lambda x: self.tasks.reward(x, no_action, x, goal)))(states)
            returns -= at_rest * returns_to_go(jnp.ones_like(at_rest), discount)
        return returns

    def credits_of(self, samples: Samples, goal: jax.Array) -> jax.Array:
        """Advantages [B, T, D] at each of the credit discounts."""
        return jnp.stack(
            [advantages(self.returns_of(samples, goal, discount)) for discount in self.sampling.credit_discounts], axis=-1
        )

    def system_with(self, dynamics: Any) -> System:
        if self.tasks.sample_dynamics is None:
            return cast(System, self.system)
        return cast(Callable[[Any], System], self.system)(dynamics)

    def check_action_shapes(self, key: jax.Array) -> None:
        """Raises ValueError unless the policy's outputs have the shape of the system's action."""
        sample_dynamics = self.tasks.sample_dynamics
        system = self.system_with(None if sample_dynamics is None else sample_dynamics(key))
        x, goal = jnp.zeros(system.observation_size), self.tasks.sample_goal(key)
        outputs = self.policy.apply(self.policy.init(key), x, goal)
        for name, value in zip(("mean", "log of the standard deviation"), outputs, strict=True):
            if value.shape != (action := (system.action_size,)):
                raise ValueError(f"policy: expected a {name} of shape {action}, the action of {system.name}, got {value.shape}")


def _collected(task: SamplingTask) -> Samples:
    if task.samples is None:
        raise ValueError("task: expected samples, got none: call collect before observe, plain_loss and log_prob")
    return task.samples
