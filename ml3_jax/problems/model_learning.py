"""The context of model-based problems: a dynamics model and the rollouts on the real system that it was fitted to.

`initial_context` fills a buffer with random rollouts and fits nothing yet; `refit` adds rollouts and fits, which is what the
refresh of `ml3_jax.problems.model_based` does.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ml3_jax import dynamics, replay
from ml3_jax.rollout import Trajectory, check_finite, rollout
from ml3_jax.types import Context

LOGGED_FITS = 64  # fits whose errors are kept
NOISE_MEMORY = 0.9  # of random actions, a step: they push long enough to get somewhere


class System(Protocol):
    """The real system: a Brax environment that can be put anywhere, such as those of `envs`."""

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
    """Errors of the model on held-out rollouts after each of the first `LOGGED_FITS` fits; NaN where there was none."""

    fits: jax.Array  # [] int32, how many there were in all
    rollouts: jax.Array  # [L] int32, rollouts in the buffer
    one_step_error: jax.Array  # [L, S] root mean square, in the unit of each coordinate
    horizon_error: jax.Array  # [L, S] the same after T steps in open loop
    error_against_time: jax.Array  # [T, S] the same after 1, ..., T steps, of the latest fit


class ModelContext(struct.PyTreeNode):
    """What the problem's functions get as context, and refresh renews."""

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
      act: (x [S], key) -> action [A] in units of the system's limit, beyond which it is clipped.
      start: [S].
      goal: [G].
      key: one typed key.
      horizon: T.

    Returns:
      States [T + 1, S], and the actions as the system took them [T, A], in its units.
    """

    def step(state: Any, action: jax.Array) -> Any:
        return system.step(state, action)

    def policy_fn(x: jax.Array, key: jax.Array) -> jax.Array:
        return system.action_limit * jnp.clip(act(x, key), -1.0, 1.0)

    return rollout(policy_fn, step, system.state_at(start, goal), key, horizon=horizon, observation_fn=lambda s: s.obs)


def random_actions(key: jax.Array, horizon: int, size: int) -> jax.Array:
    """Actions that drift at random, [T, A] in units of the limit: an autoregressive process of standard deviation 1."""
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
    """A context with rollouts of random actions in its buffer, and a model that is not fitted yet: the first refresh does it.

    Args:
      system: the real system.
      ensemble: the kind of model.
      sample_start: key -> [S].
      goal_size: G.
      key: one typed key.
      horizon: T.
      rollouts: how many there are at first, at least 1.
      capacity: the most that the buffer holds.
      rollouts_per_refresh: the most that is added at once.

    Raises:
      ValueError: a size below 1, a buffer that is too small, or a rollout that is not finite.
    """
    if rollouts < 1:
        raise ValueError(f"rollouts: expected at least 1 for the first fit, got {rollouts}")
    size, action_size = system.observation_size, system.action_size
    buffer = replay.make_buffer(capacity, horizon, size, action_size, rollouts_per_refresh=max(rollouts, rollouts_per_refresh))
    model_key, rollout_key = jax.random.split(key)

    @jax.jit
    def first(key: jax.Array) -> Trajectory:
        def one(key: jax.Array) -> Trajectory:
            start_key, action_key = jax.random.split(key)
            actions = system.action_limit * jnp.clip(random_actions(action_key, horizon, action_size), -1.0, 1.0)

            def planned(time: jax.Array, key: jax.Array) -> jax.Array:
                del key  # they are drawn already
                return actions[time]

            def step(state: tuple[Any, jax.Array], action: jax.Array) -> tuple[Any, jax.Array]:
                return system.step(state[0], action), state[1] + 1

            start = system.state_at(sample_start(start_key), jnp.zeros(goal_size))
            return rollout(
                planned,
                step,
                (start, jnp.int32(0)),
                action_key,
                horizon=horizon,
                observation_fn=lambda state: state[1],
                record_fn=lambda state: state[0].obs,
            )

        return jax.vmap(one)(jax.random.split(key, rollouts))

    trajectories = first(rollout_key)
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


def refit(ensemble: dynamics.Ensemble, context: ModelContext, trajectories: Trajectory, key: jax.Array) -> ModelContext:
    """The context with rollouts added, [B, T + 1, S] and [B, T, A], and the model fitted anew; broken ones are left out."""
    finite = jnp.all(jnp.isfinite(trajectories.states), axis=(1, 2)) & jnp.all(jnp.isfinite(trajectories.actions), axis=(1, 2))
    # A policy that diverged on the way must not ruin the model: a copy of a rollout that is already known takes its place.
    known = Trajectory(context.buffer.states[0], context.buffer.actions[0])
    trajectories = jax.tree.map(
        lambda new, old: jnp.where(finite.reshape(-1, *[1] * (new.ndim - 1)), new, old[None]), trajectories, known
    )
    buffer = replay.add(context.buffer, trajectories)
    model, metrics = ensemble.fit(context.model, buffer, key)
    log, entry = context.log, jnp.minimum(context.log.fits, LOGGED_FITS)  # beyond the last entry, .at drops it
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
    """What a log holds, on the host: {"rollouts": [F], "one_step_error": [F, S], "horizon_error": [F, S]} of F fits."""
    fits = min(int(log.fits), LOGGED_FITS)
    return {name: np.asarray(getattr(log, name))[:fits] for name in ("rollouts", "one_step_error", "horizon_error")}
