"""The ant: its observation in the axes of its torso, and its picture."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import math as rotations

import envs
from envs.ant_goal import POSITIONS, AntGoal
from tests.envs.systems import B, System, build

YAW = 1.1  # rad


@pytest.fixture(scope="module")
def system() -> System:
    return build("ant_goal")


@pytest.fixture(scope="module")
def ant(system: System) -> AntGoal:
    assert isinstance(system.env, AntGoal)
    return system.env


@jax.jit
def turned(x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same state and goal in a world that is turned about the vertical and moved."""
    turn = jnp.array([math.cos(YAW / 2), 0.0, 0.0, math.sin(YAW / 2)])
    moved = jnp.array([3.0, -2.0, 0.0])
    place, velocity = (rotations.rotate(vector, turn) for vector in (x[:3], x[POSITIONS : POSITIONS + 3]))
    x = x.at[:3].set(place + moved).at[3:7].set(rotations.quat_mul(turn, x[3:7]))
    return x.at[POSITIONS : POSITIONS + 3].set(velocity), rotations.rotate(jnp.append(goal, 0.0), turn)[:2] + moved[:2]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_view_from_the_torso_does_not_depend_on_place_and_heading(ant: AntGoal, system: System, steps: int):
    x, goal = jnp.asarray(system.starts[0]), jnp.asarray(system.goals[0])
    x_there, goal_there = turned(x, goal)
    even = jnp.arange(B)[:, None] % 2 == 0  # rows of even number are here, the others there
    goals = jnp.where(even, goal, goal_there)
    state = system.state_at(jnp.where(even, x, x_there), goals)
    for action in jax.random.uniform(jax.random.key(4), (steps, ant.action_size), minval=-1.0):
        state = system.step(state, jnp.tile(action, (B, 1)))
    views = np.asarray(jax.jit(jax.vmap(ant.from_torso))(state.obs, goals))
    np.testing.assert_allclose(views[0], views[1], atol=2e-2 if steps else 1e-5)
    assert np.abs(views[0, 9:12]).max() > (0.2 if steps else 0.0)  # it turns, so the angular velocity is compared


def test_the_view_starts_with_the_way_to_the_goal_and_the_vertical(ant: AntGoal):
    x = jnp.zeros(29).at[2].set(0.5).at[3].set(1.0)
    view = jax.jit(ant.from_torso)(x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(view[:6], [1.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    assert view[12] == 0.5


def test_feet_are_drawn_at_the_places_of_brax(ant: AntGoal):
    level = jnp.zeros(29).at[2].set(0.5).at[3].set(1.0)
    straight = ant.sketch(level, jnp.ones(2)).segments
    assert straight.shape == (12, 2, 2)
    # In brax's ant.xml hips lie at (+-0.2, +-0.2) of the torso and each part of a leg is 0.2 * sqrt(2) or 0.4 * sqrt(2) long.
    np.testing.assert_allclose(straight[2::3, 1], [[0.8, 0.8], [-0.8, 0.8], [-0.8, -0.8], [0.8, -0.8]], rtol=1e-5)


def test_a_goal_too_far_for_the_horizon_is_refused():
    with pytest.raises(ValueError, match="ant_goal: option goal_radius: expected at most 2 m, the reach of 5 steps"):
        envs.make("ant_goal", horizon=5, goal_radius=3.0)
    with pytest.raises(ValueError, match=r"ant_goal: unknown physics 'mjx'; \(one of spring\)"):
        envs.make("ant_goal", physics="mjx")
