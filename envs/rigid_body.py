"""A serial chain of revolute joints and its equations of motion, by recursive Newton-Euler as a scan over the links.

All functions are pure and take one state of one arm: use `vmap`, `jit` and `grad`. `envs.arm` loads arms. The torque of the
motors is `tau = M(q) a + h(q, v)`, with M the `mass_matrix` and h the `bias_forces`. All units are SI and radians.

Featherstone, Rigid Body Dynamics Algorithms (2008), chapters 5 and 6, in 3D vectors and rotation matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "rotation", "translation", "axis", "mass", "com", "inertia", "armature", "damping", "gravity", "hand", "home",
        "lower", "upper", "velocity_limit", "torque_limit",
    ],
    meta_fields=["joint_names"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Arm:
    """A chain of n links, each turned by one joint against the link before it. A pytree of its arrays.

    The origin of a link's frame lies on its joint's axis. Joint names are static: arms with different names are pytrees of
    different structure.
    """

    rotation: jax.Array  # [n, 3, 3] from a link's frame at q = 0 to its parent's
    translation: jax.Array  # [n, 3] m, a link's origin in its parent's frame
    axis: jax.Array  # [n, 3] of the joint, length 1, in the link's frame
    mass: jax.Array  # [n] kg
    com: jax.Array  # [n, 3] m, centre of mass in the link's frame
    inertia: jax.Array  # [n, 3, 3] kg m^2 about the centre of mass, in the link's frame
    armature: jax.Array  # [n] kg m^2, inertia of the motor at the joint
    damping: jax.Array  # [n] N m s/rad
    gravity: jax.Array  # [3] m/s^2, in the base's frame
    hand: jax.Array  # [3] m, place of a load, in the last link's frame
    home: jax.Array  # [n] rad, a posture within the limits in which the arm can hold loads
    lower: jax.Array  # [n] rad; -inf if a joint has no limit
    upper: jax.Array  # [n] rad; inf if a joint has no limit
    velocity_limit: jax.Array  # [n] rad/s; inf if a joint has none
    torque_limit: jax.Array  # [n] N m; inf if a joint has none
    joint_names: tuple[str, ...]  # [n]

    @property
    def size(self) -> int:
        """Number of joints, n."""
        return len(self.joint_names)


def make_arm(*, joint_names: Sequence[str], **arrays: Any) -> Arm:
    """Builds an arm from array-likes and checks them on the host.

    Args:
      joint_names: [n].
      **arrays: the other fields of `Arm`.

    Returns:
      The arm, with arrays of JAX's default floating-point type.

    Raises:
      ValueError: a wrong shape, a number that must be finite and is not, an axis that is not of length 1, an invalid rotation,
        a link without mass or inertia, or a home beyond the limits.
      TypeError: an unknown or missing field.
    """
    n = len(joint_names)
    exact = {field: np.asarray(value, float) for field, value in arrays.items()}
    for field, value in exact.items():
        shape = {"rotation": (n, 3, 3), "inertia": (n, 3, 3), "gravity": (3,), "hand": (3,)}.get(field, (n,))
        shape = (n, 3) if field in ("translation", "axis", "com") else shape
        if value.shape != shape:
            raise ValueError(f"arm: {field}: expected shape {shape} for {n} joints, got {value.shape}")
        infinite = field in ("lower", "upper", "velocity_limit", "torque_limit")
        if not (~np.isnan(value) if infinite else np.isfinite(value)).all():
            raise ValueError(f"arm: {field}: expected finite numbers, got {value.tolist()}")
    arm = Arm(**{field: jnp.asarray(value, float) for field, value in exact.items()}, joint_names=tuple(joint_names))
    for i, joint in enumerate(joint_names):
        turn, moments = exact["rotation"][i], np.linalg.eigvalsh(exact["inertia"][i])
        if not np.allclose(turn @ turn.T, np.eye(3), atol=1e-6) or not np.isclose(np.linalg.norm(exact["axis"][i]), 1):
            raise ValueError(f"arm: joint {joint}: expected a rotation matrix and an axis of length 1, got "
                f"{turn.tolist()} and {exact['axis'][i].tolist()}")
        if not (exact["mass"][i] > 0 and moments[0] > 0):
            raise ValueError(
                f"arm: the link of joint {joint}: expected a mass and moments of inertia above 0, got {exact['mass'][i]:g} kg "
                f"and {moments.tolist()} kg m^2"
            )
        low, home, high = exact["lower"][i], exact["home"][i], exact["upper"][i]
        if not low <= home <= high or low == high:
            raise ValueError(f"arm: joint {joint}: expected limits around home, got {low:g} to {high:g} around {home:g} rad")
    return arm


def turns(arm: Arm) -> tuple[jax.Array, jax.Array]:
    """The joints' limits, [n] and [n] rad; half a turn on each side of home if a joint has none."""
    low = jnp.where(jnp.isfinite(arm.lower), arm.lower, arm.home - math.pi)
    return low, jnp.where(jnp.isfinite(arm.upper), arm.upper, arm.home + math.pi)


def inverse_dynamics(arm: Arm, q: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
    """The motors' torque for a given acceleration of the arm (Featherstone, table 5.1).

    Args:
      arm: the arm.
      q: [n] rad.
      v: [n] rad/s.
      a: [n] rad/s^2.

    Returns:
      Torque [n] in N m: the torque of the links with gravity, of the motors' own inertia, and of the damping.

    Raises:
      ValueError: a wrong shape.
    """
    q, v, a = _shaped(arm, "q", q), _shaped(arm, "v", v), _shaped(arm, "a", a)
    return _newton_euler(arm, q, v, a, arm.gravity) + arm.armature * a + arm.damping * v


def bias_forces(arm: Arm, q: jax.Array, v: jax.Array) -> jax.Array:
    """The torque h(q, v) of zero acceleration: Coriolis and centrifugal forces, gravity and damping.

    MuJoCo counts damping as a passive force: h = qfrc_bias - qfrc_passive.

    Args:
      arm: the arm.
      q: [n] rad.
      v: [n] rad/s.

    Returns:
      Torque [n] in N m.

    Raises:
      ValueError: a wrong shape.
    """
    return inverse_dynamics(arm, q, v, jnp.zeros_like(q))


def mass_matrix(arm: Arm, q: jax.Array) -> jax.Array:
    """The inertia matrix M(q), with the armature: column j is the torque of a unit acceleration of joint j.

    Args:
      arm: the arm.
      q: [n] rad.

    Returns:
      M [n, n] in kg m^2, exactly symmetric; positive definite.

    Raises:
      ValueError: a wrong shape.
    """
    q = _shaped(arm, "q", q)
    units = jnp.eye(arm.size, dtype=q.dtype)
    rest, weightless = jnp.zeros_like(q), jnp.zeros_like(arm.gravity)
    rows = jax.vmap(lambda unit: _newton_euler(arm, q, rest, unit, weightless))(units)
    # Entry [j, i] is the force at joint i of an acceleration of joint j. Below the diagonal (i < j) it is the more precise one:
    # links before j are at rest, so nothing large cancels.
    lower = jnp.tril(rows)
    return lower + jnp.tril(rows, -1).T + jnp.diag(arm.armature)


def positions(arm: Arm, q: jax.Array) -> jax.Array:
    """Positions of the links and the hand.

    Args:
      arm: the arm.
      q: [n] rad.

    Returns:
      [n + 1, 3] m in the base's frame: the origin of each link, then the hand.

    Raises:
      ValueError: a wrong shape.
    """
    turned = _turned(arm, _shaped(arm, "q", q))

    def outward(carry: tuple[jax.Array, jax.Array], link: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        rotation, origin = carry
        turn, shift = link
        origin = origin + _times(rotation, shift)
        rotation = _times(rotation, turn)
        return (rotation, origin), origin

    start = (jnp.eye(3, dtype=turned.dtype), jnp.zeros(3, turned.dtype))
    (rotation, origin), origins = jax.lax.scan(outward, start, (turned, arm.translation))
    return jnp.concatenate([origins, (origin + _times(rotation, arm.hand))[None]])


def with_load(arm: Arm, mass: jax.Array | float, offset: jax.Array, *, radius: jax.Array | float = 0.0) -> Arm:
    """The arm with a load fixed in its hand: a ball, or a point if the radius is 0.

    All arguments may be traced, to draw loads per task. `envs.arm.check_load` checks a load on the host.

    Args:
      arm: the arm.
      mass: mass of the load, kg.
      offset: [3] m, the load's centre from the hand, in the last link's frame.
      radius: radius of the ball, m.

    Returns:
      The arm whose last link includes the load (parallel axis theorem).

    Raises:
      ValueError: a wrong shape.
    """
    offset = jnp.asarray(offset, arm.com.dtype)
    if offset.shape != (3,) or jnp.shape(mass) or jnp.shape(radius):
        raise ValueError(
            f"load: expected a scalar mass, an offset of shape (3,) and a scalar radius, got {jnp.shape(mass)}, {offset.shape} "
            f"and {jnp.shape(radius)}; an arm holds one load, use jax.vmap for more"
        )
    link, place = arm.mass[-1], arm.hand + offset
    total = link + mass
    com = (link * arm.com[-1] + mass * place) / total
    ball = 0.4 * mass * radius**2 * jnp.eye(3, dtype=arm.com.dtype)
    # The inertia of two masses about their common centre is that of the reduced mass at their distance.
    inertia = arm.inertia[-1] + ball + _parallel_axis(link * mass / total, place - arm.com[-1])
    return dataclasses.replace(
        arm,
        mass=arm.mass.at[-1].set(total),
        com=arm.com.at[-1].set(com),
        inertia=arm.inertia.at[-1].set(inertia),
    )


def scale_masses(arm: Arm, factors: jax.Array) -> Arm:
    """The arm with links of the same shape and different density.

    Args:
      arm: the arm.
      factors: [n], above 0; each multiplies the mass and the inertia of one link.

    Returns:
      The arm with those links.

    Raises:
      ValueError: a wrong shape.
    """
    factors = _shaped(arm, "factors", factors)
    return dataclasses.replace(arm, mass=arm.mass * factors, inertia=arm.inertia * factors[:, None, None])


def _newton_euler(arm: Arm, q: jax.Array, v: jax.Array, a: jax.Array, gravity: jax.Array) -> jax.Array:
    """Torque [n] of the links alone, without armature and damping."""
    turned = _turned(arm, q)
    spin, spin_up = arm.axis * v[:, None], arm.axis * a[:, None]

    def outward(carry: tuple[jax.Array, ...], link: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], tuple]:
        omega, alpha, acceleration = carry  # of the parent: velocity, acceleration, and its origin's, in its frame
        turn, shift, spin, spin_up, mass, com, inertia = link
        back = turn.T
        acceleration = _times(back, acceleration + _swing(omega, alpha, shift))
        omega = _times(back, omega)
        alpha = _times(back, alpha) + jnp.cross(omega, spin) + spin_up
        omega = omega + spin
        force = mass * (acceleration + _swing(omega, alpha, com))
        moment = _times(inertia, alpha) + jnp.cross(omega, _times(inertia, omega)) + jnp.cross(com, force)
        return (omega, alpha, acceleration), (force, moment)

    def inward(carry: tuple[jax.Array, jax.Array], link: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        force, moment = carry  # of the links beyond, on this link, at its origin and in its frame
        turn, shift, axis, own_force, own_moment = link
        force, moment = force + own_force, moment + own_moment
        torque = jnp.sum(axis * moment)
        force = _times(turn, force)
        return (force, _times(turn, moment) + jnp.cross(shift, force)), torque

    # Gravity is a base that accelerates upward. The zeros take the type that the recursion gives them.
    still = jnp.zeros(3, jnp.result_type(turned, spin, spin_up, arm.mass))
    start = (still, still, still - gravity)
    links = (turned, arm.translation, spin, spin_up, arm.mass, arm.com, arm.inertia)
    _, (forces, moments) = jax.lax.scan(outward, start, links)
    links = (turned, arm.translation, arm.axis, forces, moments)
    return jax.lax.scan(inward, (still, still), links, reverse=True)[1]


def _turned(arm: Arm, q: jax.Array) -> jax.Array:
    """Rotations [n, 3, 3] from each link's frame at q to its parent's (Rodrigues' formula)."""
    cos, sin = jnp.cos(q)[:, None, None], jnp.sin(q)[:, None, None]
    along = arm.axis[:, :, None] * arm.axis[:, None, :]
    eye = jnp.eye(3, dtype=along.dtype)
    across = jnp.cross(arm.axis[:, None, :], eye[None])  # [n, 3, 3]; row k is axis x e_k, so this is the transposed matrix
    turn = cos * eye + (1 - cos) * along - sin * across
    return _times(arm.rotation, turn)


def _times(matrix: jax.Array, other: jax.Array) -> jax.Array:
    """The product `@` in full float32; a GPU's default has fewer bits."""
    return jnp.matmul(matrix, other, precision=jax.lax.Precision.HIGHEST)


def _swing(omega: jax.Array, alpha: jax.Array, arm: jax.Array) -> jax.Array:
    """Acceleration [3] of a point at `arm` [3] of a turning body, against the body's origin."""
    return jnp.cross(alpha, arm) + jnp.cross(omega, jnp.cross(omega, arm))


def _parallel_axis(mass: jax.Array, shift: jax.Array) -> jax.Array:
    """Inertia [3, 3] about a point of a mass at `shift` [3] from it."""
    return mass * (jnp.sum(shift**2) * jnp.eye(3, dtype=shift.dtype) - shift[:, None] * shift[None, :])


def _shaped(arm: Arm, what: str, value: jax.Array) -> jax.Array:
    array = jnp.asarray(value, float)
    if array.shape != (arm.size,):
        raise ValueError(
            f"{what}: expected shape ({arm.size},), one number per joint, got {array.shape}; this takes one state of one arm, "
            "use jax.vmap for more"
        )
    return array
