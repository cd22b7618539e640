"""Every environment through one suite; a new one is a row of `SYSTEMS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs

B = 8


class Row(NamedTuple):
    """What the suite must be told of an environment."""

    name: str
    options: dict[str, Any]
    extremes: list[list[float]]  # states at and beyond the edge of what happens
    far: list[float]  # a goal out of reach
    bad: list[dict[str, Any]]  # options out of their range


REACHER = {
    "extremes": [[3.0, -3.0, 50.0, -50.0], [-3.0, 3.0, -50.0, 50.0], [3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 100.0, -100.0]],
    "far": [0.0, 3.1],
    "bad": [{"gear": 0.0}, {"armature": -1.0}, {"damping": float("nan")}, {"goal_range": 4.0}, {"start_spread": "wide"}],
}
STANDING = [0.0, 0.0, 0.55, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0]
SYSTEMS = {
    "point_mass": Row(
        name="point_mass",
        options={"damping": 0.1},
        extremes=[[1e3, -1e3, 1e3, -1e3], [0.0, 0.0, -1e4, 1e4]],
        far=[0.0, 5.0],
        bad=[
            {"dt": 0.0},
            {"damping": 10.0},
            {"goal_radius": (1.0, 0.5)},
            {"goal_radius": (0.5, 9.0)},
            {"goal_radius": 1.0},
            {"half_plane": "top"},
            {"start_speed": -1.0},
        ],
    ),
    "mountain_car": Row(
        name="mountain_car",
        options={"start_spread": 0.1},
        extremes=[[-1.2, -1.5], [0.5, 1.5], [-1.2, 1.5], [100.0, -100.0]],
        far=[0.6, 0.0],
        bad=[{"start_spread": 0.7}, {"start_spread": -0.1}],
    ),
    "reacher": Row(name="reacher", options={}, **REACHER),
    "ant_goal": Row(
        name="ant_goal",
        options={"physics": "spring"},
        # Flat on the ground; upside down; turning over at full speed.
        extremes=[[0.0, 0.0, 0.3, 1.0, *[0.0] * 25], [0.0, 0.0, 0.5, 0.0, 1.0, *[0.0] * 24], [*STANDING, *[10.0] * 14]],
        far=[0.0, 50.0],
        bad=[{"action_limit": 2.0}, {"goal_radius": 0.0}, {"goal_radius": 100.0}, {"start_spread": -0.1}],
    ),
    "reacher, mjx": Row(name="reacher", options={"physics": "mjx"}, **REACHER),
}


class System(NamedTuple):
    """A row, its environment, what runs it and a batch of inputs."""

    row: Row
    env: envs.GoalEnv
    rollout: Callable[..., envs.State]  # x, goal, actions [T, A] -> states with [T, ...] in each field
    batched: Callable[..., envs.State]
    starts: jax.Array  # [B, S]
    goals: jax.Array  # [B, G]
    actions: jax.Array  # [B, T, A]


def _rollout_of(env: envs.GoalEnv) -> Callable[..., envs.State]:
    def rollout(x: jax.Array, goal: jax.Array, actions: jax.Array) -> envs.State:
        def step(state: envs.State, action: jax.Array) -> tuple[envs.State, envs.State]:
            state = env.step(state, action)
            kept = envs.State(None, state.obs, state.reward, state.done, state.metrics, state.info)
            return state, kept

        return jax.lax.scan(step, env.state_at(x, goal), actions)[1]

    return rollout


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request) -> System:
    row = SYSTEMS[request.param]
    env = envs.make(row.name, **row.options)

    rollout = _rollout_of(env)
    start_key, goal_key, action_key = jax.random.split(jax.random.key(0), 3)
    starts = jax.vmap(env.sample_start)(jax.random.split(start_key, B))
    goals = jax.vmap(env.sample_goal)(jax.random.split(goal_key, B))
    actions = env.action_limit * jax.random.uniform(action_key, (B, env.horizon, env.action_size), minval=-1.0)
    return System(row, env, jax.jit(rollout), jax.jit(jax.vmap(rollout)), starts, goals, actions)


def test_what_it_says_of_itself_is_so(system):
    env = system.env
    assert env.name == system.row.name
    assert env.backend == system.row.options.get("physics", "closed_form")
    assert env.dt > 0
    state = jax.eval_shape(env.reset, jax.random.key(0))
    assert state.obs.shape == (env.observation_size,)
    assert state.info["goal"].shape == (env.goal_size,)
    assert 1 <= env.position_size < env.observation_size
    assert state.obs.dtype == jnp.float32
    assert state.reward.shape == state.done.shape == state.metrics["distance"].shape == ()
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((env.action_size,), jnp.float32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_a_state_starts_where_it_is_put(system):
    state = jax.jit(lambda x, goal: env_view(system.env.state_at(x, goal)))(system.starts[0], system.goals[0])
    np.testing.assert_array_equal(state.obs, system.starts[0])
    np.testing.assert_array_equal(state.info["goal"], system.goals[0])
    distance = system.env.distance(system.starts[0], system.goals[0])
    np.testing.assert_allclose(state.metrics["distance"], distance, rtol=1e-6)
    np.testing.assert_allclose(state.reward, -distance, rtol=1e-6)


def env_view(state: envs.State) -> envs.State:
    """A state without its simulator's part, which then need not be computed."""
    return envs.State(None, state.obs, state.reward, state.done, state.metrics, state.info)


def test_a_reset_is_its_keys(system):
    reset = jax.jit(lambda key: env_view(system.env.reset(key)))
    first, again, other = (reset(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.obs, again.obs)
    np.testing.assert_array_equal(first.info["goal"], again.info["goal"])
    assert np.any(np.asarray(first.obs) != np.asarray(other.obs))


def test_a_rollout_of_the_horizon_is_finite_and_measures_its_distance(system):
    states = system.batched(system.starts, system.goals, system.actions)
    assert states.obs.shape == (B, system.env.horizon, system.env.observation_size)
    assert np.isfinite(states.obs).all()
    distance = system.env.distance(states.obs, system.goals[:, None])
    assert distance.shape == (B, system.env.horizon)
    np.testing.assert_allclose(states.metrics["distance"], distance, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states.reward, -states.metrics["distance"])
    np.testing.assert_array_equal(states.done, np.zeros_like(states.done))
    assert np.all(np.std(states.obs[:, :, 0], axis=1) > 0)  # it moved


def test_vmap_is_a_loop(system):
    # In float64: over an ant's contacts the rounding of float32, which differs from program to program, grows to 2e-3.
    with jax.enable_x64(True):
        rollout = _rollout_of(envs.make(system.row.name, **system.row.options))
        starts, goals, actions = (jnp.asarray(leaf, jnp.float64) for leaf in (system.starts, system.goals, system.actions))
        batch = jax.jit(jax.vmap(rollout))(starts, goals, actions)
        alone = jax.jit(rollout)
        for b in (0, B - 1):
            one = alone(starts[b], goals[b], actions[b])
            assert one.obs.dtype == jnp.float64
            np.testing.assert_allclose(one.obs, batch.obs[b], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(one.reward, batch.reward[b], rtol=1e-8, atol=1e-8)


def test_jit_is_eager(system):
    compiled = system.rollout(system.starts[0], system.goals[0], system.actions[0])
    state_at, step = system.env.state_at, system.env.step
    if system.env.backend != "closed_form":  # a simulator, operation by operation, takes 20 s: each function on its own instead
        state_at, step = jax.jit(state_at), jax.jit(step)
    state = state_at(system.starts[0], system.goals[0])
    for t in range(2):
        state = step(state, system.actions[0, t])
        np.testing.assert_allclose(state.obs, compiled.obs[t], rtol=1e-5, atol=1e-6)


def test_actions_are_clipped(system):
    limit = system.env.action_limit
    signs = jnp.sign(system.actions)
    far = system.batched(system.starts, system.goals, 1e6 * signs)
    at = system.batched(system.starts, system.goals, limit * signs)
    inside = system.batched(system.starts, system.goals, 0.9 * limit * signs)
    np.testing.assert_array_equal(far.obs, at.obs)
    assert np.abs(np.asarray(inside.obs - at.obs)).max() > 1e-3


def test_it_stays_finite_at_the_edges(system):
    extremes = jnp.array([system.row.extremes[b % len(system.row.extremes)] for b in range(B)])
    signs = jnp.where(jnp.arange(B) % 2 == 0, 1.0, -1.0)[:, None, None]
    states = system.batched(extremes, system.goals, 1e9 * signs * jnp.ones_like(system.actions))
    assert np.isfinite(states.obs).all()
    assert np.isfinite(states.reward).all()


def test_goals_drawn_can_be_reached_and_others_are_refused(system):
    env = system.env
    for goal in jax.vmap(env.sample_goal)(jax.random.split(jax.random.key(5), 50)):
        env.check_goal(goal)
    with pytest.raises(ValueError, match=r"goal: expected .* got .*; choose"):
        env.check_goal(system.row.far)
    with pytest.raises(ValueError, match=r"expected finite numbers"):
        env.check_goal([float("nan")] * env.goal_size)
    with pytest.raises(ValueError, match=rf"expected shape \({env.goal_size},\), got"):
        env.check_goal(np.zeros(env.goal_size + 1))


def test_at_the_goal_distance_and_its_gradient_are_zero(system):
    env, goal = system.env, system.goals[0]
    size = min(env.position_size, env.goal_size)
    x = jnp.zeros(env.observation_size).at[:size].set(goal[:size])
    distance, gradient = jax.value_and_grad(env.distance)(x, goal)
    assert distance == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(x))
    away = jax.grad(env.distance)(x.at[0].add(0.5), goal)
    np.testing.assert_allclose(away[0], 1.0, rtol=1e-6)


def test_dynamics_is_the_step_and_has_a_gradient_or_says_that_it_has_none(system):
    env, x, action = system.env, system.starts[0], 0.5 * system.actions[0, 0]
    if not env.differentiable:
        with pytest.raises(NotImplementedError, match="closed_form"):
            env.dynamics(x, action)
        return
    after = jax.jit(env.dynamics)(x, action)
    np.testing.assert_array_equal(after, jax.jit(env.step)(env.state_at(x, system.goals[0]), action).obs)
    by_action = jax.jacobian(env.dynamics, argnums=1)(x, action)
    assert np.isfinite(by_action).all()
    assert np.all(np.abs(by_action).max(axis=0) > 0)


def test_brax_wrappers_run_it(system):
    from brax.envs.wrappers import training  # after envs, which silences what importing Brax warns of

    # By shapes alone: the state that comes out of a wrapped step has the structure of the one that went in, as a scan wants.
    wrapped = training.wrap(system.env, episode_length=system.env.horizon)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)  # Brax's wrappers read raw keys' shapes
    state = jax.eval_shape(wrapped.reset, keys)
    after = jax.eval_shape(wrapped.step, state, jax.ShapeDtypeStruct((3, system.env.action_size), jnp.float32))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"goal", "steps", "truncation", "first_obs"} <= set(after.info)
    assert after.obs.shape == (3, system.env.observation_size)


def test_a_wrong_shape_is_refused(system):
    env = system.env
    with pytest.raises(ValueError, match=r"x: expected shape .* use jax.vmap"):
        env.state_at(system.starts, system.goals[0])
    with pytest.raises(ValueError, match=r"goal: expected shape"):
        env.state_at(system.starts[0], jnp.zeros(env.goal_size + 1))
    state = jax.eval_shape(env.reset, jax.random.key(0))
    with pytest.raises(ValueError, match=r"action: expected shape"):
        jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((env.action_size + 1,), jnp.float32))


def test_a_sketch_can_be_drawn(system):
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
    [(row.name, row.options | bad) for row in SYSTEMS.values() for bad in COMMON + row.bad],
    ids=str,
)
def test_a_bad_option_is_refused_by_its_name(name, options):
    with pytest.raises(ValueError, match=rf"{name}: .*({'|'.join(options)}).*expected .* got"):
        envs.make(name, **options)


def test_every_environment_has_a_row():
    assert {row.name for row in SYSTEMS.values()} == set(envs.names())


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown environment 'reachr'; did you mean 'reacher'"):
        envs.make("reachr")
    with pytest.raises(ValueError, match="reacher: unknown physics 'mj'; did you mean 'mjx'"):
        envs.make("reacher", physics="mj")
    with pytest.raises(ValueError, match="point_mass: unknown physics 'mjx'"):
        envs.make("point_mass", physics="mjx")
    for physics in ("closed_form", "mjx"):
        with pytest.raises(TypeError, match="reacher: unknown option 'dampin'; did you mean 'damping'"):
            envs.make("reacher", physics=physics, dampin=1.0)
