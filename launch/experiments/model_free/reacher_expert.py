"""reacher_expert: reacher_mfrl with a task loss that clones an expert in meta-training (paper, section IV-D).

The expert is the best of several trajectory optimisations through the closed form, from several starts to each goal. Meta-test
has new goals and no expert. With `--config.extra=False` the task loss is the policy gradient's.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from launch.config import field
from launch.experiments.model_free import common, reacher, trajectory_optimization
from ml3_jax.problems import model_free

SEED = 8  # of the expert's goals


@dataclasses.dataclass(frozen=True)
class ExpertConfig(reacher.ReacherConfig):
    """The number of demonstrations."""

    goal: str = "visible"
    extra: bool = field(True)
    expert_goals: int = field(256, at_least=1)
    expert_starts: int = field(4, at_least=1)  # for each goal


def clone(act: Callable[[Array], tuple[Array, Array]], expert: trajectory_optimization.Expert) -> Array:
    """Mean squared error of the policy's mean action at the expert's states, summed over the action's coordinates."""
    states, actions = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (expert.states, expert.actions))
    return jnp.mean(jnp.sum((jax.vmap(lambda x: act(x)[0])(states) - actions) ** 2, axis=-1))


def demonstrations(config: ExpertConfig) -> model_free.Demonstrations | None:
    """The context of meta-training: the expert's trajectories, or None without extra."""
    if not config.extra:
        return None
    env = reacher.make_env(config)
    equations = env if env.differentiable else reacher.make_env(config, physics="closed_form")
    return trajectory_optimization.demonstrations(
        equations,
        reacher.reward(config, equations),
        jax.random.key(SEED),
        goals=config.expert_goals,
        starts=config.expert_starts,
        horizon=config.horizon,
    )


DEFINITION = common.definition(
    "reacher_expert",
    "reacher_mfrl, meta-trained to clone an expert that meta-test does not have (3 min)",
    ExpertConfig,
    reacher.ROBOT,
    reacher.scenarios,
    extra_loss=lambda config: clone if config.extra else None,
    make_context=demonstrations,
    physics="closed_form",
)
