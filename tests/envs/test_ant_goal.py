"""The ant: what it is told of itself, and how it is drawn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import math as rotations

import envs
from envs.ant_goal import POSITIONS, AntGoal

YAW = 1.1  # rad


@pytest.fixture(scope="module")
def ant() -> AntGoal:
    made = envs.make("ant_goal")
    assert isinstance(made, AntGoal)
    return made


def turned(x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same ant, way and motion in a world that is turned about the vertical and moved."""
    turn = jnp.array([math.cos(YAW / 2), 0.0, 0.0, math.sin(YAW / 2)])
    moved = jnp.array([3.0, -2.0, 0.0])
    place, velocity = (rotations.rotate(vector, turn) for vector in (x[:3], x[POSITIONS : POSITIONS + 3]))
    x = x.at[:3].set(place + moved).at[3:7].set(rotations.quat_mul(turn, x[3:7]))
    return x.at[POSITIONS : POSITIONS + 3].set(velocity), rotations.rotate(jnp.append(goal, 0.0), turn)[:2] + moved[:2]


def test_what_it_is_told_does_not_depend_on_where_it_stands_and_looks(ant: AntGoal):
    x, goal = ant.sample_start(jax.random.key(0)), ant.sample_goal(jax.random.key(1))
    np.testing.assert_allclose(ant.from_torso(x, goal), ant.from_torso(*turned(x, goal)), atol=1e-5)


def test_nor_does_it_after_steps_of_the_simulator(ant: AntGoal):
    x, goal = ant.sample_start(jax.random.key(2)), ant.sample_goal(jax.random.key(3))
    actions = jax.random.uniform(jax.random.key(4), (3, ant.action_size), minval=-1.0)

    @jax.jit
    def after(x: jax.Array, goal: jax.Array) -> jax.Array:
        states = jax.lax.scan(lambda s, a: (ant.step(s, a), None), ant.state_at(x, goal), actions)[0]
        return ant.from_torso(jnp.asarray(states.obs), goal)

    told, again = np.asarray(after(x, goal)), np.asarray(after(*turned(x, goal)))
    np.testing.assert_allclose(told, again, atol=2e-2)
    assert np.abs(told[9:12]).max() > 0.2  # it turns: its angular velocity is among what is compared


def test_the_way_is_to_the_goal_and_up_is_up(ant: AntGoal):
    x = jnp.zeros(29).at[2].set(0.5).at[3].set(1.0)
    told = ant.from_torso(x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(told[:6], [1.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    assert told[12] == 0.5


def test_feet_are_drawn_where_brax_has_them(ant: AntGoal):
    x = ant.sample_start(jax.random.key(5))
    sketch = ant.sketch(x, jnp.ones(2))
    assert sketch.segments.shape == (12, 2, 2)
    # In brax's ant.xml hips lie at (+-0.2, +-0.2) of the torso and each part of a leg is 0.2 * sqrt(2) or 0.4 * sqrt(2) long.
    level = jnp.zeros(29).at[2].set(0.5).at[3].set(1.0)
    straight = ant.sketch(level, jnp.ones(2)).segments
    np.testing.assert_allclose(straight[2::3, 1], [[0.8, 0.8], [-0.8, 0.8], [-0.8, -0.8], [0.8, -0.8]], rtol=1e-5)


def test_a_goal_beyond_what_the_horizon_leaves_time_for_is_refused():
    with pytest.raises(ValueError, match="ant_goal: option goal_radius: expected at most 2 m, what 5 steps leave time for"):
        envs.make("ant_goal", horizon=5, goal_radius=3.0)
    with pytest.raises(ValueError, match=r"ant_goal: unknown physics 'mjx'; \(one of spring\)"):
        envs.make("ant_goal", physics="mjx")
