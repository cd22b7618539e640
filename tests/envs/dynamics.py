"""Equations of motion of an arm in a batch of states, by `envs.rigid_body` and by MuJoCo's C library."""

import dataclasses
from typing import Any, NamedTuple

import jax
import mujoco as mujoco_c
import numpy as np

from envs import rigid_body
from envs.rigid_body import Arm

mujoco: Any = mujoco_c  # compiled, without types
B = 64  # states


class Dynamics(NamedTuple):
    """Results for B states of n joints; arrays of JAX or numpy."""

    mass: Any  # [B, n, n] kg m^2
    bias: Any  # [B, n] N m
    torque: Any  # [B, n] N m
    points: Any  # [B, n + 1, 3] m


@jax.jit
def _dynamics(arm: Arm, q: jax.Array, v: jax.Array, a: jax.Array) -> Dynamics:
    def one(q: jax.Array, v: jax.Array, a: jax.Array) -> Dynamics:
        return Dynamics(
            mass=rigid_body.mass_matrix(arm, q),
            bias=rigid_body.bias_forces(arm, q, v),
            torque=rigid_body.inverse_dynamics(arm, q, v, a),
            points=rigid_body.positions(arm, q),
        )

    return jax.vmap(one)(q, v, a)


def by_rigid_body(arm: Arm, q: Any, v: Any, a: Any) -> Dynamics:
    """Dynamics at q, v and a, each [B, n].

    Names are static: without them all arms of n joints share one compiled program per precision.
    """
    assert q.shape == (B, arm.size)
    return _dynamics(dataclasses.replace(arm, joint_names=("",) * arm.size), q, v, a)


def by_mujoco(model: Any, q: Any, v: Any, a: Any) -> Dynamics:
    """Dynamics at q, v and a, each [B, n], in float64; the model has a site at the hand alone."""
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_LIMIT
    data, rows = mujoco.MjData(model), []
    for values in zip(np.asarray(q, float), np.asarray(v, float), np.asarray(a, float), strict=True):
        data.qpos[:], data.qvel[:], data.qacc[:] = values
        mujoco.mj_inverse(model, data)
        mass = np.zeros((model.nv, model.nv))
        mujoco.mj_fullM(model, data, mass)
        points = np.concatenate([data.xanchor, data.site_xpos])
        rows.append(Dynamics(mass, data.qfrc_bias - data.qfrc_passive, data.qfrc_inverse.copy(), points))
    return Dynamics(*(np.stack(column) for column in zip(*rows, strict=True)))


def states(arm: Arm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Angles, velocities and accelerations [B, n], far beyond those of a motion."""
    keys = jax.random.split(jax.random.key(0), 4)
    scales = (np.pi, 3.0, 10.0)
    q, v, a = (s * jax.random.uniform(k, (B, arm.size), minval=-1.0) for k, s in zip(keys, scales, strict=False))
    return q, v, a
