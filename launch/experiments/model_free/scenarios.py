"""Scenarios of the model-free experiments, with the baselines that sample: PPO and a pretrained policy."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch.evaluation import ppo
from launch.experiment import Reference, Scenario
from launch.experiments import control
from launch.experiments.control import Robot
from launch.experiments.model_free import common

PPO_SEED = 5100  # of the first PPO run
PRETRAIN_LR = 3e-3  # of the control "pretrained_tuned"


def scenario(
    robot: Robot,
    config: Any,
    env: envs.GoalEnv,
    title: str,
    *,
    problem: ml3_jax.Problem | None = None,
    ppo_settings: ppo.PPOSettings | None = None,
    dynamics: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Scenario:
    """A scenario of meta-test on one system, or on one system for each task.

    Args:
      robot: the system's description.
      config: of the policies.
      env: the tested system, with its goals.
      title: of the scenario.
      problem: the problem of env and config; None: it is made. Scenarios that share one share its compilation.
      ppo_settings: settings of the baseline "ppo"; None: no such baseline.
      dynamics: sample_dynamics and system of `model_free.make_problem`; None: env for all tasks.
      **fields: further fields of `control.scenario`, such as goals, pretrain or on_request.
    """
    dynamics = dynamics or {}
    if problem is None:
        problem = common.make_problem(robot, config, env, **dynamics)

    def reference(tasks: Any, folder: pathlib.Path) -> Reference:
        assert ppo_settings is not None
        return ppo_reference(robot, config, env, ppo_settings, dynamics.get("system"), tasks, folder)

    # The context is None: goals are drawn anew, and demonstrations are for meta-training alone.
    return control.scenario(
        problem,
        "return",
        steps=20,
        maximize=True,
        log_scale=False,
        other_metrics=("distance",),
        title=title,
        reference=reference if ppo_settings else None,
        **fields,
    )


def ppo_reference(
    robot: Robot,
    config: Any,
    env: envs.GoalEnv,
    settings: ppo.PPOSettings,
    system: Callable[[Any], Any] | None,
    tasks: Any,
    folder: pathlib.Path,
) -> Reference:
    """PPO's curves on the first `ppo_tasks` tasks.

    Args:
      robot, config, env: as of `scenario`.
      settings: of PPO.
      system: dynamics of a task -> its system; None: env.
      tasks: [M, ...].
      folder: curves are kept there.
    """
    tasks = jax.tree.map(lambda leaf: leaf[: config.ppo_tasks], tasks)
    systems = [env] * len(tasks.goal) if system is None else [system(dynamics) for dynamics in tasks.dynamics]
    made = [
        ppo.OneTask(
            one,
            goal,
            sample_start=env.sample_start,
            inputs=robot.inputs(env),
            reward=robot.objective(config, env),
            distance=env.distance,
            horizon=config.horizon,
        )
        for one, goal in zip(systems, tasks.goal, strict=True)
    ]
    names = [{**_describe_system(env, config), "task": task} for task in control.describe(tasks)]
    curves = ppo.curves(made, settings, folder, names=names, horizon=config.horizon, seed=PPO_SEED)
    return _align(curves)


def _describe_system(env: envs.GoalEnv, config: Any) -> dict[str, Any]:
    """Everything besides the task that determines a PPO run: the environment's numbers and the reward's. A cache key."""
    options = {name: value for name, value in vars(env).items() if isinstance(value, int | float | str | tuple)}
    own = {"environment": env.name, "backend": env.backend, "action_cost": config.action_cost}
    return {**own, **{name: value for name, value in options.items() if not name.startswith("_")}}


def _align(curves: list[ppo.Curve]) -> Reference:
    """Curves of different lengths on the evaluations of the longest; a shorter one keeps its last value."""
    steps = max((curve.env_steps for curve in curves), key=lambda steps: steps[-1])

    def at_steps(curve: ppo.Curve, values: list[float]) -> np.ndarray:
        return np.interp(steps, curve.env_steps, values)

    values = {name: np.array([at_steps(curve, curve.values[name]) for curve in curves]) for name in curves[0].values}
    return Reference(list(steps), values, [curve.flat for curve in curves])


def pretrainer(problem: ml3_jax.Problem, config: Any) -> Callable[[Array], Any]:
    """`Scenario.pretrain`: one policy trained on the meta-train tasks by policy gradient."""
    return control.pretrainer(problem, None, num_tasks=config.num_tasks, steps=config.pretrain_steps, learning_rate=PRETRAIN_LR)


def with_policies(config: Any, choices: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    """The config with each of these policies: {name: (hidden, activation)} -> {name: config}."""
    return {
        name: dataclasses.replace(config, policy_hidden=hidden, policy_activation=activation)
        for name, (hidden, activation) in choices.items()
    }
