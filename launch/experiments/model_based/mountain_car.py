"""mountain_car: a loss shaped by a goal on the way teaches a car to swing back before it climbs (paper, section IV-D2).

Meta-training sees the extra goal, at the left, where the car must be early; meta-test knows the goal on the hill alone.
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

WAYPOINT = (-0.947, -0.0055)  # position and velocity; the released code's extra goal
EARLY = 15  # the car should have been at the waypoint within this many states
NEAR = 0.1  # the car counts as having passed the waypoint within this distance
REACHED = 1e-3  # the car stops at the goal, which is a wall
STATE_SCALE = (1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class MountainCarConfig(common.ControlConfig):
    """One start and one goal: tasks differ in the initial policy."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {  # the released code's
            "inner_lr": 1e-3,
            "inner_steps": 1,
            "meta_lr": 1e-3,
            "meta_steps": 300,
            "meta_decay_steps": 0,
            "meta_clip": 0.0,
            "num_tasks": 1,
            "objective": "last",
            "loss": "mlp",
            "hidden": (400, 400),
            "activation": "elu",
            "dynamics": "exact",
            "detach_states": False,
            "sees_final_distance": True,
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
    horizon: int = field(35, at_least=EARLY + 1)  # the task loss looks at states later than the early ones
    action_limit: float = 0.25
    refresh_every: int = 200
    model_hidden: tuple[int, ...] = (32, 32)
    extra: bool = field(True)  # whether the task loss of meta-training knows the waypoint
    excess_weight: float = field(1e-3, at_least=0.0)  # of actions beyond the limit in the task loss


def make_env(config: MountainCarConfig) -> envs.GoalEnv:
    """The car of a config."""
    return envs.make("mountain_car", horizon=config.horizon, action_limit=config.action_limit)


def cost(config: MountainCarConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """How far the car is from the goal when it is nearest; with extra, the remaining way past the waypoint.

    As published: the distances of the states to the goals as states (position and velocity), at the end and early.
    """

    def closest(states: Array, actions: Array, goal: Array, extra: Any) -> Array:
        excess = config.excess_weight * jnp.mean(jnp.maximum(jnp.abs(actions) - 1.0, 0.0))
        # The start counts for neither goal: a car that is pushed away from a goal would be nearest to it there, and the
        # gradient would not see how it moves.
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
    """How near the car comes to the goal, and where it ends."""

    def of_rollout(states: Array, goal: Array) -> dict[str, Array]:
        distances = env.distance(states, goal)
        return {"distance": jnp.min(distances), "final_distance": distances[-1]}

    return of_rollout


ROBOT = Robot(
    make_env,
    cost,
    common.scaled(STATE_SCALE, sees_goal=False),
    evaluate,
    extra=lambda config: jnp.array(WAYPOINT) if config.extra else None,
    features=("state",),  # there is only one goal
    state_scale=STATE_SCALE,
    policy_activation="identity",
    policy_bias=False,
    policy_gain=lambda config: 1.0 / config.action_limit,  # its output is a force, as in the released code
)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Policies never seen."""
    main = common.scenario(
        ROBOT,
        experiment,
        "distance",
        make_env(experiment.config),
        steps=20,
        title="policies never seen",
        other_metrics=("final_distance",),
        success=lambda distance: distance < REACHED,
        log_scale=False,
    )
    return {"": main}


DEFINITION = common.definition(
    "mountain_car",
    "a weak car that must swing back to climb, taught by a loss that knew a waypoint (30 s)",
    MountainCarConfig,
    ROBOT,
    scenarios,
)
