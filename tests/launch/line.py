"""A tiny experiment for the tests of `launch`: fit a line to points with outliers. It meta-trains in a second."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import ml3_jax
from launch.config import Config, field
from launch.evaluation.probes import gradient_cosine
from launch.experiment import Definition, Experiment, Scenario, Trained


@dataclasses.dataclass(frozen=True)
class LineConfig(Config):
    """New fields and new defaults; inner_lr depends on inner_optimizer."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"adam": {"inner_lr": 0.05}}

    inner_steps: int = 4
    inner_decay_steps: int = 3
    meta_steps: int = 20
    num_tasks: int = 4
    log_every: int | None = 5
    save_every: int | None = 10
    outliers: float = field(0.25, at_least=0.0, at_most=1.0)
    hidden: tuple[int, ...] = field((8,), at_least=1)
    extra: bool = field(True)
    broken: str = field("", choices=("", "observe", "nan"))

    def preset(self) -> str:
        """The inner optimizer."""
        return self.inner_optimizer


class Line(NamedTuple):
    """A task: fit y = slope * x + offset."""

    x: Array  # [N]
    y: Array  # [N], with outliers
    extra: Array  # [2]: slope, offset


def _predict(params: Any, x: Array) -> Array:
    return params["slope"] * x + params["offset"]


def make_problem(config: LineConfig) -> ml3_jax.Problem:
    """The problem of a config."""

    def sample_task(key: Array, context: Any) -> Line:
        line_key, noise_key = jax.random.split(key)
        line = jax.random.normal(line_key, (2,))
        outlier = 4.0 * jax.random.bernoulli(noise_key, config.outliers, (16,))
        return Line(context, line[0] * context + line[1] + outlier, line)

    def init(key: Array, task: Line) -> Any:
        return {"slope": 0.1 * jax.random.normal(key), "offset": jnp.zeros(())}

    def observe(params: Any, task: Line, context: Any, key: Array, step: Array) -> Array:
        columns = jnp.stack([_predict(params, task.x), task.y], axis=-1)
        return columns[0] if config.broken == "observe" else columns

    def plain_loss(params: Any, task: Line, context: Any, key: Array, step: Array) -> Array:
        return jnp.mean((_predict(params, task.x) - task.y) ** 2)

    def task_loss(params: Any, task: Line, context: Any, key: Array) -> Array:
        if not config.extra:
            return plain_loss(params, task, context, key, jnp.zeros((), jnp.int32))
        error = (params["slope"] - task.extra[0]) ** 2 + (params["offset"] - task.extra[1]) ** 2
        return error * (jnp.nan if config.broken == "nan" else 1.0)

    def evaluate(params: Any, task: Line, context: Any, key: Array) -> dict[str, Array]:
        off = jnp.stack([params["slope"], params["offset"]]) - task.extra
        return {"distance": jnp.sqrt(jnp.sum(off**2) + 1e-12), "offset_error": jnp.abs(off[1])}

    return ml3_jax.Problem(sample_task, init, observe, task_loss, evaluate, plain_loss)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """The main scenario, and a variant with twice the outliers that counts environment steps."""
    more = make_problem(dataclasses.replace(experiment.config, outliers=0.5))._replace(samples_per_step=16)
    top = Scenario(
        experiment.problem,
        "distance",
        experiment.context,
        num_tasks=12,
        steps=6,
        unit="m",
        title="lines with outliers",
        other_metrics=("offset_error", "gradient_cosine"),
        success=lambda distance: distance < 0.5,
        describe=lambda tasks: tasks.extra.tolist(),
        probe=gradient_cosine(experiment.problem, experiment.learned_loss),
    )
    noisy = top._replace(
        problem=more,
        other_metrics=(),
        probe=None,
        success=None,
        describe=None,
        title="twice the outliers",
        pretrain=lambda key: {"slope": jnp.zeros(()), "offset": jnp.ones(())},
        maml=lambda key: {"slope": jnp.zeros(()), "offset": 2.0 * jnp.ones(())},
    )
    return {"": top, "noisy": noisy}


def history(experiment: Experiment):
    """Records the loss at one pair (prediction, target)."""
    return lambda loss_params: experiment.learned_loss.apply(loss_params, jnp.array([[0.5, 1.0]]))


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """Writes its arguments into a file, for a test."""
    shape = None if trained.history is None else list(trained.history["values"].shape)
    (folder / "figures.txt").write_text(f"{trained.results['experiment']} {shape}")


DEFINITION = Definition(
    "line",
    "a line through points with outliers (1 s)",
    LineConfig,
    make_problem,
    make_loss=lambda config: ml3_jax.losses.mlp(config.hidden),
    scenarios=scenarios,
    make_context=lambda config: jnp.linspace(-1.0, 1.0, 16),
    history=history,
    figures=figures,
)
