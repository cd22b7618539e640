"""sine: a loss is meta-trained on one narrow sine and meta-tested on wide sines of other amplitudes, phases and ranges.

The defaults are ours, for SGD in the inner loop. The preset "published" is the released code's (paper, section IV-A). The
preset "adam" is for Adam in the inner loop.
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
from launch.experiment import PAPER_LOSS, Definition, Experiment, Scenario, Trained, paper_network
from launch.figures import loss_landscapes
from ml3_jax import networks
from ml3_jax.problems import supervised

WAVES = {  # ranges of amplitude and phase; x lies within +- the last number
    "narrow": ((1.0, 1.0), (math.pi, math.pi), 2.0),  # one sine; every task draws new points
    "wide": ((0.2, 5.0), (-math.pi, math.pi), 5.0),  # the tested distribution
}
POINTS = 100  # in each split of a task
OPTIMIZEE = networks.MLP((100, 10, 1))
OTHER_OPTIMIZEES = {
    "tanh_2x40": networks.MLP((40, 40, 1), "tanh"),
    "relu_4x64": networks.MLP((64, 64, 64, 64, 1)),
    "relu_2x256": networks.MLP((256, 256, 1)),
}
SLOW_OPTIMIZEES = ("relu_2x256",)  # twice as long as all the others together
TEST_STEPS = 100
LOSS_CAP, LOSS_FLOOR = 100.0, 1e-5  # task loss log(min(mse, cap) + floor): a diverged task does not dominate the mean


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
        # Adam cancels the scale of the loss, so the schedule is learned. The gradient through 100 steps of Adam explodes, so
        # the inner loop is unrolled in segments.
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
    train_tasks: str = field("narrow", choices=tuple(WAVES))
    outer_data: str = field("test", choices=("test", "train"))  # the split of the task loss; inner steps use "train"
    loss: str = field("affine_split_rmse", choices=("mlp", "affine_split_rmse", PAPER_LOSS))
    schedule_degree: int = field(0, at_least=0)  # affine_split_rmse: degree of the learned schedule; 0: a fixed fade
    log_task_loss: bool = field(True)
    hidden: tuple[int, ...] = field((50, 50), at_least=1)  # mlp
    meta_init: str = field("fan_in", choices=("fan_in", "xavier"))  # init_scheme in meta-training; meta-test has "fan_in"

    def preset(self) -> str:
        """The name of the protocol, or of the inner optimizer under the default protocol."""
        return self.inner_optimizer if self.protocol == "default" else self.protocol


def sample_wave(key: Array, waves: str) -> supervised.SupervisedTask:
    """A task y = A sin(x - p). A, p and the x of both splits are uniform in the ranges of `WAVES`."""
    amplitude, phase, reach = WAVES[waves]
    amplitude_key, phase_key, train_key, test_key = jax.random.split(key, 4)
    height = jax.random.uniform(amplitude_key, minval=amplitude[0], maxval=amplitude[1])
    shift = jax.random.uniform(phase_key, minval=phase[0], maxval=phase[1])

    def split(key: Array) -> supervised.Examples:
        x = jax.random.uniform(key, (POINTS, 1), minval=-reach, maxval=reach)
        return supervised.Examples(x, height * jnp.sin(x - shift))

    return supervised.SupervisedTask(split(train_key), split(test_key), extra=jnp.stack([height, shift]))


def _log_capped(mse: Array) -> Array:
    return jnp.log(jnp.minimum(mse, LOSS_CAP) + LOSS_FLOOR)


def problem_on(config: SineConfig, waves: str, model: networks.MLP, inner_steps: int) -> ml3_jax.Problem:
    """The problem of a config for one distribution of tasks, one optimizee and one number of inner steps."""
    features = ("prediction", "target", "input", "progress") if config.loss == "affine_split_rmse" else ("prediction", "target")
    return supervised.make_problem(
        model,
        lambda key, context: sample_wave(key, waves),
        features=features,
        metrics={"mse": supervised.squared_error},
        outer_data=config.outer_data,
        outer_transform=_log_capped if config.log_task_loss else None,
        inner_steps=inner_steps,
    )


def make_problem(config: SineConfig) -> ml3_jax.Problem:
    """The problem of meta-training."""
    return problem_on(config, config.train_tasks, OPTIMIZEE.clone(init_scheme=config.meta_init), config.inner_steps)


def make_loss(config: SineConfig) -> ml3_jax.LearnedLoss:
    """A scheduled error of the predictions, or an MLP."""
    if config.loss == "mlp":
        return ml3_jax.losses.mlp(config.hidden)
    return ml3_jax.losses.affine_split_rmse(fade=config.schedule_degree == 0, schedule_degree=config.schedule_degree)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Wide sines; the narrow sine with new initialisations; wide sines with new architectures."""

    def tested(waves: str, model: networks.MLP, title: str) -> Scenario:
        def problem_for(steps: int) -> ml3_jax.Problem:
            return problem_on(experiment.config, waves, model, steps)

        return Scenario(
            problem_for(TEST_STEPS),
            "mse",
            steps=TEST_STEPS,
            title=title,
            describe=lambda tasks: np.asarray(tasks.extra).tolist(),
            problem_for=problem_for,
        )

    others = {
        name: tested("wide", model, f"wide sines, optimizee {name}")._replace(on_request=name in SLOW_OPTIMIZEES)
        for name, model in OTHER_OPTIMIZEES.items()
    }
    return {
        "": tested("wide", OPTIMIZEE, "wide sines"),
        "train_task": tested("narrow", OPTIMIZEE, "the narrow sine, new initialisations"),
        **others,
    }


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """Draws the learned loss against the prediction, beside the squared error."""
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
                [_losses_of_batches(apply, loss_params, predictions - target, shape) for target in targets]
            )
            for name, shape in {
                "the same in every sample": np.ones(POINTS),
                "of alternating sign": np.tile([1.0, -1.0], POINTS // 2),
            }.items()
        }
        subtitle = "of a batch in which all errors have this size, at the start of training; learned curves share one scale"
    loss_landscapes.over_prediction(folder / "landscape.png", predictions, targets, curves, subtitle=subtitle)


def _losses_of_batches(apply: Callable[..., Array], loss_params: Any, errors: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The losses [P] of batches with errors `errors` [P] times `shape` [N]. Inputs are equally spaced in [-2, 2]."""
    inputs = jnp.linspace(-2.0, 2.0, POINTS)

    def of_batch(error: Array) -> Array:
        return apply(loss_params, jnp.stack([error * shape, 0 * inputs, inputs, 0 * inputs], axis=-1))

    return np.asarray(jax.vmap(of_batch)(jnp.asarray(errors)))


DEFINITION = Definition(
    "sine",
    "a loss meta-trained on one narrow sine, tested on wide ones (15 s; trained on wide ones with Adam: 40 s)",
    SineConfig,
    make_problem,
    make_loss,
    scenarios,
    figures=figures,
    paper_network=lambda config: paper_network(config.hidden),
)
