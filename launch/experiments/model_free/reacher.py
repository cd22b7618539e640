"""reacher_mfrl: a learned loss trains stochastic policies of a two-link arm from samples alone (paper, section IV-C2).

Meta-training draws places for the tip of the arm in closed form; meta-test draws others, policies of other architectures,
other motors, places farther out, and the arm in Brax (mjx). The paper gives R = -d + 1 / (d + 0.001) - |a|, with a peak of
1000 times the distance; here d counts in links of 0.1 m and the peak is 1:
R = -d + 0.1 / (d + 0.1) - 0.01 |a|.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import envs
from envs.reacher import LENGTH, Reacher
from launch.config import field
from launch.evaluation import ppo
from launch.experiment import Experiment, Scenario
from launch.experiments.control import Robot
from launch.experiments.model_free import common
from launch.experiments.model_free import scenarios as family
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
class ReacherConfig(common.SamplingConfig):
    """Goals are positions of the tip at joint angles drawn from a square."""

    log_every: int | None = 20
    inner_optimizer: str = "mup_adam"  # meta-test has policies up to four times as wide
    physics: str = field("closed_form", choices=("closed_form", "mjx"))  # where meta-training samples
    action_limit: float = field(0.3, above=0.0)
    goal_range: float = field(1.0, above=0.0)  # rad
    start_spread: float = field(0.1, at_least=0.0)  # rad


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
    return common.near_goal(env, unit=LENGTH, height=PEAK, width=PEAK, action_cost=config.action_cost)


ROBOT = Robot(make_env, reward, inputs)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Goals never seen; other motors, the arm in Brax, goals farther out where joints can turn there; policies never seen."""
    config = experiment.config
    env = make_env(config, physics="closed_form")
    assert isinstance(env, Reacher)
    # By the policy gradient, even where the learned loss was meta-trained with demonstrations.
    pretrain = family.pretrainer(common.make_problem(ROBOT, config, env), config)
    ppo_settings = ppo.PPOSettings(env_steps=config.ppo_env_steps)

    def tested(title: str, env: envs.GoalEnv, *, config: ReacherConfig = config, **options: Any) -> Scenario:
        return family.scenario(ROBOT, config, env, title, num_tasks=5, **options)

    def gears(key: Array) -> Array:
        exponents = jax.random.uniform(key, (2,), minval=-1.0)
        return env.gear * GEAR_FACTOR**exponents

    motors = {"sample_dynamics": gears, "system": env.with_gear}
    found = {
        "": tested("goals and policies never seen", env, pretrain=pretrain, ppo_settings=ppo_settings),
        "shifted": tested("motors drawn anew for each task", env, dynamics=motors, pretrain=pretrain),
        "mjx": tested("the arm in Brax (mjx)", make_env(config, physics="mjx")),
    }
    outside = min(OUTSIDE * config.goal_range, *env.reach)
    if outside > config.goal_range:
        farther = make_env(config, physics="closed_form", goal_range=outside, goal_within=config.goal_range)
        found["shifted_goals"] = tested("goals farther out than those of meta-training", farther, pretrain=pretrain)
    for name, other in family.with_policies(config, POLICIES).items():
        words = name.removeprefix("policy_").replace("_", ", ")
        found[name] = tested(f"a policy never seen: {words}", env, config=other)
    return found


DEFINITION = common.definition(
    "reacher_mfrl",
    "a two-link arm whose stochastic policy learns from samples alone (3 min)",
    ReacherConfig,
    ROBOT,
    scenarios,
    physics="closed_form",
)
