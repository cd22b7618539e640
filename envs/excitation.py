"""Smooth random motions that excite an arm within its limits, and measurement noise.

A joint moves as a sum of sines, the finite Fourier series of Swevers et al. (Optimal Robot Excitation and Identification, IEEE
Transactions on Robotics and Automation 13, 1997) with its own frequencies, so that a stream of any length does not repeat.
All functions are pure and take one task: use `vmap` over keys and loads.
"""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.rigid_body import Arm, inverse_dynamics, turns

HARMONICS = 5  # sines per joint
MARGIN = 0.95  # the share of each limit that a motion may use
SIZES = 21  # candidate motions, from the drawn one down to rest
CENTRE = 0.5  # the centre of a motion is drawn from this middle share of a joint's range
FILL = (0.6, 1.0)  # a motion uses between these shares of the room that the limits leave

_torques = jax.jit(jax.vmap(inverse_dynamics, in_axes=(None, 0, 0, 0)))


class Trajectory(NamedTuple):
    """A motion of n joints at T times."""

    q: jax.Array  # [T, n] rad
    v: jax.Array  # [T, n] rad/s
    a: jax.Array  # [T, n] rad/s^2


class Noise(NamedTuple):
    """Standard deviations of normal measurement noise; each a number, or [n]."""

    q: jax.Array | float = 0.0  # rad
    v: jax.Array | float = 0.0  # rad/s
    a: jax.Array | float = 0.0  # rad/s^2
    torque: jax.Array | float = 0.0  # N m


def sample_trajectory(
    key: jax.Array,
    arm: Arm,
    *,
    steps: int,
    dt: float,
    band: tuple[float, float] = (0.05, 0.5),
) -> Trajectory:
    """Draws a motion within the arm's limits of position, velocity and torque.

    With `q = c + sum_l A_l sin(w_l t + p_l)`, the sums of A_l and of A_l w_l bound position and velocity at every time. Torque
    has no such bound. Until the torque at all T samples is within its limits, the centre c moves to the arm's home, then the
    amplitudes shrink. If no motion is within the limits, the arm rests at home: see `check_trajectory`.

    Args:
      key: one typed key.
      arm: the arm with its load; the torque limits apply to the loaded arm.
      steps: number of samples T.
      dt: time between samples, s.
      band: lowest and highest frequency in Hz; each sine gets an equal part of the band.

    Returns:
      The motion; v and a are the exact derivatives of q.

    Raises:
      ValueError: an option out of its range.
    """
    _check_options(steps, dt, band)
    centre, swing = _sum_of_sines(key, arm, steps=steps, dt=dt, band=band)
    torque_limit = MARGIN * arm.torque_limit

    def motion(size: jax.Array) -> Trajectory:
        away, scale = jnp.maximum(2 * size - 1, 0), jnp.minimum(2 * size, 1)
        middle = arm.home + away * (centre - arm.home)
        return Trajectory(middle + scale * swing.q, scale * swing.v, scale * swing.a)

    def holds(size: jax.Array) -> jax.Array:
        torque = _torques(arm, *motion(size))
        return jnp.all(jnp.abs(torque) <= torque_limit)

    sizes = jnp.linspace(1.0, 0.0, SIZES, dtype=centre.dtype)
    # Sequential: a vmap would hold SIZES copies of the motion in memory.
    held = jax.lax.map(holds, sizes)
    return motion(jnp.max(jnp.where(held, sizes, 0.0)))


def measure(key: jax.Array, trajectory: Trajectory, torque: jax.Array, noise: Noise) -> tuple[Trajectory, jax.Array]:
    """Adds normal measurement noise to a motion and its torque.

    Args:
      key: one typed key.
      trajectory: the motion [T, n].
      torque: [T, n] N m.
      noise: standard deviations.

    Returns:
      The measured motion and torque [T, n].

    Raises:
      ValueError: a wrong shape.
    """
    if torque.shape != trajectory.q.shape:
        raise ValueError(f"torque: expected shape {trajectory.q.shape}, that of the motion, got {torque.shape}")
    keys = jax.random.split(key, 4)
    clean = (*trajectory, torque)
    q, v, a, torque = (x + s * jax.random.normal(k, x.shape, x.dtype) for k, x, s in zip(keys, clean, noise, strict=True))
    return Trajectory(q, v, a), torque


def check_measured(arm: Arm, trajectory: Trajectory, torque: jax.Array) -> None:
    """Checks a stream of measurements of an arm. Runs on the host, not under a transformation.

    Args:
      arm: the arm.
      trajectory: the measured motion [T, n].
      torque: [T, n] N m.

    Raises:
      ValueError: a wrong shape, or a number that is not finite (the quantity, the sample and the joint are named).
    """
    for name, value in zip((*Trajectory._fields, "torque"), (*trajectory, torque), strict=True):
        _check_finite(arm, f"measured {name}", value)


def check_trajectory(arm: Arm, trajectory: Trajectory) -> None:
    """Checks a motion of an arm against its limits. Runs on the host, not under a transformation.

    Args:
      arm: one arm, with its load.
      trajectory: [T, n].

    Raises:
      ValueError: a wrong shape, numbers that are not finite, a limit exceeded (the joint is named), or an arm at rest.
    """
    for name, value in zip(Trajectory._fields, trajectory, strict=True):
        _check_finite(arm, f"trajectory: {name}", value)
    torque = _torques(arm, *trajectory)
    for name, unit, value, low, high in (
        ("position", "rad", trajectory.q, arm.lower, arm.upper),
        ("velocity", "rad/s", trajectory.v, -arm.velocity_limit, arm.velocity_limit),
        ("torque", "N m", torque, -arm.torque_limit, arm.torque_limit),
    ):
        excess = np.asarray(jnp.maximum(value - high, low - value))
        t, joint = np.unravel_index(excess.argmax(), excess.shape)
        if excess[t, joint] > 0:
            raise ValueError(
                f"trajectory: {name}: expected joint {arm.joint_names[joint]} within {low[joint]:.4g} and {high[joint]:.4g} "
                f"{unit}, got {value[t, joint]:.4g} at sample {t}; draw the motion for the arm with its load"
            )
    if not np.asarray(trajectory.v).any():
        raise ValueError(
            "trajectory: expected a motion, got an arm at rest: its torque limits leave it no motion near home; choose a "
            "lighter load, a slower band, or another home"
        )


def _check_finite(arm: Arm, what: str, value: jax.Array) -> None:
    if value.ndim != 2 or value.shape[1] != arm.size:
        raise ValueError(f"{what}: expected shape (T, {arm.size}), got {value.shape}; pass one motion of this arm")
    times, joints = np.nonzero(~np.isfinite(np.asarray(value)))
    if times.size:
        raise ValueError(
            f"{what}: expected finite numbers, got {value[times[0], joints[0]]} at sample {times[0]} of joint "
            f"{arm.joint_names[joints[0]]} and {times.size - 1} more"
        )


def _sum_of_sines(
    key: jax.Array, arm: Arm, *, steps: int, dt: float, band: tuple[float, float]
) -> tuple[jax.Array, Trajectory]:
    """A centre [n] and a motion about 0. It keeps the position and velocity limits about any point from home to the centre."""
    frequency_key, weight_key, phase_key, centre_key, fill_key = jax.random.split(key, 5)
    shape, dtype = (arm.size, HARMONICS), arm.home.dtype
    # One frequency from each of HARMONICS equal parts of the band.
    part = (band[1] - band[0]) / HARMONICS
    frequency = band[0] + part * (jnp.arange(HARMONICS) + jax.random.uniform(frequency_key, shape, dtype))
    rate = 2 * math.pi * frequency
    # Equal shares of velocity, on average: large slow swings and small fast ones.
    amplitude = jax.random.uniform(weight_key, shape, dtype, minval=0.2) / rate
    phase = jax.random.uniform(phase_key, shape, dtype, maxval=2 * math.pi)
    low, high = turns(arm)
    middle, half = (low + high) / 2, MARGIN * (high - low) / 2
    centre = middle + CENTRE * half * jax.random.uniform(centre_key, (arm.size,), dtype, minval=-1.0)
    room = half - jnp.maximum(jnp.abs(centre - middle), jnp.abs(arm.home - middle))
    fill = jax.random.uniform(fill_key, (arm.size,), dtype, minval=FILL[0], maxval=FILL[1])
    most = jnp.minimum(room / amplitude.sum(-1), MARGIN * arm.velocity_limit / (amplitude * rate).sum(-1))
    amplitude = amplitude * (fill * most)[:, None]
    angle = rate * (dt * jnp.arange(steps, dtype=dtype))[:, None, None] + phase  # [T, n, HARMONICS]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return centre, Trajectory(
        q=jnp.sum(amplitude * sin, axis=-1),
        v=jnp.sum(amplitude * rate * cos, axis=-1),
        a=-jnp.sum(amplitude * rate**2 * sin, axis=-1),
    )


def _check_options(steps: Any, dt: Any, band: Any) -> None:
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"sample_trajectory: option steps: expected a whole number, at least 1, got {steps!r}")
    if not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"sample_trajectory: option dt: expected a finite number of seconds above 0, got {dt!r}")
    if len(band) != 2 or not (math.isfinite(band[1]) and 0 < band[0] <= band[1]):
        raise ValueError(f"sample_trajectory: option band: expected 0 < least <= greatest frequency in Hz, got {band!r}")
    if 2 * band[1] * dt > 1:
        raise ValueError(
            f"sample_trajectory: option band: expected at most {0.5 / dt:.4g} Hz, half the samples' rate, got {band!r}; choose "
            "a smaller dt or lower frequencies"
        )
