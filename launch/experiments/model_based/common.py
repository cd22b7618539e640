"""Model-based control: config, problem, learned model and scenarios. An experiment passes its `Robot` to `definition`."""

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
from launch.experiment import PAPER_LOSS, Definition, Experiment, Scenario, paper_network
from launch.experiments import control
from launch.experiments.model_based import figures
from ml3_jax import dynamics, estimators, networks
from ml3_jax.problems import model_based, model_learning

DATA_SEED = 7  # of the first rollouts and the untrained model; later draws use the seed of the run
PRETRAIN = {"num_tasks": 32, "steps": 1000, "learning_rate": 1e-3}  # of the curve "pretrained_tuned"
PUBLISHED = {  # shared by the presets "published"
    "inner_steps": 1,
    "meta_decay_steps": 0,
    "num_tasks": 1,
    "objective": "last",
    "loss": "mlp",
    "activation": "elu",
    "detach_states": False,
}
RELEASED = {**PUBLISHED, "meta_clip": 0.0, "hidden": (400, 400), "sees_final_distance": True}  # of the released code


@dataclasses.dataclass(frozen=True)
class ControlConfig(Config):
    """A policy, a model of the system, and a learned loss of actions."""

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
    adapt_on: str = field("model", choices=model_based.ADAPT_ON)  # source of the rollouts in the inner loop
    dynamics: str = field("learned", choices=("learned", "exact"))  # the model of the system in all losses
    loss: str = field("action_target", choices=("action_target", "fitted_action_target", "mlp", PAPER_LOSS))
    hidden: tuple[int, ...] = field((64, 64), at_least=1)  # of the learned loss
    activation: str = field("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))  # of the learned loss
    symmetric: bool = field(False)  # action_target: invariant to mirroring state, goal and action
    target_scale: float = field(3.0, above=0.0)  # the target at network output 1, in action limits
    detach_states: bool = field(True)  # the inner gradient passes through actions, not through states
    sees_final_distance: bool = field(False)  # adds the final distance to each sample's features
    policy_hidden: tuple[int, ...] = field((64, 64), at_least=1)
    policy_last_scale: float = field(0.1, above=0.0)  # factor on the policy's initial last layer
    horizon: int = field(25, at_least=1)
    action_limit: float = field(1.0, above=0.0)
    estimator: str = field("backprop", choices=tuple(sorted(estimators.ESTIMATORS)))
    es_sigma: float = field(0.05, above=0.0)  # es, pes: standard deviation of a perturbation of phi
    es_pairs: int = field(16, at_least=1)  # es, pes: mirrored pairs
    refresh_every: int = field(100, at_least=1)  # meta-steps between refits of the model
    first_rollouts: int = field(32, at_least=1)  # random actions, before meta-training
    refresh_rollouts: int = field(16, at_least=1)  # on the real system, before each refit
    buffer_rollouts: int = field(256, at_least=1)  # capacity of the model's data
    exploration: float = field(0.1, at_least=0.0)  # noise on the actions of a refresh, in action limits
    members: int = field(3, at_least=1)  # of the ensemble
    model_hidden: tuple[int, ...] = field((100, 30), at_least=1)
    fit_steps: int = field(1000, at_least=1)  # gradient steps of a refit

    def derived(self) -> dict[str, Any]:
        """Rows and checkpoints are written when the model is refitted."""
        log_every = self.log_every or self.refresh_every
        return {**super().derived(), "log_every": log_every, "save_every": log_every}

    def check(self) -> None:
        """Also checks that a refresh fits into the buffer."""
        super().check()
        if self.dynamics == "learned" and self.refresh_rollouts > self.buffer_rollouts:
            raise UsageError(
                f"config field 'buffer_rollouts' must be at least refresh_rollouts = {self.refresh_rollouts}, got "
                f"{self.buffer_rollouts}: a refresh would overwrite its own data"
            )


def scaled(state_scale: tuple[float, ...], *, sees_goal: bool = True) -> Callable[[Any], Callable[[Array, Array], Array]]:
    """A `Robot.inputs`: the scaled state, and the goal if the policy sees it."""
    scale = jnp.asarray(state_scale)

    def inputs(x: Array, goal: Array) -> Array:
        return jnp.concatenate([x / scale, goal]) if sees_goal else x / scale

    return lambda env: inputs


def distance_cost(config: Any, env: envs.GoalEnv) -> model_based.CostFn:
    """Ten times the last distance, plus the mean distance."""
    del config

    def cost(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        del actions, extra
        distances = env.distance(states, goal)
        return 10.0 * distances[-1] + jnp.mean(distances)

    return cost


def make_policy(robot: control.Robot, config: Any, env: envs.GoalEnv) -> model_based.Policy:
    """The deterministic policy of a config."""
    network, inputs, gain = robot.policy_network(config, env), robot.inputs(env), robot.policy_gain(config)

    def apply(params: Any, x: Array, goal: Array) -> Array:
        return gain * jnp.asarray(network.apply(params, inputs(x, goal)))

    return model_based.Policy(lambda key: network.init(key, control.blank_input(inputs, env)), apply)


def make_ensemble(config: Any, env: envs.GoalEnv) -> dynamics.Ensemble:
    """The dynamics model of a config. It predicts the change of the velocity, like the released code's."""
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


def make_problem(robot: control.Robot, config: Any, env: envs.GoalEnv) -> ml3_jax.Problem:
    """The problem of a config. Tasks are starts and goals of env."""
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
            state_scale=jnp.asarray(robot.state_scale),
            detach_states=config.detach_states,
        ),
        adapt_on=config.adapt_on,
        refresh=refresh,
    )


def _exact_model(robot: control.Robot, config: Any, env: envs.GoalEnv) -> Callable[[Any, Array, Array], Array]:
    """The equations of the system. A simulator's steps have no gradient, so that the closed form replaces them."""
    equations = env if env.differentiable else robot.make_env(config, physics="closed_form")
    return lambda context, x, action: equations.dynamics(x, action)


def make_loss(config: Any, action_size: int) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden, config.activation)
    given, scale = (action_size, config.hidden, config.activation), config.target_scale
    if config.loss == "fitted_action_target":
        return ml3_jax.losses.fitted_action_target(*given, target_scale=scale)
    return ml3_jax.losses.action_target(*given, config.symmetric, target_scale=scale)


def make_context(robot: control.Robot, config: Any) -> Any:
    """The model before meta-training and its data, or None with exact dynamics."""
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
    settings = () if config.estimator == "backprop" else (config.es_sigma, config.es_pairs)
    estimator = estimators.ESTIMATORS[config.estimator](*settings)
    return {"estimator": estimator, "refresh_every": config.refresh_every if config.dynamics == "learned" else None}


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """Steps on the real system: the first rollouts, the rollouts of each refresh and those of inner steps."""
    config = experiment.config
    steps = meta_steps * config.num_tasks * config.unroll * (experiment.problem.samples_per_step or 0)
    if config.dynamics == "learned":
        fits = -(-meta_steps // config.refresh_every)
        steps += config.horizon * (config.first_rollouts + fits * config.refresh_rollouts)
    return steps


def scenario(robot: control.Robot, experiment: Experiment, metric: str, env: envs.GoalEnv, **fields: Any) -> Scenario:
    """A scenario on the system and goals of env. `robot` may differ from the experiment's in its policy."""
    config = experiment.config
    problem = make_problem(robot, config, env)
    trained_on = make_problem(robot, config, robot.make_env(config))  # the goals of meta-training
    pretrain = control.pretrainer(trained_on, experiment.context, **PRETRAIN)
    return control.scenario(problem, metric, experiment.context, pretrain=pretrain, **fields)


def definition(
    name: str, summary: str, config: type[ControlConfig], robot: control.Robot, scenarios: control.Scenarios, **figure_env: Any
) -> Definition:
    """The definition of an experiment. Figures show the system with the options `figure_env` of `robot.make_env`."""

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
        paper_network=lambda config: paper_network(config.hidden, config.activation),
    )
