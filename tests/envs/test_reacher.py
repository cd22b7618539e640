"""The arm in both physics against MuJoCo's C library, its mass matrix, gradients, limits and the place of its tip."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco as mujoco_c
import numpy as np
import pytest

import envs
from envs import reacher
from envs.reacher import Reacher
from envs.reacher_mjx import ReacherMjx
from tests.envs.systems import B, batch_functions

mujoco: Any = mujoco_c  # compiled, without types
# The default, and a light arm: at torques of 0.03 N m the inertia of its links counts.
DEFAULT: dict[str, Any] = {}
LIGHT: dict[str, Any] = {"gear": 0.3, "armature": 0.001, "damping": 0.005}


def model_of(**options) -> Any:
    return mujoco.MjModel.from_xml_string(ReacherMjx(**options).mjcf())


def inputs(env: envs.GoalEnv) -> tuple[jax.Array, jax.Array]:
    """Starts [B, 4] in motion, and actions [B, T, 2]."""
    start_key, speed_key, action_key = jax.random.split(jax.random.key(0), 3)
    starts = jax.jit(jax.vmap(env.sample_start))(jax.random.split(start_key, B))
    starts = starts.at[:, 2:].set(jax.random.uniform(speed_key, (B, 2), minval=-1.0))
    actions = jax.random.uniform(action_key, (B, env.horizon, 2), minval=-env.action_limit, maxval=env.action_limit)
    return starts, actions


def by_mujoco(model: Any, starts: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """States [B, T, 4] of MuJoCo C, in float64."""
    states = np.zeros((*actions.shape[:2], 4))
    for b, start in enumerate(starts):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = start[:2], start[2:]
        for t, action in enumerate(actions[b]):
            data.ctrl[:] = action
            mujoco.mj_step(model, data)
            states[b, t] = np.concatenate([data.qpos, data.qvel])
    return states


def rollout(env: envs.GoalEnv, starts: jax.Array, actions: jax.Array) -> jax.Array:
    """States [B, T, 4] of an environment."""

    def one(x: jax.Array, actions: jax.Array) -> jax.Array:
        def step(state: envs.State, action: jax.Array) -> tuple[envs.State, jax.Array]:
            state = env.step(state, action)
            return state, jnp.asarray(state.obs)

        return jax.lax.scan(step, env.state_at(x, jnp.zeros(2)), actions)[1]

    return jax.vmap(one)(starts, actions)


def assert_agree(states: Any, expected: np.ndarray) -> None:
    assert 0.3 < np.abs(expected[..., :2]).max() < reacher.LIMIT  # it moves, and hits no limit
    assert np.abs(np.asarray(states)[..., :2] - expected[..., :2]).max() < 2e-6  # rad
    assert np.abs(np.asarray(states)[..., 2:] - expected[..., 2:]).max() < 1e-5  # rad/s


@pytest.mark.parametrize("options", [DEFAULT, LIGHT], ids=["default", "light"])
def test_the_closed_form_agrees_with_mujoco(options: dict[str, Any]):
    env = Reacher(**options)
    starts, actions = inputs(env)
    expected = by_mujoco(model_of(**options), np.asarray(starts), np.asarray(actions))
    assert_agree(jax.jit(lambda x, u: rollout(env, x, u))(starts, actions), expected)


def test_mjx_agrees_with_mujoco_with_the_options_and_with_other_motors():
    arms = [ReacherMjx(**DEFAULT), ReacherMjx(**LIGHT), ReacherMjx(**DEFAULT)]
    models = [model_of(**DEFAULT), model_of(**LIGHT), model_of(**DEFAULT)]
    gear = jnp.array([120.0, 60.0])  # of each joint its own
    models[2].actuator_gear[:, 0] = gear
    arms[2]._system = jax.jit(lambda gear: arms[0].with_gear(gear)._system)(gear)
    for arm, model in zip(arms, models, strict=True):
        starts, actions = inputs(arm)
        state_at, step = batch_functions(arm)
        state, states = state_at(starts, jnp.zeros((B, 2))), []
        for t in range(arm.horizon):
            state = step(state, actions[:, t])
            states.append(state.obs)
        assert_agree(np.stack(states, axis=1), by_mujoco(model, np.asarray(starts), np.asarray(actions)))


def test_other_motors_give_the_step_of_an_arm_that_is_built_with_them():
    x, action = jnp.array([0.1, 0.2, 0.5, -1.0]), jnp.array([0.05, -0.08])
    built, changed = Reacher(gear=60.0, goal_range=0.2), Reacher()
    after = jax.jit(lambda gear, action: changed.with_gear(gear).dynamics(x, action))
    alike = jnp.full(2, 60.0)
    np.testing.assert_allclose(after(alike, action), jax.jit(built.dynamics)(x, action), rtol=1e-6)
    # Each joint has its own: twice the gear is twice the action.
    uneven = after(jnp.array([120.0, 60.0]), action)
    np.testing.assert_allclose(uneven, after(alike, action * jnp.array([2.0, 1.0])), rtol=1e-5)


def test_the_options_change_the_motion():
    # Without this the tests above could agree on the file's own numbers.
    starts, actions = inputs(Reacher())
    default = by_mujoco(model_of(), np.asarray(starts), np.asarray(actions))
    for option in ("gear", "armature", "damping"):
        changed = by_mujoco(model_of(**{option: 0.7, "action_limit": 30.0}), np.asarray(starts), np.asarray(actions))
        assert np.abs(changed - default).max() > 1e-2


def test_the_links_have_the_masses_of_the_file():
    model = model_of()
    np.testing.assert_allclose(model.body_mass[1:], reacher.MASS, rtol=1e-9)
    assert pytest.approx(0.036, abs=5e-4) == reacher.MASS  # kg
    np.testing.assert_allclose(model.body_inertia[1:, 0], reacher.INERTIA, rtol=1e-9)
    np.testing.assert_allclose(model.body_inertia[1:, 1], reacher.INERTIA, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(model.body_ipos[1:], axis=1), reacher.CENTRE, rtol=1e-9)
    np.testing.assert_allclose(model.jnt_range, [[-reacher.LIMIT, reacher.LIMIT]] * 2)
    assert model.opt.timestep == Reacher.dt


def test_the_mass_matrix_agrees_with_mujoco():
    model, env = model_of(**LIGHT), Reacher(**LIGHT)
    data = mujoco.MjData(model)
    for q in np.random.default_rng(0).uniform(-3, 3, (10, 2)):
        data.qpos[:] = q
        mujoco.mj_forward(model, data)
        expected = np.zeros((2, 2))
        mujoco.mj_fullM(model, data, expected)
        np.testing.assert_allclose(env.mass_matrix(q), expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_closed_form_agrees_with_mujoco_to_rounding_in_float64():
    env = Reacher(**LIGHT)
    starts, actions = inputs(env)
    expected = by_mujoco(model_of(**LIGHT), np.asarray(starts), np.asarray(actions))
    states = jax.jit(lambda x, u: rollout(env, x, u))(starts, actions)
    np.testing.assert_allclose(states, expected, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_gradients_agree_with_finite_differences():
    env = Reacher(**LIGHT)
    starts, actions = inputs(env)
    x, actions = starts[0], 0.5 * actions[0, :20]

    def final(x: jax.Array, actions: jax.Array) -> jax.Array:
        return env.distance(jax.lax.scan(lambda x, a: (env.dynamics(x, a), None), x, actions)[0], jnp.array([0.5, -0.5]))

    gradients = jax.jit(jax.grad(final, argnums=(0, 1)))(x, actions)
    directions = (jnp.array([0.3, -0.2, 0.5, 0.4]), jnp.cos(jnp.arange(40.0)).reshape(20, 2))
    compiled, eps = jax.jit(final), 1e-5
    for i, (dx, da) in enumerate([(directions[0], 0.0), (0.0, directions[1])]):
        above, below = ((x + sign * eps * dx, actions + sign * eps * da) for sign in (1, -1))
        expected = (compiled(*above) - compiled(*below)) / (2 * eps)
        np.testing.assert_allclose(jnp.vdot(gradients[i], directions[i]), expected, rtol=1e-6)


def test_a_limit_of_the_closed_form_stops_the_joint_and_releases_it():
    dynamics = jax.jit(Reacher().dynamics)
    held = dynamics(jnp.array([2.99, -2.99, 5.0, -5.0]), jnp.zeros(2))
    np.testing.assert_allclose(held, [3.0, -3.0, 0.0, 0.0], atol=1e-6)
    back = dynamics(jnp.array([3.0, 0.0, 0.0, 0.0]), jnp.array([-0.1, 0.0]))
    assert back[0] < 3.0
    assert back[2] < 0


def test_reach_is_the_angle_that_a_joint_turns_at_full_torque():
    env = Reacher(action_limit=0.03, goal_range=0.5, start_spread=0.0)
    dynamics = jax.jit(env.dynamics)
    for joint in range(2):
        x = jnp.zeros(4)
        for _ in range(env.horizon):
            x = dynamics(x, jnp.zeros(2).at[joint].set(0.03))
        assert float(x[joint]) == pytest.approx(env.reach[joint], rel=1e-3)
    with pytest.raises(ValueError, match=r"goal_range: expected at most 0.942 rad"):
        Reacher(action_limit=0.03)


def test_the_tip_agrees_with_mujoco_and_the_sketch():
    env, model = Reacher(), model_of()
    np.testing.assert_allclose(env.tip(jnp.array([[0.0, 0.0], [np.pi / 2, -np.pi / 2]])), [[0.2, 0.0], [0.1, 0.1]], atol=1e-6)
    data, q = mujoco.MjData(model), np.array([0.4, 1.1])
    data.qpos[:] = q
    mujoco.mj_forward(model, data)
    forearm = data.body("forearm")
    expected = forearm.xpos + forearm.xmat.reshape(3, 3) @ [reacher.LENGTH, 0, 0]
    np.testing.assert_allclose(env.tip(jnp.asarray(q)), expected[:2], atol=1e-6)
    sketch = env.sketch(np.concatenate([q, np.zeros(2)]), q)
    np.testing.assert_allclose(sketch.point, expected[:2], atol=1e-6)
    np.testing.assert_allclose(sketch.segments[:, 0], [[0, 0], forearm.xpos[:2]], atol=1e-6)
    np.testing.assert_allclose(sketch.goal_segments, sketch.segments)


def test_goals_of_the_tip_are_the_places_of_drawn_angles():
    joints, tips = (envs.make("reacher", goal_space=space, goal_range=1.0) for space in ("joints", "tip"))
    assert isinstance(tips, Reacher)
    key = jax.random.key(3)
    np.testing.assert_allclose(tips.sample_goal(key), tips.tip(joints.sample_goal(key)), rtol=1e-6)
    x = jnp.array([0.3, -0.4, 1.0, 1.0])
    np.testing.assert_allclose(
        tips.distance(x, jnp.array([0.1, 0.1])), np.hypot(*(np.asarray(tips.tip(x[:2])) - 0.1)), rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"a position within 0\.2 m"):
        tips.check_goal([0.3, 0.0])


def test_goals_beyond_an_inner_square_fill_the_ring_evenly():
    env = envs.make("reacher", goal_range=1.5, goal_within=1.0)
    goals = np.asarray(jax.jit(jax.vmap(env.sample_goal))(jax.random.split(jax.random.key(0), 20_000)))
    size = np.abs(goals).max(axis=1)
    assert size.min() >= 1.0
    assert size.max() <= 1.5
    # The share within 1.25 of an area that grows as the square: (1.25^2 - 1) / (1.5^2 - 1) = 0.45.
    np.testing.assert_allclose(np.mean(size <= 1.25), 0.45, atol=0.012)
    np.testing.assert_allclose(goals.mean(axis=0), 0.0, atol=0.03)
    np.testing.assert_allclose(np.mean(np.abs(goals[:, 0]) > np.abs(goals[:, 1])), 0.5, atol=0.012)
