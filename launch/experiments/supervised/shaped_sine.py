"""shaped_sine: a learned loss fits one frequency; its meta-training knew the true frequency (paper, section IV-D).

The squared error of sin(w x) has many minima over w. Meta-training with the true w shapes a loss that gradient descent can
follow. At meta-test the loss sees only predictions, targets and inputs.
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
from launch.experiment import PAPER_LOSS, Definition, Experiment, Scenario, Trained, paper_network
from launch.figures import loss_landscapes
from ml3_jax.problems import shaped

HIGHEST = 5.0  # largest |w| of the true frequencies (paper)
FIRST_GUESS = 0.1  # start of the search (released code)
LANDSCAPE_TRUTHS = (-3.0, -0.7, 1.5, 4.5)  # some of the released code's test frequencies
LANDSCAPE_GRID = np.linspace(-5.5, 5.5, 221, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class ShapedSineConfig(Config):
    """A meta-gradient spans one of the ten inner steps. Resets are staggered over the tasks."""

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
    extra: bool = field(True)  # the task loss of meta-training uses the true frequency
    input_range: float = field(1.0, above=0.0)  # inputs are drawn from [-input_range, input_range]
    points: int = field(64, at_least=1)  # samples of a task
    anywhere: float = field(0.5, at_least=0.0, at_most=1.0)  # share of meta-train searches that start anywhere in [-5, 5]
    floor: float = field(1e-3, above=0.0)  # task loss with extra: log(squared error of w + floor)
    loss: str = field("weighted_squared_error", choices=("weighted_squared_error", PAPER_LOSS))
    hidden: tuple[int, ...] = field((20, 20, 20), at_least=1)
    activation: str = field("elu", choices=tuple(sorted(ml3_jax.networks.ACTIVATIONS)))


def _anywhere(key: Array) -> Array:
    return jax.random.uniform(key, minval=-HIGHEST, maxval=HIGHEST)


def _mixed(key: Array, share: float) -> Array:
    """A start anywhere with probability `share`, else at the first guess."""
    which, where = jax.random.split(key)
    return jnp.where(jax.random.bernoulli(which, share), _anywhere(where), FIRST_GUESS)


def _predict(w: Array, x: Array) -> Array:
    return jnp.sin(w * x)


def problem_from(config: ShapedSineConfig, start: Callable[[Array], Array]) -> ml3_jax.Problem:
    """The problem of a config. `start` draws the first w of a search."""
    extra_loss = shaped.log_squared_distance(config.floor) if config.extra else None

    def sample_inputs(key: Array) -> Array:
        return jax.random.uniform(key, (config.points,), minval=-config.input_range, maxval=config.input_range)

    return shaped.make_problem(_predict, start, _anywhere, sample_inputs, extra_loss=extra_loss)


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Searches from the first guess of the released code, and from anywhere in [-5, 5]."""

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
        "": tested(lambda key: jnp.asarray(FIRST_GUESS), f"error of the frequency w, search from w = {FIRST_GUESS}"),
        "start_anywhere": tested(_anywhere, "error of the frequency w, search from anywhere in [-5, 5]"),
    }


def _landscape_features(config: ShapedSineConfig) -> Array:
    """Features [T, P, N, 3] for T true frequencies and P frequencies of the optimizee."""
    x = jnp.linspace(-config.input_range, config.input_range, config.points)
    truths, grid = jnp.asarray(LANDSCAPE_TRUTHS), jnp.asarray(LANDSCAPE_GRID)
    predictions = _predict(grid[None, :, None], x[None, None, :])
    targets = _predict(truths[:, None, None], x[None, None, :])
    return jnp.stack(jnp.broadcast_arrays(predictions, targets, x[None, None, :]), axis=-1)


def history(experiment: Experiment) -> Callable[[Any], Array]:
    """Records the learned loss [T, P] over the frequency."""
    features = _landscape_features(experiment.config)
    loss = jax.vmap(jax.vmap(experiment.learned_loss.apply, (None, 0)), (None, 0))
    return lambda loss_params: loss(loss_params, features)


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """Draws the learned loss over the frequency at several meta-steps."""
    experiment, recorded = trained.experiment, trained.history
    features = np.asarray(_landscape_features(experiment.config))
    mse = np.mean((features[..., 0] - features[..., 1]) ** 2, axis=-1)
    if recorded is None:  # history.npz is missing: only the last meta-step can be drawn
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
        title="The learned loss of sin(w x) over w during meta-training, beside the mean squared error",
    )


DEFINITION = Definition(
    "shaped_sine",
    "a frequency found by a loss that was meta-trained with the true frequency (1 min)",
    ShapedSineConfig,
    make_problem=lambda config: problem_from(config, lambda key: _mixed(key, config.anywhere)),
    make_loss=lambda config: ml3_jax.losses.weighted_squared_error(config.hidden, config.activation),
    scenarios=scenarios,
    history=history,
    figures=figures,
    paper_network=lambda config: paper_network(config.hidden, config.activation),
)
