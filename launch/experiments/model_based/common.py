"""Model-based control: config, problem, learned model and scenarios of the experiments of this family.

Each experiment gives `definition` its `Robot`, its config and its scenarios.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import envs
import ml3_jax
from launch.config import Config, field
from launch.errors import UsageError
from launch.experiment import Definition, Experiment, Scenario
from launch.experiments import control
from launch.experiments.control import Robot
from launch.experiments.model_based import figures
from ml3_jax import dynamics, estimators, networks
from ml3_jax.problems import model_based, model_learning

DATA_SEED = 7  # of the first rollouts and of the untrained model; later draws come from the run's own seed
PRETRAIN = {"num_tasks": 32, "steps": 1000, "learning_rate": 1e-3}  # of the control "pretrained_tuned"


@dataclasses.dataclass(frozen=True)
class ControlConfig(Config):
    """A policy, the model that stands in for the system, and a learned loss of actions."""

    inner_lr: float = 3e-2
    inner_steps: int = 2
    meta_lr: float = 3e-3
    meta_steps: int = 1000
    meta_decay_steps: int = 1000
    meta_clip: float = 10.0
    num_tasks: int = 16
    objective: str = "mean"
    log_every: int | None = None  # None: refresh_every
    save_every: int | None = None  # None: log_every
    protocol: str = field("default", choices=("default", "published"))
    adapt_on: str = field("model", choices=model_based.ADAPT_ON)  # whose rollouts the inner loss sees
    dynamics: str = field("learned", choices=("learned", "exact"))  # what stands in for the system in all losses
    loss: str = field("action_target", choices=("action_target", "fitted_action_target", "mlp"))
    hidden: tuple[int, ...] = field((64, 64), at_least=1)  # of the learned loss
    activation: str = field("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))  # of the learned loss
    symmetric: bool = field(False)  # action_target: the loss of a mirrored state, goal and action is the same
    target_scale: float = field(3.0, above=0.0)  # the target where the loss's network gives 1, in action limits
    detach_states: bool = field(True)  # the learned loss reaches the policy through its actions alone
    sees_final_distance: bool = field(False)  # every row of the learned loss's features holds the final distance
    policy_hidden: tuple[int, ...] = field((64, 64), at_least=1)
    policy_last_scale: float = field(0.1, above=0.0)  # factor on the policy's initial last layer
    horizon: int = field(25, at_least=1)
    action_limit: float = field(1.0, above=0.0)
    estimator: str = field("backprop", choices=tuple(sorted(estimators.ESTIMATORS)))
    es_sigma: float = field(0.05, above=0.0)  # es: standard deviation of a perturbation of phi
    es_pairs: int = field(16, at_least=1)  # es: mirrored pairs
    refresh_every: int = field(100, at_least=1)  # meta-steps between refits of the model
    first_rollouts: int = field(32, at_least=1)  # of random actions, before meta-training
    refresh_rollouts: int = field(16, at_least=1)  # on the real system, before each refit
    buffer_rollouts: int = field(256, at_least=1)  # the model is fitted to at most this many
    exploration: float = field(0.1, at_least=0.0)  # noise on the actions of these rollouts, in action limits
    members: int = field(3, at_least=1)  # of the ensemble
    model_hidden: tuple[int, ...] = field((100, 30), at_least=1)
    fit_steps: int = field(1000, at_least=1)  # gradient steps of a refit

    def derived(self) -> dict[str, Any]:
        """Rows and checkpoints are written where the model is refitted."""
        log_every = self.log_every or self.refresh_every
        return {**super().derived(), "log_every": log_every, "save_every": log_every}

    def check(self) -> None:
        """As of the base; and a refresh must fit into the buffer."""
        super().check()
        if self.dynamics == "learned" and self.refresh_rollouts > self.buffer_rollouts:
            raise UsageError(
                f"config field 'buffer_rollouts' must be at least refresh_rollouts = {self.refresh_rollouts}, got "
                f"{self.buffer_rollouts}: a refresh would overwrite its own data"
            )


def scaled(state_scale: tuple[float, ...], *, sees_goal: bool = True) -> Callable[[Any], Callable[[Array, Array], Array]]:
    """`Robot.inputs`: the scaled state, and the goal where the policy sees it."""
    scale = jnp.asarray(state_scale)

    def inputs(x: Array, goal: Array) -> Array:
        return jnp.concatenate([x / scale, goal]) if sees_goal else x / scale

    return lambda env: inputs


def make_policy(robot: Robot, config: Any, env: envs.GoalEnv) -> model_based.Policy:
    """The deterministic policy of a config."""
    network, inputs, gain = robot.policy_network(config, env), robot.inputs(env), robot.policy_gain(config)

    def init(key: Array) -> Any:
        return network.init(key, control.blank_input(inputs, env))

    def apply(params: Any, x: Array, goal: Array) -> Array:
        return gain * jnp.asarray(network.apply(params, inputs(x, goal)))

    return model_based.Policy(init, apply)


def make_ensemble(config: Any, env: envs.GoalEnv) -> dynamics.Ensemble:
    """The dynamics model of a config. It predicts the change of the velocity, as in the released code."""
    return dynamics.make_ensemble(
        env.observation_size,
        env.action_size,
        members=config.members,
        hidden=config.model_hidden,
        fitting=dynamics.Fitting(steps=config.fit_steps),
        predicts="velocity",
        dt=env.dt,
        state_limits=env.state_limits,
    )


def make_problem(robot: Robot, config: Any, env: envs.GoalEnv) -> ml3_jax.Problem:
    """The problem of a config on one system, whose starts and goals are the tasks'."""
    predict, refresh = _exact_model(robot, config, env), None
    if config.dynamics == "learned":
        ensemble = make_ensemble(config, env)
        predict = model_learning.predict_fn(ensemble)
        refresh = model_based.Refresh(
            lambda context, trajectories, key: model_learning.refit(ensemble, context, trajectories, key),
            config.refresh_rollouts,
            config.exploration,
        )
    return model_based.make_problem(
        env,
        make_policy(robot, config, env),
        predict,
        model_based.Tasks(
            sample_start=env.sample_start,
            sample_goal=env.sample_goal,
            cost=robot.objective(config, env),
            evaluate=robot.evaluate(env),
            horizon=env.horizon,
            extra=robot.extra(config),
            distance=env.distance,
        ),
        observed=model_based.Observed(
            features=(*robot.features, *(("final_distance",) if config.sees_final_distance else ())),
            state_scale=None if robot.state_scale is None else jnp.asarray(robot.state_scale),
            detach_states=config.detach_states,
        ),
        adapt_on=config.adapt_on,
        refresh=refresh,
    )


def _exact_model(robot: Robot, config: Any, env: envs.GoalEnv) -> Callable[[Any, Array, Array], Array]:
    """The system's own equations. A simulator's steps have no gradient: there the closed form stands in."""
    equations = env if env.differentiable else robot.make_env(config, physics="closed_form")

    def predict(context: Any, x: Array, action: Array) -> Array:
        del context
        return equations.dynamics(x, action)

    return predict


def make_loss(config: Any, action_size: int) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden, config.activation)
    if config.loss == "fitted_action_target":
        return ml3_jax.losses.fitted_action_target(
            action_size, config.hidden, config.activation, target_scale=config.target_scale
        )
    return ml3_jax.losses.action_target(
        action_size, config.hidden, config.activation, config.symmetric, target_scale=config.target_scale
    )


def make_context(robot: Robot, config: Any) -> Any:
    """The model before meta-training, with the rollouts that it was fitted to; None where the equations stand in."""
    if config.dynamics != "learned":
        return None
    env = robot.make_env(config)
    return model_learning.initial_context(
        env,
        make_ensemble(config, env),
        env.sample_start,
        env.goal_size,
        jax.random.key(DATA_SEED),
        horizon=env.horizon,
        rollouts=config.first_rollouts,
        capacity=config.buffer_rollouts,
        rollouts_per_refresh=config.refresh_rollouts,
    )


def meta_options(config: Any) -> dict[str, Any]:
    """Estimator and refresh interval of a config."""
    estimator = estimators.evolution_strategy(config.es_sigma, config.es_pairs) if config.estimator == "es" else "backprop"
    return {"estimator": estimator, "refresh_every": config.refresh_every if config.dynamics == "learned" else None}


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """Steps on the real system: the first rollouts, those of every refresh, and those that inner steps saw."""
    config = experiment.config
    steps = meta_steps * config.num_tasks * config.unroll * (experiment.problem.samples_per_step or 0)
    if config.dynamics == "learned":
        fits = -(-meta_steps // config.refresh_every)
        steps += config.horizon * (config.first_rollouts + fits * config.refresh_rollouts)
    return steps


def scenario(robot: Robot, experiment: Experiment, metric: str, env: envs.GoalEnv, **fields: Any) -> Scenario:
    """A scenario of meta-test on one real system.

    Args:
      robot: the experiment's, or one with another policy.
      experiment: the experiment.
      metric: of the robot's evaluate.
      env: the tested system, with the tested goals.
      **fields: further fields of `Scenario`.
    """
    config = experiment.config
    problem = make_problem(robot, config, env)
    # The control saw the goals of meta-training, not those that are tested.
    seen = make_problem(robot, config, robot.make_env(config))
    pretrain = control.pretrainer(seen, experiment.context, **PRETRAIN)
    return control.scenario(problem, metric, experiment.context, pretrain=pretrain, **fields)


def definition(
    name: str,
    summary: str,
    config: type[ControlConfig],
    robot: Robot,
    scenarios: Callable[[Experiment], dict[str, Scenario]],
    **figure_env: Any,
) -> Definition:
    """The definition of an experiment of this family.

    Args:
      name, summary, config, scenarios: as of `Definition`.
      robot: the system.
      **figure_env: options of robot.make_env for the system that figures show.
    """

    def draw(trained: Any, folder: Any) -> None:
        config = trained.experiment.config
        env = robot.make_env(config, **figure_env)
        act = make_policy(robot, config, env).apply
        problem = control.recording_problem(make_problem(robot, config, env), env, act, config.horizon)
        figures.draw(trained, problem, env, robot.extra(config), folder)

    return Definition(
        name,
        summary,
        config,
        make_problem=lambda config: make_problem(robot, config, robot.make_env(config)),
        make_loss=lambda config: make_loss(config, robot.make_env(config).action_size),
        scenarios=scenarios,
        make_context=lambda config: make_context(robot, config),
        meta_options=meta_options,
        figures=draw,
        env_steps=env_steps,
    )
