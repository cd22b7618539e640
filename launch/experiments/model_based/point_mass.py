"""point_mass_mbrl: a policy brings a point mass to goals of the half-plane that meta-training never saw (paper, section IV-C1).

Meta-training draws its goals from the right half-plane, meta-test from the left one; a variant tests on the right.
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

TRAIN_HALF, TEST_HALF = "right", "left"
SUCCESS = 0.05  # of the initial distance
NEAREST = 0.5  # m, of the goals

DEFAULT: dict[str, Any] = {
    "inner_lr": 3e-2,
    "inner_steps": 2,
    "unroll": 2,
    "meta_lr": 3e-3,
    "meta_steps": 1000,
    "meta_decay_steps": 1000,
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
    "horizon": 25,
    "action_limit": 1.0,
    "estimator": "backprop",
    "refresh_every": 100,
    "first_rollouts": 32,
    "refresh_rollouts": 16,
}
# The paper's loss and one update on full gradients; it leaves the other numbers open.
PUBLISHED: dict[str, Any] = {
    **DEFAULT,
    "inner_lr": 1e-3,
    "inner_steps": 1,
    "unroll": 1,
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


@dataclasses.dataclass(frozen=True)
class PointMassConfig(control.ControlConfig):
    """Goals lie in a half ring around the start."""

    symmetric: bool = setting(True)  # or nothing says that the other half-plane is like the one that was seen
    goal_radius: float = setting(1.5, above=NEAREST)  # m, of the farthest goals; the nearest are at 0.5


def resolve(config: PointMassConfig) -> PointMassConfig:
    """Fills in what the protocol decides."""
    return control.fill(config, {"published": PUBLISHED, "default": DEFAULT})


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


ROBOT = control.Robot(
    name="point_mass_mbrl",
    make_env=make_env,
    state_scale=(1.0, 1.0, 1.0, 1.0),
    cost=cost,
    evaluate=evaluate,
)


def build(config: PointMassConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    return control.build(ROBOT, config, **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Goals of the half-plane that meta-training never saw, and others of the one that it saw."""

    def measured(title: str, half_plane: str, **options: Any) -> Setting:
        return control.measured(
            ROBOT,
            experiment,
            make_env(experiment.config, half_plane=half_plane),
            num_tasks=100,
            steps=10,
            metric="relative_distance",
            title=title,
            other_metrics=("final_distance",),
            success=lambda distance: distance <= SUCCESS,
            pretrain_steps=1000,
            **options,
        )

    return {
        "": measured("goals of the half-plane never seen", TEST_HALF),
        "goals_inside": measured("other goals of the half-plane of meta-training", TRAIN_HALF),
        "policy_without_goal": measured(
            "goals of the half-plane never seen, a policy that does not see the goal", TEST_HALF, sees_goal=False
        ),
    }


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """Trajectories in the plane before and after updates, the model's errors, an animation."""
    del recorded
    control_figures.draw(ROBOT, experiment, loss_params, results, folder, env=make_env(experiment.config, half_plane=TEST_HALF))


DEFINITION = Definition(
    "point_mass_mbrl",
    "a point mass brought to goals of a half-plane never seen, through a learned model (30 s)",
    PointMassConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
    env_steps=control.env_steps,
)
