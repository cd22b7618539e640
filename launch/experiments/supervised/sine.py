"""sine: a loss meta-trained on one narrow sine and meta-tested on wide ones, of other amplitudes, phases and ranges.

The defaults are our own for SGD in the inner loop. Presets: "published", the released code's protocol (paper, section IV-A),
and "adam", for Adam in the inner loop.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch.config import Config, field
from launch.experiment import Definition, Experiment, Scenario, Trained
from launch.figures import loss_landscapes
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
LOSS_CAP, LOSS_FLOOR = 100.0, 1e-5  # of the task loss log(min(mse, cap) + floor): a diverged task does not dominate the mean


@dataclasses.dataclass(frozen=True)
class SineConfig(Config):
    """The meta-train tasks, the optimizee and the learned loss."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "inner_lr": 1e-3,
            "inner_steps": 1,
            "meta_lr": 1e-3,
            "meta_steps": 500,
            "meta_decay_steps": 0,
            "meta_clip": 0.0,
            "num_tasks": 1,
            "objective": "last",
            "loss": "mlp",
            "log_task_loss": False,
            "meta_init": "xavier",
        },
        # Adam cancels the scale of the loss except for its memory, so the schedule is learned. The inner loop is trained in
        # segments, since the gradient through a hundred steps of Adam explodes.
        "adam": {
            "inner_lr": 3e-2,
            "inner_steps": 100,
            "meta_steps": 200,
            "meta_decay_steps": 200,
            "num_tasks": 10,
            "unroll": 20,
            "schedule_degree": 2,
        },
    }

    inner_lr: float = 0.1
    inner_steps: int = 50
    meta_lr: float = 3e-2
    meta_steps: int = 100
    meta_decay_steps: int = 100
    meta_clip: float = 1.0
    num_tasks: int = 6
    objective: str = "mean"
    protocol: str = field("default", choices=("default", "published"))
    train_tasks: str = field("narrow", choices=("narrow", "wide"))
    outer_data: str = field("test", choices=("test", "train"))  # points of the task loss: fresh ones, or the inner steps'
    loss: str = field("affine_split_rmse", choices=("mlp", "affine_split_rmse"))
    schedule_degree: int = field(0, at_least=0)  # affine_split_rmse: degree of the learned schedule; 0: a fixed fade
    log_task_loss: bool = field(True)
    hidden: tuple[int, ...] = field((50, 50), at_least=1)  # mlp
    # Initialisation of the optimizees of meta-training (`networks.MLP.init_scheme`); in a meta-test it is always "fan_in".
    meta_init: str = field("fan_in", choices=("fan_in", "xavier"))

    def preset(self) -> str:
        """The protocol's, or else the inner optimizer's."""
        return self.inner_optimizer if self.protocol == "default" else self.protocol


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


def problem_on(config: SineConfig, sampler: str, model: networks.MLP, inner_steps: int) -> ml3_jax.Problem:
    """The problem of a config for one sampler of tasks, one optimizee and one number of inner steps."""
    features = ("prediction", "target", "input", "progress") if config.loss == "affine_split_rmse" else ("prediction", "target")
    return supervised.make_problem(
        model,
        SAMPLERS[sampler],
        features=features,
        metrics={"mse": supervised.squared_error},
        outer_data=config.outer_data,
        outer_transform=_log_capped if config.log_task_loss else None,
        inner_steps=inner_steps,
    )


def make_problem(config: SineConfig) -> ml3_jax.Problem:
    """The problem that is meta-trained on."""
    return problem_on(config, config.train_tasks, OPTIMIZEE.clone(init_scheme=config.meta_init), config.inner_steps)


def make_loss(config: SineConfig) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden)
    return ml3_jax.losses.affine_split_rmse(fade=config.schedule_degree == 0, schedule_degree=config.schedule_degree)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Wide tasks; the narrow one from fresh initialisations; and optimizees that meta-training never saw on wide tasks."""

    def tested(sampler: str, model: networks.MLP, title: str) -> Scenario:
        def problem_for(steps: int) -> ml3_jax.Problem:
            return problem_on(experiment.config, sampler, model, steps)

        return Scenario(
            problem_for(TEST_STEPS),
            "mse",
            steps=TEST_STEPS,
            title=title,
            describe=lambda tasks: np.asarray(tasks.extra).tolist(),
            problem_for=problem_for,
        )

    others = {name: tested("wide", model, f"wide sines, optimizee {name}") for name, model in OTHER_OPTIMIZEES.items()}
    return {
        "": tested("wide", OPTIMIZEE, "wide sines"),
        "train_task": tested("narrow", OPTIMIZEE, "the narrow sine, fresh initialisations"),
        **others,
    }


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """The learned loss of one sample over its prediction, beside the squared error."""
    loss_params = trained.loss_params
    predictions, targets = np.linspace(-3.0, 3.0, 121, dtype=np.float32), (-1.0, 0.0, 1.0)
    apply = trained.experiment.learned_loss.apply
    if trained.experiment.config.loss == "mlp":
        points = np.stack([loss_landscapes.stacked(predictions, target) for target in targets])
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
    loss_landscapes.over_prediction(folder / "landscape.png", predictions, targets, curves, subtitle=subtitle)


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
    make_problem,
    make_loss,
    scenarios,
    figures=figures,
)
