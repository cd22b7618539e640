"""Every environment through one suite. A new environment is a row of `systems.ROWS`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from tests.envs.systems import ROWS, B, System, build, row_of


@pytest.fixture(scope="module", params=ROWS)
def system(request: pytest.FixtureRequest) -> System:
    return build(request.param)


def state_shape(env: envs.GoalEnv) -> envs.State:
    """The shapes and types of a state; nothing is computed."""
    floats = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (env.observation_size, env.goal_size))
    return jax.eval_shape(env.state_at, *floats)


def env_view(state: envs.State) -> envs.State:
    """A state without its simulator's part."""
    return state.replace(pipeline_state=None)


def test_declared_sizes_and_types_are_those_of_the_states(system: System):
    env = system.env
    assert env.name == system.row.name
    assert env.backend == system.row.options.get("physics", "closed_form")
    assert env.dt > 0
    state = state_shape(env)
    assert state.obs.shape == (env.observation_size,)
    assert state.info["goal"].shape == (env.goal_size,)
    assert 1 <= env.position_size < env.observation_size
    assert state.obs.dtype == jnp.float32
    assert state.reward.shape == state.done.shape == state.metrics["distance"].shape == ()
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((env.action_size,), jnp.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_state_at_returns_the_given_state_and_goal(system: System):
    state = system.state_at(system.starts, system.goals)
    np.testing.assert_array_equal(state.obs, system.starts)
    np.testing.assert_array_equal(state.info["goal"], system.goals)
    distance = system.env.distance(system.starts, system.goals)
    np.testing.assert_allclose(state.metrics["distance"], distance, rtol=1e-6)
    np.testing.assert_allclose(state.reward, -distance, rtol=1e-6)


def test_reset_depends_on_its_key_alone(system: System):
    @jax.jit
    def reset(seed: jax.Array) -> tuple[jax.Array, jax.Array]:  # the simulator's part of the state need not be computed
        state = type(system.env).reset(system.env, jax.random.key(seed))
        return jnp.asarray(state.obs), state.info["goal"]

    first, again, other = (reset(jnp.asarray(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(np.asarray(first[0]) != np.asarray(other[0]))


def test_a_rollout_over_the_horizon_is_finite_and_reports_its_distance(system: System):
    states = system.rollout(system.starts, system.actions)
    assert states.obs.shape == (B, system.env.horizon, system.env.observation_size)
    chex.assert_tree_all_finite(states)
    distance = system.env.distance(states.obs, system.goals[:, None])
    assert distance.shape == (B, system.env.horizon)
    np.testing.assert_allclose(states.distance, distance, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.reward, -states.distance)
    np.testing.assert_array_equal(states.done, np.zeros_like(states.done))
    assert np.all(np.std(states.obs[:, :, 0], axis=1) > 0)  # it moved


def test_a_vmapped_step_treats_each_row_alone(system: System):
    state, other = (system.state_at(x, system.goals) for x in (system.starts, system.starts[::-1].copy()))
    mixed = jax.tree.map(lambda own, theirs: jnp.concatenate([own[:1], theirs[1:]]), state, other)
    actions = np.concatenate([system.actions[:1, 0], system.actions[1:, 1]])
    after = row_of(system.step(state, system.actions[:, 0]), 0)
    chex.assert_trees_all_equal(env_view(row_of(system.step(mixed, actions), 0)), env_view(after))
    if system.env.backend != "closed_form":  # MuJoCo's C library steps one arm at a time, see test_reacher
        return
    x, goal, action = (jnp.asarray(rows[0]) for rows in (system.starts, system.goals, system.actions[:, 0]))
    one = system.env.step(system.env.state_at(x, goal), action)
    with jax.disable_jit():
        eager = system.env.step(system.env.state_at(x, goal), action)
    chex.assert_trees_all_close(one, after, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(eager, after, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_states_are_in_float64_where_jax_is(system: System):
    env = envs.make(system.row.name, **system.row.options)
    sizes = (env.observation_size, env.goal_size)
    state = jax.eval_shape(env.state_at, *(jax.ShapeDtypeStruct((size,), jnp.float64) for size in sizes))
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((env.action_size,), jnp.float64))
    assert {state.obs.dtype, after.obs.dtype, after.reward.dtype} == {jnp.dtype("float64")}


def test_actions_beyond_the_limit_are_clipped(system: System):
    limit = system.env.action_limit
    signs = np.sign(system.actions[:, :10])
    far = system.rollout(system.starts, 1e6 * signs)
    at = system.rollout(system.starts, limit * signs)
    inside = system.rollout(system.starts, 0.9 * limit * signs)
    np.testing.assert_array_equal(far.obs, at.obs)
    assert np.abs(inside.obs - at.obs).max() > 1e-3


def test_states_stay_finite_from_extreme_starts(system: System):
    extremes = np.array([system.row.extremes[b % len(system.row.extremes)] for b in range(B)], np.float32)
    signs = np.where(np.arange(B) % 2 == 0, 1.0, -1.0)[:, None, None]
    chex.assert_tree_all_finite(system.rollout(extremes, np.float32(1e9 * signs) * np.ones_like(system.actions)))


def test_drawn_goals_are_within_reach_and_others_are_refused(system: System):
    env = system.env
    for goal in np.asarray(jax.jit(jax.vmap(env.sample_goal))(jax.random.split(jax.random.key(5), 50))):
        env.check_goal(goal)
    with pytest.raises(ValueError, match=r"goal: expected .* got .*; choose"):
        env.check_goal(system.row.far)
    with pytest.raises(ValueError, match=r"expected finite numbers"):
        env.check_goal([float("nan")] * env.goal_size)
    with pytest.raises(ValueError, match=rf"expected shape \({env.goal_size},\), got"):
        env.check_goal(np.zeros(env.goal_size + 1))


def test_distance_and_its_gradient_are_zero_at_the_goal(system: System):
    env, goal = system.env, jnp.asarray(system.goals[0])
    size = min(env.position_size, env.goal_size)
    x = jnp.zeros(env.observation_size).at[:size].set(goal[:size])
    distance_and_gradient = jax.jit(jax.value_and_grad(env.distance))
    distance, gradient = distance_and_gradient(x, goal)
    assert distance == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(x))
    _, away = distance_and_gradient(x.at[0].add(0.5), goal)
    np.testing.assert_allclose(away[0], 1.0, rtol=1e-6)


def test_dynamics_equals_the_step_and_has_a_gradient_or_is_refused(system: System):
    env, x, actions = system.env, jnp.asarray(system.starts[0]), 0.5 * system.actions[:, 0]
    if not env.differentiable:
        with pytest.raises(NotImplementedError, match="closed_form"):
            env.dynamics(x, jnp.asarray(actions[0]))
        return

    @jax.jit
    def dynamics(x: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        return env.dynamics(x, action), jax.jacobian(env.dynamics, argnums=1)(x, action)

    after, by_action = dynamics(x, jnp.asarray(actions[0]))
    states = system.state_at(system.starts, system.goals)
    np.testing.assert_allclose(after, system.step(states, actions).obs[0], rtol=1e-6, atol=1e-7)
    assert np.isfinite(by_action).all()
    assert np.all(np.abs(by_action).max(axis=0) > 0)


def test_brax_wrappers_keep_the_structure_of_a_state(system: System):
    from brax.envs.wrappers import training  # after envs, which silences the warnings that importing Brax raises

    # By shapes alone: the state that comes out of a wrapped step has the structure of the one that went in, as a scan wants.
    wrapped = training.wrap(system.env, episode_length=system.env.horizon)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)  # Brax's wrappers read raw keys' shapes
    state = jax.eval_shape(wrapped.reset, keys)
    after = jax.eval_shape(wrapped.step, state, jax.ShapeDtypeStruct((3, system.env.action_size), jnp.float32))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"goal", "steps", "truncation", "first_obs"} <= set(after.info)
    assert after.obs.shape == (3, system.env.observation_size)


def test_a_wrong_shape_is_refused(system: System):
    env = system.env
    with pytest.raises(ValueError, match=r"x: expected shape .* use jax.vmap"):
        env.state_at(jnp.asarray(system.starts), jnp.asarray(system.goals[0]))
    with pytest.raises(ValueError, match=r"goal: expected shape"):
        env.state_at(jnp.asarray(system.starts[0]), jnp.zeros(env.goal_size + 1))
    with pytest.raises(ValueError, match=r"action: expected shape"):
        jax.eval_shape(env.step, state_shape(env), jax.ShapeDtypeStruct((env.action_size + 1,), jnp.float32))


def test_a_sketch_lies_within_its_limits(system: System):
    sketch = system.env.sketch(system.starts[0], system.goals[0])
    assert sketch.point.shape == sketch.goal.shape == (2,)
    assert sketch.segments.shape[1:] == sketch.goal_segments.shape[1:] == (2, 2)
    xmin, xmax, ymin, ymax = sketch.limits
    for x, y in (sketch.point, sketch.goal, *sketch.segments.reshape(-1, 2), *sketch.goal_segments.reshape(-1, 2)):
        assert xmin <= x <= xmax
        assert ymin <= y <= ymax
    assert sketch.background is None or sketch.background.shape[1:] == (2,)


COMMON = [{"horizon": 0}, {"horizon": 2.5}, {"horizon": True}, {"action_limit": 0.0}, {"action_limit": float("inf")}]


@pytest.mark.parametrize(
    ("name", "options"),
    [(row.name, row.options | bad) for row in ROWS.values() for bad in COMMON + row.bad],
    ids=str,
)
def test_a_bad_option_is_refused_by_its_name(name: str, options: dict):
    with pytest.raises(ValueError, match=rf"{name}: .*({'|'.join(options)}).*expected .* got"):
        envs.make(name, **options)


def test_every_environment_has_a_row():
    assert {row.name for row in ROWS.values()} == set(envs.names())


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="unknown environment 'reachr'; did you mean 'reacher'"):
        envs.make("reachr")
    with pytest.raises(ValueError, match="reacher: unknown physics 'mj'; did you mean 'mjx'"):
        envs.make("reacher", physics="mj")
    with pytest.raises(ValueError, match="point_mass: unknown physics 'mjx'"):
        envs.make("point_mass", physics="mjx")
    for physics in ("closed_form", "mjx"):
        with pytest.raises(TypeError, match="reacher: unknown option 'dampin'; did you mean 'damping'"):
            envs.make("reacher", physics=physics, dampin=1.0)
