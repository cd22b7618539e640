"""The replay buffer: slots of rollouts, held-out slots, and bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import replay
from ml3_jax.rollout import Trajectory


def numbered(*numbers: int) -> Trajectory:
    """Rollouts of 2 steps, S = 1 and A = 1: all states are the rollout's number and all actions its negative."""
    column = jnp.asarray(numbers, float)[:, None, None]
    return Trajectory(jnp.broadcast_to(column, (len(numbers), 3, 1)), -jnp.broadcast_to(column, (len(numbers), 2, 1)))


def held(buffer: replay.ReplayBuffer) -> list[int]:
    """The number of the rollout in each slot."""
    states, actions = np.asarray(buffer.states), np.asarray(buffer.actions)
    assert np.all(states == states[:, :1])
    assert np.all(actions == -states[:, :1])
    return states[:, 0, 0].astype(int).tolist()


def test_rollouts_fill_the_buffer_and_then_replace_the_oldest():
    buffer = replay.make_buffer(4, 2, 1, 1)
    add = jax.jit(replay.add)
    assert (held(buffer), int(buffer.count), int(buffer.position)) == ([0, 0, 0, 0], 0, 0)
    buffer = add(buffer, numbered(1, 2, 3))
    assert (held(buffer), int(buffer.count), int(buffer.position)) == ([1, 2, 3, 0], 3, 3)
    buffer = add(buffer, numbered(4, 5, 6))
    assert (held(buffer), int(buffer.count), int(buffer.position)) == ([5, 6, 3, 4], 4, 2)


@pytest.mark.parametrize("before", [0, 3])
def test_the_newest_of_too_many_rollouts_stay(before: int):
    buffer = replay.add(replay.make_buffer(4, 2, 1, 1), numbered(*range(100, 100 + before)))
    many = replay.add(buffer, numbered(1, 2, 3, 4, 5, 6))
    one_by_one, add = buffer, jax.jit(replay.add)
    for number in range(1, 7):
        one_by_one = add(one_by_one, numbered(number))
    assert sorted(held(many)) == [3, 4, 5, 6]
    chex.assert_trees_all_equal(many, one_by_one)


def test_a_tenth_of_the_slots_is_held_out_from_the_second_on():
    train, test = replay.split_slots(30, 0.1)
    assert test.tolist() == [1, 11, 21]
    assert sorted([*train, *test]) == list(range(30))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9])
def test_the_held_out_share_is_the_fraction_and_slot_0_trains(fraction: float):
    train, test = replay.split_slots(1000, fraction)
    assert abs(len(test) - 1000 * fraction) <= 1
    assert train[0] == 0
    if fraction <= 0.5:
        assert test[0] == 1


def test_a_buffer_too_small_is_refused():
    with pytest.raises(ValueError, match="capacity_rollouts: expected a whole number of at least 1, got 0"):
        replay.make_buffer(0, 5, 1, 1)
    with pytest.raises(ValueError, match="expected at least 10, the rollouts of one refresh, got 9"):
        replay.make_buffer(9, 5, 1, 1, rollouts_per_refresh=10)
    with pytest.raises(ValueError, match="horizon: expected a whole number of at least 1, got 0"):
        replay.make_buffer(9, 0, 1, 1)
    with pytest.raises(ValueError, match="action_size: expected a whole number of at least 1, got 0"):
        replay.make_buffer(9, 5, 1, 0)


def test_rollouts_of_another_shape_are_refused():
    buffer = replay.make_buffer(4, 2, 1, 1)
    short = jax.tree.map(lambda leaf: leaf[:, 1:], numbered(1))
    alone = jax.tree.map(lambda leaf: leaf[0], numbered(1))
    for trajectories in (short, alone):
        with pytest.raises(ValueError, match=r"expected states \[B, 3, 1\] and actions \[B, 2, 1\], got"):
            replay.add(buffer, trajectories)
