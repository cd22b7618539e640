"""What the model-free experiments share: config, policy, problem and meta-objective.

An experiment describes a `Plant` and its own defaults, and hands both to this; `sampling_settings` has what meta-test
makes of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import ppo
from launch.errors import UsageError
from launch.experiments import config as config_lib
from launch.experiments.base import Config, Experiment, assemble, setting
from ml3_jax import inner, networks
from ml3_jax.problems import model_free

FEATURES = ("state", "updates", "return_to_go", "action", "mean", "std")  # of `losses.guided_policy_gradient`


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Config):
    """Trajectories, policy and learned loss; rollouts * horizon samples are one inner step's.

    What the size decides stands as None until `resolve`.
    """

    inner_optimizer: str = "adam"
    inner_lr: float | None = 2e-2
    inner_steps: int = 20
    unroll: int | None = 5
    meta_lr: float = 3e-3
    meta_steps: int | None = None
    meta_decay_steps: int | None = None
    meta_clip: float = 1.0
    num_tasks: int | None = None
    objective: str = "mean"
    size: str = setting("default", choices=("default", "full"))  # full: the paper's, for a GPU
    horizon: int = setting(50, at_least=1)
    rollouts: int | None = setting(None, at_least=1)  # an inner step; as many for the task loss and for each evaluation
    discount: float = setting(1.0, above=0.0, at_most=1.0)
    rest_baseline: bool = False  # advantages are over what staying at the state would bring
    share_samples: bool = False  # what judges an update is what the next one learns from
    action_cost: float = setting(0.01, at_least=0.0)  # of each unit of an action, in action limits
    collect_gradient: str = setting("cut", choices=inner.COLLECT_GRADIENTS)  # "score": the unbiased meta-gradient
    hidden: tuple[int, ...] = setting((64, 64), at_least=1)  # of the learned loss
    activation: str = setting("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))  # of the learned loss
    target_scale: float = setting(3.0, above=0.0)  # the target where the loss's network gives 1, in action limits
    target_weight: float = setting(10.0, at_least=0.0)  # in the meta-objective, of what the targets are worth as a policy
    target_std: float = setting(0.3, above=0.0)  # how far that policy explores, in action limits
    policy_hidden: tuple[int, ...] = setting((64, 64), at_least=1)
    policy_activation: str = setting("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))
    policy_last_scale: float = setting(0.1, above=0.0)  # factor on the initial last layer
    policy_std: float = setting(0.5, above=0.0)  # at the start, in action limits
    policy_least_std: float = setting(0.2, above=0.0)  # it never explores less
    pretrain_steps: int = setting(1000, at_least=1)  # updates of the control "pretrained_tuned"
    ppo_tasks: int | None = setting(None, at_least=1, optional=True)  # PPO learns the first of the tested ones; None: all
    ppo_env_steps: int = setting(200_000, at_least=1)  # at least; PPO goes on until its curve is flat


C = TypeVar("C", bound=SamplingConfig)


def resolve(config: C, sizes: Mapping[str, Mapping[str, Any]]) -> C:
    """Fills in what the size decides; a field that was set wins.

    Args:
      config: with fields left None.
      sizes: size -> {field: value}.
    """
    left_open = {name: value for name, value in sizes[config.size].items() if getattr(config, name) is None}
    return config_lib.override(config, left_open)


class Plant(NamedTuple):
    """What one experiment is about; functions of its resolved config and its environment.

    Attributes:
      name: of the experiment.
      make_env: (config, **options) -> the environment.
      inputs: env -> ((x, goal) -> what the policy and the learned loss see).
      reward: (config, env) -> the reward of a transition.
      ppo: config -> the settings of the baseline.
    """

    name: str
    make_env: Callable[..., envs.GoalEnv]
    inputs: Callable[[envs.GoalEnv], Callable[[Array, Array], Array]]
    reward: Callable[[Any, envs.GoalEnv], model_free.RewardFn]
    ppo: Callable[[Any], ppo.PPOSettings]


def near_goal(env: envs.GoalEnv, *, unit: float, height: float, width: float, action_cost: float) -> model_free.RewardFn:
    """R = -d + height / (d + width) - action_cost |a| at the next state, |a| the sum over clipped actions.

    Args:
      env: whose distance counts.
      unit: d is the distance over this.
      height, width: of the peak at the goal; its top is height / width.
      action_cost: of each unit of an action.
    """

    def of_transition(x: Array, action: Array, following: Array, goal: Array) -> Array:
        del x
        distance = env.distance(following, goal) / unit
        effort = jnp.sum(jnp.abs(jnp.clip(action, -1.0, 1.0)))
        return -distance + height / (distance + width) - action_cost * effort

    return of_transition


def make_policy(plant: Plant, config: Any, env: envs.GoalEnv) -> model_free.GaussianPolicy:
    """The policy of a config: a network of the inputs gives the mean, the deviation is a parameter with a floor."""
    network = networks.MLP(
        (*config.policy_hidden, env.action_size),
        config.policy_activation,
        init_scheme="fan_in",
        last_scale=config.policy_last_scale,
    )
    inputs = plant.inputs(env)
    if config.policy_std <= config.policy_least_std:
        raise ValueError(
            f"policy_std: expected more than policy_least_std = {config.policy_least_std}, got {config.policy_std}"
        )
    # std = floor + e^s; s starts where that is policy_std.
    start = math.log(config.policy_std - config.policy_least_std)

    def init(key: Array) -> Any:
        seen = inputs(jnp.zeros(env.observation_size), jnp.zeros(env.goal_size))
        return {"mean": network.init(key, seen), "log_std": jnp.full(env.action_size, start)}

    def apply(params: Any, x: Array, goal: Array) -> tuple[Array, Array]:
        mean = jnp.asarray(network.apply(params["mean"], inputs(x, goal)))
        return mean, jnp.log(config.policy_least_std + jnp.exp(params["log_std"]))

    return model_free.GaussianPolicy(init, apply)


def make_problem(
    plant: Plant,
    config: Any,
    env: envs.GoalEnv,
    *,
    policy: model_free.GaussianPolicy | None = None,
    sample_dynamics: Callable[[Array], Any] | None = None,
    system: Any = None,
    extra_loss: Callable[..., Array] | None = None,
) -> ml3_jax.Problem:
    """The problem of a config on one system, or on one made anew for each task.

    Args:
      plant: the experiment.
      config: its resolved config.
      env: the system, whose starts and goals are the tasks'.
      sample_dynamics: what the system of a task is made with; None: env for all.
      system: dynamics -> system, where dynamics are sampled.
      extra_loss: the task loss where an expert is known; None: the policy gradient's.
    """
    return model_free.make_problem(
        env if system is None else system,
        make_policy(plant, config, env) if policy is None else policy,
        sample_start=env.sample_start,
        sample_goal=env.sample_goal,
        reward=plant.reward(config, env),
        evaluate=lambda states, goal: {"distance": env.distance(states[-1], goal)},
        horizon=config.horizon,
        rollouts=config.rollouts,
        discount=config.discount,
        rest_baseline=config.rest_baseline,
        share_samples=config.share_samples,
        scaled_task_loss=config.collect_gradient != "score",  # the score function credits values
        features=FEATURES,
        inputs=plant.inputs(env),
        sample_dynamics=sample_dynamics,
        extra_loss=extra_loss,
    )


def build(
    plant: Plant,
    config: Any,
    *,
    demonstrations: Callable[[envs.GoalEnv], model_free.Demonstrations] | None = None,
    extra_loss: Callable[..., Array] | None = None,
    **options: Any,
) -> Experiment:
    """The experiment of a config.

    Args:
      plant: the experiment.
      config: its resolved config.
      demonstrations: env -> what experts did, the context of meta-training; None: there are none.
      extra_loss: the task loss with them, as of `model_free.make_problem`.
      **options: go on to `assemble`.

    Raises:
      UsageError: an environment, a policy or a problem that cannot be built, or rewards that are not finite.
    """
    try:
        env = plant.make_env(config)
        problem = make_problem(plant, config, env, extra_loss=extra_loss)
        _check_rewards(problem)
        context = None if demonstrations is None else demonstrations(env)
        loss = ml3_jax.losses.guided_policy_gradient(
            env.action_size, config.hidden, config.activation, target_scale=config.target_scale
        )
        auxiliary = worth_of_targets(plant, config, env, loss, extra_loss) if config.target_weight else None
    except ValueError as error:
        raise UsageError(f"experiment '{plant.name}' cannot be built with this config: {error}") from error
    options = {"collect_gradient": config.collect_gradient, "auxiliary_loss": auxiliary, **options}
    return assemble(plant.name, config, problem, loss, context, **options)


def worth_of_targets(
    plant: Plant, config: Any, env: envs.GoalEnv, loss: ml3_jax.LearnedLoss, extra_loss: Callable[..., Array] | None
) -> Callable[..., Array]:
    """The task loss of the policy that an inner loop which has converged would leave: its mean is the loss's target.

    Through the inner loop the target feels the task loss as far as a segment of updates comes on its way there; this is where
    that way ends, and costs no inner step to differentiate.
    """
    inputs, size = plant.inputs(env), env.action_size
    seen = jnp.size(inputs(jnp.zeros(env.observation_size), jnp.zeros(env.goal_size))) + 1
    target = loss.target
    assert target is not None

    def act(loss_params: Any, x: Array, goal: Array) -> tuple[Array, Array]:
        converged = jnp.ones(1)  # "updates", k / (k + 1), after infinitely many
        mean = target(loss_params, jnp.concatenate([inputs(x, goal), converged]))
        return mean, jnp.full(size, math.log(config.target_std))

    def init(key: Array) -> Any:
        return loss.init(key, seen + 3 * size + 1)

    problem = make_problem(plant, config, env, policy=model_free.GaussianPolicy(init, act), extra_loss=extra_loss)

    def worth(loss_params: Any, task: Any, context: Any, key: Array) -> Array:
        return config.target_weight * problem.task_loss(loss_params, task, context, key)

    return worth


def _check_rewards(problem: ml3_jax.Problem) -> None:
    """Raises ValueError unless the first policy's rewards are finite, before anything is trained on them."""
    key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
    assert problem.collect is not None
    task = problem.sample_task(key, None)
    rewards = np.asarray(problem.collect(problem.init(key, task), task, None, key, step).samples.rewards)
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        rollout, time = bad[0]
        raise ValueError(
            f"rewards: expected finite numbers, got {rewards[rollout, time]} at step {time} of rollout {rollout} of a random "
            "policy: look at the reward and at the environment's steps"
        )


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """What meta-training sampled: for every inner step, and for every task loss."""
    config, samples = experiment.config, experiment.problem.samples_per_step
    assert samples is not None
    losses = config.unroll if config.objective == "mean" else 1
    if experiment.context is not None:
        losses = 0  # the task loss compares with an expert
    elif experiment.problem.collected_loss is not None and config.objective == "mean":
        losses = 1  # what judges an update is what the next one learns from
    if config.target_weight and experiment.context is None:
        losses += 1  # of the policy that acts on the targets
    return meta_steps * config.num_tasks * samples * (config.unroll + losses)
