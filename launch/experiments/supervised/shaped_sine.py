"""shaped_sine: one frequency is fitted by a loss that was meta-trained with the true frequency in sight (paper, IV-D).

The squared error of sin(w x) over w has many minima; a loss that saw the true w while it was meta-trained can be shaped so
that plain gradient descent finds it. At meta-test it sees predictions, targets and inputs alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch.config import Config, field
from launch.experiment import Definition, Experiment, Scenario, Trained
from launch.figures import loss_landscapes
from ml3_jax.problems import shaped

HIGHEST = 5.0  # |w| of the true frequencies (paper)
FIRST_GUESS = 0.1  # where the search starts (released code)
LANDSCAPE_TRUTHS = (-3.0, -0.7, 1.5, 4.5)  # of the frequencies that the released code tests on
LANDSCAPE_GRID = np.linspace(-5.5, 5.5, 221, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class ShapedSineConfig(Config):
    """Defaults: one inner step a meta-gradient, optimizees that live for ten, all ages in every meta-step."""

    inner_lr: float = 1.0
    inner_steps: int = 10
    unroll: int | None = 1
    meta_lr: float = 1e-2
    meta_steps: int = 4000
    meta_decay_steps: int = 4000
    meta_clip: float = 1.0
    num_tasks: int = 128
    log_every: int | None = 50
    save_every: int | None = 1000
    extra: bool = field(True)  # whether the task loss of meta-training may see the true frequency
    input_range: float = field(1.0, above=0.0)  # inputs are drawn from [-input_range, input_range]
    points: int = field(64, at_least=1)  # samples of a task
    anywhere: float = field(0.5, at_least=0.0, at_most=1.0)  # share of meta-train lives that start anywhere in [-5, 5]
    floor: float = field(1e-3, above=0.0)  # task loss with extra: log(squared error of w + floor)
    hidden: tuple[int, ...] = field((20, 20, 20), at_least=1)
    activation: str = field("elu", choices=tuple(sorted(ml3_jax.networks.ACTIVATIONS)))


def _anywhere(key: Array) -> Array:
    return jax.random.uniform(key, minval=-HIGHEST, maxval=HIGHEST)


def _fixed(key: Array) -> Array:
    del key
    return jnp.asarray(FIRST_GUESS)


def _mixed(share: float) -> Callable[[Array], Array]:
    def start(key: Array) -> Array:
        which, where = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(which, share), _anywhere(where), FIRST_GUESS)

    return start


def _predict(w: Array, x: Array) -> Array:
    return jnp.sin(w * x)


def problem_from(config: ShapedSineConfig, start: Callable[[Array], Array]) -> ml3_jax.Problem:
    """The problem of a config, with searches that begin at `start`."""
    extra_loss = shaped.log_squared_distance(config.floor) if config.extra else None

    def sample_inputs(key: Array) -> Array:
        return jax.random.uniform(key, (config.points,), minval=-config.input_range, maxval=config.input_range)

    return shaped.make_problem(_predict, start, _anywhere, sample_inputs, extra_loss=extra_loss)


def make_problem(config: ShapedSineConfig) -> ml3_jax.Problem:
    """The problem that is meta-trained on: searches begin at the first guess or anywhere."""
    return problem_from(config, _mixed(config.anywhere))


def make_loss(config: ShapedSineConfig) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    return ml3_jax.losses.weighted_squared_error(config.hidden, config.activation)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Searches from the released code's first guess, and from anywhere."""

    def tested(start: Callable[[Array], Array], title: str) -> Scenario:
        return Scenario(
            problem_from(experiment.config, start),
            "parameter_error",
            num_tasks=200,
            steps=50,
            title=title,
            other_metrics=("mse",),
            success=lambda error: error < 0.1,
            describe=lambda tasks: np.asarray(tasks.extra).tolist(),
        )

    return {
        "": tested(_fixed, f"error of the frequency w, search from w = {FIRST_GUESS}"),
        "start_anywhere": tested(_anywhere, "error of the frequency w, search from anywhere in [-5, 5]"),
    }


def _landscape_features(config: ShapedSineConfig) -> Array:
    """[T, P, N, 3] what the loss sees for T true frequencies at P frequencies of the optimizee."""
    x = jnp.linspace(-config.input_range, config.input_range, config.points)
    truths, grid = jnp.asarray(LANDSCAPE_TRUTHS), jnp.asarray(LANDSCAPE_GRID)
    predictions = _predict(grid[None, :, None], x[None, None, :])
    targets = _predict(truths[:, None, None], x[None, None, :])
    return jnp.stack(jnp.broadcast_arrays(predictions, targets, x[None, None, :]), axis=-1)


def history(experiment: Experiment) -> Callable[[Any], Array]:
    """Records the landscape over the frequency."""
    features = _landscape_features(experiment.config)
    loss = jax.vmap(jax.vmap(experiment.learned_loss.apply, (None, 0)), (None, 0))
    return lambda loss_params: loss(loss_params, features)


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """The landscape over the frequency, as meta-training shaped it."""
    experiment, recorded = trained.experiment, trained.history
    features = np.asarray(_landscape_features(experiment.config))
    mse = np.mean((features[..., 0] - features[..., 1]) ** 2, axis=-1)
    if recorded is None:  # a run folder whose history was taken away still shows where it ended
        recorded = {
            "steps": np.array([experiment.config.meta_steps]),
            "values": np.asarray(history(experiment)(trained.loss_params))[None],
        }
    loss_landscapes.over_parameter(
        folder / "landscape.png",
        LANDSCAPE_GRID,
        LANDSCAPE_TRUTHS,
        np.asarray(recorded["values"]),
        [int(s) for s in recorded["steps"]],
        mse,
        parameter="frequency w",
        title="What gradient descent on w sees: the loss of sin(w x) as meta-training shapes it, beside the mean squared error",
    )


DEFINITION = Definition(
    "shaped_sine",
    "a frequency found by a loss that was meta-trained with the true one in sight (1 min)",
    ShapedSineConfig,
    make_problem,
    make_loss,
    scenarios,
    history=history,
    figures=figures,
)
