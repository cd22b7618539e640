"""reacher_mfrl: a learned loss trains stochastic policies of a two-link arm from samples alone (paper, section IV-C2).

Meta-training draws places for the tip of the arm in closed form; meta-test draws others, policies of other architectures,
other motors, places farther out, and the arm in Brax (mjx). The paper gives R = -d + 1 / (d + 0.001) - |a|, whose peak is
1000 times what there is to lose on the way; here d counts in links of 0.1 m and the peak is 1:
R = -d + 0.1 / (d + 0.1) - 0.01 |a|.
"""

import dataclasses
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

import envs
from envs.reacher import LENGTH, Reacher
from launch import ppo
from launch.experiments import sampling, sampling_figures, sampling_settings
from launch.experiments.base import Definition, Experiment, Setting, setting
from ml3_jax.problems import model_free

PEAK = 0.1  # links; where the bonus near the goal has half its height
GEAR_FACTOR = 3.0  # of shifted tasks: each motor is between a third and three times as strong
OUTSIDE = 1.5  # of the range of meta-training's goals, up to which goals "farther out" lie
POLICIES: dict[str, tuple[tuple[int, ...], str]] = {
    f"policy_{depth}x{width}_{activation}": ((width,) * depth, activation)
    for depth, width, activation in (
        (1, 64, "tanh"),
        (3, 64, "tanh"),
        (4, 64, "tanh"),
        (2, 32, "tanh"),
        (2, 256, "tanh"),
        (2, 64, "relu"),
        (4, 256, "relu"),
    )
}


@dataclasses.dataclass(frozen=True)
class ReacherConfig(sampling.SamplingConfig):
    """Goals are where the tip is at joint angles drawn from a square."""

    log_every: int = 20
    inner_optimizer: str = "mup_adam"  # meta-test has policies up to four times as wide
    physics: str = setting("closed_form", choices=("closed_form", "mjx"))  # where meta-training samples
    action_limit: float = setting(0.3, above=0.0)
    goal_range: float = setting(1.0, above=0.0)  # rad
    start_spread: float = setting(0.1, at_least=0.0)  # rad


SIZES: dict[str, dict[str, Any]] = {
    "default": {"rollouts": 4, "num_tasks": 16, "meta_steps": 800, "meta_decay_steps": 800},
    "full": {"rollouts": 32, "num_tasks": 64, "meta_steps": 2000, "meta_decay_steps": 2000},
}
C = TypeVar("C", bound=ReacherConfig)


def resolve(config: C) -> C:
    """As `sampling.resolve`."""
    return sampling.resolve(config, SIZES)


def make_env(config: ReacherConfig, **options: Any) -> envs.GoalEnv:
    """The arm of a config; options win over it."""
    given = {"physics": config.physics, "horizon": config.horizon, "action_limit": config.action_limit, "goal_space": "tip"}
    spread = {"goal_range": config.goal_range, "start_spread": config.start_spread}
    return envs.make("reacher", **{**given, **spread, **options})


def inputs(env: Any) -> Any:
    """(x, goal) -> angles, speeds, the goal, and the way from the tip to it, [8], all of size 1 or so."""

    def of_state(x: Array, goal: Array) -> Array:
        return jnp.concatenate([x[:2], x[2:] / 10.0, goal / LENGTH, (goal - env.tip(x[:2])) / LENGTH])

    return of_state


def reward(config: ReacherConfig, env: envs.GoalEnv) -> model_free.RewardFn:
    """-d + 0.1 / (d + 0.1) - 0.01 |a| at the next state, d in links."""
    return sampling.near_goal(env, unit=LENGTH, height=PEAK, width=PEAK, action_cost=config.action_cost)


PLANT = sampling.Plant(
    name="reacher_mfrl",
    make_env=make_env,
    inputs=inputs,
    reward=reward,
    ppo=lambda config: ppo.PPOSettings(env_steps=config.ppo_env_steps),
)


def build(config: ReacherConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    return sampling.build(PLANT, config, **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Those of `settings_of`."""
    return settings_of(PLANT, experiment)


def settings_of(plant: sampling.Plant, experiment: Experiment) -> dict[str, Setting]:
    """Goals never seen; other motors, the arm in Brax, goals farther out where joints can turn there; policies never seen."""
    config = experiment.config
    env = make_env(config, physics="closed_form")
    assert isinstance(env, Reacher)
    # By the policy gradient, whatever the learned loss was meta-trained with.
    pretrain = sampling_settings.pretrainer(sampling.make_problem(plant, config, env), None, config)

    def measured(title: str, env: envs.GoalEnv, **options: Any) -> Setting:
        given = {"num_tasks": 5, "steps": 20, "success": None, "title": title}
        return sampling_settings.measured(plant, experiment, env, **{**given, **options})

    def gears(key: Array) -> Array:
        exponents = jax.random.uniform(key, (2,), minval=-1.0)
        return env.gear * GEAR_FACTOR**exponents

    made = {
        "": measured("goals and policies never seen", env, pretrain=pretrain, with_ppo=True),
        "shifted": measured(
            "motors drawn anew for each task",
            env,
            sample_dynamics=gears,
            system=env.with_gear,
            pretrain=pretrain,
        ),
        "mjx": measured("the arm in Brax (mjx)", make_env(config, physics="mjx")),
    }
    outside = min(OUTSIDE * config.goal_range, *env.reach)
    if outside > config.goal_range:
        farther = make_env(config, physics="closed_form", goal_range=outside, goal_within=config.goal_range)
        made["shifted_goals"] = measured("goals farther out than those of meta-training", farther, pretrain=pretrain)
    for name, other in sampling_settings.architectures(config, POLICIES).items():
        made[name] = measured(f"a policy never seen: {name.removeprefix('policy_').replace('_', ', ')}", env, config=other)
    return made


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """Return against environment steps, paths before and after updates, the learned loss, an animation."""
    del recorded
    sampling_figures.draw(
        PLANT, experiment, loss_params, results, folder, env=make_env(experiment.config, physics="closed_form")
    )


DEFINITION = Definition(
    "reacher_mfrl",
    "a two-link arm whose stochastic policy learns from samples alone (3 min)",
    ReacherConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
    env_steps=sampling.env_steps,
)
