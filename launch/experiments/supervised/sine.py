"""sine: a loss meta-trained on one narrow sine and meta-tested on wide ones, of other amplitudes, phases and ranges.

Three presets, by `protocol`, `train_tasks` and `inner_optimizer`: the released code's protocol, and defaults of our own for
SGD and for Adam inside (paper, section IV-A; the released code's sine task).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch import landscapes
from launch.experiments import config as config_lib
from launch.experiments.base import Config, Definition, Experiment, Setting, assemble, setting
from ml3_jax import networks
from ml3_jax.problems import supervised

POINTS = 100  # of each split of a task
OPTIMIZEE = networks.MLP((100, 10, 1))
OTHER_OPTIMIZEES = {
    "tanh_2x40": networks.MLP((40, 40, 1), "tanh"),
    "relu_4x64": networks.MLP((64, 64, 64, 64, 1)),
    "relu_2x256": networks.MLP((256, 256, 1)),
}
TEST_STEPS = 100
LOSS_CAP, LOSS_FLOOR = 100.0, 1e-5  # of the task loss log(min(mse, cap) + floor): one diverged task does not rule the mean

PUBLISHED: dict[str, Any] = {  # the released code's
    "inner_lr": 1e-3,
    "inner_steps": 1,
    "meta_lr": 1e-3,
    "meta_steps": 500,
    "meta_decay_steps": 0,
    "meta_clip": 0.0,
    "num_tasks": 1,
    "objective": "last",
    "unroll": 1,
    "loss": "mlp",
    "log_task_loss": False,
    "schedule_degree": 0,
    "meta_init": "xavier",
}
DEFAULT: dict[str, Any] = {  # SGD inside
    "inner_lr": 0.1,
    "inner_steps": 50,
    "meta_lr": 3e-2,
    "meta_steps": 100,
    "meta_decay_steps": 100,
    "meta_clip": 1.0,
    "num_tasks": 6,
    "objective": "mean",
    "unroll": 50,
    "loss": "split_error",
    "log_task_loss": True,
    "schedule_degree": 0,
    "meta_init": "fan_in",
}
# Adam cancels the loss's scale but for its memory, so the schedule is learned: over whole lives, in segments, since the
# gradient through a hundred steps of Adam explodes.
ADAM: dict[str, Any] = {
    **DEFAULT,
    "inner_lr": 3e-2,
    "inner_steps": 100,
    "meta_steps": 200,
    "meta_decay_steps": 200,
    "num_tasks": 10,
    "unroll": 20,
    "schedule_degree": 2,
}


@dataclasses.dataclass(frozen=True)
class SineConfig(Config):
    """What a preset decides stands as None until `resolve` fills it in."""

    protocol: str = setting("default", choices=("default", "published"))
    train_tasks: str = setting("narrow", choices=("narrow", "wide"))
    outer_data: str = setting("test", choices=("test", "train"))  # points of the task loss: fresh ones, or the inner steps'
    loss: str | None = setting(None, choices=("mlp", "split_error"))
    schedule_degree: int | None = setting(None, at_least=0)  # split_error: degree of the learned schedule; 0: a fixed fade
    log_task_loss: bool | None = setting(None)
    hidden: tuple[int, ...] = setting((50, 50), at_least=1)  # mlp
    # How optimizees of meta-training are drawn (`networks.MLP.init_scheme`); those of a meta-test are always "fan_in".
    meta_init: str | None = setting(None, choices=("fan_in", "xavier"))
    inner_steps: int | None = setting(None, at_least=1)
    meta_lr: float | None = setting(None, above=0.0)
    meta_steps: int | None = setting(None, at_least=1)
    meta_decay_steps: int | None = setting(None, at_least=0)
    meta_clip: float | None = setting(None, at_least=0.0)
    num_tasks: int | None = setting(None, at_least=1)
    objective: str | None = setting(None, choices=("last", "mean"))


def resolve(config: SineConfig) -> SineConfig:
    """Fills in what the preset decides; unroll follows inner_steps where that was set by hand."""
    preset = PUBLISHED if config.protocol == "published" else ADAM if config.inner_optimizer == "adam" else DEFAULT
    if config.inner_steps not in (None, preset["inner_steps"]):
        preset = {**preset, "unroll": config.inner_steps}
    left_open = {name: value for name, value in preset.items() if getattr(config, name) is None}
    return config_lib.override(config, left_open)


def sample_wave(
    key: Array, amplitude: tuple[float, float], phase: tuple[float, float], reach: float
) -> supervised.SupervisedTask:
    """A task y = A sin(x - p), x uniform in [-reach, reach], with A and p uniform in their ranges; both splits are fresh."""
    amplitude_key, phase_key, train_key, test_key = jax.random.split(key, 4)
    height = jax.random.uniform(amplitude_key, minval=amplitude[0], maxval=amplitude[1])
    shift = jax.random.uniform(phase_key, minval=phase[0], maxval=phase[1])

    def split(key: Array) -> supervised.Examples:
        x = jax.random.uniform(key, (POINTS, 1), minval=-reach, maxval=reach)
        return supervised.Examples(x, height * jnp.sin(x - shift))

    return supervised.SupervisedTask(split(train_key), split(test_key), extra=jnp.stack([height, shift]))


def narrow(key: Array, context: Any) -> supervised.SupervisedTask:
    """The one meta-train task: sin(x - pi), x in [-2, 2]; its points are drawn anew."""
    del context
    return sample_wave(key, (1.0, 1.0), (math.pi, math.pi), 2.0)


def wide(key: Array, context: Any) -> supervised.SupervisedTask:
    """The distribution that is tested: A in [0.2, 5], p in [-pi, pi], x in [-5, 5]."""
    del context
    return sample_wave(key, (0.2, 5.0), (-math.pi, math.pi), 5.0)


SAMPLERS = {"narrow": narrow, "wide": wide}


def _log_capped(mse: Array) -> Array:
    return jnp.log(jnp.minimum(mse, LOSS_CAP) + LOSS_FLOOR)


def make_problem(config: SineConfig, sampler: str, model: networks.MLP, horizon: int) -> ml3_jax.Problem:
    """The problem of a config for one sampler of tasks, one optimizee and one length of training."""
    features = ("prediction", "target", "input", "progress") if config.loss == "split_error" else ("prediction", "target")
    return supervised.make_problem(
        model,
        SAMPLERS[sampler],
        features=features,
        metrics={"mse": supervised.squared_error},
        outer_data=config.outer_data,
        outer_transform=_log_capped if config.log_task_loss else None,
        horizon=horizon,
    )


def make_loss(config: SineConfig) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden)
    assert config.schedule_degree is not None  # resolved
    return ml3_jax.losses.split_error(fade=config.schedule_degree == 0, schedule_degree=config.schedule_degree)


def build(config: SineConfig, **options: Any) -> Experiment:
    """The experiment of a config."""
    assert config.inner_steps is not None  # resolved
    assert config.meta_init is not None
    optimizee = OPTIMIZEE.clone(init_scheme=config.meta_init)
    problem = make_problem(config, config.train_tasks, optimizee, config.inner_steps)
    return assemble("sine", config, problem, make_loss(config), **options)


def settings(experiment: Experiment) -> dict[str, Setting]:
    """Wide tasks; the narrow one from fresh initialisations; and optimizees that meta-training never saw on wide tasks."""

    def measured(sampler: str, model: networks.MLP, title: str) -> Setting:
        def problem_for(steps: int) -> ml3_jax.Problem:
            return make_problem(experiment.config, sampler, model, steps)

        return Setting(
            problem_for(TEST_STEPS),
            None,
            lambda key, n: jax.vmap(SAMPLERS[sampler], (0, None))(jax.random.split(key, n), None),
            num_tasks=100,
            steps=TEST_STEPS,
            metric="mse",
            title=title,
            describe=lambda tasks: np.asarray(tasks.extra).tolist(),
            problem_for=problem_for,
        )

    others = {name: measured("wide", model, f"wide sines, optimizee {name}") for name, model in OTHER_OPTIMIZEES.items()}
    return {
        "": measured("wide", OPTIMIZEE, "wide sines"),
        "train_task": measured("narrow", OPTIMIZEE, "the narrow sine, fresh initialisations"),
        **others,
    }


def figures(
    experiment: Experiment, loss_params: Any, results: dict[str, Any], recorded: dict[str, Any] | None, folder: pathlib.Path
) -> None:
    """The learned loss of one sample over its prediction, beside the squared error."""
    del results, recorded
    predictions, targets = np.linspace(-3.0, 3.0, 121, dtype=np.float32), (-1.0, 0.0, 1.0)
    apply = experiment.learned_loss.apply
    if experiment.config.loss == "mlp":
        points = np.stack([landscapes.stacked(predictions, target) for target in targets])
        values = jax.vmap(jax.vmap(lambda row: apply(loss_params, row[None])))(points)
        curves = {"learned loss": np.asarray(values)}
        subtitle = "of one sample, against its prediction"
    else:
        curves = {
            f"learned loss, error {name}": np.stack(
                [_over_batches(apply, loss_params, predictions - target, shape) for target in targets]
            )
            for name, shape in {
                "the same in every sample": np.ones(POINTS),
                "of alternating sign": np.tile([1.0, -1.0], POINTS // 2),
            }.items()
        }
        subtitle = "of a batch whose errors all have this size, at the start of training; both learned curves share one scale"
    landscapes.over_prediction(folder / "landscape.png", predictions, targets, curves, subtitle=subtitle)


def _over_batches(apply: Callable[..., Array], loss_params: Any, errors: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The loss of batches whose error is `errors` times `shape`, inputs equally spaced in [-2, 2]."""
    inputs = jnp.linspace(-2.0, 2.0, POINTS)

    def of_batch(error: Array) -> Array:
        return apply(loss_params, jnp.stack([error * shape, 0 * inputs, inputs, 0 * inputs], axis=-1))

    return np.asarray(jax.vmap(of_batch)(jnp.asarray(errors)))


DEFINITION = Definition(
    "sine",
    "a loss meta-trained on one narrow sine, tested on wide ones (15 s; wide, Adam inside: 40 s)",
    SineConfig,
    build,
    settings,
    resolve=resolve,
    figures=figures,
)
