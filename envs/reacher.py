"""A planar arm of two links in closed form. `envs.reacher_mjx` is the same arm in a simulator; tests compare the two."""

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import NO_SEGMENTS, GoalEnv, Sketch, norm

# The links, as in assets/reacher.xml: capsules of water, a cylinder with half a ball at each end.
LENGTH, RADIUS, DENSITY = 0.1, 0.01, 1000.0  # m, m, kg/m^3
CENTRE = LENGTH / 2  # of mass, from the joint
LIMIT = 3.0  # rad
GOAL_SPACES = ("joints", "tip")


def _capsule() -> tuple[float, float]:
    """Mass in kg, and moment of inertia in kg m^2 about a transverse axis through the centre."""
    cylinder = DENSITY * math.pi * RADIUS**2 * LENGTH
    ball = DENSITY * 4 / 3 * math.pi * RADIUS**3
    inertia = cylinder * (LENGTH**2 / 12 + RADIUS**2 / 4)
    inertia += ball * (2 / 5 * RADIUS**2 + LENGTH**2 / 4 + 3 / 8 * LENGTH * RADIUS)
    return cylinder + ball, inertia


MASS, INERTIA = _capsule()


class Reacher(GoalEnv):
    """State (q1, q2, qd1, qd2) in rad and rad/s, q2 relative to the first link; action (u1, u2).

    The goal is the joint angles (q1, q2) in rad, or the tip's position (x, y) in m. The distance is the 2-norm of the error in
    the same unit. The torque of a joint is gear * u. Semi-implicit Euler with implicit damping, as in MuJoCo:
    `a = solve(M(q) + armature + dt D, gear u - D qd - C(q, qd));  qd += dt a;  q += dt qd`. The arm lies in the horizontal
    plane: no gravity.

    Joint limits of +-3 rad are hard: the angle is clipped and its outward velocity becomes 0, with no effect on the other
    joint. MuJoCo's limits are soft springs, so the two physics agree only while no limit is hit. Choose torques, goals and
    horizons that avoid the limits. At the paper's action_limit of 1, most rollouts of random torques hit them.
    """

    name = "reacher"
    distance_unit = "rad"
    position_size = 2
    observation_size = 4
    action_size = 2
    goal_size = 2
    dt = 0.01
    state_limits = ((-LIMIT, -LIMIT, -math.inf, -math.inf), (LIMIT, LIMIT, math.inf, math.inf))

    def __init__(
        self,
        *,
        horizon: int = 65,
        action_limit: float = 0.1,
        gear: float = 200.0,
        armature: float = 1.0,
        damping: float = 1.0,
        goal_space: str = "joints",
        goal_range: float = 1.5,
        goal_within: float = 0.0,
        start_spread: float = 0.1,
    ):
        """Sets the options.

        Args:
          horizon: steps of an episode.
          action_limit: largest action; 0.1 is a torque of 20 N m at the default gear.
          gear: torque of an action of 1, N m.
          armature: inertia of each motor, kg m^2. The links' inertia is below 0.001, so a gear of 200 needs an armature near 1.
          damping: damping of each joint, N m s/rad.
          goal_space: "joints", or "tip": the tip's position at the drawn angles.
          goal_range: half-width of the interval of each goal angle, rad. Angles are uniform.
          goal_within: goals with both angles within +- this are excluded, rad.
          start_spread: half-width of the interval of each start angle, rad. The arm starts at rest.

        Raises:
          ValueError: an option out of its range, or goals that cannot be reached within the horizon.
        """
        super().__init__(horizon=horizon, action_limit=action_limit)
        self.gear: Any = self.positive("gear", gear)
        self.armature = self.non_negative("armature", armature)
        self.damping = self.non_negative("damping", damping)
        self.goal_range = self.positive("goal_range", goal_range)
        self.goal_within = self.non_negative("goal_within", goal_within)
        self.start_spread = self.non_negative("start_spread", start_spread)
        if goal_space not in GOAL_SPACES:
            raise ValueError(f"{self.name}: option goal_space: expected one of {', '.join(GOAL_SPACES)}, got {goal_space!r}")
        self.goal_space = goal_space
        self.distance_unit = "rad" if goal_space == "joints" else "m"
        if self.goal_within >= self.goal_range:
            raise ValueError(
                f"{self.name}: option goal_within: expected less than goal_range = {self.goal_range!r}, got {goal_within!r}"
            )
        self.reach = self._reach()
        if self.goal_range > min(self.reach):
            raise ValueError(
                f"{self.name}: option goal_range: expected at most {min(self.reach):.3g} rad, which each joint can turn in "
                f"{horizon} steps, got {goal_range!r}; choose nearer goals, or a larger horizon or action_limit"
            )

    def with_gear(self, gear: jax.Array) -> "Reacher":
        """The same arm with other motors.

        Args:
          gear: [2] torque in N m of an action of 1, per joint; it may be traced.

        Returns:
          The arm with this gear. It draws the same goals as this arm.
        """
        changed = copy.copy(self)
        changed.gear = gear
        return changed

    def _reach(self) -> tuple[float, float]:
        """Angle in rad that each joint turns alone at full torque from the worst start, against its largest inertia."""
        mass = np.array(self._inertias(1.0))[[0, 2]]
        angle, speed = np.full(2, -self.start_spread), np.zeros(2)
        for _ in range(self.horizon):
            torque = self.gear * self.action_limit - self.damping * speed
            speed = speed + self.dt * torque / (mass + self.dt * self.damping)
            angle = angle + self.dt * speed
        low, high = np.minimum(angle, LIMIT).tolist()
        return low, high

    def sample_start(self, key: jax.Array) -> jax.Array:
        """Draws a start [4], at rest."""
        angles = self.start_spread * jax.random.uniform(key, (2,), minval=-1.0)
        return jnp.concatenate([angles, jnp.zeros(2)])

    def sample_goal(self, key: jax.Array) -> jax.Array:
        """Draws a goal [2]."""
        angles = self.goal_range * jax.random.uniform(key, (2,), minval=-1.0)
        if self.goal_within > 0.0:
            angles = self._angles_in_ring(key)
        return angles if self.goal_space == "joints" else self.tip(angles)

    def _angles_in_ring(self, key: jax.Array) -> jax.Array:
        """Angles [2] rad, uniform over the square of +-goal_range without the square of +-goal_within."""
        edge_key, side_key, size_key = jax.random.split(key, 3)
        along = jax.random.uniform(edge_key, (2,), minval=-1.0)
        edge = jnp.stack([jnp.where(along[0] < 0, -1.0, 1.0), along[1]])
        edge = jnp.where(jax.random.bernoulli(side_key), edge, edge[::-1])
        inner, outer = self.goal_within**2, self.goal_range**2
        return edge * jnp.sqrt(inner + (outer - inner) * jax.random.uniform(size_key))

    def distance(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """The 2-norm of the error of the angles (rad) or of the tip (m): x [..., 4] against the goal [..., 2]."""
        q = x[..., :2]
        return norm((q if self.goal_space == "joints" else self.tip(q)) - goal)

    def mass_matrix(self, q: jax.Array | np.ndarray) -> jax.Array:
        """Inertia of the joints at the angles q [2], with the armature: [2, 2], kg m^2."""
        m11, m12, m22 = self._inertias(jnp.cos(q[1]))
        return jnp.array([[m11, m12], [m12, m22]])

    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """One step, x [4], action [2] -> x' [4]."""
        q, qd = x[:2], x[2:]
        m11, m12, m22 = self._inertias(jnp.cos(q[1]))
        m11, m22 = m11 + self.dt * self.damping, m22 + self.dt * self.damping
        coupling = MASS * LENGTH * CENTRE * jnp.sin(q[1])
        coriolis = coupling * jnp.stack([-qd[1] * (2 * qd[0] + qd[1]), qd[0] ** 2])
        force = self.gear * self._clipped(action) - self.damping * qd - coriolis
        acceleration = jnp.stack([m22 * force[0] - m12 * force[1], m11 * force[1] - m12 * force[0]]) / (m11 * m22 - m12**2)
        qd = qd + self.dt * acceleration
        q = q + self.dt * qd
        outward = (jnp.abs(q) > LIMIT) & (q * qd > 0)
        return jnp.concatenate([jnp.clip(q, -LIMIT, LIMIT), jnp.where(outward, 0.0, qd)])

    def _inertias(self, cos_elbow: jax.Array | float) -> tuple[Any, Any, float]:
        """The mass matrix's entries 11, 12 and 22."""
        lever = MASS * LENGTH * CENTRE * cos_elbow
        second = INERTIA + MASS * CENTRE**2
        return 2 * second + MASS * LENGTH**2 + 2 * lever + self.armature, second + lever, second + self.armature

    def tip(self, q: jax.Array) -> jax.Array:
        """Position of the arm's end at the angles q [..., 2]: [..., 2] m."""
        first, both = q[..., 0], q[..., 0] + q[..., 1]
        return LENGTH * jnp.stack([jnp.cos(first) + jnp.cos(both), jnp.sin(first) + jnp.sin(both)], axis=-1)

    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """The arm and its goal, a posture or a position of the tip, from above."""
        arm = _posture(np.asarray(x)[:2])
        wanted = _posture(np.asarray(goal)) if self.goal_space == "joints" else NO_SEGMENTS
        side = 2.2 * LENGTH
        return Sketch(
            body="arm",
            point=arm[-1, 1],
            segments=arm,
            goal=wanted[-1, 1] if self.goal_space == "joints" else np.asarray(goal),
            goal_segments=wanted,
            limits=(-side, side, -side, side),
            axes=("x (m)", "y (m)"),
            followed="tip",
        )

    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        if self.goal_space == "tip":
            near = np.linalg.norm(goal) <= 2 * LENGTH + 1e-6
            return None if near else f"a position within {2 * LENGTH:.3g} m of the shoulder"
        if (np.abs(goal) <= np.array(self.reach) + 1e-6).all():
            return None
        first, second = self.reach
        return f"angles within +-{first:.3g} and +-{second:.3g} rad, which the joints can turn in {self.horizon} steps"


def _posture(q: np.ndarray) -> np.ndarray:
    """The two links at the angles q [2]: [2, 2, 2]."""
    angles = np.cumsum(q)
    ends = np.cumsum(LENGTH * np.stack([np.cos(angles), np.sin(angles)], axis=-1), axis=0)
    starts = np.concatenate([np.zeros((1, 2)), ends[:1]])
    return np.stack([starts, ends], axis=1)
