"""An experiment: the declarative `Definition`, the `Experiment` it builds, and the `Scenario`s of its meta-test.

A module below `launch.experiments` assigns one `DEFINITION`. The entry points find it by name in the registry.
"""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import ml3_jax
from launch import optimizers
from launch.errors import rejected_config
from launch.runtime import precision
from ml3_jax.optimizers import LearnedOptimizer

PAPER_LOSS = "paper"  # the choice of --config.loss for the paper's form


def paper_network(hidden: Sequence[int], activation: str = "tanh", last_scale: float = 0.1) -> ml3_jax.LearnedLoss:
    """The network of the paper's form: of any sign, and small at first, since it stands beside the plain loss."""
    return ml3_jax.losses.mlp(hidden, activation, positive=False, bias=True, last_scale=last_scale)


class Experiment(NamedTuple):
    """One experiment under one config, ready to meta-train."""

    name: str
    config: Any  # a resolved config, of the definition's config class
    problem: ml3_jax.Problem
    learned_loss: Any  # a LearnedLoss; None if optimizees descend the plain loss
    context: Any  # of meta-training
    meta: ml3_jax.MetaLearner
    learned_optimizer: LearnedOptimizer | None = None  # the inner optimizer if it is learned


class Reference(NamedTuple):
    """Curves "ppo" of an algorithm without an inner loop, on the first R of the tested tasks; E evaluations."""

    env_steps: list[int]  # [E], the first before any update
    values: dict[str, np.ndarray]  # {METRIC: [R, E]}
    converged: list[bool]  # [R]


class Scenario(NamedTuple):
    """One distribution of tasks and one optimizee for meta-test: the main scenario of an experiment, or a variant.

    Every function except sample_tasks, pretrain and maml is for ONE task.
    """

    problem: ml3_jax.Problem
    metric: str  # the name in problem.evaluate by which curves are compared
    context: Any = None
    sample_tasks: Callable[[Array, int], Any] | None = None  # (key, M) -> tasks [M, ...]; None: problem.sample_task
    num_tasks: int = 100  # default of --tasks
    steps: int | None = None  # default of --steps; None: the config's inner_steps
    unit: str = ""  # of the metric; "": none
    maximize: bool = False  # whether a larger metric is better
    title: str = ""  # in words, for figures and tables
    on_request: bool = False  # whether meta-test runs this variant only if --variants names it
    log_scale: bool = True  # whether figures draw the metric on a log axis
    other_metrics: tuple[str, ...] = ()  # further reported names in problem.evaluate or in probe
    success: Callable[[Any], Any] | None = None  # metric (a NumPy array) -> whether each value is a success
    describe: Callable[[Any], list[Any]] | None = None  # tasks -> a JSON value for each; None: their indices
    sample_tuning_tasks: Callable[[Array, int], Any] | None = None  # tasks to tune step sizes on; None: sample_tasks
    # (loss_params, params, task, context, key) -> {NAME: scalar}, added to problem.evaluate along every curve. loss_params
    # are untrained on the curve "untrained" and meta-trained on all others.
    probe: Callable[[Any, Any, Any, Any, Array], Mapping[str, Array]] | None = None
    # inner steps -> the problem for this number of steps; None: `problem` for any number
    problem_for: Callable[[int], ml3_jax.Problem] | None = None
    # key -> params: one optimizee trained on the meta-train tasks with the task loss, for the curve "pretrained_tuned"
    pretrain: Callable[[Array], Any] | None = None
    # {NAME: key -> ((tasks [M, ...], keys [M], steps) -> {METRIC: [M, steps + 1]})}: curves of other learners that are trained
    # on the meta-train tasks. An inner step of theirs takes as many samples.
    rivals: Mapping[str, Callable[[Array], Callable[[Any, Array, int], Mapping[str, np.ndarray]]]] = types.MappingProxyType({})
    # key -> params: an initialisation meta-trained on the meta-train tasks, for the curve "maml"
    maml: Callable[[Array], Any] | None = None
    # (tasks, folder) -> the curves "ppo" of all or the first tasks; the folder is their cache
    reference: Callable[[Any, pathlib.Path], Reference] | None = None

    def draw_tasks(self, key: Array, count: int) -> Any:
        """Tasks [count, ...] of the tested distribution."""
        if self.sample_tasks is not None:
            return self.sample_tasks(key, count)
        return jax.vmap(self.problem.sample_task, (0, None))(jax.random.split(key, count), self.context)

    def with_problem(self, change: Callable[[ml3_jax.Problem], ml3_jax.Problem]) -> "Scenario":
        """The scenario with a changed problem, for each number of inner steps."""
        made = self.problem_for
        problem_for = None if made is None else lambda steps: change(made(steps))
        return self._replace(problem=change(self.problem), problem_for=problem_for)

    def with_steps(self, steps: int) -> "Scenario":
        """The scenario for this number of inner steps."""
        return self if self.problem_for is None else self._replace(problem=self.problem_for(steps))


@dataclasses.dataclass(frozen=True)
class Definition:
    """An experiment by name. Only the first six fields are required."""

    name: str  # on the command line
    summary: str  # one line with the time it takes on two cores, for --list
    config: type[Any]  # the class of its config, with its presets
    make_problem: Callable[[Any], ml3_jax.Problem]  # config -> the problem of meta-training
    make_loss: Callable[[Any], ml3_jax.LearnedLoss | None]  # config -> the learned loss; None: the plain loss
    scenarios: Callable[[Experiment], dict[str, Scenario]]  # {"": the main scenario of meta-test, VARIANT: another one}
    make_context: Callable[[Any], Any] = lambda config: None  # config -> the context of meta-training
    meta_options: Callable[[Any], dict[str, Any]] = lambda config: {}  # further arguments of ml3_jax.make_meta_learner
    # experiment -> (loss_params -> array), recorded in history.npz at step 0 and at each logged meta-step
    history: Callable[[Experiment], Callable[[Any], Array]] | None = None
    figures: "Callable[[Trained, pathlib.Path], None] | None" = None  # draws further figures into the run folder
    # (experiment, meta-steps) -> environment steps taken; None: counted from problem.samples_per_step
    env_steps: Callable[[Experiment, int], int] | None = None
    # config -> the network of --config.loss=paper, to which `for_config` adds the plain loss. None: make_loss knows "paper".
    paper_network: Callable[[Any], ml3_jax.LearnedLoss] | None = None

    def for_config(self, config: Any) -> "Definition":
        """The definition for a config with the paper's form of the loss: a network of the features beside the plain loss.

        Its figures and history would show the experiment's own form; they are left out.
        """
        network = self.paper_network
        if network is None or getattr(config, "loss", None) != PAPER_LOSS:
            return self
        observed, losses = ml3_jax.losses.observe_plain_loss, ml3_jax.losses

        def scenarios(experiment: Experiment) -> dict[str, Scenario]:
            return {name: one.with_problem(observed) for name, one in self.scenarios(experiment).items()}

        return dataclasses.replace(
            self,
            make_problem=lambda config: observed(self.make_problem(config)),
            make_loss=lambda config: losses.plain_plus(network(config)),
            scenarios=scenarios,
            history=None,
            figures=None,
            paper_network=None,
        )

    def build(self, config: Any, **options: Any) -> Experiment:
        """The experiment of a resolved config; `options` replace arguments of `ml3_jax.make_meta_learner`.

        Raises:
          UsageError: the config describes a problem, a loss or a system that cannot be built.
        """
        definition = self.for_config(config)
        if definition is not self:
            return definition.build(config, **options)
        products: str = config.precision
        with rejected_config(self.name, "built"), precision.products(products):
            problem, learned_loss = self.make_problem(config), self.make_loss(config)
            context = self.make_context(config)
            given = {**meta_settings(config), **self.meta_options(config), **options}
            meta = ml3_jax.make_meta_learner(problem, learned_loss, **given)
        meta = ml3_jax.MetaLearner(*(precision.under(products, function) for function in meta))
        inner = given["inner_optimizer"]
        learned = inner if isinstance(inner, LearnedOptimizer) else None
        return Experiment(self.name, config, problem, learned_loss, context, meta, learned)

    def count_env_steps(self, experiment: Experiment, meta_steps: int) -> int | None:
        """Environment steps of meta-training; None if nothing is sampled."""
        if self.env_steps is not None:
            return self.env_steps(experiment, meta_steps)
        samples, config = experiment.problem.samples_per_step, experiment.config
        return None if samples is None else meta_steps * config.num_tasks * config.unroll * samples


class Trained(NamedTuple):
    """A meta-trained and meta-tested experiment, for `Definition.figures`."""

    experiment: Experiment  # with the context that meta-training left
    loss_params: Any
    results: dict[str, Any]  # the content of meta_test.json
    history: dict[str, np.ndarray] | None  # {"steps": [H], "values": [H, ...]}, if the definition records it


def meta_settings(config: Any) -> dict[str, Any]:
    """The arguments of `ml3_jax.make_meta_learner` that a config's common fields describe."""
    return {
        "inner_optimizer": optimizers.inner(config.inner_optimizer, config.inner_lr, decay_steps=config.inner_decay_steps),
        "meta_optimizer": optimizers.meta(
            config.meta_optimizer, config.meta_lr, clip=config.meta_clip, decay_steps=config.meta_decay_steps
        ),
        "num_tasks": config.num_tasks,
        "inner_steps": config.inner_steps,
        "unroll": config.unroll,
        "gradient": config.gradient,
        "objective": config.objective,
        "compute_dtype": None if config.compute_dtype == "float32" else config.compute_dtype,
    }
