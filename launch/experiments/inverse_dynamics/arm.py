"""inverse_dynamics: an arm that picked up a load learns its inertia matrix from one pass over its own measurements.

Meta-training sees recorded runs of other loads, and with `extra` the true inertia matrix (paper, section IV-D); meta-test has
new loads, motions and initialisations, and the loss sees predicted and measured torque and the state alone.
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
from launch.experiment import Definition, Experiment, Scenario
from launch.experiments.inverse_dynamics import figures, recordings
from ml3_jax.problems import inverse_dynamics

LIBRARY_SEED = 11  # of the runs that meta-training sees
FEATURES = ("state", "updates", "measured", "predicted")  # of `losses.guided_squared_error`
LOADS = {"reacher": {"load_mass": 0.05, "load_offset": 0.01}}  # of arms that are too small for the usual ones
USUAL_LOAD = {"load_mass": 5.0, "load_offset": 0.1}
OTHER_MASSES = 0.3  # variant other_arm: each link's mass is drawn within this share of its own
PRETRAIN_LR = 2e-3  # of the control "pretrained_tuned"


@dataclasses.dataclass(frozen=True)
class DynamicsConfig(Config):
    """The arm, its runs, the model that learns and the learned loss; a life is one pass of inner_steps mini-batches."""

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
    extra: bool = field(True)  # whether the task loss of meta-training may see the true inertia matrix
    # Share of errors by joint in the task loss, the rest in kg m^2 or N m; None: 0.1 with extra, 1 without, each its best.
    by_joint: float | None = field(None, at_least=0.0, at_most=1.0)
    arm: str = field("sawyer")  # a name in envs.arm, or the path of an MJCF
    joints: tuple[str, ...] = field(())  # of an MJCF, from the base to the hand; (): all that it has
    loads: int = field(64, at_least=1)  # recorded runs of meta-training, each with a load of its own
    load_mass: float | None = field(None, at_least=0.0)  # kg, loads weigh from 0 to this; None: by arm
    load_offset: float | None = field(None, at_least=0.0)  # m, from the hand along each axis; None: by arm
    batch_size: int = field(10, at_least=1)  # samples of an inner step
    dt: float = field(0.1, above=0.0)  # s between samples
    workspace: float = field(0.8, above=0.0)  # rad, joints stay this close to home
    band: tuple[float, ...] = field((0.1, 0.7), above=0.0)  # Hz, least and greatest frequency of the motions
    noise_q: float = field(1e-3, at_least=0.0)  # rad, standard deviation
    noise_v: float = field(1e-2, at_least=0.0)  # rad/s
    noise_a: float = field(0.1, at_least=0.0)  # rad/s^2
    noise_torque: float = field(5e-3, at_least=0.0)  # of each joint's torque limit
    hidden: tuple[int, ...] = field((64, 64), at_least=1)  # of the learned loss
    optimizee_hidden: tuple[int, ...] = field((64, 64), at_least=1)
    plain_scaled: bool = field(True)  # plain loss: torque in units of its typical size by joint; False: N m
    test_motions: int = field(4, at_least=1)  # held-out motions of a load
    test_samples: int = field(32, at_least=1)  # of each
    pretrain_steps: int = field(2000, at_least=1)  # updates of the control "pretrained_tuned"

    def derived(self) -> dict[str, Any]:
        """The arm decides the loads; the extra information decides how the task loss weighs joints."""
        return {**super().derived(), **LOADS.get(self.arm, USUAL_LOAD), "by_joint": 0.1 if self.extra else 1.0}

    def check(self) -> None:
        """As of the base; and a band has two frequencies."""
        super().check()
        if len(self.band) != 2:
            raise UsageError(f"config field 'band': expected the least and the greatest frequency, got {self.band}")


def make_recorder(config: DynamicsConfig, arm: Arm, **options: Any) -> recordings.Recorder:
    """How a config's runs are made; options win over it."""
    given = recordings.Recorder(
        arm=arm,
        samples=config.inner_steps * config.batch_size,
        dt=config.dt,
        workspace=config.workspace,
        band=(config.band[0], config.band[1]),
        load_mass=_resolved(config.load_mass),
        load_offset=_resolved(config.load_offset),
        noise=recordings.noise_of(arm, q=config.noise_q, v=config.noise_v, a=config.noise_a, torque=config.noise_torque),
        test_motions=config.test_motions,
        test_samples=config.test_samples,
    )
    return given._replace(**options)


def _resolved(value: float | None) -> float:
    assert value is not None  # the config is resolved
    return value


@functools.lru_cache(maxsize=2)
def library(config: DynamicsConfig) -> tuple[Arm, inverse_dynamics.Runs]:
    """(the arm, the runs that meta-training sees [loads, ...]) of a config.

    Raises:
      UsageError: the arm cannot be read, or its runs not be made; measurements that are not finite.
    """
    arm = recordings.load_arm(config.arm, config.joints)
    return arm, recordings.record(make_recorder(config, arm), jax.random.key(LIBRARY_SEED), config.loads)


def problem_on(
    config: DynamicsConfig, arm: Arm, scales: inverse_dynamics.Scales, *, plain_network: bool = False
) -> ml3_jax.Problem:
    """The problem of a resolved config: of the inertia network or of the plain one."""
    make = inverse_dynamics.torque_network if plain_network else inverse_dynamics.inertia_network
    return inverse_dynamics.make_problem(
        make(scales, config.optimizee_hidden),
        scales,
        inner_steps=config.inner_steps,
        batch_size=config.batch_size,
        task_loss=inverse_dynamics.TaskLoss(extra=config.extra, by_joint=_resolved(config.by_joint)),
        features=FEATURES,
        plain_scaled=config.plain_scaled,
        joint_names=arm.joint_names,
    )


def make_problem(config: DynamicsConfig) -> ml3_jax.Problem:
    """The problem that is meta-trained on: the inertia network on the recorded runs."""
    arm, runs = library(config)
    return problem_on(config, arm, inverse_dynamics.scales_of(runs))


def scenarios(experiment: Experiment) -> dict[str, Scenario]:
    """Loads never seen; with them the plain network, an arm of other masses, and motions over the joints' whole range."""
    config = experiment.config
    arm, runs = library(config)
    scales = inverse_dynamics.scales_of(runs)
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
            pretrain=pretrainer(config, arm, runs, plain_network=plain_network),
        )

    return {
        "": tested("loads, motions and networks never seen"),
        "plain_network": tested("a plain network of the torque", plain_network=True),
        "other_arm": tested("an arm whose links weigh up to 30 % more or less", mass_spread=OTHER_MASSES),
        "whole_range": tested("motions over the joints' whole range", workspace=float("inf")),
    }


def describe(tasks: inverse_dynamics.DynamicsTask) -> list[Any]:
    """The loads of tasks, as JSON values."""
    rows = zip(*(np.asarray(leaf).tolist() for leaf in tasks.about), strict=True)
    return [{"mass": mass, "offset": offset, "link_masses": factors} for mass, offset, factors in rows]


def _within_the_stream(problem: ml3_jax.Problem, steps: int, most: int) -> ml3_jax.Problem:
    if steps > most:
        raise UsageError(f"--steps: expected at most {most}, the mini-batches of one pass over the stream, got {steps}")
    return problem


def pretrainer(config: DynamicsConfig, arm: Arm, runs: inverse_dynamics.Runs, *, plain_network: bool) -> Callable[[Array], Any]:
    """For `Scenario.pretrain`: one network trained on the recorded runs of meta-training by the squared error of the torque."""
    # The same control for every learned loss.
    config = dataclasses.replace(config, extra=False, by_joint=None)
    config = dataclasses.replace(config, by_joint=config.derived()["by_joint"])
    problem = problem_on(config, arm, inverse_dynamics.scales_of(runs), plain_network=plain_network)

    def pretrain(key: Array) -> Any:
        return pretraining.pretrain(problem, runs, key, num_tasks=16, steps=config.pretrain_steps, learning_rate=PRETRAIN_LR)

    return pretrain


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """The samples of the recorded runs: they are made once, however long meta-training goes on."""
    del meta_steps
    config = experiment.config
    return config.loads * config.inner_steps * config.batch_size


DEFINITION = Definition(
    "inverse_dynamics",
    "a 7-joint arm with a load learns its inertia matrix from one pass over its measurements (3 min)",
    DynamicsConfig,
    make_problem,
    make_loss=lambda config: ml3_jax.losses.guided_squared_error(library(config)[0].size, config.hidden),
    scenarios=scenarios,
    make_context=lambda config: library(config)[1],
    figures=lambda trained, folder: figures.draw(folder, trained.results, extra=trained.experiment.config.extra),
    env_steps=env_steps,
)
