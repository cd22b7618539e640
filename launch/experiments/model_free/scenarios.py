"""Scenarios of the model-free experiments, with the baselines that sample: PPO and a pretrained policy."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch.evaluation import ppo, pretraining
from launch.experiment import Reference, Scenario
from launch.experiments import control
from launch.experiments.model_free import common

PPO_SEED = 5100  # of the first PPO run
PRETRAIN_LR = 3e-3  # of the curves "pretrained_tuned" and "maml"
MAML_LR, MAML_STEPS = 0.1, 3  # of "maml": the inner step size at its start, and inner steps

# Controls: what the learned loss does without the rewards, by which alone it can know a hidden goal.
CONTROLS = {
    "rewards_hidden": "control: the learned loss sees no rewards",
    "rewards_shuffled": "control: the learned loss sees rewards shuffled among the samples",
}


def without_rewards(problem: ml3_jax.Problem, control: str) -> ml3_jax.Problem:
    """The problem of a control in `CONTROLS`: the features, and the advantages in them, are of other rewards."""

    def observe(params: Any, task: Any, context: Any, key: Array, step: Array) -> Any:
        rewards = task.samples.rewards
        if control == "rewards_hidden":
            other = jnp.zeros_like(rewards)
        else:
            other = jax.random.permutation(key, rewards.ravel()).reshape(rewards.shape)
        return problem.observe(params, task.replace(samples=task.samples.replace(rewards=other)), context, key, step)

    return problem._replace(observe=observe)


def scenario(
    robot: control.Robot,
    config: Any,
    env: envs.GoalEnv,
    title: str,
    *,
    problem: ml3_jax.Problem | None = None,
    ppo_settings: ppo.PPOSettings | None = None,
    dynamics: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Scenario:
    """A scenario of meta-test on the goals of env.

    Args:
      robot, config, env: of the tested policies and system.
      title: of the scenario.
      problem: the problem of env and config; None: a new one. Scenarios with the same problem compile it once.
      ppo_settings: settings of the baseline "ppo"; None: no such baseline.
      dynamics: sample_dynamics and system of `model_free.make_problem`, for a system of each task; None: env for all tasks.
      **fields: further arguments of `control.scenario`, such as goals, pretrain or on_request.
    """
    dynamics = dynamics or {}
    if problem is None:
        problem = common.make_problem(robot, config, env, **dynamics)

    def reference(tasks: Any, folder: pathlib.Path) -> Reference:
        """PPO's curves on the first `ppo_tasks` of the tested tasks."""
        assert ppo_settings is not None
        tasks = jax.tree.map(lambda leaf: leaf[: config.ppo_tasks], tasks)
        system = dynamics.get("system")
        systems = [env] * len(tasks.goal) if system is None else [system(one) for one in tasks.dynamics]
        ppo_tasks = [_ppo_task(robot, config, env, *one) for one in zip(systems, tasks.goal, strict=True)]
        names = [{**_describe_system(env, config), "task": task} for task in control.describe(tasks)]
        return _align(ppo.curves(ppo_tasks, ppo_settings, folder, names=names, horizon=config.horizon, seed=PPO_SEED))

    # Without a context, goals are new: demonstrations are for meta-training alone.
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


def _ppo_task(robot: control.Robot, config: Any, env: envs.GoalEnv, system: Any, goal: Array) -> ppo.OneTask:
    """A task of PPO: one goal on one system, with the starts and the reward of env."""
    return ppo.OneTask(
        system,
        goal,
        sample_start=env.sample_start,
        inputs=common.seen_by(robot, config, env),
        reward=robot.objective(config, env),
        distance=env.distance,
        horizon=config.horizon,
    )


def _describe_system(env: envs.GoalEnv, config: Any) -> dict[str, Any]:
    """Everything besides the task that determines a PPO run: environment and reward. Used as the cache key."""
    options = {name: value for name, value in vars(env).items() if isinstance(value, int | float | str | tuple)}
    own = {"environment": env.name, "backend": env.backend, "action_cost": config.action_cost}
    return {**own, **{name: value for name, value in options.items() if not name.startswith("_")}}


def _align(curves: list[ppo.Curve]) -> Reference:
    """Interpolates curves to the evaluations of the longest one. A shorter curve keeps its last value."""
    steps = max((curve.env_steps for curve in curves), key=lambda steps: steps[-1])
    values = {
        name: np.array([np.interp(steps, curve.env_steps, curve.values[name]) for curve in curves]) for name in curves[0].values
    }
    return Reference(list(steps), values, [curve.flat for curve in curves])


def controls(problem: ml3_jax.Problem, config: Any) -> dict[str, Any]:
    """`Scenario.pretrain` and `Scenario.maml`: a policy trained, or an initialisation meta-trained, on the meta-train tasks."""
    tasks, steps = config.num_tasks, config.pretrain_steps

    def pretrain(key: Array) -> Any:
        return pretraining.pretrain(problem, None, key, num_tasks=tasks, steps=steps, learning_rate=PRETRAIN_LR)

    def maml(key: Array) -> Any:
        options: dict[str, Any] = {
            "inner_lr": MAML_LR,
            "inner_steps": MAML_STEPS,
            "meta_lr": PRETRAIN_LR,
            "learn_step_size": True,
        }
        return pretraining.maml(problem, None, key, num_tasks=tasks, steps=max(1, steps // MAML_STEPS), **options)

    return {"pretrain": pretraining.cached(pretrain), "maml": pretraining.cached(maml)}
