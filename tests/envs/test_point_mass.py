"""The point mass: its closed form over many steps, the places of its goals, and its reach."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point_mass import PointMass


def goals(env: PointMass, **options: Any) -> np.ndarray:
    """500 goals [500, 2] m."""
    sample = jax.jit(jax.vmap(lambda key: env.sample_goal(key, **options)))
    return np.asarray(sample(jax.random.split(jax.random.key(0), 500)))


def test_n_steps_agree_with_the_closed_form():
    # Constant a from (p, v), no damping: v_n = v + n dt a;  p_n = p + n dt v + n (n + 1) / 2 dt^2 a.
    env = PointMass(dt=0.1)
    x, a, n = jnp.array([0.1, -0.2, 0.3, -0.4]), jnp.array([0.5, -1.0]), 20
    dynamics = jax.jit(env.dynamics)
    for _ in range(n):
        x = dynamics(x, a)
    expected = [
        0.1 + 2.0 * 0.3 + 210 * 0.01 * 0.5,
        -0.2 + 2.0 * -0.4 + 210 * 0.01 * -1.0,
        0.3 + 2.0 * 0.5,
        -0.4 + 2.0 * -1.0,
    ]
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_damping_reduces_the_velocity():
    # v' = 1 + 0.1 (0 - 2 * 1) = 0.8;  p' = 0 + 0.1 * 0.8.
    env = PointMass(dt=0.1, damping=2.0, goal_radius=(0.1, 0.2))
    np.testing.assert_allclose(env.dynamics(jnp.array([0.0, 0.0, 1.0, 0.0]), jnp.zeros(2)), [0.08, 0.0, 0.8, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("side", "sign"), [("right", 1), ("left", -1)])
def test_goals_lie_in_their_half_of_the_ring(side: str, sign: int):
    drawn = goals(PointMass(half_plane=side))
    assert np.all(sign * drawn[:, 0] > 0)
    np.testing.assert_array_equal(drawn, goals(PointMass(), half_plane=side))
    radius = np.linalg.norm(drawn, axis=1)
    assert radius.min() >= 0.5 - 1e-6
    assert radius.max() <= 1.5 + 1e-6
    # Even over the area from 0.5 to 1.5: a fraction (1.25 - 0.25) / 2 of it lies within sqrt(1.25). 500 draws: sd 0.022.
    assert np.mean(radius < np.sqrt(1.25)) == pytest.approx(0.5, abs=0.09)


def test_goals_lie_on_both_sides_by_default():
    assert np.mean(goals(PointMass())[:, 0] > 0) == pytest.approx(0.5, abs=0.09)


def test_reach_is_the_distance_from_the_worst_start_at_full_acceleration():
    # -0.1 - 25 * 0.1 * 0.1 + 25 * 26 / 2 * 0.01 * 1.
    env = PointMass()
    assert env.reach == pytest.approx(2.9)
    x, dynamics = jnp.array([-0.1, 0.1, -0.1, 0.1]), jax.jit(env.dynamics)
    for _ in range(env.horizon):
        x = dynamics(x, jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(x[:2], [2.9, -2.9], rtol=1e-5)
    env.check_goal([2.9, -2.9])
    with pytest.raises(ValueError, match=r"within \+-2.9 m"):
        env.check_goal([0.0, 2.91])
