"""ant_mfrl: a learned loss trains stochastic policies that send Brax's ant to goals around it (paper, section IV-C2).

The paper gives R = -d + 5 / (d + 0.25) - |a|. Here |a| has weight 0.1, so that an early policy gains more by walking than by
standing still: R = -d + 5 / (d + 0.25) - 0.1 |a|, d in metres.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

import envs
from launch.config import field
from launch.curves import CONTEXT_POLICY
from launch.evaluation import ppo
from launch.experiment import Experiment, Scenario
from launch.experiments import control
from launch.experiments.model_free import common, context_policy
from launch.experiments.model_free import scenarios as family
from ml3_jax.problems import model_free

OUTSIDE = 1.5  # radius of the variant "shifted_goals", in radii of meta-training
VELOCITY = 15  # index of the torso's velocity in the state
JOINTS, FAST = 8, 10.0  # FAST is in rad/s, three times the joint speeds of random actions


@dataclasses.dataclass(frozen=True)
class AntConfig(common.SamplingConfig):
    """Goals lie on a circle around the start.

    Without a decaying inner_lr the last updates undo each other, since Adam's steps keep their size. At a meta_lr of 3e-3
    meta-training loses its progress repeatedly.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **dict.fromkeys(("hidden full", "visible full"), common.FULL),
        **dict.fromkeys(("hidden paper", "visible paper"), common.PAPER),
        **{name: {**common.FULL, **common.PAPER} for name in ("hidden paper full", "visible paper full")},
    }

    meta_steps: int = 1000
    meta_decay_steps: int = 1000
    horizon: int = 100
    discount: float = 0.95
    rest_return_baseline: bool = True
    reuse_rollouts: bool = True
    ppo_tasks: int | None = 3
    ppo_env_steps: int = 800_000
    action_cost: float = 0.1
    action_limit: float = field(1.0, above=0.0, at_most=1.0)
    goal_radius: float = field(2.0, above=0.0)  # m
    start_spread: float = field(0.1, at_least=0.0)


def inputs(env: Any) -> Any:
    """(x, goal) -> `AntGoal.from_torso`, [29], with joint speeds in units of FAST."""
    return lambda x, goal: env.from_torso(x, goal).at[-JOINTS:].divide(FAST)


def inputs_without_goal(env: Any) -> Any:
    """(x, goal) -> position (in radii of the goals) and velocity in the world's axes, then `inputs` without the goal, [34]."""

    def of_state(x: Array, goal: Array) -> Array:
        own = env.from_torso(x, jnp.zeros_like(goal)).at[-JOINTS:].divide(FAST)
        world = [x[:2] / env.goal_radius, x[VELOCITY : VELOCITY + 2], x[3:7]]
        return jnp.concatenate([*world, own[3:]])

    return of_state


def reward(config: AntConfig, env: envs.GoalEnv) -> model_free.RewardFn:
    """-d + 5 / (d + 0.25) - 0.1 |a| at the next state, d in metres."""
    return common.near_goal(env, unit=1.0, height=5.0, width=0.25, action_cost=config.action_cost)


make_env = control.env_factory("ant_goal", "horizon", "action_limit", "goal_radius", "start_spread", physics="spring")
ROBOT = control.Robot(make_env, reward, inputs, inputs_without_goal=inputs_without_goal)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """New goals on the circle and new policies; a wider circle, if the ant can reach it within the horizon."""
    config = experiment.config
    env: Any = make_env(config)  # an AntGoal, which has a reach
    problem = common.make_problem(ROBOT, config, env)
    rivals = {CONTEXT_POLICY: context_policy.rival(ROBOT, config, env)} if config.goal == "hidden" else {}
    shared = {"problem": problem, **family.controls(problem, config), "num_tasks": 10}
    steps = config.ppo_env_steps
    # With 16 environments, the default, PPO diverges at any fast step size.
    parallel = {"num_envs": 64, "batch_size": 64, "learning_rate": 1e-3, "reward_scaling": 0.1}
    settings = ppo.PPOSettings(env_steps=steps, most_env_steps=2 * steps, **parallel)
    found = {"": family.scenario(ROBOT, config, env, "new goals and policies", ppo_settings=settings, rivals=rivals, **shared)}
    radius = min(OUTSIDE * config.goal_radius, env.reach)
    if radius > config.goal_radius:
        goals = make_env(config, goal_radius=radius).sample_goal
        title = "goals farther out than in meta-training"
        # On request: it adds half of the time.
        found["shifted_goals"] = family.scenario(ROBOT, config, env, title, goals=goals, on_request=True, **shared)
    return found


DEFINITION = common.definition(
    "ant_mfrl",
    "Brax's ant, sent to goals around it, learns from samples alone (25 min)",
    AntConfig,
    ROBOT,
    scenarios,
)
