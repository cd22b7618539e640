"""Brax's ant with goals in the plane, in the spring pipeline. `envs.make("ant_goal")` builds it.

The robot of Schulman et al. (2015, arXiv:1506.02438) in Brax's version: a body on four legs with eight motors. Only the
spring pipeline keeps it at a walking height under random actions. It is also Brax's fastest pipeline on a CPU.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from brax import kinematics
from brax import math as rotations
from brax.envs.ant import Ant

from envs.base import NO_SEGMENTS, GoalEnv, Sketch, State, norm, quiet_brax

POSITIONS, VELOCITIES = 15, 14  # x, y, z in m, a quaternion (w, x, y, z), 8 joint angles in rad; m/s, rad/s and 8 times rad/s
FASTEST = 8.0  # m/s; an upper bound on the speed of this ant
TIP = 0.4  # m; a foot's end lies this far along both axes of its link, away from the body
LEGS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # direction of each leg along x and y


class AntGoal(GoalEnv):
    """The state is x = (q [15], qd [14]). The goal [2] in m is a position of the torso. A fallen ant keeps moving.

    Position and velocity of the torso are in the world's axes; its angular velocity is in its own. The simulator carries
    more state than x, since spring joints have slack. `state_at` starts the simulator anew at x.
    """

    name = "ant_goal"
    distance_unit = "m"
    observation_size = POSITIONS + VELOCITIES
    action_size = 8
    position_size = POSITIONS
    goal_size = 2
    differentiable = False
    backend = "spring"

    def __init__(self, *, horizon: int = 100, action_limit: float = 1.0, goal_radius: float = 2.0, start_spread: float = 0.1):
        """Sets the options and loads the model.

        Args:
          horizon: steps of 0.05 s in an episode.
          action_limit: largest action, as a fraction of the motors' full torque, at most 1.
          goal_radius: goals lie on the circle with this radius in m about the start.
          start_spread: half-width of the uniform noise on the start's positions (m) and angles (rad), and standard deviation of
            the noise on its velocities (m/s, rad/s).

        Raises:
          ValueError: an option out of its range.
        """
        super().__init__(horizon=horizon, action_limit=action_limit)
        if self.action_limit > 1.0:
            raise ValueError(f"{self.name}: option action_limit: expected at most 1, got {action_limit}")
        self.start_spread = self.non_negative("start_spread", start_spread)
        self.goal_radius = self.positive("goal_radius", goal_radius)
        with quiet_brax():
            self._ant = Ant(backend=self.backend)
        self.dt = float(self._ant.dt)
        self._legs = jax.jit(self._legs_at)  # an animation calls it thousands of times
        if self.goal_radius > self.reach:
            raise ValueError(
                f"{self.name}: option goal_radius: expected at most {self.reach:g} m, the reach of {self.horizon} steps, got "
                f"{goal_radius}; choose a smaller radius or a larger horizon"
            )

    def sample_start(self, key: jax.Array) -> jax.Array:
        """Draws a start x [29]: an ant that stands near the origin and faces along the x axis."""
        position_key, velocity_key = jax.random.split(key)
        spread = self.start_spread
        q = self._ant.sys.init_q + jax.random.uniform(position_key, (POSITIONS,), minval=-spread, maxval=spread)
        q = q.at[3:7].divide(jnp.linalg.norm(q[3:7]))
        return jnp.concatenate([q, spread * jax.random.normal(velocity_key, (VELOCITIES,))])

    def sample_goal(self, key: jax.Array) -> jax.Array:
        """Draws a goal [2] m on the circle."""
        angle = jax.random.uniform(key, maxval=2.0 * math.pi)
        return self.goal_radius * jnp.array([jnp.cos(angle), jnp.sin(angle)])

    def distance(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """Distance in m from the torso to the goal in the plane."""
        return norm(x[..., :2] - goal)

    def from_torso(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """An observation in the torso's axes, which does not depend on the ant's position and heading.

        Args:
          x: [29].
          goal: [2] m.

        Returns:
          [29]: the vector to the goal (m), the vertical, the torso's velocity (m/s) and angular velocity (rad/s), 3 numbers
          each; then its height (m), 8 joint angles (rad) and 8 joint velocities (rad/s).
        """
        q, qd = x[:POSITIONS], x[POSITIONS:]
        way = jnp.append(goal - q[:2], 0.0)
        turned = [rotations.inv_rotate(vector, q[3:7]) for vector in (way, jnp.array([0.0, 0.0, 1.0]), qd[:3])]
        return jnp.concatenate([*turned, qd[3:6], q[2:3], q[7:], qd[6:]])

    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """Not available.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(f"{self.name} has no differentiable dynamics, as it has no physics='closed_form': use step")

    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """The ant from above, three segments per leg."""
        legs = np.asarray(self._legs(jnp.asarray(x)))
        side = float(max(self.goal_radius + 2.0, np.abs(legs).max() + 1.0))  # the ant is always in the picture
        return Sketch(
            body="ant",
            point=legs[0, 0],
            segments=np.stack([legs[:, :-1], legs[:, 1:]], axis=2).reshape(-1, 2, 2),
            goal=np.asarray(goal, float),
            goal_segments=NO_SEGMENTS,
            limits=(-side, side, -side, side),
            axes=("x (m)", "y (m)"),
            followed="torso",
        )

    @property
    def reach(self) -> float:
        """Largest distance in m of a goal from the start: the horizon at the largest speed."""
        return self.horizon * self.dt * FASTEST

    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        if np.linalg.norm(goal) <= self.reach:
            return None
        return f"a position within {self.reach:g} m of the start, the reach of {self.horizon} steps"

    def _pipeline_state(self, x: jax.Array) -> Any:
        with quiet_brax():
            return self._ant.pipeline_init(x[:POSITIONS], x[POSITIONS:])

    def _legs_at(self, x: jax.Array) -> jax.Array:
        """The torso, hip, ankle and foot of each leg from above, [4, 4, 2] m."""
        with quiet_brax():
            links: Any = kinematics.forward(self._ant.sys, x[:POSITIONS], x[POSITIONS:])[0]
        legs = []
        for leg, (along, across) in enumerate(LEGS):
            hip, ankle = 1 + 2 * leg, 2 + 2 * leg
            foot = links.pos[ankle] + rotations.rotate(jnp.array([TIP * along, TIP * across, 0.0]), links.rot[ankle])
            legs.append(jnp.stack([links.pos[0], links.pos[hip], links.pos[ankle], foot])[:, :2])
        return jnp.stack(legs)

    def _advance(self, state: State, action: jax.Array) -> tuple[Any, jax.Array]:
        with quiet_brax():
            after: Any = self._ant.pipeline_step(state.pipeline_state, self._clipped(action))
        return after, jnp.concatenate([after.q, after.qd])
