"""A point mass in the plane with a goal position. `envs.make("point_mass")` builds it."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import NO_SEGMENTS, GoalEnv, Sketch, norm

# The range of the goal's angle, rad.
HALF_PLANES = {"right": (-np.pi / 2, np.pi / 2), "left": (np.pi / 2, 3 * np.pi / 2), "both": (-np.pi, np.pi)}


class PointMass(GoalEnv):
    """State (x, y, vx, vy) in m and m/s, action the acceleration (ax, ay) in m/s^2, goal (x, y) in m.

    Semi-implicit Euler: `v += dt (a - damping v);  p += dt v`. The distance is Euclidean, between positions, in m. The
    mass starts near the origin. Goals are uniform over the area of a ring around it, or of half a ring (paper, section IV-B:
    train on goals of one half-plane, test on those of the other).
    """

    name = "point_mass"
    distance_unit = "m"
    position_size = 2
    observation_size = 4
    action_size = 2
    goal_size = 2

    def __init__(
        self,
        *,
        horizon: int = 25,
        action_limit: float = 1.0,
        dt: float = 0.1,
        damping: float = 0.0,
        goal_radius: tuple[float, float] = (0.5, 1.5),
        half_plane: str = "both",
        start_spread: float = 0.1,
        start_speed: float = 0.1,
    ):
        """Sets the options.

        Args:
          horizon: steps of an episode.
          action_limit: largest acceleration along an axis, m/s^2.
          dt: length of a step, s.
          damping: damping rate of the velocity, 1/s; below 1/dt.
          goal_radius: smallest and largest distance of a goal from the origin, m.
          half_plane: side of the goals: "right" (x > 0), "left" (x < 0) or "both".
          start_spread: half-width of the interval of each start coordinate, m.
          start_speed: half-width of the interval of each start velocity, m/s.

        Raises:
          ValueError: an option out of its range, or goals that cannot be reached within the horizon.
        """
        super().__init__(horizon=horizon, action_limit=action_limit)
        self.dt = self.positive("dt", dt)
        self.damping = self.non_negative("damping", damping)
        if self.damping * self.dt >= 1:
            raise ValueError(f"point_mass: option damping: expected less than 1/dt = {1 / self.dt:g}, got {damping!r}")
        self.half_plane = _known_half_plane(half_plane)
        self.start_spread = self.non_negative("start_spread", start_spread)
        self.start_speed = self.non_negative("start_speed", start_speed)
        if not isinstance(goal_radius, tuple | list) or len(goal_radius) != 2:
            raise ValueError(f"point_mass: option goal_radius: expected (smallest, largest), got {goal_radius!r}")
        low, high = self.non_negative("goal_radius", goal_radius[0]), self.positive("goal_radius", goal_radius[1])
        if low > high:
            raise ValueError(f"point_mass: option goal_radius: expected the smaller radius first, got {goal_radius!r}")
        self.goal_radius = (low, high)
        self.reach = self._reach()
        if high > self.reach:
            raise ValueError(
                f"point_mass: option goal_radius: expected at most {self.reach:.3g} m, which the mass can travel in {horizon} "
                f"steps, got {high:g}; choose nearer goals, or a larger horizon or action_limit"
            )

    def _reach(self) -> float:
        """Distance in m along an axis at full acceleration from the worst start."""
        position, velocity = -self.start_spread, -self.start_speed
        for _ in range(self.horizon):
            velocity += self.dt * (self.action_limit - self.damping * velocity)
            position += self.dt * velocity
        return position

    def sample_start(self, key: jax.Array) -> jax.Array:
        """Draws a start [4] uniformly from a box."""
        half_width = jnp.array([self.start_spread] * 2 + [self.start_speed] * 2)
        return half_width * jax.random.uniform(key, (4,), minval=-1.0)

    def sample_goal(self, key: jax.Array, *, half_plane: str | None = None) -> jax.Array:
        """Draws a goal [2].

        Args:
          key: one typed key.
          half_plane: "right", "left" or "both"; None is the option's.

        Returns:
          The goal, m.

        Raises:
          ValueError: an unknown half-plane.
        """
        side = self.half_plane if half_plane is None else _known_half_plane(half_plane)
        angle_key, radius_key = jax.random.split(key)
        low, high = HALF_PLANES[side]
        angle = jax.random.uniform(angle_key, minval=low, maxval=high)
        smallest, largest = self.goal_radius
        # Uniform over the area: the square of the radius is uniform. Clipping keeps rounding errors inside the ring.
        squared = jax.random.uniform(radius_key, minval=smallest**2, maxval=largest**2)
        radius = jnp.clip(jnp.sqrt(squared), smallest, largest)
        across = jnp.cos(angle)
        if side != "both":  # rounding may put the cosine at an edge on the wrong side
            across = jnp.abs(across) if side == "right" else -jnp.abs(across)
        return radius * jnp.stack([across, jnp.sin(angle)])

    def distance(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """Distance in m of the positions of x [..., 4] from the goal [..., 2]."""
        return norm(x[..., :2] - goal)

    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """One step, x [4], action [2] -> x' [4]."""
        position, velocity = x[:2], x[2:]
        velocity = velocity + self.dt * (self._clipped(action) - self.damping * velocity)
        return jnp.concatenate([position + self.dt * velocity, velocity])

    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """The mass as a point in the plane."""
        side = max(1.2 * self.goal_radius[1], 0.1)
        return Sketch(
            body="point mass",
            point=np.asarray(x)[:2],
            segments=NO_SEGMENTS,
            goal=np.asarray(goal),
            goal_segments=NO_SEGMENTS,
            limits=(-side, side, -side, side),
            axes=("x (m)", "y (m)"),
        )

    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        if np.abs(goal).max() <= self.reach + 1e-6:
            return None
        return f"each coordinate within +-{self.reach:.3g} m, which the mass can travel in {self.horizon} steps"


def _known_half_plane(name: str) -> str:
    if name not in HALF_PLANES:
        raise ValueError(f"point_mass: half_plane: expected one of {', '.join(HALF_PLANES)}, got {name!r}")
    return name
