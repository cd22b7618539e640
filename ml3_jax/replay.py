"""A replay buffer of rollouts, the data that a dynamics model of `ml3_jax.dynamics` is fitted to.

The buffer has a fixed size, so that adding and fitting compile once. The slot of a rollout decides whether it is for training
or held out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ml3_jax.arguments import check_count
from ml3_jax.rollout import Trajectory


class ReplayBuffer(struct.PyTreeNode):
    """A ring of R rollouts of T steps; the slots below `count` are filled, the others hold zeros."""

    states: jax.Array  # [R, T + 1, S]
    actions: jax.Array  # [R, T, A]
    position: jax.Array  # [] int32, the slot that the next rollout takes
    count: jax.Array  # [] int32, slots filled


def make_buffer(
    capacity_rollouts: int, horizon: int, state_size: int, action_size: int, *, rollouts_per_refresh: int = 1
) -> ReplayBuffer:
    """An empty buffer.

    Args:
      capacity_rollouts: R, rollouts.
      horizon: T, steps of each rollout.
      state_size: S.
      action_size: A.
      rollouts_per_refresh: the most rollouts that are added at once; the buffer has to hold them.

    Raises:
      ValueError: a size below 1, or a buffer smaller than one refresh.
    """
    sizes = {"capacity_rollouts": capacity_rollouts, "horizon": horizon, "state_size": state_size, "action_size": action_size}
    for name, size in (*sizes.items(), ("rollouts_per_refresh", rollouts_per_refresh)):
        check_count(name, size)
    if capacity_rollouts < rollouts_per_refresh:
        raise ValueError(
            f"capacity_rollouts: expected at least {rollouts_per_refresh}, the rollouts of one refresh, got "
            f"{capacity_rollouts}: make the buffer larger or collect fewer rollouts"
        )
    return ReplayBuffer(
        states=jnp.zeros((capacity_rollouts, horizon + 1, state_size)),
        actions=jnp.zeros((capacity_rollouts, horizon, action_size)),
        position=jnp.int32(0),
        count=jnp.int32(0),
    )


def add(buffer: ReplayBuffer, trajectories: Trajectory) -> ReplayBuffer:
    """Writes rollouts into the next slots, over the oldest if the buffer is full. Of more than R, it keeps the newest R.

    Args:
      buffer: R rollouts of T steps.
      trajectories: states [B, T + 1, S] and actions [B, T, A], oldest first. They must be finite: call
        `ml3_jax.rollout.check_finite` before.

    Raises:
      ValueError: shapes that do not fit the buffer's.
    """
    states, actions = jnp.asarray(trajectories.states), jnp.asarray(trajectories.actions)
    capacity = buffer.states.shape[0]
    rollouts = states.shape[0]
    if states.shape[1:] != buffer.states.shape[1:] or actions.shape != (rollouts, *buffer.actions.shape[1:]):
        raise ValueError(
            f"trajectories: expected states [B, {', '.join(map(str, buffer.states.shape[1:]))}] and actions "
            f"[B, {', '.join(map(str, buffer.actions.shape[1:]))}], got {states.shape} and {actions.shape}: record the state "
            "vector alone, with the buffer's horizon, and vmap the rollout"
        )
    kept = slice(max(0, rollouts - capacity), rollouts)
    slots = (buffer.position + jnp.arange(kept.start, kept.stop)) % capacity
    return buffer.replace(
        states=buffer.states.at[slots].set(states[kept].astype(buffer.states.dtype), unique_indices=True),
        actions=buffer.actions.at[slots].set(actions[kept].astype(buffer.actions.dtype), unique_indices=True),
        position=(buffer.position + rollouts) % capacity,
        count=jnp.minimum(buffer.count + rollouts, capacity),
    )


def split_slots(capacity_rollouts: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """The training slots and the held-out slots, both ascending.

    Held-out slots are evenly spaced from slot 1 on (1, 11, 21, ... for a tenth), so the second rollout is already held
    out. Slot 0 is for training.

    Args:
      capacity_rollouts: R.
      held_out: the fraction of slots, in (0, 1).
    """
    slots = np.arange(capacity_rollouts)
    # A slot is held out if the running total of the fraction passes an integer there: for a tenth, first after slot 1.
    total = slots * held_out + 1 - 1.5 * held_out
    held = (np.floor(total + held_out) > np.floor(total)) & (slots > 0)
    return slots[~held], slots[held]
