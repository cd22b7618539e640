"""ant_mfrl: a learned loss trains stochastic policies of Brax's ant, which is sent to places about it (paper, section IV-C2).

The paper gives R = -d + 5 / (d + 0.25) - |a|; here |a| counts less, so that to stand still is not the best of what a first
policy can find: R = -d + 5 / (d + 0.25) - 0.1 |a|, d in metres.
"""

import dataclasses
import pathlib
from typing import Any

from jax import Array

import envs
from launch import ppo
from launch.experiments import sampling, sampling_figures, sampling_settings
from launch.experiments.base import Definition, Experiment, Setting, setting
from ml3_jax.problems import model_free

PEAK, NEAR = 5.0, 0.25  # of the reward near the goal, m
OUTSIDE = 1.5  # times the radius of meta-training: where goals "farther out" lie
JOINTS, FAST = 8, 10.0  # rad/s; how fast joints are under random actions is a third of it


@dataclasses.dataclass(frozen=True)
class AntConfig(sampling.SamplingConfig):
    """Goals lie on a circle about the start."""

    log_every: int = 10
    inner_decay_steps: int = 30  # of 20: without, the last updates undo as much as they do, as Adam moves on by its step size
    meta_lr: float = 1e-3  # at 3e-3 what was learned is lost again and again
    horizon: int = setting(100, at_least=1)
    discount: float = setting(0.95, above=0.0, at_most=1.0)
    rest_baseline: bool = True
    share_samples: bool = True
    ppo_tasks: int | None = setting(3, at_least=1, optional=True)
    ppo_env_steps: int = setting(800_000, at_least=1)
    action_cost: float = setting(0.1, at_least=0.0)
    physics: str = setting("spring", choices=("spring",))
    action_limit: float = setting(1.0, above=0.0, at_most=1.0)
    goal_radius: float = setting(2.0, above=0.0)  # m
    start_spread: float = setting(0.1, at_least=0.0)


SIZES: dict[str, dict[str, Any]] = {
    "default": {"rollouts": 4, "num_tasks": 16, "meta_steps": 1000, "meta_decay_steps": 1000},
    "full": {"rollouts": 32, "num_tasks": 64, "meta_steps": 2000, "meta_decay_steps": 2000},
}


def resolve(config: AntConfig) -> AntConfig:
    """As `sampling.resolve`."""
    return sampling.resolve(config, SIZES)


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
    return sampling.near_goal(env, unit=1.0, height=PEAK, width=NEAR, action_cost=config.action_cost)


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


PLANT = sampling.Plant(
    name="ant_mfrl",
    make_env=make_env,
    inputs=inputs,
    reward=reward,
    ppo=ppo_settings,
)


def build(config: AntConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    return sampling.build(PLANT, config, **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Goals on the circle and policies never seen; a circle that is farther out, where the horizon leaves time for one."""
    config = experiment.config
    env: Any = make_env(config)  # an AntGoal, which knows its reach
    problem = sampling.make_problem(PLANT, config, env)
    pretrain = sampling_settings.pretrainer(problem, None, config)

    def measured(title: str, **options: Any) -> Setting:
        given = {"num_tasks": 10, "steps": 20, "success": None, "title": title, "problem": problem, "pretrain": pretrain}
        return sampling_settings.measured(PLANT, experiment, env, **{**given, **options})

    made = {"": measured("goals and policies never seen", with_ppo=True)}
    radius = min(OUTSIDE * config.goal_radius, env.reach)
    if radius > config.goal_radius:
        farther = make_env(config, goal_radius=radius)
        made["shifted_goals"] = measured(
            "goals farther out than those of meta-training",
            goals=farther.sample_goal,
            on_request=True,  # it takes half as long again
        )
    return made


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """Return against environment steps, paths before and after updates, the learned loss, an animation."""
    del recorded
    sampling_figures.draw(PLANT, experiment, loss_params, results, folder, env=make_env(experiment.config))


DEFINITION = Definition(
    "ant_mfrl",
    "Brax's ant, sent to places about it, learns from samples alone (25 min)",
    AntConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
    env_steps=sampling.env_steps,
)
