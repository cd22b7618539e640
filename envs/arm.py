"""Arms by name, and the checks of loads. `envs.rigid_body` has their dynamics, `envs.mjcf` their MuJoCo models.

These functions run on the host, not under a transformation.
"""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs import reacher
from envs.mjcf import from_mjcf, mjcf, rotation_of
from envs.rigid_body import Arm, make_arm, mass_matrix, turns, with_load

__all__ = ["CONDITION_LIMIT", "Arm", "check_load", "from_mjcf", "load", "mjcf", "names"]

DATA = pathlib.Path(__file__).parent / "assets" / "arms.json"
CONDITION_LIMIT = 1e5  # condition number (2-norm) of M; beyond it float32 leaves fewer than 2 digits in M^-1 tau
POSTURES = 64  # number of postures at which check_load evaluates M

_mass_matrices = jax.jit(jax.vmap(mass_matrix, in_axes=(None, 0)))


def names() -> tuple[str, ...]:
    """Every name that `load` knows."""
    return (*sorted(_data()), "reacher")


def load(name: str) -> Arm:
    """An arm by name: "sawyer" and "iiwa", of 7 joints, or "reacher", the planar arm of `envs.reacher` with its defaults.

    The file `assets/arms.json` names the source and the licence of each arm's data.

    Args:
      name: one of `names()`.

    Returns:
      The arm, with arrays of JAX's default floating-point type.

    Raises:
      ValueError: an unknown name.
    """
    if name == "reacher":
        return _reacher()
    data = _data()
    if name not in data:
        raise ValueError(f"unknown arm '{name}' (one of {', '.join(names())})")
    links = data[name]["links"]

    def column(field: str) -> np.ndarray:
        return np.array([link[field] for link in links], float)

    principal = np.stack([rotation_of(quat) for quat in column("iquat")])
    return make_arm(
        rotation=np.stack([rotation_of(quat) for quat in column("quat")]),
        translation=column("pos"),
        axis=column("axis"),
        mass=column("mass"),
        com=column("com"),
        inertia=np.einsum("nij,nj,nkj->nik", principal, column("diaginertia"), principal),
        armature=column("armature"),
        damping=column("damping"),
        gravity=data[name]["gravity"],
        hand=data[name]["hand"],
        home=data[name]["home"],
        lower=column("range")[:, 0],
        upper=column("range")[:, 1],
        velocity_limit=column("velocity"),
        torque_limit=column("effort"),
        joint_names=[link["joint"] for link in links],
    )


def check_load(arm: Arm, mass: Any, offset: Any, *, radius: Any = 0.0) -> None:
    """Checks a load for `rigid_body.with_load`, in float64 and in postures over the full range of the joints.

    Args:
      arm: one arm, without the load.
      mass: kg.
      offset: [3] m, from the hand.
      radius: m.

    Raises:
      ValueError: a wrong shape, a number that is not finite or below 0, or an ill-conditioned inertia matrix with the load.
    """
    for what, value, shape in (("mass", mass, ()), ("offset", offset, (3,)), ("radius", radius, ())):
        array = np.asarray(value, float)
        if array.shape != shape:
            raise ValueError(f"load: {what}: expected shape {shape}, got {array.shape}; pass one load")
        if not np.isfinite(array).all():
            raise ValueError(f"load: {what}: expected finite numbers, got {array.tolist()}")
        if what != "offset" and array < 0:
            raise ValueError(f"load: {what}: expected a number of at least 0, got {float(array)}")
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), float), arm)
        loaded = with_load(exact, float(mass), jnp.asarray(offset, float), radius=float(radius))
        low, high = (np.asarray(x) for x in turns(exact))
        shares = np.random.default_rng(0).uniform(size=(POSTURES, arm.size))
        postures = jnp.asarray(np.concatenate([np.asarray(exact.home)[None], low + shares * (high - low)]))
        matrices = np.asarray(_mass_matrices(loaded, postures))
    values = np.linalg.eigvalsh(matrices) if np.isfinite(matrices).all() else np.full((1, 2), np.nan)
    worst = float(np.max(values[:, -1] / values[:, 0]))
    if not (values[:, 0] > 0).all() or not worst <= CONDITION_LIMIT:
        number = f"{worst:.3g}" if (values[:, 0] > 0).all() else "none, as M is not positive definite"
        raise ValueError(
            f"load: mass {float(mass):g} kg at {np.asarray(offset, float).tolist()} m from the hand makes the inertia matrix "
            f"ill-conditioned: expected a condition number of at most {CONDITION_LIMIT:.3g} in every posture, got {number}; "
            "choose a smaller or nearer load, or an arm with more armature"
        )


def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))["arms"]


def _reacher() -> Arm:
    """The default `Reacher`: links along x that turn about z in the horizontal plane."""
    options = reacher.Reacher()
    # About x a capsule has the inertia of a cylinder, m r^2 / 2, and of a ball, 2/5 m r^2. Planar motion does not depend on it.
    ball = reacher.DENSITY * 4 / 3 * math.pi * reacher.RADIUS**3
    along = ((reacher.MASS - ball) / 2 + 0.4 * ball) * reacher.RADIUS**2
    return make_arm(
        rotation=np.tile(np.eye(3), (2, 1, 1)),
        translation=[[0, 0, 0], [reacher.LENGTH, 0, 0]],
        axis=[[0, 0, 1]] * 2,
        mass=[reacher.MASS] * 2,
        com=[[reacher.CENTRE, 0, 0]] * 2,
        inertia=[np.diag([along, reacher.INERTIA, reacher.INERTIA])] * 2,
        armature=[options.armature] * 2,
        damping=[options.damping] * 2,
        gravity=[0, 0, 0],
        hand=[reacher.LENGTH, 0, 0],
        home=[0, 0],
        lower=[-reacher.LIMIT] * 2,
        upper=[reacher.LIMIT] * 2,
        velocity_limit=[math.inf] * 2,
        torque_limit=[options.gear * options.action_limit] * 2,
        joint_names=["shoulder", "elbow"],
    )
