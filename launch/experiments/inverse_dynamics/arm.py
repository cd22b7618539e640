"""inverse_dynamics: an arm with a new load learns its inertia matrix from one pass over its own measurements.

Meta-training has recorded runs of other loads. With `extra` its task loss uses the true inertia matrix (paper, section IV-D).
Meta-test has new loads, motions and initialisations. The learned loss sees predicted and measured torque, and the state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

import ml3_jax
from envs.rigid_body import Arm
from launch.config import Config, field
from launch.errors import UsageError
from launch.evaluation import pretraining
from launch.experiment import PAPER_LOSS, Definition, Experiment, Scenario, paper_network
from launch.experiments.inverse_dynamics import figures, recordings
from ml3_jax.problems import inverse_dynamics

LIBRARY_SEED = 11  # of the runs of meta-training
RECORDED = ("dt", "workspace", "band", "load_mass", "load_offset", "test_motions", "test_samples")  # of a `Recorder`
FEATURES = ("state", "updates", "measured", "predicted")  # of `losses.guided_squared_error`
LOADS = {"reacher": {"load_mass": 0.05, "load_offset": 0.01}}  # of arms too small for the usual load
USUAL_LOAD = {"load_mass": 5.0, "load_offset": 0.1}
BY_JOINT = {True: 0.1, False: 1.0}  # extra -> best share of errors relative to each joint in the task loss
OTHER_MASSES = 0.3  # variant "other_arm": largest relative change of a link's mass
PRETRAIN_LR = 2e-3  # of the curve "pretrained_tuned"
MAML_INNER_STEPS = 5  # of the curve "maml"


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(Config):
    """The arm, its runs, the optimizee and the learned loss. An inner loop is one pass over inner_steps mini-batches."""

    inner_lr: float = 3e-2
    inner_steps: int = 200
    unroll: int | None = 10
    meta_lr: float = 5e-3
    meta_steps: int = 3000
    meta_decay_steps: int = 3000
    meta_clip: float = 1.0
    num_tasks: int = 16
    objective: str = "mean"
    log_every: int | None = 50
    save_every: int | None = 1000
    extra: bool = field(True)  # the task loss of meta-training uses the true inertia matrix
    by_joint: float | None = field(None, at_least=0.0, at_most=1.0)  # the rest is in kg m^2 or N m; None: `BY_JOINT`
    arm: str = field("sawyer")  # a name in envs.arm, or the path of an MJCF
    joints: tuple[str, ...] = field(())  # of an MJCF, from the base to the hand; (): all
    loads: int = field(64, at_least=1)  # recorded runs of meta-training, each with its own load
    load_mass: float | None = field(None, at_least=0.0)  # kg, of the heaviest load; None: by arm
    load_offset: float | None = field(None, at_least=0.0)  # m, largest offset from the hand along each axis; None: by arm
    batch_size: int = field(10, at_least=1)  # samples of an inner step
    dt: float = field(0.1, above=0.0)  # s between samples
    workspace: float = field(0.8, above=0.0)  # rad, largest distance of a joint from home
    band: tuple[float, ...] = field((0.1, 0.7), above=0.0)  # Hz, least and greatest frequency of the motions
    noise_q: float = field(1e-3, at_least=0.0)  # rad, standard deviation
    noise_v: float = field(1e-2, at_least=0.0)  # rad/s
    noise_a: float = field(0.1, at_least=0.0)  # rad/s^2
    noise_torque: float = field(5e-3, at_least=0.0)  # of each joint's torque limit
    loss: str = field("guided_squared_error", choices=("guided_squared_error", PAPER_LOSS))
    hidden: tuple[int, ...] = field((64, 64), at_least=1)  # of the learned loss
    optimizee_hidden: tuple[int, ...] = field((64, 64), at_least=1)
    plain_scaled: bool = field(True)  # plain loss: torque in units of each joint's typical torque; False: N m
    test_motions: int = field(4, at_least=1)  # held-out motions of a load
    test_samples: int = field(32, at_least=1)  # of each
    pretrain_steps: int = field(2000, at_least=1)  # updates of the curve "pretrained_tuned"; half as many of "maml"

    def derived(self) -> dict[str, Any]:
        """Loads depend on the arm, the weights of joints in the task loss on `extra`."""
        return {**super().derived(), **LOADS.get(self.arm, USUAL_LOAD), "by_joint": BY_JOINT[self.extra]}

    def check(self) -> None:
        """Also checks that the band has two frequencies."""
        super().check()
        if len(self.band) != 2:
            raise UsageError(f"config field 'band': expected the least and the greatest frequency, got {self.band}")


def make_recorder(config: DynamicsConfig, arm: Arm, **options: Any) -> recordings.Recorder:
    """The recorder of a config; options win over the config."""
    given = {name: getattr(config, name) for name in RECORDED}
    noise = recordings.noise_of(arm, q=config.noise_q, v=config.noise_v, a=config.noise_a, torque=config.noise_torque)
    return recordings.Recorder(arm=arm, samples=config.inner_steps * config.batch_size, noise=noise, **{**given, **options})


@functools.lru_cache(maxsize=2)
def library(config: DynamicsConfig) -> tuple[Arm, inverse_dynamics.Runs]:
    """The arm of a config, and the runs of meta-training [loads, ...].

    Raises:
      UsageError: the arm cannot be read, its runs cannot be recorded, or measurements are not finite.
    """
    arm = recordings.load_arm(config.arm, config.joints)
    return arm, recordings.record(make_recorder(config, arm), jax.random.key(LIBRARY_SEED), config.loads)


def problem_on(
    config: DynamicsConfig, arm: Arm, scales: inverse_dynamics.Scales, *, plain_network: bool = False
) -> ml3_jax.Problem:
    """The problem of a resolved config, with the inertia network or the plain one as optimizee."""
    assert config.by_joint is not None  # the config is resolved
    make = inverse_dynamics.torque_network if plain_network else inverse_dynamics.inertia_network
    return inverse_dynamics.make_problem(
        make(scales, config.optimizee_hidden),
        scales,
        inner_steps=config.inner_steps,
        batch_size=config.batch_size,
        task_loss=inverse_dynamics.TaskLoss(extra=config.extra, by_joint=config.by_joint),
        features=FEATURES,
        plain_scaled=config.plain_scaled,
        joint_names=arm.joint_names,
    )


def make_problem(config: DynamicsConfig) -> ml3_jax.Problem:
    """The problem of meta-training: the inertia network on the recorded runs."""
    arm, runs = library(config)
    return problem_on(config, arm, inverse_dynamics.scales_of(runs))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """New loads; also with the plain network, with other link masses, and with motions over the joints' full range."""
    config = experiment.config
    arm, runs = library(config)
    scales = inverse_dynamics.scales_of(runs)
    trained: dict[bool, Any] = {plain: controls(config, arm, runs, plain_network=plain) for plain in (False, True)}
    by_joint = tuple(f"torque_rmse_{name}" for name in arm.joint_names)

    def tested(title: str, *, plain_network: bool = False, **options: Any) -> Scenario:
        problem = problem_on(config, arm, scales, plain_network=plain_network)
        recorder = make_recorder(config, arm, **options)

        def sample_tasks(key: Array, count: int) -> inverse_dynamics.DynamicsTask:
            return inverse_dynamics.task_of(recordings.record(recorder, key, count))

        return Scenario(
            problem,
            "torque_rmse",
            sample_tasks=sample_tasks,
            num_tasks=20,
            unit="N m",
            title=title,
            other_metrics=("inertia", "inertia_by_joint", *by_joint),
            describe=describe,
            problem_for=lambda steps: _within_the_stream(problem, steps, config.inner_steps),
            **trained[plain_network],
        )

    return {
        "": tested("new loads, motions and networks"),
        "plain_network": tested("a plain network of the torque", plain_network=True),
        "other_arm": tested("an arm with links up to 30 % heavier or lighter", mass_spread=OTHER_MASSES),
        "whole_range": tested("motions over the joints' full range", workspace=float("inf")),
    }


def describe(tasks: inverse_dynamics.DynamicsTask) -> list[Any]:
    """The loads of tasks, as JSON values."""
    rows = zip(*(np.asarray(leaf).tolist() for leaf in tasks.about), strict=True)
    return [{"mass": mass, "offset": offset, "link_masses": factors} for mass, offset, factors in rows]


def _within_the_stream(problem: ml3_jax.Problem, steps: int, most: int) -> ml3_jax.Problem:
    if steps > most:
        raise UsageError(f"--steps: expected at most {most}, the mini-batches of one pass over the stream, got {steps}")
    return problem


def controls(
    config: DynamicsConfig, arm: Arm, runs: inverse_dynamics.Runs, *, plain_network: bool
) -> dict[str, Callable[[Array], Any]]:
    """`Scenario.pretrain` and `Scenario.maml`: a network trained, or an initialisation meta-trained, on the recorded runs.

    Both descend the squared error of the torque. MAML adapts to the first mini-batches of a run.
    """
    # Independent of the learned loss, so that all learned losses are compared with the same network.
    config = dataclasses.replace(config, extra=False, by_joint=BY_JOINT[False])
    problem = problem_on(config, arm, inverse_dynamics.scales_of(runs), plain_network=plain_network)

    def pretrain(key: Array) -> Any:
        return pretraining.pretrain(problem, runs, key, num_tasks=16, steps=config.pretrain_steps, learning_rate=PRETRAIN_LR)

    def maml(key: Array) -> Any:
        steps, inner_steps = max(1, config.pretrain_steps // 2), min(MAML_INNER_STEPS, config.inner_steps)
        return pretraining.maml(problem, runs, key, num_tasks=16, steps=steps, inner_steps=inner_steps, learn_step_size=True)

    return {"pretrain": pretraining.cached(pretrain), "maml": pretraining.cached(maml)}


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """The samples of the recorded runs. They are recorded once, before meta-training."""
    del meta_steps
    config = experiment.config
    return config.loads * config.inner_steps * config.batch_size


DEFINITION = Definition(
    "inverse_dynamics",
    "a 7-joint arm with a new load learns its inertia matrix from one pass over its measurements (3 min)",
    DynamicsConfig,
    make_problem,
    make_loss=lambda config: ml3_jax.losses.guided_squared_error(library(config)[0].size, config.hidden),
    scenarios=scenarios,
    make_context=lambda config: library(config)[1],
    figures=lambda trained, folder: figures.draw(folder, trained.results, extra=trained.experiment.config.extra),
    env_steps=env_steps,
    paper_network=lambda config: paper_network(config.hidden),
)
