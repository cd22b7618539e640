"""What the model-based control experiments share: config, problem, learned model, meta-test settings and figures.

`point_mass_mbrl`, `reacher_mbrl` and `mountain_car` each describe a `Robot` and their own defaults, and hand both to this.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import pretraining
from launch.errors import UsageError
from launch.experiments import config as config_lib
from launch.experiments.base import Config, Experiment, Setting, assemble, setting
from ml3_jax import dynamics, estimators, networks
from ml3_jax.problems import model_based, model_learning

C = TypeVar("C", bound="ControlConfig")
DATA_SEED = 7  # of the first rollouts and of the untrained model; what follows comes from the run's own seed
PRETRAIN_TASKS, PRETRAIN_LR = 32, 1e-3  # of the control "pretrained_tuned"


@dataclasses.dataclass(frozen=True)
class ControlConfig(Config):
    """What a protocol decides stands as None until `fill` fills it in."""

    protocol: str = setting("default", choices=("default", "published"))
    adapt_on: str = setting("model", choices=model_based.ADAPT_ON)  # whose rollouts the inner loss sees
    dynamics: str | None = setting(None, choices=("learned", "exact"))  # what stands in for the system in all losses
    loss: str | None = setting(None, choices=("action_target", "fitted_action_target", "mlp"))
    hidden: tuple[int, ...] | None = setting(None, at_least=1)  # of the learned loss
    activation: str | None = setting(None, choices=tuple(sorted(networks.ACTIVATIONS)))  # of the learned loss
    symmetric: bool = setting(False)  # action_target: whether what holds for a state and goal holds for their mirror image
    target_scale: float = setting(3.0, above=0.0)  # the target where the loss's network gives 1, in action limits
    detach_states: bool | None = setting(None)  # whether the learned loss reaches the policy through its actions alone
    sees_final_distance: bool | None = setting(None)  # whether the learned loss sees the final distance, in every row
    policy_hidden: tuple[int, ...] | None = setting(None, at_least=1)
    policy_last_scale: float | None = setting(None, above=0.0)  # factor on the policy's initial last layer
    horizon: int | None = setting(None, at_least=1)
    action_limit: float | None = setting(None, above=0.0)
    estimator: str | None = setting(None, choices=tuple(sorted(estimators.ESTIMATORS)))
    es_sigma: float = setting(0.05, above=0.0)  # es: standard deviation of a perturbation of phi
    es_pairs: int = setting(16, at_least=1)  # es: mirrored pairs
    refresh_every: int | None = setting(None, at_least=1)  # meta-steps between refits of the model
    first_rollouts: int | None = setting(None, at_least=1)  # of random actions, before anything else
    refresh_rollouts: int | None = setting(None, at_least=1)  # on the real system, before each refit
    buffer_rollouts: int = setting(256, at_least=1)  # the most that the model is fitted to
    exploration: float = setting(0.1, at_least=0.0)  # noise on the actions of these rollouts, in action limits
    members: int = setting(3, at_least=1)  # of the ensemble
    model_hidden: tuple[int, ...] = setting((100, 30), at_least=1)
    fit_steps: int = setting(1000, at_least=1)  # gradient steps of a refit
    inner_steps: int | None = setting(None, at_least=1)
    meta_lr: float | None = setting(None, above=0.0)
    meta_steps: int | None = setting(None, at_least=1)
    meta_decay_steps: int | None = setting(None, at_least=0)
    meta_clip: float | None = setting(None, at_least=0.0)
    num_tasks: int | None = setting(None, at_least=1)
    objective: str | None = setting(None, choices=("last", "mean"))
    log_every: int | None = setting(None, at_least=1)  # a multiple of refresh_every
    save_every: int | None = setting(None, at_least=1)


class Robot(NamedTuple):
    """What one experiment is about; functions of its resolved config.

    Attributes:
      name: of the experiment.
      make_env: (config, **options) -> the environment.
      state_scale: [S] typical size of each coordinate of the state.
      policy_bias: whether the policy's layers have biases.
      policy_activation: of the policy.
      policy_gain: config -> what the policy's network is multiplied with, in action limits.
      features: what the learned loss sees beside the action.
      policy_sees_goal: whether the policy's input holds the goal beside the state.
      cost: (config, env) -> the task loss of a rollout.
      evaluate: env -> (states, goal) -> {name: scalar}.
      extra: config -> what the task loss alone may see.
    """

    name: str
    make_env: Callable[..., envs.GoalEnv]
    state_scale: tuple[float, ...]
    cost: Callable[[Any, envs.GoalEnv], model_based.CostFn]
    evaluate: Callable[[envs.GoalEnv], Callable[[Array, Array], Mapping[str, Array]]]
    extra: Callable[[Any], Any] = lambda config: None
    policy_bias: bool = True
    policy_activation: str = "tanh"
    policy_gain: Callable[[Any], float] = lambda config: 1.0
    policy_sees_goal: bool = True
    features: tuple[str, ...] = ("state", "goal")


def fill(config: C, presets: Mapping[str, Mapping[str, Any]]) -> C:
    """Fills in what the protocol decides; unroll follows inner_steps."""
    preset = presets[config.protocol]
    if config.inner_steps not in (None, preset["inner_steps"]):
        preset = {**preset, "unroll": config.inner_steps}
    left_open = {name: value for name, value in preset.items() if getattr(config, name) is None}
    config = config_lib.override(config, left_open)
    if config.log_every is None:
        config = config_lib.override(config, {"log_every": config.refresh_every})
    if config.save_every is None:
        config = config_lib.override(config, {"save_every": config.log_every})
    assert config.refresh_rollouts is not None  # every preset has it
    if config.dynamics == "learned" and config.refresh_rollouts > config.buffer_rollouts:
        raise UsageError(
            f"config field 'buffer_rollouts' must be at least refresh_rollouts = {config.refresh_rollouts}, got "
            f"{config.buffer_rollouts}: a refresh would overwrite its own data"
        )
    return config


def make_policy(robot: Robot, config: Any, env: envs.GoalEnv, *, sees_goal: bool) -> model_based.Policy:
    """The policy of a config: a network of the scaled state, and of the goal where it sees it."""
    network = networks.MLP(
        (*config.policy_hidden, env.action_size),
        robot.policy_activation,
        robot.policy_bias,
        init_scheme="fan_in",
        last_scale=config.policy_last_scale,
    )
    scale, gain = jnp.asarray(robot.state_scale), robot.policy_gain(config)

    def inputs(x: Array, goal: Array) -> Array:
        return jnp.concatenate([x / scale, goal]) if sees_goal else x / scale

    def init(key: Array) -> Any:
        return network.init(key, inputs(jnp.zeros(env.observation_size), jnp.zeros(env.goal_size)))

    def apply(params: Any, x: Array, goal: Array) -> Array:
        return gain * jnp.asarray(network.apply(params, inputs(x, goal)))

    return model_based.Policy(init, apply)


def make_ensemble(config: Any, env: envs.GoalEnv) -> dynamics.Ensemble:
    """The dynamics model of a config: it predicts the change of the velocity, as the released code's does."""
    return dynamics.make_ensemble(
        env.observation_size,
        env.action_size,
        members=config.members,
        hidden=config.model_hidden,
        fit_steps=config.fit_steps,
        predicts="velocity",
        dt=env.dt,
        state_limits=env.state_limits,
    )


def make_problem(
    robot: Robot,
    config: Any,
    env: envs.GoalEnv,
    *,
    ensemble: dynamics.Ensemble | None,
    evaluate: Callable[[Array, Array], Mapping[str, Array]] | None = None,
    policy: model_based.Policy | None = None,
) -> ml3_jax.Problem:
    """The problem of a config on one system.

    Args:
      robot: the experiment.
      config: its resolved config.
      env: the real system, whose starts and goals are the tasks'.
      ensemble: the learned model; None: the losses see the system's own equations.
      evaluate: what is reported of a rollout; None: the robot's.
      policy: the optimizee; None: the config's.
    """

    # A simulator's steps have no gradient: the same system in closed form has.
    equations = env if env.differentiable else robot.make_env(config, physics="closed_form")

    def exact(context: Any, x: Array, action: Array) -> Array:
        del context
        return equations.dynamics(x, action)

    refresh = None
    if ensemble is not None:
        refresh = model_based.Refresh(
            lambda context, trajectories, key: model_learning.refit(ensemble, context, trajectories, key),
            config.refresh_rollouts,
            config.exploration,
        )
    return model_based.make_problem(
        env,
        policy or make_policy(robot, config, env, sees_goal=robot.policy_sees_goal),
        exact if ensemble is None else model_learning.predict_fn(ensemble),
        sample_start=env.sample_start,
        sample_goal=env.sample_goal,
        cost=robot.cost(config, env),
        evaluate=evaluate or robot.evaluate(env),
        horizon=env.horizon,
        extra=robot.extra(config),
        distance=env.distance,
        features=(*robot.features, *(("final_distance",) if config.sees_final_distance else ())),
        state_scale=jnp.asarray(robot.state_scale),
        adapt_on=config.adapt_on,
        detach_states=config.detach_states,
        refresh=refresh,
    )


def make_loss(config: Any, env: envs.GoalEnv) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden, config.activation)
    if config.loss == "fitted_action_target":
        return ml3_jax.losses.fitted_action_target(
            env.action_size, config.hidden, config.activation, target_scale=config.target_scale
        )
    return ml3_jax.losses.action_target(
        env.action_size, config.hidden, config.activation, config.symmetric, target_scale=config.target_scale
    )


def build(robot: Robot, config: Any, **options: Any) -> Experiment:
    """The experiment of a config.

    Raises:
      UsageError: an environment that cannot be built, or whose steps are not finite.
    """
    try:
        env = robot.make_env(config)
        ensemble, context = None, None
        if config.dynamics == "learned":
            ensemble = make_ensemble(config, env)
            context = model_learning.initial_context(
                env,
                ensemble,
                env.sample_start,
                env.goal_size,
                jax.random.key(DATA_SEED),
                horizon=env.horizon,
                rollouts=config.first_rollouts,
                capacity=config.buffer_rollouts,
                rollouts_per_refresh=config.refresh_rollouts,
            )
    except ValueError as error:
        raise UsageError(f"experiment '{robot.name}' cannot be built with this config: {error}") from error
    estimator = estimators.evolution_strategy(config.es_sigma, config.es_pairs) if config.estimator == "es" else "backprop"
    return assemble(
        robot.name,
        config,
        make_problem(robot, config, env, ensemble=ensemble),
        make_loss(config, env),
        context,
        estimator=estimator,
        refresh_every=None if ensemble is None else config.refresh_every,
        **options,
    )


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """What meta-training took from the real system: the first rollouts, those of every refresh, those that inner steps saw."""
    config = experiment.config
    steps = meta_steps * config.num_tasks * config.unroll * (experiment.problem.samples_per_step or 0)
    if config.dynamics == "learned":
        fits = -(-meta_steps // config.refresh_every)
        steps += config.horizon * (config.first_rollouts + fits * config.refresh_rollouts)
    return steps


def measured(
    robot: Robot,
    experiment: Experiment,
    env: envs.GoalEnv,
    *,
    sees_goal: bool | None = None,
    pretrain_steps: int = 0,
    **fields: Any,
) -> Setting:
    """A setting of meta-test on one system.

    Args:
      robot: the experiment's description.
      experiment: it.
      env: the real system that is reported on, with the goals that are tested.
      sees_goal: whether the policy sees the goal; None: as in meta-training.
      pretrain_steps: updates of the control "pretrained_tuned"; 0: none.
      **fields: further fields of `Setting`.
    """
    config = experiment.config
    ensemble = make_ensemble(config, env) if config.dynamics == "learned" else None
    policy = make_policy(robot, config, env, sees_goal=robot.policy_sees_goal if sees_goal is None else sees_goal)
    problem = make_problem(robot, config, env, ensemble=ensemble, policy=policy)
    # What has seen the tasks of meta-training has seen its goals, and not those that are tested.
    seen = make_problem(robot, config, robot.make_env(config), ensemble=ensemble, policy=policy)

    def sample_tasks(key: Array, count: int) -> model_based.ControlTask:
        return jax.vmap(problem.sample_task, (0, None))(jax.random.split(key, count), None)

    def pretrain(key: Array) -> Any:
        return pretraining.pretrain(
            seen, experiment.context, key, num_tasks=PRETRAIN_TASKS, steps=pretrain_steps, learning_rate=PRETRAIN_LR
        )

    return Setting(
        problem,
        experiment.context,
        sample_tasks,
        describe=lambda tasks: [
            {"start": start, "goal": goal}
            for start, goal in zip(np.asarray(tasks.start).tolist(), np.asarray(tasks.goal).tolist(), strict=True)
        ],
        pretrain=pretrain if pretrain_steps else None,
        **fields,
    )
