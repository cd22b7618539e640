"""few_shot_sine: sines from 5 or 10 points after a few gradient steps (Finn et al. 2017, section 5.1, arXiv:1703.03400).

The config says what is learned: an initialisation (MAML), step sizes, both (Meta-SGD), a loss, or all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch.config import Config, field
from launch.evaluation import pretraining
from launch.experiment import Definition, Experiment, Scenario
from ml3_jax import networks, optimizers
from ml3_jax.problems import supervised

AMPLITUDES, PHASES, REACH = (0.1, 5.0), (0.0, math.pi), 5.0  # x lies within +- REACH
TEST_POINTS = 200  # on which meta-test measures the error
TEST_STEPS = 10
OPTIMIZEE = networks.MLP((40, 40, 1))
LEARN = {  # the learned parts
    "loss": ("loss",),
    "init": ("init",),
    "maml": ("init",),
    "step_sizes": ("step_sizes",),
    "meta_sgd": ("init", "step_sizes"),
    "loss_init": ("loss", "init"),
    "loss_step_sizes": ("loss", "step_sizes"),
    "all": ("loss", "init", "step_sizes"),
}


@dataclasses.dataclass(frozen=True)
class FewShotSineConfig(Config):
    """What is learned, and from how many points. The preset "published" is MAML as in the paper."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "inner_steps": 1,
            "meta_steps": 70_000,
            "meta_decay_steps": 0,
            "meta_clip": 0.0,
            "learn": "maml",
            "control_steps": 70_000,
        },
    }

    inner_lr: float = 0.01  # the first one, if step sizes are learned
    inner_steps: int = 5
    objective: str = "mean"
    meta_lr: float = 1e-3
    meta_steps: int = 20_000
    meta_decay_steps: int = 20_000
    meta_clip: float = 10.0
    num_tasks: int = 25
    log_every: int | None = 100
    save_every: int | None = 5000
    protocol: str = field("default", choices=("default", "published"))
    learn: str = field("all", choices=tuple(LEARN))
    shots: int = field(5, at_least=1)  # points to learn from, and as many for the task loss
    step_sizes_per: str = field("parameter", choices=optimizers.PER)
    hidden: tuple[int, ...] = field((20, 20), at_least=1)  # of the learned loss
    control_steps: int = field(20_000, at_least=1)  # meta-steps of the curve "maml", and updates of "pretrained_tuned"


def learns(config: FewShotSineConfig, part: str) -> bool:
    """Whether "loss", "init" or "step_sizes" is learned."""
    return part in LEARN[config.learn]


def sample_sine(key: Array, shots: int, query: int) -> supervised.SupervisedTask:
    """A task y = A sin(x - p): `shots` points to learn from, and `query` other ones."""
    amplitude_key, phase_key, train_key, test_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
    phase = jax.random.uniform(phase_key, minval=PHASES[0], maxval=PHASES[1])

    def split(key: Array, points: int) -> supervised.Examples:
        x = jax.random.uniform(key, (points, 1), minval=-REACH, maxval=REACH)
        return supervised.Examples(x, amplitude * jnp.sin(x - phase))

    return supervised.SupervisedTask(split(train_key, shots), split(test_key, query), extra=jnp.stack([amplitude, phase]))


def problem_with(shots: int, query: int) -> ml3_jax.Problem:
    """The problem with this many points of each kind."""
    return supervised.make_problem(
        OPTIMIZEE,
        lambda key, context: sample_sine(key, shots, query),
        features=("prediction", "target", "input"),
        metrics={"mse": supervised.squared_error},
    )


def make_loss(config: FewShotSineConfig) -> ml3_jax.LearnedLoss | None:
    """The squared error times a learned weight; it starts near the squared error."""
    return ml3_jax.losses.weighted_squared_error(config.hidden) if learns(config, "loss") else None


def meta_options(config: FewShotSineConfig) -> dict[str, Any]:
    """The other learned parts."""
    options: dict[str, Any] = {"learn_init": learns(config, "init")}
    if learns(config, "step_sizes"):
        makers = {"sgd": optimizers.learned_sgd, "adam": optimizers.learned_adam}
        options["inner_optimizer"] = makers[config.inner_optimizer](config.inner_lr, config.step_sizes_per)
    return options


def controls(config: FewShotSineConfig) -> dict[str, Callable[[Array], Any]]:
    """`Scenario.pretrain` and `Scenario.maml`, which see the tasks of meta-training."""
    problem, tasks, steps = problem_with(config.shots, config.shots), config.num_tasks, config.control_steps
    return {
        "pretrain": lambda key: pretraining.pretrain(problem, None, key, num_tasks=tasks, steps=steps),
        "maml": lambda key: pretraining.maml(problem, None, key, num_tasks=tasks, steps=steps, inner_steps=config.inner_steps),
    }


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """New sines with the shots of meta-training, and with the other number of shots."""
    config = experiment.config

    def tested(shots: int, **fields: Any) -> Scenario:
        return Scenario(
            problem_with(shots, TEST_POINTS),
            "mse",
            num_tasks=200,
            steps=TEST_STEPS,
            title=f"sines from {shots} points",
            describe=lambda tasks: np.asarray(tasks.extra).tolist(),
            **fields,
        )

    other = 10 if config.shots == 5 else 5
    return {"": tested(config.shots, **controls(config)), f"shots_{other}": tested(other, on_request=True)}


DEFINITION = Definition(
    "few_shot_sine",
    "sines from five points: a loss, an initialisation and step sizes, learned together or apart (1 min)",
    FewShotSineConfig,
    make_problem=lambda config: problem_with(config.shots, config.shots),
    make_loss=make_loss,
    scenarios=scenarios,
    meta_options=meta_options,
)
