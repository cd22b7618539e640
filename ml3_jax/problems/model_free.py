"""Model-free control: a stochastic policy learns from trajectories that it sampled, without any gradient of the system.

`collect` samples trajectories under the current policy, once an inner step; `observe` shows them to the learned loss, with
the policy's outputs at them, which are all that the gradient goes through (Bechtle et al. 2020, algorithm 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax.problems.model_learning import System
from ml3_jax.rollout import rollout
from ml3_jax.types import Context, Params, Problem

FEATURES = ("state", "goal", "updates", "reward", "return_to_go", "log_prob", "action", "mean", "std")


class GaussianPolicy(NamedTuple):
    """A policy with independent normal actions, in units of the system's limit, beyond which the system clips them.

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
    """Where to, with what; and the trajectories of this inner step."""

    goal: jax.Array  # [G]
    dynamics: Any = None  # what this task's system is made with, such as the strength of its motors
    extra: Any = None  # for task_loss alone, for example what an expert does
    samples: Samples | None = None


class Demonstrations(struct.PyTreeNode):
    """A context of tasks that an expert has done: sample_task draws one of its E goals, with what is known of it."""

    goals: jax.Array  # [E, G]
    extra: Any  # each leaf [E, ...]


# (x [S], action [A] in units of the limit, next x [S], goal [G]) -> scalar
RewardFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def normal_log_prob(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density of actions [..., A] under independent normals, summed over A: [...]."""
    squares = ((action - mean) / jnp.exp(log_std)) ** 2
    return -0.5 * jnp.sum(squares + 2.0 * log_std + math.log(2.0 * math.pi), axis=-1)


def returns_to_go(rewards: jax.Array, discount: float) -> jax.Array:
    """The discounted sum of the rewards from each step on: [B, T] -> [B, T]."""

    def back(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = reward + discount * later
        return value, value

    _, values = jax.lax.scan(back, jnp.zeros(rewards.shape[0]), rewards.T, reverse=True)
    return values.T


def advantages(returns: jax.Array) -> jax.Array:
    """What `centred_returns` gives, over its deviation: [B, T] -> [B, T], of one trajectory the returns as they are.

    The policy gradient stays unbiased up to the scale, which is one number for all.
    """
    if returns.shape[0] == 1:
        return returns
    centred = centred_returns(returns)
    return centred / (jnp.sqrt(jnp.mean(centred**2)) + 1e-6)


def centred_returns(returns: jax.Array) -> jax.Array:
    """Returns-to-go less the mean of the other trajectories at the same step: [B, T] -> [B, T].

    That mean does not depend on a trajectory's own actions, so the policy gradient stays unbiased.
    """
    rollouts = returns.shape[0]
    if rollouts == 1:
        return returns
    return (returns - jnp.mean(returns, axis=0, keepdims=True)) * (rollouts / (rollouts - 1))


def make_problem(
    system: System | Callable[[Any], System],
    policy: GaussianPolicy,
    *,
    sample_start: Callable[[jax.Array], jax.Array],
    sample_goal: Callable[[jax.Array], jax.Array],
    reward: RewardFn,
    evaluate: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]],
    horizon: int,
    rollouts: int,
    discount: float = 1.0,
    rest_baseline: bool = False,
    share_samples: bool = False,
    scaled_task_loss: bool = True,
    features: Sequence[str] = FEATURES,
    inputs: Callable[[jax.Array, jax.Array], jax.Array] = lambda x, goal: x,
    sample_dynamics: Callable[[jax.Array], Any] | None = None,
    extra: Callable[[jax.Array], Any] | None = None,
    extra_loss: Callable[[Callable[[jax.Array], tuple[jax.Array, jax.Array]], Any], jax.Array] | None = None,
) -> Problem:
    """The problem of learning to reach a goal from sampled trajectories.

    Args:
      system: what is sampled from; it needs no derivative. With sample_dynamics, dynamics -> system.
      policy: the optimizee.
      sample_start: key -> [S], anew for each trajectory.
      sample_goal: key -> [G], of a task.
      reward: of a transition.
      evaluate: (states [T + 1, S], goal) -> {name: scalar}, averaged over trajectories beside "return". The trajectories
        are those of the policy's mean actions: how far it explores is no part of what it can.
      horizon: T, steps of a trajectory.
      rollouts: B, trajectories an inner step; as many are drawn for the task loss and for an evaluation.
      discount: of rewards, in (0, 1].
      rest_baseline: whether advantages are of returns less those of staying at the state without acting, reward(x, 0, x, goal)
        at every step: a baseline that depends on the state alone, for rewards of where the system is.
      share_samples: whether the trajectories by which meta-training judges an update are those that the next update learns
        from (`Problem.collected_loss`), which spares almost half of the simulation; not with extra_loss, which needs none.
      scaled_task_loss: whether the task loss's gradient is the policy gradient over the horizon and over the deviation of its
        advantages, of size 1 or so whatever the rewards are. False: it is that of the value, the expected return (with
        discounted rewards in both), as `collect_gradient="score"` needs it, which credits values.
      features: what the learned loss sees of each sample, some of `FEATURES`, in this order: "state" (as `inputs`), "goal",
        "updates" (k / (k + 1) after k of them), "reward", "return_to_go" (as
        an advantage, see `advantages`), "action", and of the policy at the state "log_prob" (of the action), "mean" and
        "std". The gradient goes through the last three alone.
      inputs: (x, goal) -> what stands for the state in the features, of size 1 or so.
      sample_dynamics: key -> what the task's system is made with; None: the same system for all.
      extra: goal -> what the task loss alone may see; with a context of `Demonstrations`, theirs.
      extra_loss: (x -> (mean, log std), extra) -> scalar: the task loss with extra information, for example behavioural
        cloning; None: the policy gradient's.

    Returns:
      A Problem whose observe is [B * T, F]. The task loss is minus the mean return of fresh trajectories of the updated
      policy in value, whose gradient is the policy gradient's direction (with scaled_task_loss=False the policy gradient
      itself). samples_per_step is B * T.

    Raises:
      ValueError: a size below 1, a discount outside (0, 1], an unknown feature, or a policy whose actions are not the system's.
    """
    for name, size in (("horizon", horizon), ("rollouts", rollouts)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount: expected a number in (0, 1], got {discount}")
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(f"features: expected some of {', '.join(FEATURES)}, got {tuple(features)}")

    def system_with(dynamics: Any) -> System:
        return cast(Callable[[Any], System], system)(dynamics) if sample_dynamics else cast(System, system)

    def action_shapes(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = system_with(None if sample_dynamics is None else sample_dynamics(key))
        mean, log_std = policy.apply(policy.init(key), jnp.zeros(made.observation_size), sample_goal(key))
        for what, value in (("mean", mean), ("log of the standard deviation", log_std)):
            if value.shape != (made.action_size,):
                raise ValueError(
                    f"policy: expected a {what} of shape ({made.action_size},), the action of {made.name}, got {value.shape}"
                )
        return mean, log_std

    jax.eval_shape(action_shapes, jax.random.key(0))

    def sample(params: Params, task: SamplingTask, key: jax.Array, *, explore: bool = True) -> Samples:
        """B trajectories, without any gradient."""
        # Cuts the gradient through the system and through how actions are drawn: what theta does to the distribution of
        # the data is the business of a score function (policy gradient, log_prob), not of backpropagation.
        params = jax.lax.stop_gradient(params)
        system, goal = system_with(task.dynamics), task.goal

        def act(x: jax.Array, key: jax.Array) -> jax.Array:
            mean, log_std = policy.apply(params, x, goal)
            return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape) if explore else mean

        def step(state: Any, action: jax.Array) -> Any:
            return system.step(state, system.action_limit * jnp.clip(action, -1.0, 1.0))

        def one(key: jax.Array) -> Samples:
            start_key, rollout_key = jax.random.split(key)
            start = system.state_at(sample_start(start_key), goal)
            made = rollout(act, step, start, rollout_key, horizon=horizon, observation_fn=lambda s: s.obs)
            rewards = jax.vmap(reward, in_axes=(0, 0, 0, None))(made.states[:-1], made.actions, made.states[1:], goal)
            return Samples(made.states, made.actions, rewards)

        # Cuts what is left of it: samples are constants.
        return jax.lax.stop_gradient(jax.vmap(one)(jax.random.split(key, rollouts)))

    def outputs(params: Params, samples: Samples, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log std), each [B, T, A], of the policy at the states that were visited."""
        at_states = jax.vmap(jax.vmap(policy.apply, in_axes=(None, 0, None)), in_axes=(None, 0, None))
        return at_states(params, samples.states[:, :-1], goal)

    def log_probs(params: Params, samples: Samples, goal: jax.Array) -> jax.Array:
        mean, log_std = outputs(params, samples, goal)
        return normal_log_prob(samples.actions, mean, log_std)

    def returns_of(samples: Samples, goal: jax.Array) -> jax.Array:
        returns = returns_to_go(samples.rewards, discount)
        if rest_baseline:
            states, still = samples.states[:, :-1], jnp.zeros(samples.actions.shape[-1])
            at_rest = jax.vmap(jax.vmap(lambda x: reward(x, still, x, goal)))(states)
            returns -= at_rest * returns_to_go(jnp.ones_like(at_rest), discount)
        return returns

    def advantages_of(samples: Samples, goal: jax.Array) -> jax.Array:
        return advantages(returns_of(samples, goal))

    def minus_return(value: jax.Array, surrogate: jax.Array) -> jax.Array:
        # Cuts the surrogate's value, which says nothing; its gradient stays beside the return.
        return surrogate - jax.lax.stop_gradient(surrogate) - value

    def policy_gradient(params: Params, samples: Samples, goal: jax.Array) -> jax.Array:
        """Minus the mean return in value, minus the policy gradient in gradient, up to a scale."""
        surrogate = -jnp.mean(advantages_of(samples, goal) * log_probs(params, samples, goal))
        return minus_return(jnp.mean(jnp.sum(samples.rewards, axis=1)), surrogate)

    def judged(params: Params, samples: Samples, goal: jax.Array) -> jax.Array:
        """The task loss without extra information."""
        if scaled_task_loss:
            return policy_gradient(params, samples, goal)
        weights = jnp.broadcast_to(discount ** jnp.arange(horizon), samples.rewards.shape)
        credit = weights * centred_returns(returns_of(samples, goal))
        surrogate = -jnp.mean(jnp.sum(credit * log_probs(params, samples, goal), axis=1))
        return minus_return(jnp.mean(jnp.sum(weights * samples.rewards, axis=1)), surrogate)

    def gathered(task: SamplingTask) -> Samples:
        if task.samples is None:
            raise ValueError("the task holds no samples: collect comes before observe, plain_loss and log_prob")
        return task.samples

    def sample_task(key: jax.Array, context: Context) -> SamplingTask:
        goal_key, dynamics_key = jax.random.split(key)
        if isinstance(context, Demonstrations):
            row = jax.random.randint(goal_key, (), 0, context.goals.shape[0])
            return SamplingTask(context.goals[row], extra=jax.tree.map(lambda leaf: leaf[row], context.extra))
        goal = sample_goal(goal_key)
        dynamics = None if sample_dynamics is None else sample_dynamics(dynamics_key)
        return SamplingTask(goal, dynamics, None if extra is None else extra(goal))

    def init(key: jax.Array, task: SamplingTask) -> Params:
        del task
        return policy.init(key)

    def collect(params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> SamplingTask:
        del context, step
        return task.replace(samples=sample(params, task, key))

    def observe(params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        samples = gathered(task)
        mean, log_std = outputs(params, samples, task.goal)
        shape = samples.rewards.shape
        made = {
            "state": jax.vmap(jax.vmap(inputs, (0, None)), (0, None))(samples.states[:, :-1], task.goal),
            "updates": jnp.broadcast_to(step / (step + 1.0), (*shape, 1)),
            "goal": jnp.broadcast_to(task.goal, (*shape, *task.goal.shape)),
            "action": samples.actions,
            "reward": samples.rewards[..., None],
            "return_to_go": advantages_of(samples, task.goal)[..., None],
            "log_prob": normal_log_prob(samples.actions, mean, log_std)[..., None],
            "std": jnp.exp(log_std),
            "mean": mean,
        }
        columns = jnp.concatenate([made[name] for name in features], axis=-1)
        return columns.reshape(shape[0] * shape[1], -1)

    def plain_loss(params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return policy_gradient(params, gathered(task), task.goal)

    def log_prob(params: Params, task: SamplingTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return jnp.sum(log_probs(params, gathered(task), task.goal))

    def task_loss(params: Params, task: SamplingTask, context: Context, key: jax.Array) -> jax.Array:
        del context
        if extra_loss is not None:
            return extra_loss(lambda x: policy.apply(params, x, task.goal), task.extra)
        return judged(params, sample(params, task, key), task.goal)

    def collected_loss(params: Params, task: SamplingTask, context: Context) -> jax.Array:
        del context
        return judged(params, gathered(task), task.goal)

    def measure(params: Params, task: SamplingTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context
        samples = sample(params, task, key, explore=False)
        values = jax.vmap(evaluate, in_axes=(0, None))(samples.states, task.goal)
        means = {name: jnp.mean(value) for name, value in values.items()}
        return {"return": jnp.mean(jnp.sum(samples.rewards, axis=1)), **means}

    return Problem(
        sample_task=sample_task,
        init=init,
        observe=observe,
        task_loss=task_loss,
        evaluate=measure,
        plain_loss=plain_loss,
        collect=collect,
        log_prob=log_prob,
        samples_per_step=rollouts * horizon,
        collected_loss=collected_loss if share_samples and extra_loss is None else None,
    )
