"""The mountain car: one step by hand, its walls, its speed limit, and the need to swing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.mountain_car import MountainCar

dynamics = jax.jit(MountainCar().dynamics)


def step(x: list[float], u: float) -> np.ndarray:
    return np.asarray(dynamics(jnp.array(x), jnp.array([u])))


def test_one_step_by_hand():
    # At x = -0.55, v = 0.2, u = 0.1: cos(-1.65) = -0.0791209
    # v' = 0.2 + 0.1 (-1.96 * -0.0791209 + 0.1 / 0.2 - 0.3 * 0.2) = 0.2 + 0.1 (0.155077 + 0.5 - 0.06) = 0.2595077
    # x' = -0.55 + 0.1 v' = -0.5240492
    np.testing.assert_allclose(step([-0.55, 0.2], 0.1), [-0.5240492, 0.2595077], rtol=1e-5)


def test_the_position_moves_by_the_speed_before_its_limit():
    # v' = 1.5 + 0.1 (-1.96 cos(-1.5) + 0.25 / 0.2 - 0.45) = 1.5 + 0.1 (-0.138645 + 1.25 - 0.45) = 1.5661355
    # x' = -0.5 + 0.1 v'
    np.testing.assert_allclose(step([-0.5, 1.5], 0.25), [-0.3433864, 1.5], rtol=1e-5)


def test_the_left_wall_stops_the_car_and_the_right_one_limits_its_position_alone():
    left = step([-1.19, -1.0], 0.0)
    np.testing.assert_allclose(left, [-1.2, 0.0])
    right = step([0.49, 1.0], 0.0)
    # v' = 1 + 0.1 (-1.96 cos(1.47) - 0.3) = 1 + 0.1 (-0.197233 - 0.3) = 0.950277
    np.testing.assert_allclose(right, [0.5, 0.950277], rtol=1e-5)


def test_starts_lie_evenly_around_the_valley_and_the_goal_is_fixed():
    env = MountainCar(start_spread=0.1)
    starts = np.asarray(jax.jit(jax.vmap(env.sample_start))(jax.random.split(jax.random.key(0), 200)))
    assert np.all(np.abs(starts[:, 0] + 0.55) <= 0.1 + 1e-6)
    assert np.std(starts[:, 0]) == pytest.approx(0.1 / np.sqrt(3), rel=0.15)
    np.testing.assert_array_equal(starts[:, 1], 0.0)
    np.testing.assert_allclose(MountainCar().sample_start(jax.random.key(0)), [-0.55, 0.0])
    np.testing.assert_allclose(env.sample_goal(jax.random.key(1)), [0.5, 1.0375])


def test_swinging_reaches_the_goal_and_full_force_ahead_does_not():
    env = MountainCar()

    def best(policy: Callable[[np.ndarray], np.ndarray]) -> float:
        x, furthest = env.sample_start(jax.random.key(0)), -1.2
        for _ in range(env.horizon):
            x = dynamics(x, policy(np.asarray(x)))
            furthest = max(furthest, float(x[0]))
        return furthest

    assert best(lambda x: np.array([0.25])) < 0.4
    assert best(lambda x: np.where(x[1:] > 0, 0.25, -0.25)) == 0.5
