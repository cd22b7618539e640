"""Recorded runs of arms with loads: the data of inverse_dynamics.

A run is a random load, the stream of measurements with this load, and held-out motions in the same workspace without noise.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from envs import arm as arms
from envs import excitation, rigid_body
from envs.rigid_body import Arm
from launch.errors import UsageError
from ml3_jax.problems.inverse_dynamics import Measured, Runs

AT_ONCE = 8  # runs in one compiled call: any number of runs needs only one compilation
STATIC = ("samples", "dt", "band", "test_motions", "test_samples")  # fields of a Recorder that fix shapes or are checked


class Recorder(NamedTuple):
    """The settings of recorded runs, in rad, s, kg and m."""

    arm: Arm  # without a load
    samples: int  # T, of the stream
    dt: float
    workspace: float  # largest distance of a joint from home; inf: its full range
    band: tuple[float, float]  # Hz, of the motions
    load_mass: float  # of the heaviest load
    load_offset: float  # loads are centred in a cube of this half-width around the hand
    noise: excitation.Noise
    test_motions: int
    test_samples: int  # of each
    mass_spread: float = 0.0  # largest relative change of a link's mass


class Drawn(NamedTuple):
    """The random load and link masses of a run."""

    mass: Array  # [] kg of the load
    offset: Array  # [3] m from the hand
    factors: Array  # [n] of the links' masses


def load_arm(name: str, joints: tuple[str, ...] = ()) -> Arm:
    """An arm by its name in `envs.arm`, or from an MJCF with these joints from the base to the hand; (): all joints.

    Raises:
      UsageError: neither a name nor a file; a file that is no model or lacks a joint.
    """
    if name in arms.names():
        return arms.load(name)
    if not pathlib.Path(name).is_file():
        raise UsageError(f"config field 'arm': expected one of {', '.join(arms.names())} or the path of an MJCF, got {name!r}")
    try:
        return arms.from_mjcf(name, joints=joints or None)
    except ValueError as error:
        raise UsageError(f"config field 'arm': {name}: {error}") from error


def within(arm: Arm, workspace: float) -> Arm:
    """The arm with joint limits of at most `workspace` (rad) from home."""
    lower, upper = jnp.maximum(arm.lower, arm.home - workspace), jnp.minimum(arm.upper, arm.home + workspace)
    return dataclasses.replace(arm, lower=lower, upper=upper)


def record(recorder: Recorder, key: Array, count: int) -> Runs:
    """Runs [count, ...] with random loads, motions and noise. Their `about` is `Drawn`.

    Raises:
      UsageError: an option out of its range, a load too heavy for the arm (`envs.arm.check_load`), torque limits too low for
        any motion, or measurements that are not finite.
    """
    keys = jax.random.split(key, count)
    try:
        parts = [
            _record(*_split(recorder), keys[np.arange(first, first + AT_ONCE) % count]) for first in range(0, count, AT_ONCE)
        ]
        runs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)
        check(recorder, runs)
    except ValueError as error:
        raise UsageError(f"the arm's runs cannot be recorded: {error}") from error
    return runs


def check(recorder: Recorder, runs: Runs) -> None:
    """Checks the runs [E, ...] of a recorder on the host.

    Raises:
      ValueError: see `record`.
    """
    drawn: Drawn = runs.about
    for row in range(len(drawn.mass)):
        own = rigid_body.scale_masses(recorder.arm, drawn.factors[row])
        arms.check_load(own, drawn.mass[row], drawn.offset[row])
    for row in range(len(drawn.mass)):
        for what, measured in (("stream", runs.stream), ("held-out motions", runs.test)):
            motion = excitation.Trajectory(measured.q[row], measured.v[row], measured.a[row])
            try:
                excitation.check_measured(recorder.arm, motion, measured.torque[row])
            except ValueError as error:
                raise ValueError(f"run {row}, {what}: {error}") from error
        if not np.asarray(runs.test.v[row]).any():
            raise ValueError(
                f"run {row}: expected a motion, got an arm at rest: its torque limits allow no motion near home with a load of "
                f"{float(drawn.mass[row]):.3g} kg; choose lighter loads (load_mass), a slower band, or another home"
            )


def noise_of(arm: Arm, *, q: float, v: float, a: float, torque: float) -> excitation.Noise:
    """Measurement noise as standard deviations. `torque` is a share of each joint's torque limit.

    Raises:
      UsageError: `torque` is not 0 and a joint has no torque limit.
    """
    limit = np.asarray(arm.torque_limit)
    if torque and not np.isfinite(limit).all():
        free = [name for name, value in zip(arm.joint_names, limit, strict=True) if not math.isfinite(value)]
        raise UsageError(
            f"config field 'noise_torque' is a share of the torque limits, and joints {', '.join(free)} have none: set "
            "actuatorfrcrange in the model, or pass --config.noise_torque=0"
        )
    return excitation.Noise(q, v, a, torque * jnp.asarray(np.where(np.isfinite(limit), limit, 0.0)))


def _split(recorder: Recorder) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """The static fields of a recorder, as a hashable argument, and its other fields."""
    fields = recorder._replace(arm=within(recorder.arm, recorder.workspace))._asdict()
    return tuple((name, fields.pop(name)) for name in STATIC), fields


@functools.partial(jax.jit, static_argnums=0)
def _record(static: tuple[tuple[str, Any], ...], fields: dict[str, Any], keys: Array) -> Runs:
    return jax.vmap(functools.partial(_one, Recorder(**dict(static), **fields)))(keys)


def _one(recorder: Recorder, key: Array) -> Runs:
    """One run, with leaves without a leading axis."""
    mass_key, offset_key, factor_key, stream_key, noise_key, test_key = jax.random.split(key, 6)
    spread, width = recorder.mass_spread, recorder.load_offset
    drawn = Drawn(
        mass=recorder.load_mass * jax.random.uniform(mass_key),
        offset=jax.random.uniform(offset_key, (3,), minval=-width, maxval=width),
        factors=jax.random.uniform(factor_key, (recorder.arm.size,), minval=1 - spread, maxval=1 + spread),
    )
    arm = rigid_body.with_load(rigid_body.scale_masses(recorder.arm, drawn.factors), drawn.mass, drawn.offset)
    motion = excitation.sample_trajectory(stream_key, arm, steps=recorder.samples, dt=recorder.dt, band=recorder.band)
    torque = jax.vmap(rigid_body.inverse_dynamics, in_axes=(None, 0, 0, 0))(arm, *motion)
    stream = _with_bias(arm, *excitation.measure(noise_key, motion, torque, recorder.noise))

    # Half a period of the greatest frequency: samples differ in posture, speed and acceleration.
    spacing = 0.5 / recorder.band[1]

    def other(key: Array) -> excitation.Trajectory:
        return excitation.sample_trajectory(key, arm, steps=recorder.test_samples, dt=spacing, band=recorder.band)

    others = jax.vmap(other)(jax.random.split(test_key, recorder.test_motions))
    tested = excitation.Trajectory(*(leaf.reshape(-1, arm.size) for leaf in others))
    clean = jax.vmap(rigid_body.inverse_dynamics, in_axes=(None, 0, 0, 0))(arm, *tested)
    inertia = jax.vmap(rigid_body.mass_matrix, in_axes=(None, 0))(arm, tested.q)
    return Runs(stream, _with_bias(arm, tested, clean), inertia, drawn)


def _with_bias(arm: Arm, motion: excitation.Trajectory, torque: Array) -> Measured:
    bias = jax.vmap(rigid_body.bias_forces, in_axes=(None, 0, 0))(arm, motion.q, motion.v)
    return Measured(motion.q, motion.v, motion.a, torque, bias)
