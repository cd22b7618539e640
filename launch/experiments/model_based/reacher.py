"""reacher_mbrl: a policy brings a two-link arm to joint angles in two updates, through a learned model of the arm.

Paper, section IV-C1, and the released code. Meta-training uses the arm in closed form or in Brax (mjx). Meta-test reports on
the arm in Brax, with the closed form as a variant.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

import envs
from launch.config import field
from launch.experiment import Experiment, Scenario
from launch.experiments import control
from launch.experiments.model_based import common
from ml3_jax.problems import model_based

SUCCESS = 0.25  # rad
STATE_SCALE = (1.0, 1.0, 10.0, 10.0)


@dataclasses.dataclass(frozen=True)
class ReacherConfig(common.ControlConfig):
    """Goals are joint angles, drawn from a square."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            **common.RELEASED,
            "inner_lr": 1e-4,
            "meta_lr": 1e-2,
            "meta_steps": 3000,
            "policy_last_scale": 1.0,
            "action_limit": 1.0,  # this torque drives most rollouts into the joint limits
            "refresh_every": 300,
            "first_rollouts": 3,
            "refresh_rollouts": 1,
        }
    }

    meta_steps: int = 2000
    meta_decay_steps: int = 2000
    horizon: int = 65
    action_limit: float = 0.1
    physics: str = field("closed_form", choices=("closed_form", "mjx"))  # of meta-training
    goal_range: float = field(1.5, above=0.0)  # rad, largest joint angle of a goal
    start_spread: float = field(0.1, at_least=0.0)  # rad, largest joint angle of a start; starts are at rest


def cost(config: ReacherConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """The released code's cost: `distance_cost` and a little of the mean speed."""
    distance_cost = common.distance_cost(config, env)
    return lambda states, *others: distance_cost(states, *others) + 1e-4 * jnp.mean(jnp.abs(states[:, 2:]))


make_env = control.env_factory("reacher", "physics", "horizon", "action_limit", "goal_range", "start_spread")
evaluate = control.final_distance("joint_distance")
ROBOT = control.Robot(make_env, cost, common.scaled(STATE_SCALE), evaluate, state_scale=STATE_SCALE)
WITHOUT_GOAL = ROBOT._replace(inputs=common.scaled(STATE_SCALE, sees_goal=False))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """The arm in Brax, the arm in closed form, and a policy without the goal as input."""

    def tested(title: str, physics: str, robot: control.Robot = ROBOT) -> Scenario:
        env = make_env(experiment.config, physics=physics)
        fields = {"unit": "rad", "success": lambda distance: distance <= SUCCESS}
        return common.scenario(robot, experiment, "joint_distance", env, steps=5, title=title, **fields)

    return {
        "": tested("the arm in Brax (mjx), new goals and policies", "mjx"),
        "closed_form": tested("the arm in closed form", "closed_form"),
        "policy_without_goal": tested("a policy without the goal as input", "closed_form", WITHOUT_GOAL),
    }


DEFINITION = common.definition(
    "reacher_mbrl",
    "a two-link arm brought to joint angles in two updates, through a learned model (1 min)",
    ReacherConfig,
    ROBOT,
    scenarios,
    physics="mjx",
)
