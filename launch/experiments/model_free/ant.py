"""ant_mfrl: a learned loss trains stochastic policies of Brax's ant, which is sent to places about it (paper, section IV-C2).

The paper gives R = -d + 5 / (d + 0.25) - |a|; here |a| counts less, so that to stand still is not the best of what a first
policy can find: R = -d + 5 / (d + 0.25) - 0.1 |a|, d in metres.
"""

import dataclasses
from typing import Any

from jax import Array

import envs
from launch.config import field
from launch.evaluation import ppo
from launch.experiment import Experiment, Scenario
from launch.experiments.control import Robot
from launch.experiments.model_free import common
from launch.experiments.model_free import scenarios as family
from ml3_jax.problems import model_free

PEAK, NEAR = 5.0, 0.25  # of the reward near the goal, m
OUTSIDE = 1.5  # times the radius of meta-training: where goals "farther out" lie
JOINTS, FAST = 8, 10.0  # rad/s; under random actions joints are a third as fast


@dataclasses.dataclass(frozen=True)
class AntConfig(common.SamplingConfig):
    """Goals lie on a circle about the start."""

    inner_decay_steps: int = 30  # of 20 steps: without decay the last updates undo each other, as Adam's steps keep their size
    meta_lr: float = 1e-3  # at 3e-3 meta-training forgets again and again
    meta_steps: int = 1000
    meta_decay_steps: int = 1000
    horizon: int = 100
    discount: float = 0.95
    rest_return_baseline: bool = True
    reuse_rollouts: bool = True
    ppo_tasks: int | None = 3
    ppo_env_steps: int = 800_000
    action_cost: float = 0.1
    physics: str = field("spring", choices=("spring",))
    action_limit: float = field(1.0, above=0.0, at_most=1.0)
    goal_radius: float = field(2.0, above=0.0)  # m
    start_spread: float = field(0.1, at_least=0.0)


def make_env(config: AntConfig, **options: Any) -> envs.GoalEnv:
    """The ant of a config; options win over it."""
    given = {"physics": config.physics, "horizon": config.horizon, "action_limit": config.action_limit}
    tasks = {"goal_radius": config.goal_radius, "start_spread": config.start_spread}
    return envs.make("ant_goal", **{**given, **tasks, **options})


def inputs(env: Any) -> Any:
    """(x, goal) -> what `AntGoal.from_torso` tells, [29], with joint speeds in units of FAST."""

    def of_state(x: Array, goal: Array) -> Array:
        told = env.from_torso(x, goal)
        return told.at[-JOINTS:].divide(FAST)

    return of_state


def reward(config: AntConfig, env: envs.GoalEnv) -> model_free.RewardFn:
    """-d + 5 / (d + 0.25) - 0.1 |a| at the next state, d in metres."""
    return common.near_goal(env, unit=1.0, height=PEAK, width=NEAR, action_cost=config.action_cost)


def ppo_settings(config: AntConfig) -> ppo.PPOSettings:
    """PPO with more environments than an arm needs: with 16 of them it breaks down after a while at any fast step size."""
    return ppo.PPOSettings(
        env_steps=config.ppo_env_steps,
        most_env_steps=2 * config.ppo_env_steps,
        num_envs=64,
        batch_size=64,
        learning_rate=1e-3,
        reward_scaling=0.1,
    )


ROBOT = Robot(make_env, reward, inputs)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Goals on the circle and policies never seen; a wider circle, where the horizon leaves time for one."""
    config = experiment.config
    env: Any = make_env(config)  # an AntGoal, which has a reach
    problem = common.make_problem(ROBOT, config, env)
    shared = {"problem": problem, "pretrain": family.pretrainer(problem, config), "num_tasks": 10}
    title = "goals and policies never seen"
    found = {"": family.scenario(ROBOT, config, env, title, ppo_settings=ppo_settings(config), **shared)}
    radius = min(OUTSIDE * config.goal_radius, env.reach)
    if radius > config.goal_radius:
        goals = make_env(config, goal_radius=radius).sample_goal
        title = "goals farther out than those of meta-training"
        # On request: it takes half as long again.
        found["shifted_goals"] = family.scenario(ROBOT, config, env, title, goals=goals, on_request=True, **shared)
    return found


DEFINITION = common.definition(
    "ant_mfrl",
    "Brax's ant, sent to places about it, learns from samples alone (25 min)",
    AntConfig,
    ROBOT,
    scenarios,
)
