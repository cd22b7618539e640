"""The context of model-based problems: a dynamics model and its data, rollouts on the real system.

`initial_context` fills a buffer with random rollouts and fits nothing. `refit` adds rollouts and fits the model; the refresh of
`ml3_jax.problems.model_based` calls it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ml3_jax import dynamics, replay
from ml3_jax.arguments import check_count
from ml3_jax.rollout import Trajectory, check_finite, rollout
from ml3_jax.types import Context

LOGGED_FITS = 64  # the log has room for the errors of so many fits
NOISE_MEMORY = 0.9  # correlation of successive random actions: white noise would hardly move the system


class System(Protocol):
    """The real system: a Brax environment with settable state, for example one of `envs`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def observation_size(self) -> int:
        """S: an observation is the whole state."""
        ...

    @property
    def action_size(self) -> int:
        """A."""
        ...

    @property
    def action_limit(self) -> float:
        """Actions are clipped to +- this, in the system's units."""
        ...

    def state_at(self, x: jax.Array, goal: jax.Array) -> Any:
        """The environment's state at x [S] with a goal [G]; its `obs` is x."""
        ...

    def step(self, state: Any, action: jax.Array) -> Any:
        """The next state."""
        ...


class FitLog(struct.PyTreeNode):
    """Errors of the model on held-out rollouts after each of the first `LOGGED_FITS` fits; NaN in the rest."""

    fits: jax.Array  # [] int32, number of fits
    rollouts: jax.Array  # [L] int32, rollouts in the buffer
    one_step_error: jax.Array  # [L, S] root mean square, in the unit of each coordinate
    horizon_error: jax.Array  # [L, S] the same after T steps in open loop
    error_against_time: jax.Array  # [T, S] the same after 1, ..., T steps, of the latest fit


class ModelContext(struct.PyTreeNode):
    """The context of the problem's functions; refresh renews it."""

    model: dynamics.DynamicsModel
    buffer: replay.ReplayBuffer
    log: FitLog


def real_rollout(
    system: System,
    act: Callable[[jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    goal: jax.Array,
    key: jax.Array,
    *,
    horizon: int,
) -> Trajectory:
    """One rollout on the real system.

    Args:
      system: the system.
      act: (x [S], key) -> action [A] in units of the system's limit, clipped to the limit.
      start: [S].
      goal: [G].
      key: one typed key.
      horizon: T.

    Returns:
      States [T + 1, S], and the clipped actions [T, A] in the system's units.
    """

    def step(state: Any, action: jax.Array) -> Any:
        return system.step(state, action)

    def policy_fn(x: jax.Array, key: jax.Array) -> jax.Array:
        return system.action_limit * jnp.clip(act(x, key), -1.0, 1.0)

    return rollout(policy_fn, step, system.state_at(start, goal), key, horizon=horizon, observation_fn=lambda s: s.obs)


def random_actions(key: jax.Array, horizon: int, size: int) -> jax.Array:
    """Actions that drift at random, [T, A] in units of the limit: an autoregressive process with standard deviation 1."""
    noise = jax.random.normal(key, (horizon + 1, size))  # the first is the action before the first

    def drift(action: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        action = NOISE_MEMORY * action + jnp.sqrt(1.0 - NOISE_MEMORY**2) * noise
        return action, action

    return jax.lax.scan(drift, noise[0], noise[1:])[1]


def initial_context(
    system: System,
    ensemble: dynamics.Ensemble,
    sample_start: Callable[[jax.Array], jax.Array],
    goal_size: int,
    key: jax.Array,
    *,
    horizon: int,
    rollouts: int,
    capacity: int,
    rollouts_per_refresh: int = 1,
) -> ModelContext:
    """A context with rollouts of random actions in its buffer, and an unfitted model; the first refresh fits it.

    Args:
      system: the real system.
      ensemble: the dynamics model.
      sample_start: key -> [S].
      goal_size: G.
      key: one typed key.
      horizon: T.
      rollouts: number of rollouts, at least 1.
      capacity: rollouts that the buffer holds.
      rollouts_per_refresh: the most rollouts that a refresh adds.

    Raises:
      ValueError: a size below 1, a buffer that is too small, or a rollout that is not finite.
    """
    check_count("rollouts", rollouts)
    size, action_size = system.observation_size, system.action_size
    buffer = replay.make_buffer(capacity, horizon, size, action_size, rollouts_per_refresh=max(rollouts, rollouts_per_refresh))
    model_key, rollout_key = jax.random.split(key)

    def one(key: jax.Array) -> Trajectory:
        start_key, action_key = jax.random.split(key)
        start = system.state_at(sample_start(start_key), jnp.zeros(goal_size))
        return _random_rollout(system, start, action_key, horizon)

    trajectories = jax.jit(jax.vmap(one))(jax.random.split(rollout_key, rollouts))
    check_finite(trajectories, system.name)
    unknown = jnp.full((LOGGED_FITS, size), jnp.nan)
    log = FitLog(
        fits=jnp.int32(0),
        rollouts=jnp.zeros(LOGGED_FITS, jnp.int32),
        one_step_error=unknown,
        horizon_error=unknown,
        error_against_time=jnp.full((horizon, size), jnp.nan),
    )
    return ModelContext(ensemble.init(model_key), replay.add(buffer, trajectories), log)


def _random_rollout(system: System, start: Any, key: jax.Array, horizon: int) -> Trajectory:
    """A rollout of `random_actions` from the system's state `start`."""
    actions = system.action_limit * jnp.clip(random_actions(key, horizon, system.action_size), -1.0, 1.0)

    def planned(time: jax.Array, key: jax.Array) -> jax.Array:
        del key  # the actions are drawn already
        return actions[time]

    def step(state: tuple[Any, jax.Array], action: jax.Array) -> tuple[Any, jax.Array]:
        return system.step(state[0], action), state[1] + 1

    return rollout(
        planned,
        step,
        (start, jnp.int32(0)),
        key,
        horizon=horizon,
        observation_fn=lambda state: state[1],
        record_fn=lambda state: state[0].obs,
    )


def refit(ensemble: dynamics.Ensemble, context: ModelContext, trajectories: Trajectory, key: jax.Array) -> ModelContext:
    """The context with added rollouts [B, ...] and a refitted model; rollouts with NaN or inf are left out."""
    finite = jnp.all(jnp.isfinite(trajectories.states), axis=(1, 2)) & jnp.all(jnp.isfinite(trajectories.actions), axis=(1, 2))
    # A rollout that diverged would ruin the model: a copy of a known rollout replaces it.
    known = Trajectory(context.buffer.states[0], context.buffer.actions[0])
    trajectories = jax.tree.map(
        lambda new, old: jnp.where(finite.reshape(-1, *[1] * (new.ndim - 1)), new, old[None]), trajectories, known
    )
    buffer = replay.add(context.buffer, trajectories)
    model, metrics = ensemble.fit(context.model, buffer, key)
    log, entry = context.log, jnp.minimum(context.log.fits, LOGGED_FITS)  # .at drops an entry beyond the last
    log = FitLog(
        fits=log.fits + 1,
        rollouts=log.rollouts.at[entry].set(buffer.count),
        one_step_error=log.one_step_error.at[entry].set(metrics.one_step_error),
        horizon_error=log.horizon_error.at[entry].set(metrics.coordinate_error[-1]),
        error_against_time=metrics.coordinate_error,
    )
    return ModelContext(model, buffer, log)


def predict_fn(ensemble: dynamics.Ensemble) -> Callable[[Context, jax.Array, jax.Array], jax.Array]:
    """(context, x [S], action [A] in the system's units) -> the next state by the context's model."""

    def predict(context: Context, x: jax.Array, action: jax.Array) -> jax.Array:
        return ensemble.predict(context.model, x, action)

    return predict


def learning_curve(log: FitLog) -> dict[str, np.ndarray]:
    """The entries of a log, on the host: {"rollouts": [F], "one_step_error": [F, S], "horizon_error": [F, S]} of F fits."""
    fits = min(int(log.fits), LOGGED_FITS)
    return {name: np.asarray(getattr(log, name))[:fits] for name in ("rollouts", "one_step_error", "horizon_error")}
