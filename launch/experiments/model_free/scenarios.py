"""Meta-test of the model-free experiments: settings, and the baselines that sample: PPO and a pretrained policy."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import ppo, pretraining
from launch.experiments import sampling
from launch.experiments.base import Experiment, Reference, Setting
from ml3_jax.problems import model_free

REFERENCE_SEED = 5100  # of the first PPO run
PRETRAIN_LR = 3e-3  # of the control "pretrained_tuned"


def measured(
    plant: sampling.Plant,
    experiment: Experiment,
    env: envs.GoalEnv,
    *,
    config: Any = None,
    problem: ml3_jax.Problem | None = None,
    goals: Callable[[Array], Array] | None = None,
    sample_dynamics: Callable[[Array], Any] | None = None,
    system: Any = None,
    pretrain: Callable[[Array], Any] | None = None,
    with_ppo: bool = False,
    **fields: Any,
) -> Setting:
    """A setting of meta-test on one system.

    Args:
      plant: the experiment's description.
      experiment: it.
      env: the system that is tested, with its goals.
      config: that of the policies; None: the experiment's.
      problem: what is tested, of env and config; None: it is made. One for several settings is compiled once.
      goals: key -> goal, where they are not those of env.
      sample_dynamics, system: as of `sampling.make_problem`.
      pretrain: of `pretrainer`, or None.
      with_ppo: whether PPO is trained on each tested task, or on the first `ppo_tasks` of them.
      **fields: further fields of `Setting`.
    """
    config = config or experiment.config
    if problem is None:
        problem = sampling.make_problem(plant, config, env, sample_dynamics=sample_dynamics, system=system)

    def sample_tasks(key: Array, count: int) -> model_free.SamplingTask:
        def one(key: Array) -> model_free.SamplingTask:
            task = problem.sample_task(key, None)
            return task if goals is None else task.replace(goal=goals(jax.random.fold_in(key, 1)))

        return jax.vmap(one)(jax.random.split(key, count))

    def describe(tasks: model_free.SamplingTask) -> list[Any]:
        columns: dict[str, list[Any]] = {"goal": np.asarray(tasks.goal).tolist()}
        if tasks.dynamics is not None:
            columns["dynamics"] = np.asarray(tasks.dynamics).tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def reference(tasks: model_free.SamplingTask, folder: pathlib.Path) -> Reference:
        tasks = jax.tree.map(lambda leaf: leaf[: config.ppo_tasks], tasks)
        systems = [env] * len(tasks.goal) if system is None else [system(dynamics) for dynamics in tasks.dynamics]
        made = [
            ppo.OneTask(
                one,
                goal,
                sample_start=env.sample_start,
                inputs=plant.inputs(env),
                reward=plant.reward(config, env),
                distance=env.distance,
                horizon=config.horizon,
            )
            for one, goal in zip(systems, tasks.goal, strict=True)
        ]
        names = [{**_of_system(env, config), "task": task} for task in describe(tasks)]
        curves = ppo.curves(made, plant.ppo(config), folder, names=names, horizon=config.horizon, seed=REFERENCE_SEED)
        return _aligned(curves)

    return Setting(
        problem,
        None,  # goals are drawn anew: what an expert did is for meta-training alone
        sample_tasks,
        metric="return",
        maximize=True,
        log_scale=False,
        other_metrics=("distance",),
        describe=describe,
        pretrain=pretrain,
        reference=reference if with_ppo else None,
        **fields,
    )


def _of_system(env: envs.GoalEnv, config: Any) -> dict[str, Any]:
    """All that what PPO is trained on depends on, beside the task: the environment's own numbers, and the reward's."""
    options = {name: value for name, value in vars(env).items() if isinstance(value, int | float | str | tuple)}
    own = {"environment": env.name, "backend": env.backend, "action_cost": config.action_cost}
    return {**own, **{name: value for name, value in options.items() if not name.startswith("_")}}


def _aligned(curves: list[ppo.Curve]) -> Reference:
    """Curves of different lengths on the evaluations of the longest; one that ended earlier keeps its last value."""
    steps = max((curve.env_steps for curve in curves), key=lambda steps: steps[-1])

    def at_steps(curve: ppo.Curve, values: list[float]) -> np.ndarray:
        return np.interp(steps, curve.env_steps, values)

    values = {name: np.array([at_steps(curve, curve.values[name]) for curve in curves]) for name in curves[0].values}
    return Reference(list(steps), values, [curve.flat for curve in curves])


def pretrainer(problem: ml3_jax.Problem, context: Any, config: Any) -> Callable[[Array], Any]:
    """For `measured`: one policy trained by policy gradient on the tasks of meta-training, once for all settings."""
    kept: dict[bytes, Any] = {}

    def pretrain(key: Array) -> Any:
        name = np.asarray(jax.random.key_data(key)).tobytes()
        if name not in kept:
            kept[name] = pretraining.pretrain(
                problem, context, key, num_tasks=config.num_tasks, steps=config.pretrain_steps, learning_rate=PRETRAIN_LR
            )
        return kept[name]

    return pretrain


def architectures(config: Any, choices: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    """The config with each of these policies: {name: (hidden, activation)} -> {name: config}."""
    return {
        name: dataclasses.replace(config, policy_hidden=hidden, policy_activation=activation)
        for name, (hidden, activation) in choices.items()
    }
