"""reacher_mbrl: a policy brings a two-link arm to joint angles in one or two updates, through a learned model of the arm.

Paper, section IV-C1, and the released code's reacher. The data come from the closed form or from the arm in Brax (mjx).
Meta-test reports on Brax's arm, and on the closed form as a variant.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

import envs
from launch.config import field
from launch.experiment import Experiment, Scenario
from launch.experiments.control import Robot
from launch.experiments.model_based import common
from ml3_jax.problems import model_based

SUCCESS = 0.25  # rad
STATE_SCALE = (1.0, 1.0, 10.0, 10.0)


@dataclasses.dataclass(frozen=True)
class ReacherConfig(common.ControlConfig):
    """Goals are joint angles, drawn from a square."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The released code's; torques of +-1 drive most rollouts into the joint limits.
        "published": {
            "inner_lr": 1e-4,
            "inner_steps": 1,
            "meta_lr": 1e-2,
            "meta_steps": 3000,
            "meta_decay_steps": 0,
            "meta_clip": 0.0,
            "num_tasks": 1,
            "objective": "last",
            "loss": "mlp",
            "hidden": (400, 400),
            "activation": "elu",
            "detach_states": False,
            "sees_final_distance": True,
            "policy_last_scale": 1.0,
            "action_limit": 1.0,
            "refresh_every": 300,
            "first_rollouts": 3,
            "refresh_rollouts": 1,
        }
    }

    meta_steps: int = 2000
    meta_decay_steps: int = 2000
    horizon: int = 65
    action_limit: float = 0.1
    physics: str = field("closed_form", choices=("closed_form", "mjx"))  # where the data of meta-training come from
    goal_range: float = field(1.5, above=0.0)  # rad; goals are drawn from +- this
    start_spread: float = field(0.1, at_least=0.0)  # rad; starts are drawn from +- this, at rest


def make_env(config: ReacherConfig, **options: Any) -> envs.GoalEnv:
    """The arm of a config; options win over it."""
    given = {"physics": config.physics, "horizon": config.horizon, "action_limit": config.action_limit}
    spread = {"goal_range": config.goal_range, "start_spread": config.start_spread}
    return envs.make("reacher", **{**given, **spread, **options})


def cost(config: ReacherConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """As released: 10 times the last distance, the mean distance, and a little of the mean speed."""
    del config

    def of_rollout(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        del actions, extra
        distances = env.distance(states, goal)
        return 10.0 * distances[-1] + jnp.mean(distances) + 1e-4 * jnp.mean(jnp.abs(states[:, 2:]))

    return of_rollout


def evaluate(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The distance in joint space at the end."""
    return lambda states, goal: {"joint_distance": env.distance(states[-1], goal)}


ROBOT = Robot(make_env, cost, common.scaled(STATE_SCALE), evaluate, state_scale=STATE_SCALE)
WITHOUT_GOAL = ROBOT._replace(inputs=common.scaled(STATE_SCALE, sees_goal=False))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """The arm in Brax, the arm in closed form, and a policy that does not see the goal."""

    def tested(title: str, physics: str, robot: Robot = ROBOT) -> Scenario:
        return common.scenario(
            robot,
            experiment,
            "joint_distance",
            make_env(experiment.config, physics=physics),
            steps=5,
            unit="rad",
            title=title,
            success=lambda distance: distance <= SUCCESS,
        )

    return {
        "": tested("the arm in Brax (mjx), goals and policies never seen", "mjx"),
        "closed_form": tested("the arm in closed form", "closed_form"),
        "policy_without_goal": tested("a policy that does not see the goal", "closed_form", WITHOUT_GOAL),
    }


DEFINITION = common.definition(
    "reacher_mbrl",
    "a two-link arm brought to joint angles in two updates, through a learned model (1 min)",
    ReacherConfig,
    ROBOT,
    scenarios,
    physics="mjx",
)
