"""Rollouts: derivatives by hand on linear systems, keys, cut gradients, and errors of values that are not finite."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from ml3_jax import rollout as rollouts
from ml3_jax.rollout import Trajectory, rollout, rollout_along
from tests.ml3_jax import toys

HORIZON = 4
A = jnp.asarray([[1.0, 0.1], [-0.2, 0.9]])
B = jnp.asarray([[0.0], [0.5]])
K = jnp.asarray([[-0.3, 0.2]])
START = jnp.asarray([1.0, -0.5])
COST = jnp.asarray([2.0, -1.0])  # of the last state: cost = COST . x_T


def linear(x: jax.Array, action: jax.Array) -> jax.Array:
    return A @ x + B @ action


def feedback(gain: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    del key
    return gain @ x


def noisy(gain: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    return gain @ x + 0.1 * jax.random.normal(key, (1,))


def bent(x: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.tanh(linear(x, action))


def run(gain: jax.Array, start: jax.Array, **options: Any) -> Trajectory:
    return rollout(functools.partial(feedback, gain), linear, start, toys.KEY, horizon=HORIZON, **options)


jitted_run = jax.jit(run, static_argnames="detach_states")


def gain_gradient(states: np.ndarray) -> np.ndarray:
    """d(COST . x_T)/dK of x' = A x + B a, a = K x along given states: sum_t (B' l_{t+1}) x_t', l_t = (A + B K)' l_{t+1}."""
    a, b, k = (np.asarray(m, np.float64) for m in (A, B, K))
    costate = np.asarray(COST, np.float64)
    total = np.zeros(k.shape)
    for x in states[:-1][::-1]:
        total += np.outer(b.T @ costate, x)
        costate = (a + b @ k).T @ costate
    return total


def test_states_and_actions_are_the_loop_written_out():
    trajectory = jitted_run(K, START)
    x, states, actions = START, [START], []
    for _ in range(HORIZON):
        actions.append(K @ x)
        x = linear(x, actions[-1])
        states.append(x)
    chex.assert_shape([trajectory.states, trajectory.actions], [(HORIZON + 1, 2), (HORIZON, 1)])
    np.testing.assert_allclose(trajectory.states, jnp.stack(states), rtol=1e-6)
    np.testing.assert_allclose(trajectory.actions, jnp.stack(actions), rtol=1e-6)


def test_gradient_of_a_gain_is_the_costates_by_hand():
    gradient = jax.jit(jax.grad(lambda gain: COST @ run(gain, START).states[-1]))(K)
    np.testing.assert_allclose(gradient, gain_gradient(np.asarray(jitted_run(K, START).states)), rtol=1e-5)


def test_tangent_of_the_start_is_the_closed_loop_to_the_power_t():
    tangent = jnp.asarray([0.3, 0.7])
    moved = jax.jit(lambda start, dx: jax.jvp(lambda x: run(K, x).states, (start,), (dx,))[1])(START, tangent)
    closed_loop = np.asarray(A + B @ K)
    for step in range(HORIZON + 1):
        np.testing.assert_allclose(moved[step], np.linalg.matrix_power(closed_loop, step) @ tangent, rtol=1e-5, atol=1e-7)


def test_jit_and_eager_agree():
    with jax.disable_jit():
        eager = run(K, START)
    chex.assert_trees_all_close(jitted_run(K, START), eager, rtol=1e-6)


def test_vmap_is_each_rollout_alone():
    starts = jax.random.normal(toys.KEY, (3, 2))
    together = jax.jit(jax.vmap(functools.partial(run, K)))(starts)
    alone = [jitted_run(K, start) for start in starts]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-6)


def test_detached_states_are_constant_and_actions_keep_their_own_gradient():
    detached = jitted_run(K, START, detach_states=True)
    np.testing.assert_array_equal(detached.states, jitted_run(K, START).states)  # the cut changes no value
    # Each leaf of the Jacobian is (by the gain, by the start).
    jacobian = jax.jit(jax.jacrev(functools.partial(run, detach_states=True), argnums=(0, 1)))(K, START)
    cut = (*jacobian.states, jacobian.actions[1])
    chex.assert_trees_all_equal(cut, jax.tree.map(jnp.zeros_like, cut))
    # actions = K x_t with x_t constant: the derivative by K is x_t
    np.testing.assert_allclose(jacobian.actions[0][:, 0, 0], detached.states[:-1], rtol=1e-6)


def test_every_step_consumes_a_key_of_its_own():
    key = jax.random.key(3)
    trajectory = rollout(lambda x, k: jax.random.key_data(k), lambda x, a: x, START, key, horizon=50)
    seen = {tuple(row) for row in np.asarray(trajectory.actions).tolist()}
    assert len(seen) == 50
    assert tuple(np.asarray(jax.random.key_data(key)).tolist()) not in seen


class Simulator(struct.PyTreeNode):
    """The state of a simulator: more than the policy's observation, with a key of its own."""

    obs: jax.Array
    reward: jax.Array
    inside: jax.Array
    rng: jax.Array


def simulator_step(state: Simulator, action: jax.Array) -> Simulator:
    inside = linear(state.inside, action)
    return Simulator(obs=inside[:1], reward=-jnp.sum(action**2), inside=inside, rng=jax.random.fold_in(state.rng, 0))


@pytest.mark.parametrize("detach_states", [False, True])
def test_a_simulator_is_observed_and_recorded_as_asked(detach_states: bool):
    start = Simulator(START[:1], jnp.zeros(()), START, jax.random.key(0))

    def go(record_fn: Any = None) -> Trajectory:
        return rollout(
            lambda obs, key: 0.5 * obs,
            simulator_step,
            start,
            toys.KEY,
            horizon=3,
            observation_fn=lambda s: s.obs,
            record_fn=record_fn,
            detach_states=detach_states,
        )

    seen = go()
    assert seen.states.shape == (4, 1)
    np.testing.assert_allclose(seen.actions, 0.5 * seen.states[:-1], rtol=1e-6)
    rewards = go(lambda s: s.reward).states
    np.testing.assert_allclose(rewards[1:], -(seen.actions[:, 0] ** 2), rtol=1e-6)
    everything = go(lambda s: s).states
    np.testing.assert_array_equal(everything.obs, seen.states)
    chex.assert_shape(everything.rng, (4,))


@pytest.mark.parametrize("horizon", [0, -1, 2.0])
def test_a_horizon_of_no_step_is_refused(horizon: Any):
    with pytest.raises(ValueError, match=rf"horizon: expected a whole number of steps, at least 1, got {horizon}"):
        rollout(functools.partial(feedback, K), linear, START, toys.KEY, horizon=horizon)


REAL_A = jnp.asarray([[0.8, 0.3], [0.1, 1.1]])


@functools.cache
def recorded() -> Trajectory:
    def real(x: jax.Array, action: jax.Array) -> jax.Array:
        return REAL_A @ x - B @ action

    return rollout(functools.partial(noisy, K), real, START, toys.KEY, horizon=HORIZON)


def test_along_a_recording_values_are_real_and_derivatives_are_the_models():
    real = recorded()
    followed = rollout_along(functools.partial(noisy, K), linear, real.states, toys.KEY)
    np.testing.assert_array_equal(followed.states, real.states)
    np.testing.assert_array_equal(followed.actions, real.actions)

    def cost(gain: jax.Array) -> jax.Array:
        return COST @ rollout_along(functools.partial(noisy, gain), linear, real.states, toys.KEY).states[-1]

    np.testing.assert_allclose(jax.jit(jax.grad(cost))(K), gain_gradient(np.asarray(real.states)), rtol=1e-5)


def test_along_a_recording_no_gradient_reaches_it():
    def cost(states: jax.Array) -> jax.Array:
        followed = rollout_along(functools.partial(feedback, K), linear, states, toys.KEY)
        return jnp.sum(followed.states) + jnp.sum(followed.actions)

    np.testing.assert_array_equal(jax.jit(jax.grad(cost))(recorded().states), np.zeros((HORIZON + 1, 2)))


def test_along_its_own_rollout_a_model_has_its_own_first_and_second_derivatives(x64: None):
    policy, start, direction = (jnp.asarray(m, float) for m in (K, START, [[0.5, -1.0]]))
    states = rollout(functools.partial(noisy, policy), bent, start, toys.KEY, horizon=HORIZON).states

    def imagined(gain: jax.Array) -> jax.Array:
        trajectory = rollout(functools.partial(noisy, gain), bent, start, toys.KEY, horizon=HORIZON)
        return jnp.sum(trajectory.states**2) + jnp.sum(trajectory.actions)

    def along(gain: jax.Array) -> jax.Array:
        trajectory = rollout_along(functools.partial(noisy, gain), bent, states, toys.KEY)
        return jnp.sum(trajectory.states**2) + jnp.sum(trajectory.actions)

    expected, found = (
        jax.jit(lambda x, dx, f=f: jax.jvp(jax.grad(f), (x,), (dx,)))(policy, direction) for f in (imagined, along)
    )
    assert np.max(np.abs(np.asarray(expected[1]))) > 0.01
    chex.assert_trees_all_close(found, expected, rtol=1e-10)


def test_a_recording_of_no_step_is_refused():
    with pytest.raises(ValueError, match=r"expected \[T \+ 1, \.\.\.\] with T at least 1, got 1 states"):
        rollout_along(functools.partial(feedback, K), linear, START[None], toys.KEY)


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.arange(24.0).reshape(3, 4, 2), 100 + np.arange(9.0).reshape(3, 3, 1)


def test_finite_trajectories_pass():
    states, actions = batch()
    assert rollouts.check_finite(Trajectory(states, actions), "reacher") is None
    assert rollouts.check_finite(Trajectory(states[0], actions[0]), "reacher") is None
    assert rollouts.check_finite(run(K, START), "reacher") is None


def test_the_error_of_a_state_that_is_not_finite_names_the_state_and_action_before_it():
    states, actions = batch()
    states[1, 2:] = np.nan
    states[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"reacher: rollout 1: the state of step 2 is not finite, \[nan nan\]") as one:
        rollouts.check_finite(Trajectory(states, actions), "reacher")
    # rollout 1's state of step 1 and its action of step 1
    assert "before it the state was [10. 11.] and the action [104.]" in str(one.value)
    with pytest.raises(ValueError, match=r"reacher: the state of step 2"):
        rollouts.check_finite(Trajectory(states[1], actions[1]), "reacher")
    with pytest.raises(ValueError, match=r"rollout 0, 1: the state of step 2"):
        rollouts.check_finite(Trajectory(states[None], actions[None]), "reacher")


def test_the_error_of_a_start_or_an_action_that_is_not_finite_names_it():
    states, actions = batch()
    actions[2, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"arm: rollout 2: the action of step 1 is not finite, \[nan\], at state \[18\. 19\.\]"
    ):
        rollouts.check_finite(Trajectory(states, actions), "arm")
    states[0, 0, 1] = np.inf
    with pytest.raises(ValueError, match=r"arm: rollout 0: the state it starts from is not finite, \[ 0\. inf\]"):
        rollouts.check_finite(Trajectory(states, actions), "arm")


def test_every_leaf_of_a_recorded_pytree_is_checked():
    states, actions = batch()
    reward = np.zeros((3, 4))
    reward[1, 3] = np.nan
    trajectory = Trajectory({"obs": states, "reward": reward}, actions)
    with pytest.raises(ValueError, match=r"rollout 1: the state of step 3"):
        rollouts.check_finite(trajectory, "ant")
