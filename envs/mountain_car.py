"""A car that is too weak for its hill and must swing to get up. `envs.make("mountain_car")` builds it."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import NO_SEGMENTS, GoalEnv, Sketch, norm

MASS, GRAVITY, FRICTION = 0.2, 9.8, 0.3
LEFT, RIGHT = -1.2, 0.5
MAX_SPEED = 1.5
START = -0.55
GOAL = (RIGHT, 1.0375)


class MountainCar(GoalEnv):
    """State (position, velocity), action the force (u,), goal (0.5, 1.0375) as a state; lengths have no unit.

    As in the paper's released code: `v += (-9.8 * 0.2 cos(3 x) + u / 0.2 - 0.3 v) dt;  x += v dt`, then |v| <= 1.5 and
    -1.2 <= x <= 0.5 by clipping. The left wall stops the car; the right one does not. Clipped values pass no gradient, unlike
    in the released code. The distance compares positions alone; a loss may also use the goal's velocity.
    """

    name = "mountain_car"
    distance_unit = ""
    position_size = 1
    observation_size = 2
    action_size = 1
    goal_size = 2
    dt = 0.1
    state_limits = ((LEFT, -MAX_SPEED), (RIGHT, MAX_SPEED))

    def __init__(self, *, horizon: int = 35, action_limit: float = 0.25, start_spread: float = 0.0):
        """Sets the options.

        Args:
          horizon: steps of an episode.
          action_limit: largest force.
          start_spread: half-width of the interval of starts about -0.55; the car starts at rest.

        Raises:
          ValueError: an option out of its range.
        """
        super().__init__(horizon=horizon, action_limit=action_limit)
        self.start_spread = self.non_negative("start_spread", start_spread)
        if self.start_spread > START - LEFT:
            raise ValueError(
                f"mountain_car: option start_spread: expected at most {START - LEFT:.2f}, the distance from the start to the "
                f"left wall, got {start_spread!r}"
            )

    def sample_start(self, key: jax.Array) -> jax.Array:
        """Draws a start [2]."""
        offset = self.start_spread * jax.random.uniform(key, minval=-1.0)
        return jnp.stack([START + offset, jnp.zeros_like(offset)])

    def sample_goal(self, key: jax.Array) -> jax.Array:
        """The one goal [2]."""
        del key
        return jnp.array(GOAL)

    def distance(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """Distance between the positions of x [..., 2] and of the goal [..., 2]."""
        return norm(x[..., :1] - goal[..., :1])

    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """One step, x [2], action [1] -> x' [2]."""
        position, velocity = x[0], x[1]
        force = self._clipped(action)[0]
        velocity = velocity + self.dt * (-GRAVITY * MASS * jnp.cos(3 * position) + force / MASS - FRICTION * velocity)
        position = position + self.dt * velocity
        velocity = jnp.clip(velocity, -MAX_SPEED, MAX_SPEED)
        velocity = jnp.where((position <= LEFT) & (velocity < 0), 0.0, velocity)
        return jnp.stack([jnp.clip(position, LEFT, RIGHT), velocity])

    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """The car on its hill, of height sin(3 x)."""
        return Sketch(
            body="car",
            point=_on_the_hill(np.asarray(x)[0]),
            segments=NO_SEGMENTS,
            goal=_on_the_hill(np.asarray(goal)[0]),
            goal_segments=NO_SEGMENTS,
            limits=(LEFT - 0.1, RIGHT + 0.1, -1.2, 1.3),
            axes=("position", "height"),
            background=_on_the_hill(np.linspace(LEFT, RIGHT, 100)),
        )

    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        if LEFT - 1e-6 <= goal[0] <= RIGHT + 1e-6 and abs(goal[1]) <= MAX_SPEED:
            return None
        return f"a position in [{LEFT}, {RIGHT}] and a velocity within +-{MAX_SPEED}"


def _on_the_hill(position: np.ndarray) -> np.ndarray:
    return np.stack([position, np.sin(3 * position)], axis=-1)
