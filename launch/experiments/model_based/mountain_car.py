"""mountain_car: a learned loss teaches a weak car to swing back before it climbs (paper, section IV-D2).

The task loss of meta-training has an extra goal, a waypoint on the left. Meta-test has only the goal on the hill.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

import envs
from launch.config import field
from launch.experiment import Experiment, Scenario
from launch.experiments import control
from launch.experiments.model_based import common
from ml3_jax.problems import model_based

WAYPOINT = (-0.947, -0.0055)  # position and velocity; the released code's extra goal
EARLY = 15  # the car should pass the waypoint within this many states
NEAR = 0.1  # the distance at which the waypoint counts as passed
REACHED = 1e-3  # the distance at which the goal counts as reached; a wall stops the car there
STATE_SCALE = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class MountainCarConfig(common.ControlConfig):
    """One start and one goal: tasks differ in the initial policy."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            **common.RELEASED,
            "inner_lr": 1e-3,
            "meta_lr": 1e-3,
            "meta_steps": 300,
            "dynamics": "exact",
            "refresh_every": 100,
        }
    }

    inner_lr: float = 5e-4
    inner_steps: int = 3
    meta_steps: int = 2000
    meta_decay_steps: int = 2000
    meta_clip: float = 1.0
    num_tasks: int = 32
    loss: str = "fitted_action_target"
    hidden: tuple[int, ...] = (32, 32)
    target_scale: float = 12.0
    policy_hidden: tuple[int, ...] = (200,)
    policy_last_scale: float = 1.0
    horizon: int = field(35, at_least=EARLY + 1)  # the task loss needs a state after the early ones
    action_limit: float = 0.25
    refresh_every: int = 200
    model_hidden: tuple[int, ...] = (32, 32)
    extra: bool = field(True)  # the task loss of meta-training uses the waypoint
    excess_weight: float = field(1e-3, at_least=0.0)  # in the task loss, of actions beyond the limit


def cost(config: MountainCarConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """The least distance from the goal; with extra, the remaining way past the waypoint.

    Preset "published": distances between states (position and velocity) at the end and early, as in the released code.
    """

    def closest(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        excess = config.excess_weight * jnp.mean(jnp.maximum(jnp.abs(actions) - 1.0, 0.0))
        # The start is left out: its distance has no gradient.
        last = jnp.min(env.distance(states[EARLY + 1 :], goal))
        if extra is None:
            return last + excess
        first = jnp.min(env.distance(states[EARLY // 2 : EARLY + 1], extra))
        passed = jnp.exp(-first / NEAR)
        return first + passed * last + (1.0 - passed) * env.distance(extra, goal) + excess

    def published(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        del actions
        value = jnp.linalg.norm(states[-1] - goal)
        return value if extra is None else value + jnp.mean(jnp.linalg.norm(states[1 : EARLY + 1] - extra, axis=-1))

    return published if config.protocol == "published" else closest


def evaluate(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The least and the last distance from the goal."""

    def of_rollout(states: Array, goal: Array) -> dict[str, Array]:
        distances = env.distance(states, goal)
        return {"distance": jnp.min(distances), "final_distance": distances[-1]}

    return of_rollout


make_env = control.env_factory("mountain_car", "horizon", "action_limit")
ROBOT = control.Robot(
    make_env,
    cost,
    common.scaled(STATE_SCALE, sees_goal=False),
    evaluate,
    extra=lambda config: jnp.array(WAYPOINT) if config.extra else None,
    features=("state",),  # there is only one goal
    state_scale=STATE_SCALE,
    policy_activation="identity",
    policy_bias=False,
    policy_gain=lambda config: 1.0 / config.action_limit,  # the output is a force, as in the released code
)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """New policies."""
    env = make_env(experiment.config)
    fields = {"other_metrics": ("final_distance",), "success": lambda distance: distance < REACHED, "log_scale": False}
    return {"": common.scenario(ROBOT, experiment, "distance", env, steps=20, title="new policies", **fields)}


DEFINITION = common.definition(
    "mountain_car",
    "a weak car that must swing back to climb; meta-training knows a waypoint (30 s)",
    MountainCarConfig,
    ROBOT,
    scenarios,
)
