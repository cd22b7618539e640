"""point_mass_mbrl: a policy brings a point mass to goals of a half-plane that meta-training never saw (paper, section IV-C1).

Meta-training draws its goals from the right half-plane, meta-test from the left one. A variant tests on the right one.
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

TRAIN_HALF, TEST_HALF = "right", "left"
SUCCESS = 0.05  # of the initial distance
NEAREST = 0.5  # m, of the goals
STATE_SCALE = (1.0, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class PointMassConfig(common.ControlConfig):
    """Goals lie in a half ring around the start."""

    # The paper's loss and one update on full gradients; it leaves the other numbers open.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "inner_lr": 1e-3,
            "inner_steps": 1,
            "meta_lr": 1e-3,
            "meta_decay_steps": 0,
            "num_tasks": 1,
            "objective": "last",
            "loss": "mlp",
            "hidden": (50, 50),
            "activation": "elu",
            "detach_states": False,
            "policy_last_scale": 1.0,
        }
    }

    symmetric: bool = field(True)  # else nothing tells the loss that the unseen half-plane is like the seen one
    goal_radius: float = field(1.5, above=NEAREST)  # m, of the farthest goals; the nearest are at 0.5


def make_env(config: PointMassConfig, **options: Any) -> envs.GoalEnv:
    """The point mass of a config, its goals in the half-plane of meta-training; options win."""
    given = {"horizon": config.horizon, "action_limit": config.action_limit}
    goals = {"goal_radius": (NEAREST, config.goal_radius), "half_plane": TRAIN_HALF}
    return envs.make("point_mass", **{**given, **goals, **options})


def cost(config: PointMassConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """The last distance, and a little of the mean one."""
    del config

    def of_rollout(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        del actions, extra
        distances = env.distance(states, goal)
        return 10.0 * distances[-1] + jnp.mean(distances)

    return of_rollout


def evaluate(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The last distance, as a fraction of the first and in metres."""

    def of_rollout(states: Array, goal: Array) -> dict[str, Array]:
        last = env.distance(states[-1], goal)
        return {"relative_distance": last / env.distance(states[0], goal), "final_distance": last}

    return of_rollout


ROBOT = Robot(make_env, cost, common.scaled(STATE_SCALE), evaluate, state_scale=STATE_SCALE)
WITHOUT_GOAL = ROBOT._replace(inputs=common.scaled(STATE_SCALE, sees_goal=False))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Goals of the half-plane never seen, other goals of the seen one, and a policy that does not see the goal."""

    def tested(title: str, half_plane: str, robot: Robot = ROBOT) -> Scenario:
        return common.scenario(
            robot,
            experiment,
            "relative_distance",
            make_env(experiment.config, half_plane=half_plane),
            steps=10,
            title=title,
            other_metrics=("final_distance",),
            success=lambda distance: distance <= SUCCESS,
        )

    return {
        "": tested("goals of the half-plane never seen", TEST_HALF),
        "goals_inside": tested("other goals of the half-plane of meta-training", TRAIN_HALF),
        "policy_without_goal": tested(
            "goals of the half-plane never seen, a policy that does not see the goal", TEST_HALF, WITHOUT_GOAL
        ),
    }


DEFINITION = common.definition(
    "point_mass_mbrl",
    "a point mass brought to goals of a half-plane never seen, through a learned model (30 s)",
    PointMassConfig,
    ROBOT,
    scenarios,
    half_plane=TEST_HALF,
)
