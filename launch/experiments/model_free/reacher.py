"""reacher_mfrl: a learned loss trains stochastic policies of a two-link arm from samples alone (paper, section IV-C2).

Meta-training draws goals for the tip of the arm in closed form. Meta-test draws new goals, goals farther out, other policy
architectures, other motors, and has the arm in Brax (mjx).
The paper gives R = -d + 1 / (d + 0.001) - |a|, with a peak of 1000. Here d is in links of 0.1 m and the peak is 1:
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
from launch.curves import CONTEXT_POLICY
from launch.evaluation import ppo
from launch.experiment import Experiment, Scenario
from launch.experiments import control
from launch.experiments.model_free import common, context_policy
from launch.experiments.model_free import scenarios as family
from ml3_jax.problems import model_free

PEAK = 0.1  # links, the distance at which the bonus near the goal is halved
GEAR_FACTOR = 3.0  # of variant "shifted": motors have a third to three times their strength
OUTSIDE = 1.5  # range of goals of variant "shifted_goals", in ranges of meta-training
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
    physics: str = field("closed_form", choices=("closed_form", "mjx"))  # of meta-training
    action_limit: float = field(0.3, above=0.0)
    goal_range: float = field(1.0, above=0.0)  # rad
    start_spread: float = field(0.1, at_least=0.0)  # rad


def inputs(env: Any) -> Any:
    """(x, goal) -> angles, speeds, the goal, and the vector from the tip to the goal, [8], all scaled to about 1."""
    return lambda x, goal: jnp.concatenate([x[:2], x[2:] / 10.0, goal / LENGTH, (goal - env.tip(x[:2])) / LENGTH])


def inputs_without_goal(env: Any) -> Any:
    """(x, goal) -> angles, speeds and the tip, [6], scaled as `inputs`."""
    return lambda x, goal: jnp.concatenate([x[:2], x[2:] / 10.0, env.tip(x[:2]) / LENGTH])


def reward(config: ReacherConfig, env: envs.GoalEnv) -> model_free.RewardFn:
    """-d + 0.1 / (d + 0.1) - 0.01 |a| at the next state, d in links."""
    return common.near_goal(env, unit=LENGTH, height=PEAK, width=PEAK, action_cost=config.action_cost)


FIELDS = ("physics", "horizon", "action_limit", "goal_range", "start_spread")
make_env = control.env_factory("reacher", *FIELDS, goal_space="tip")
ROBOT = control.Robot(make_env, reward, inputs, inputs_without_goal=inputs_without_goal)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """New goals; other motors, the arm in Brax, goals farther out within the joints' range, other policy architectures."""
    config = experiment.config
    env = make_env(config, physics="closed_form")
    assert isinstance(env, Reacher)
    # By the policy gradient, also for a learned loss that was meta-trained with demonstrations.
    controls = family.controls(common.make_problem(ROBOT, config, env), config)
    ppo_settings = ppo.PPOSettings(env_steps=config.ppo_env_steps)
    rivals = {CONTEXT_POLICY: context_policy.rival(ROBOT, config, env)} if config.goal == "hidden" else {}

    def tested(title: str, env: envs.GoalEnv, *, config: ReacherConfig = config, **options: Any) -> Scenario:
        return family.scenario(ROBOT, config, env, title, num_tasks=5, **options)

    def gears(key: Array) -> Array:
        exponents = jax.random.uniform(key, (2,), minval=-1.0)
        return env.gear * GEAR_FACTOR**exponents

    motors = {"sample_dynamics": gears, "system": env.with_gear}
    found = {
        "": tested("new goals and policies", env, **controls, ppo_settings=ppo_settings, rivals=rivals),
        "shifted": tested("random motors for each task", env, dynamics=motors, **controls),
        "mjx": tested("the arm in Brax (mjx)", make_env(config, physics="mjx")),
    }
    outside = min(OUTSIDE * config.goal_range, *env.reach)
    if outside > config.goal_range:
        farther = make_env(config, physics="closed_form", goal_range=outside, goal_within=config.goal_range)
        found["shifted_goals"] = tested("goals farther out than in meta-training", farther, **controls)
    for name, (hidden, activation) in POLICIES.items():
        other = dataclasses.replace(config, policy_hidden=hidden, policy_activation=activation)
        found[name] = tested("another policy: " + name.removeprefix("policy_").replace("_", ", "), env, config=other)
    if config.goal == "hidden":
        main = found[""].problem
        for name, title in family.CONTROLS.items():
            found[name] = tested(title, env, problem=family.without_rewards(main, name), on_request=True)
    return found


DEFINITION = common.definition(
    "reacher_mfrl",
    "a two-link arm whose stochastic policy learns from samples alone (3 min)",
    ReacherConfig,
    ROBOT,
    scenarios,
    physics="closed_form",
)
