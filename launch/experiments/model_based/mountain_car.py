"""mountain_car: a loss shaped by a goal on the way teaches a car to swing back before it climbs (paper, section IV-D2).

Meta-training sees the extra goal, at the left, where the car must be early; meta-test knows the goal on the hill alone.
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

WAYPOINT = (-0.947, -0.0055)  # position and velocity; the released code's extra goal
EARLY = 15  # states within which the car should have been there
NEAR = 0.1  # how near to the goal on the way the car counts as having passed it
REACHED = 1e-3  # the car stops at the goal, which is a wall

DEFAULT: dict[str, Any] = {
    "inner_lr": 5e-4,
    "inner_steps": 3,
    "unroll": 3,
    "meta_lr": 3e-3,
    "meta_steps": 2000,
    "meta_decay_steps": 2000,
    "meta_clip": 1.0,
    "num_tasks": 32,
    "objective": "mean",
    "loss": "fitted_action_target",
    "hidden": (32, 32),
    "activation": "tanh",
    "dynamics": "learned",
    "detach_states": True,
    "sees_final_distance": False,
    "policy_hidden": (200,),
    "policy_last_scale": 1.0,
    "horizon": 35,
    "action_limit": 0.25,
    "estimator": "backprop",
    "refresh_every": 200,
    "first_rollouts": 32,
    "refresh_rollouts": 16,
}
PUBLISHED: dict[str, Any] = {  # the released code's
    **DEFAULT,
    "inner_lr": 1e-3,
    "inner_steps": 1,
    "unroll": 1,
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


@dataclasses.dataclass(frozen=True)
class MountainCarConfig(control.ControlConfig):
    """One start and one goal: tasks differ in the policy that they start from."""

    extra: bool = setting(True)  # whether the task loss of meta-training knows the goal on the way
    excess_weight: float = setting(1e-3, at_least=0.0)  # of actions beyond the limit in the task loss
    horizon: int | None = setting(None, at_least=EARLY + 1)  # the task loss looks at states later than the early ones
    target_scale: float = setting(12.0, above=0.0)
    model_hidden: tuple[int, ...] = setting((32, 32), at_least=1)


def resolve(config: MountainCarConfig) -> MountainCarConfig:
    """Fills in what the protocol decides."""
    return control.fill(config, {"published": PUBLISHED, "default": DEFAULT})


def make_env(config: MountainCarConfig) -> envs.GoalEnv:
    """The car of a config."""
    return envs.make("mountain_car", horizon=config.horizon, action_limit=config.action_limit)


def cost(config: MountainCarConfig, env: envs.GoalEnv) -> model_based.CostFn:
    """How far the car is from the goal when it is nearest; with extra, the way that is left: over the goal on the way first.

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


ROBOT = control.Robot(
    name="mountain_car",
    make_env=make_env,
    state_scale=(1.0, 1.0),
    cost=cost,
    evaluate=evaluate,
    extra=lambda config: jnp.array(WAYPOINT) if config.extra else None,
    policy_bias=False,
    policy_activation="identity",
    policy_gain=lambda config: 1.0 / config.action_limit,  # its output is a force, as in the released code
    policy_sees_goal=False,
    features=("state",),  # there is but one goal
)


def build(config: MountainCarConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    return control.build(ROBOT, config, **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Policies never seen."""
    return {
        "": control.measured(
            ROBOT,
            experiment,
            make_env(experiment.config),
            num_tasks=100,
            steps=20,
            metric="distance",
            title="policies never seen",
            other_metrics=("final_distance",),
            success=lambda distance: distance < REACHED,
            log_scale=False,
            pretrain_steps=1000,
        )
    }


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """The phase portrait before and after updates, the model's errors, an animation."""
    del recorded
    control_figures.draw(ROBOT, experiment, loss_params, results, folder, env=make_env(experiment.config))


DEFINITION = Definition(
    "mountain_car",
    "a weak car that must swing back to climb, taught by a loss that knew a goal on the way (30 s)",
    MountainCarConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
    env_steps=control.env_steps,
)
