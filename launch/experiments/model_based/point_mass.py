"""point_mass_mbrl: a policy brings a point mass to goals in a new half-plane (paper, section IV-C1).

Meta-training draws goals from the right half-plane, meta-test from the left one. A variant tests on the right one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jax import Array

import envs
from launch.config import field
from launch.experiment import Experiment, Scenario
from launch.experiments import control
from launch.experiments.model_based import common

TRAIN_HALF, TEST_HALF = "right", "left"
SUCCESS = 0.05  # of the initial distance
NEAREST = 0.5  # m, least distance of a goal from the start
STATE_SCALE = (1.0, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class PointMassConfig(common.ControlConfig):
    """Goals lie in a half ring around the start."""

    # The paper gives the loss and one update with full gradients. The other numbers are ours.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            **common.PUBLISHED,
            "inner_lr": 1e-3,
            "meta_lr": 1e-3,
            "hidden": (50, 50),
            "policy_last_scale": 1.0,
        }
    }

    symmetric: bool = field(True)  # generalisation to the other half-plane needs the symmetry
    goal_radius: float = field(1.5, above=NEAREST)  # m, of the farthest goals


def make_env(config: PointMassConfig, **options: Any) -> envs.GoalEnv:
    """The point mass of a config. The default goals are those of meta-training."""
    make = control.env_factory("point_mass", "horizon", "action_limit", half_plane=TRAIN_HALF)
    return make(config, goal_radius=(NEAREST, config.goal_radius), **options)


def evaluate(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The last distance, as a fraction of the first and in metres."""

    def of_rollout(states: Array, goal: Array) -> dict[str, Array]:
        last = env.distance(states[-1], goal)
        return {"relative_distance": last / env.distance(states[0], goal), "final_distance": last}

    return of_rollout


ROBOT = control.Robot(make_env, common.distance_cost, common.scaled(STATE_SCALE), evaluate, state_scale=STATE_SCALE)
WITHOUT_GOAL = ROBOT._replace(inputs=common.scaled(STATE_SCALE, sees_goal=False))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Goals in the new half-plane, new goals in the half-plane of meta-training, and a policy without the goal as input."""

    def tested(title: str, half_plane: str, robot: control.Robot = ROBOT) -> Scenario:
        env = make_env(experiment.config, half_plane=half_plane)
        fields = {"other_metrics": ("final_distance",), "success": lambda distance: distance <= SUCCESS}
        return common.scenario(robot, experiment, "relative_distance", env, steps=10, title=title, **fields)

    return {
        "": tested("goals in the new half-plane", TEST_HALF),
        "goals_inside": tested("new goals in the half-plane of meta-training", TRAIN_HALF),
        "policy_without_goal": tested("goals in the new half-plane, not seen by the policy", TEST_HALF, WITHOUT_GOAL),
    }


DEFINITION = common.definition(
    "point_mass_mbrl",
    "a point mass brought to goals in a new half-plane, through a learned model (30 s)",
    PointMassConfig,
    ROBOT,
    scenarios,
    half_plane=TEST_HALF,
)
