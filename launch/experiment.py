"""What an experiment is made of: its config, what `build` returns, what meta-test looks at, and what ties them.

A module of `launch.experiments` holds one `DEFINITION`; the launches work on any of them and know none by name.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import Array

import ml3_jax
from launch import optimizers
from launch.experiments import config as config_lib
from launch.experiments.config import Config, setting

__all__ = ["Config", "Definition", "Experiment", "Reference", "Setting", "assemble", "setting"]


class Experiment(NamedTuple):
    """One experiment under one config, ready to meta-train."""

    name: str
    config: Any  # a resolved config, of the definition's config_class
    problem: ml3_jax.Problem
    learned_loss: ml3_jax.LearnedLoss
    context: Any  # what Problem's functions get as context in meta-training
    meta: ml3_jax.MetaLearner


class Reference(NamedTuple):
    """Curves "ppo" of an algorithm that is not an inner loop, with their own count of environment steps; E evaluations.

    They are of the first R of the tested tasks, where each is too dear for all of them.
    """

    env_steps: list[int]  # [E], the first before any update
    values: dict[str, np.ndarray]  # {METRIC: [R, E]}
    converged: list[bool]  # [R]


class Setting(NamedTuple):
    """One distribution of tasks and one optimizee that meta-test measures on: the experiment's own, or a variant.

    Every function but sample_tasks and pretrain is for ONE task.
    """

    problem: ml3_jax.Problem
    context: Any
    sample_tasks: Callable[[Array, int], Any]  # (key, M) -> tasks, each leaf [M, ...]
    num_tasks: int  # default of --tasks
    steps: int  # default of --steps
    metric: str  # the name in problem.evaluate that all is judged by
    unit: str = ""  # "" where it has none
    maximize: bool = False  # whether a larger metric is better
    title: str = ""  # what is measured on, in words, for figures
    on_request: bool = False  # of a variant: whether meta-test leaves it out unless --variants names it
    log_scale: bool = True  # whether figures draw the metric on a log axis
    other_metrics: tuple[str, ...] = ()  # further names in problem.evaluate (or in probe) that are reported
    success: Callable[[Any], Any] | None = None  # metric (a NumPy array) -> whether each is a success
    describe: Callable[[Any], list[Any]] | None = None  # tasks -> a JSON value for each; None: their numbers
    # (key, M) -> tasks to tune step sizes on; None: sample_tasks, on another key
    sample_tuning_tasks: Callable[[Array, int], Any] | None = None
    # (loss_params, params, task, context, key) -> {NAME: scalar}, added to what problem.evaluate returns along every curve;
    # loss_params are the curve's own on "untrained", the meta-trained ones on all others
    probe: Callable[[Any, Any, Any, Any, Array], Mapping[str, Array]] | None = None
    # inner steps -> the problem whose progress counts to that many; None: `problem`, whatever --steps says
    problem_for: Callable[[int], ml3_jax.Problem] | None = None
    # key -> params: one optimizee trained on the meta-train tasks by the task loss; makes the curve "pretrained_tuned"
    pretrain: Callable[[Array], Any] | None = None
    # (tasks, a folder to keep them in) -> the curves "ppo" of the first of them, or of all; not computed again where kept there
    reference: Callable[[Any, pathlib.Path], Reference] | None = None


class Definition(NamedTuple):
    """An experiment by name: everything that the launches ask of it."""

    name: str
    summary: str  # one line: what it is, and the time it takes on 2 cores
    config_class: type[Config]
    build: Callable[
        ..., Experiment
    ]  # (resolved config, **options) -> Experiment; options go on to `assemble`: the launches pass donate=True
    settings: Callable[[Experiment], dict[str, Setting]]  # "": the top level of meta_test.json; other names: its variants
    # config -> config with every field that depends on others filled in; unroll is inner_steps by itself
    resolve: Callable[[Any], Any] = lambda config: config
    # experiment -> (loss_params -> array): recorded at each logged meta-step, and at step 0, in history.npz
    history: Callable[[Experiment], Callable[[Any], Array]] | None = None
    # (experiment, loss_params, results, history, folder): figures of its own. results: what meta_test.json holds;
    # history: {"steps": [H], "values": [H, ...]} or None
    figures: Callable[[Experiment, Any, dict[str, Any], dict[str, Any] | None, pathlib.Path], None] | None = None
    # (experiment, meta-steps) -> what they took from the environment; None: counted from problem.samples_per_step
    env_steps: Callable[[Experiment, int], int] | None = None


def assemble(
    name: str,
    config: Any,
    problem: ml3_jax.Problem,
    learned_loss: ml3_jax.LearnedLoss,
    context: Any = None,
    **options: Any,
) -> Experiment:
    """The experiment of a resolved config, with the meta-learner that the config's common fields describe.

    Args:
      name: the experiment's name.
      config: a resolved config.
      problem: the problem to meta-train on.
      learned_loss: the loss to meta-train.
      context: what the problem's functions get as context.
      **options: further arguments of `ml3_jax.make_meta_learner`, which win over the config's.
    """
    settings: dict[str, Any] = {
        "inner_optimizer": optimizers.inner(config.inner_optimizer, config.inner_lr, decay_steps=config.inner_decay_steps),
        "meta_optimizer": optimizers.meta(
            config.meta_optimizer, config.meta_lr, clip=config.meta_clip, decay_steps=config.meta_decay_steps
        ),
        "num_tasks": config.num_tasks,
        "inner_steps": config.inner_steps,
        "unroll": config.unroll,
        "gradient": config.gradient,
        "objective": config.objective,
    }
    meta = ml3_jax.make_meta_learner(problem, learned_loss, **{**settings, **options})
    return Experiment(name, config, problem, learned_loss, context, meta)


def resolve(definition: Definition, config: Config) -> Config:
    """The config with no field left open, checked.

    Raises:
      UsageError: a field has no value, breaks its rules or does not fit another.
    """
    config = definition.resolve(config)
    if config.unroll is None:
        config = config_lib.override(config, {"unroll": config.inner_steps})
    return config_lib.check(config)
