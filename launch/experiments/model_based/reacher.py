"""reacher_mbrl: a policy brings a two-link arm to joint angles in one or two updates, through a learned model of the arm.

Paper, section IV-C1, and the released code's reacher. The data come from the closed form or from the arm in Brax (mjx);
meta-test reports on the latter, and on the former as a variant.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

import envs
from launch.experiments import control, control_figures
from launch.experiments.base import Definition, Experiment, Setting, setting
from ml3_jax.problems import model_based

SUCCESS = 0.25  # rad

PUBLISHED: dict[str, Any] = {  # the released code's; torques of +-1 drive most rollouts into the joint limits
    "inner_lr": 1e-4,
    "inner_steps": 1,
    "unroll": 1,
    "meta_lr": 1e-2,
    "meta_steps": 3000,
    "meta_decay_steps": 0,
    "meta_clip": 0.0,
    "num_tasks": 1,
    "objective": "last",
    "loss": "mlp",
    "hidden": (400, 400),
    "activation": "elu",
    "dynamics": "learned",
    "detach_states": False,
    "sees_final_distance": True,
    "policy_hidden": (64, 64),
    "policy_last_scale": 1.0,
    "horizon": 65,
    "action_limit": 1.0,
    "estimator": "backprop",
    "refresh_every": 300,
    "first_rollouts": 3,
    "refresh_rollouts": 1,
}
DEFAULT: dict[str, Any] = {
    "inner_lr": 3e-2,
    "inner_steps": 2,
    "unroll": 2,
    "meta_lr": 3e-3,
    "meta_steps": 2000,
    "meta_decay_steps": 2000,
    "meta_clip": 10.0,
    "num_tasks": 16,
    "objective": "mean",
    "loss": "action_target",
    "hidden": (64, 64),
    "activation": "tanh",
    "dynamics": "learned",
    "detach_states": True,
    "sees_final_distance": False,
    "policy_hidden": (64, 64),
    "policy_last_scale": 0.1,
    "horizon": 65,
    "action_limit": 0.1,
    "estimator": "backprop",
    "refresh_every": 100,
    "first_rollouts": 32,
    "refresh_rollouts": 16,
}


@dataclasses.dataclass(frozen=True)
class ReacherConfig(control.ControlConfig):
    """Goals are joint angles, drawn from a square."""

    physics: str = setting("closed_form", choices=("closed_form", "mjx"))  # where the data of meta-training come from
    goal_range: float = setting(1.5, above=0.0)  # rad; goals are drawn from +- this
    start_spread: float = setting(0.1, at_least=0.0)  # rad; starts are drawn from +- this, at rest


def resolve(config: ReacherConfig) -> ReacherConfig:
    """Fills in what the protocol decides."""
    return control.fill(config, {"published": PUBLISHED, "default": DEFAULT})


def make_env(config: ReacherConfig, **options: Any) -> envs.GoalEnv:
    """The arm of a config; options win over it."""
    given = {"physics": config.physics, "horizon": config.horizon, "action_limit": config.action_limit}
    spread = {"goal_range": config.goal_range, "start_spread": config.start_spread}
    return envs.make("reacher", **{**given, **spread, **options})


def cost(config: ReacherConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """The released code's: 10 times the last distance, the mean distance, and a little of the mean speed."""
    del config

    def of_rollout(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        del actions, extra
        distances = env.distance(states, goal)
        return 10.0 * distances[-1] + jnp.mean(distances) + 1e-4 * jnp.mean(jnp.abs(states[:, 2:]))

    return of_rollout


def evaluate(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The distance in joint space at the end."""
    return lambda states, goal: {"joint_distance": env.distance(states[-1], goal)}


ROBOT = control.Robot(
    name="reacher_mbrl",
    make_env=make_env,
    state_scale=(1.0, 1.0, 10.0, 10.0),
    cost=cost,
    evaluate=evaluate,
)


def build(config: ReacherConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    return control.build(ROBOT, config, **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """The arm in Brax, the arm in closed form, and a policy that does not see the goal."""

    def measured(title: str, physics: str, **options: Any) -> Setting:
        return control.measured(
            ROBOT,
            experiment,
            make_env(experiment.config, physics=physics),
            num_tasks=100,
            steps=5,
            metric="joint_distance",
            unit="rad",
            title=title,
            success=lambda distance: distance <= SUCCESS,
            pretrain_steps=1000,
            **options,
        )

    return {
        "": measured("the arm in Brax (mjx), goals and policies never seen", "mjx"),
        "closed_form": measured("the arm in closed form", "closed_form"),
        "policy_without_goal": measured("a policy that does not see the goal", "closed_form", sees_goal=False),
    }


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """Trajectories in the plane and in joint space before and after updates, the model's errors, an animation."""
    del recorded
    control_figures.draw(ROBOT, experiment, loss_params, results, folder, env=make_env(experiment.config, physics="mjx"))


DEFINITION = Definition(
    "reacher_mbrl",
    "a two-link arm brought to joint angles in two updates, through a learned model (1 min)",
    ReacherConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
    env_steps=control.env_steps,
)
