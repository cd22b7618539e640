"""`GoalEnv`: a Brax environment whose state is to be brought to a goal, and the checks that its options share.

A simulator becomes an environment by subclassing it; `envs.make` builds one by name, and whoever steps it (the library, the
launches, `brax.training`) sees Brax's reset and step alone.
"""

import abc
import contextlib
import io
import math
import numbers
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Importing Brax warns that JAXopt is not maintained and prints that Warp, which nothing here uses, is missing: news to nobody
# who runs this. Brax is imported here first, since a package imports its base before its other modules.
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    from brax.envs.base import Env, State


@contextlib.contextmanager
def quiet_brax() -> Iterator[None]:
    """Without Brax's warnings that it is not maintained, and MuJoCo's that Brax reads its data by an old name."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        warnings.filterwarnings("ignore", "Accessing `.*` directly from `Data`", DeprecationWarning)
        yield


_QUIET = threading.RLock()  # warnings have one list of filters for all threads


class Sketch(NamedTuple):
    """What a picture of one state shows, in numpy and in the units of the axes; L segments, P points."""

    body: str  # what moves, in words
    point: np.ndarray  # [2] whose path is worth drawing
    segments: np.ndarray  # [L, 2, 2] lines from [:, 0] to [:, 1]; L may be 0
    goal: np.ndarray  # [2] where the point should be
    goal_segments: np.ndarray  # [L, 2, 2] the same lines at the goal; L may be 0
    limits: tuple[float, float, float, float]  # xmin, xmax, ymin, ymax
    axes: tuple[str, str]  # what the axes are, with units
    background: np.ndarray | None = None  # [P, 2] a curve that stands still
    followed: str | None = None  # what the point is of the body, in words; None: the body


NO_SEGMENTS = np.zeros((0, 2, 2))


class GoalEnv(Env):
    """A system with state x (positions, then velocities) that should be near a goal at the end of a fixed horizon.

    `state.obs` is the full physical state x [S], `state.info["goal"]` the goal [G], `state.metrics["distance"]` the distance
    between them, the reward its negative; `done` is always 0. Actions beyond +-action_limit are clipped by the environment.
    Methods are written for one system and are pure: `vmap` and `jit` them at will. `sketch` and `check_goal` are for the host.
    """

    name: str
    distance_unit: str  # "" where lengths have none
    observation_size: int  # S
    action_size: int  # A
    position_size: int  # the first entries of x
    goal_size: int  # G
    dt: float  # s
    differentiable: bool = True  # whether `dynamics` exists and has a gradient
    backend: str = "closed_form"
    # (low [S], high [S]) that no state leaves, infinite where a coordinate has none; None: no coordinate has any
    state_limits: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(self, *, horizon: int, action_limit: float):
        """Sets what every environment has.

        Args:
          horizon: steps of an episode.
          action_limit: actions are clipped to +- this.

        Raises:
          ValueError: an option out of its range.
        """
        if not isinstance(horizon, numbers.Integral) or isinstance(horizon, bool) or horizon < 1:
            raise ValueError(f"{self.name}: option horizon: expected a whole number of steps, at least 1, got {horizon!r}")
        self.horizon = int(horizon)
        self.action_limit = self.positive("action_limit", action_limit)

    @abc.abstractmethod
    def sample_start(self, key: jax.Array) -> jax.Array:
        """Draws a start x [S]."""

    @abc.abstractmethod
    def sample_goal(self, key: jax.Array) -> jax.Array:
        """Draws a goal [G] that passes `check_goal`."""

    @abc.abstractmethod
    def distance(self, x: jax.Array, goal: jax.Array) -> jax.Array:
        """How far x [..., S] is from the goal [..., G], in `distance_unit`; its gradient at the goal is 0."""

    @abc.abstractmethod
    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """One step of the system, x [S], action [A] -> x' [S]; differentiable.

        Raises:
          NotImplementedError: not in closed form (`differentiable` is False).
        """

    @abc.abstractmethod
    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """What a picture of the state x [S] with the goal [G] shows."""

    @abc.abstractmethod
    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        """What was expected of a finite goal [G] that cannot be reached; None where it can."""

    def reset(self, rng: jax.Array) -> State:
        """Draws a start and a goal.

        Args:
          rng: one typed key (Brax's wrappers may pass a raw one).

        Returns:
          The first state.
        """
        start_key, goal_key = jax.random.split(rng)
        return self.state_at(self.sample_start(start_key), self.sample_goal(goal_key))

    def state_at(self, x: jax.Array, goal: jax.Array) -> State:
        """The State at a physical state.

        Args:
          x: [S].
          goal: [G].

        Returns:
          A state to step from.

        Raises:
          ValueError: a wrong shape.
        """
        x = self._shaped("x", x, self.observation_size)
        goal = self._shaped("goal", goal, self.goal_size)
        distance = self.distance(x, goal)
        return State(
            pipeline_state=self._pipeline_state(x),
            obs=x,
            reward=-distance,
            done=jnp.zeros_like(distance),
            metrics={"distance": distance},
            info={"goal": goal},
        )

    def step(self, state: State, action: jax.Array) -> State:
        """One step of `dt` seconds.

        Args:
          state: of `reset`, `state_at` or `step`; what wrappers added to its info and metrics stays.
          action: [A].

        Returns:
          The next state.

        Raises:
          ValueError: a wrong shape.
        """
        pipeline_state, x = self._advance(state, self._shaped("action", action, self.action_size))
        distance = self.distance(x, state.info["goal"])
        return State(
            pipeline_state=pipeline_state,
            obs=x,
            reward=-distance,
            done=jnp.zeros_like(distance),
            metrics=dict(state.metrics, distance=distance),
            info=dict(state.info),
        )

    def check_goal(self, goal: Any) -> None:
        """Checks a goal that came from outside; on the host, not under a transformation.

        Raises:
          ValueError: a wrong shape, not finite, or out of reach.
        """
        values = np.asarray(goal, dtype=float)
        if values.shape != (self.goal_size,):
            raise ValueError(f"{self.name}: goal: expected shape ({self.goal_size},), got {values.shape}; pass one goal")
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.name}: goal: expected finite numbers, got {values.tolist()}; see sample_goal for valid ones"
            )
        expected = self._why_out_of_reach(values)
        if expected is not None:
            raise ValueError(
                f"{self.name}: goal: expected {expected}, got {values.tolist()}; choose a nearer goal, or an environment with "
                "another horizon or action_limit"
            )

    def positive(self, option: str, value: Any) -> float:
        """An option as a float; ValueError unless it is finite and above 0."""
        return self._number(option, value, "a finite number above 0", lambda v: v > 0)

    def non_negative(self, option: str, value: Any) -> float:
        """An option as a float; ValueError unless it is finite and at least 0."""
        return self._number(option, value, "a finite number of at least 0", lambda v: v >= 0)

    def _number(self, option: str, value: Any, expected: str, valid: Any) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value) or not valid(value):
            raise ValueError(f"{self.name}: option {option}: expected {expected}, got {value!r}")
        return float(value)

    def _shaped(self, what: str, value: jax.Array, size: int) -> jax.Array:
        array = jnp.asarray(value, float)
        if array.shape != (size,):
            raise ValueError(
                f"{self.name}: {what}: expected shape ({size},), got {array.shape}; an environment steps one system, "
                "use jax.vmap for more"
            )
        return array

    def _clipped(self, action: jax.Array) -> jax.Array:
        return jnp.clip(action, -self.action_limit, self.action_limit)

    def _pipeline_state(self, x: jax.Array) -> Any:
        """What a simulator carries beside x; nothing in closed form."""
        del x

    def _advance(self, state: State, action: jax.Array) -> tuple[Any, jax.Array]:
        """The simulator's next state and x'."""
        return state.pipeline_state, self.dynamics(jnp.asarray(state.obs), action)


def norm(x: jax.Array) -> jax.Array:
    """The 2-norm over the last axis, with gradient 0, not NaN, at 0."""
    squared = jnp.sum(x**2, axis=-1)
    at_zero = squared == 0
    return jnp.where(at_zero, 0.0, jnp.sqrt(jnp.where(at_zero, 1.0, squared)))
