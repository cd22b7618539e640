"""reacher_expert: as reacher_mfrl, but meta-training sees what an expert does, and its task loss clones it (paper, IV-D).

The expert is the best of several trajectory optimisations through the closed form, from several starts to each goal. Meta-test
has goals that no expert was asked about, and no expert. `--config.extra=False` has the policy gradient's task loss instead.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import envs
from launch import experts
from launch.experiments import reacher_mfrl, sampling, sampling_figures
from launch.experiments.base import Definition, Experiment, Setting, setting
from ml3_jax.problems import model_free

SEED = 8  # of the goals that the expert is asked about
PLANT = reacher_mfrl.PLANT._replace(name="reacher_expert")


@dataclasses.dataclass(frozen=True)
class ExpertConfig(reacher_mfrl.ReacherConfig):
    """How much the expert shows."""

    extra: bool = setting(True)
    expert_goals: int = setting(256, at_least=1)
    expert_starts: int = setting(4, at_least=1)  # for each goal


def clone(act: Callable[[Array], tuple[Array, Array]], expert: experts.Expert) -> Array:
    """Mean squared difference of the policy's mean from the expert's actions, where the expert was, summed over actions."""
    states, actions = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (expert.states, expert.actions))
    return jnp.mean(jnp.sum((jax.vmap(lambda x: act(x)[0])(states) - actions) ** 2, axis=-1))


def build(config: ExpertConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    if not config.extra:
        return sampling.build(PLANT, config, **options)

    def shown(env: envs.GoalEnv) -> model_free.Demonstrations:
        equations = env if env.differentiable else reacher_mfrl.make_env(config, physics="closed_form")
        return _demonstrations(equations, config)

    return sampling.build(PLANT, config, demonstrations=shown, extra_loss=clone, **options)


def _demonstrations(env: envs.GoalEnv, config: ExpertConfig) -> model_free.Demonstrations:
    return experts.demonstrations(
        env,
        reacher_mfrl.reward(config, env),
        jax.random.key(SEED),
        goals=config.expert_goals,
        starts=config.expert_starts,
        horizon=config.horizon,
        sample_start=env.sample_start,
    )


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Those of reacher_mfrl."""
    return reacher_mfrl.settings_of(PLANT, experiment)


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """Those of reacher_mfrl."""
    del recorded
    env = reacher_mfrl.make_env(experiment.config, physics="closed_form")
    sampling_figures.draw(PLANT, experiment._replace(context=None), loss_params, results, folder, env=env)


DEFINITION = Definition(
    "reacher_expert",
    "as reacher_mfrl, meta-trained to clone an expert that meta-test does not have (3 min)",
    ExpertConfig,
    build,
    settings,
    resolve=reacher_mfrl.resolve,
    figures=figures,
    env_steps=sampling.env_steps,
)
