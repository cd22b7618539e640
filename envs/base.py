"""`GoalEnv`: a Brax environment with a goal for its state, and the checks that all environments apply to their options.

A subclass wraps one simulator and `envs.make` builds it by name. Callers (the library, the launches, `brax.training`) use
Brax's `reset` and `step` alone.
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

# Importing Brax warns that JAXopt is not maintained and prints that Warp is missing. Nothing here uses either of them.
# `envs/__init__.py` imports this module first, so that this is the first import of Brax.
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    from brax.envs.base import Env, State


@contextlib.contextmanager
def quiet_brax() -> Iterator[None]:
    """Silences Brax's warning about its maintenance, and MuJoCo's about an old attribute name that Brax reads."""
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        warnings.filterwarnings("ignore", "Accessing `.*` directly from `Data`", DeprecationWarning)
        yield


_QUIET = threading.RLock()  # all threads share one list of warning filters


class Sketch(NamedTuple):
    """The drawing of one state, in numpy and in the units of the axes. L segments, P points."""

    body: str  # name of the moving body, in words
    point: np.ndarray  # [2] the point whose path is drawn
    segments: np.ndarray  # [L, 2, 2] lines from [:, 0] to [:, 1]; L may be 0
    goal: np.ndarray  # [2] target of the point
    goal_segments: np.ndarray  # [L, 2, 2] the same lines at the goal; L may be 0
    limits: tuple[float, float, float, float]  # xmin, xmax, ymin, ymax
    axes: tuple[str, str]  # labels of the axes, with units
    background: np.ndarray | None = None  # [P, 2] a fixed curve
    followed: str | None = None  # the part of the body at the point, in words; None: the body itself


NO_SEGMENTS = np.zeros((0, 2, 2))


class GoalEnv(Env):
    """A system with state x (positions, then velocities) that should be near a goal at the end of a fixed horizon.

    `state.obs` is the full physical state x [S] and `state.info["goal"]` the goal [G]. `state.metrics["distance"]` is the
    distance between them, and the reward is its negative. `done` is always 0. The environment clips actions to
    +-action_limit. Methods take one system and are pure: use `vmap` and `jit`. `sketch` and `check_goal` run on the host.
    """

    name: str
    distance_unit: str  # "" if lengths have no unit
    observation_size: int  # S
    action_size: int  # A
    position_size: int  # the first entries of x
    goal_size: int  # G
    dt: float  # s
    differentiable: bool = True  # whether `dynamics` exists and has a gradient
    backend: str = "closed_form"
    # (low [S], high [S]): bounds of every state, infinite for an unbounded coordinate. None: no coordinate is bounded.
    state_limits: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __init__(self, *, horizon: int, action_limit: float):
        """Sets the options that every environment has.

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
        """Distance of x [..., S] from the goal [..., G], in `distance_unit`. Its gradient at the goal is 0."""

    @abc.abstractmethod
    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """One step of the system, x [S], action [A] -> x' [S]; differentiable.

        Raises:
          NotImplementedError: not in closed form (`differentiable` is False).
        """

    @abc.abstractmethod
    def sketch(self, x: jax.Array | np.ndarray, goal: jax.Array | np.ndarray) -> Sketch:
        """The drawing of the state x [S] with the goal [G]."""

    @abc.abstractmethod
    def _why_out_of_reach(self, goal: np.ndarray) -> str | None:
        """The condition that a finite goal [G] violates, in words; None if the goal can be reached."""

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
          state: from `reset`, `state_at` or `step`. Entries that wrappers added to info and metrics are kept.
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
        """Checks a goal that the caller supplies. Runs on the host, not under a transformation.

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
        """The simulator's own state beside x; None in closed form."""
        del x

    def _advance(self, state: State, action: jax.Array) -> tuple[Any, jax.Array]:
        """The simulator's next state and x'."""
        return state.pipeline_state, self.dynamics(jnp.asarray(state.obs), action)


def norm(x: jax.Array) -> jax.Array:
    """The 2-norm over the last axis, with gradient 0, not NaN, at 0."""
    squared = jnp.sum(x**2, axis=-1)
    at_zero = squared == 0
    return jnp.where(at_zero, 0.0, jnp.sqrt(jnp.where(at_zero, 1.0, squared)))
