"""Rollouts: derivatives by hand on linear systems, keys, what is cut, and how a broken system is named."""

import functools
from typing import Any

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
    trajectory = run(K, START)
    x, states, actions = START, [START], []
    for _ in range(HORIZON):
        actions.append(K @ x)
        x = linear(x, actions[-1])
        states.append(x)
    assert trajectory.states.shape == (HORIZON + 1, 2)
    assert trajectory.actions.shape == (HORIZON, 1)
    np.testing.assert_allclose(trajectory.states, jnp.stack(states), rtol=1e-6)
    np.testing.assert_allclose(trajectory.actions, jnp.stack(actions), rtol=1e-6)


def test_gradient_of_a_gain_is_the_costates_by_hand():
    gradient = jax.grad(lambda gain: COST @ run(gain, START).states[-1])(K)
    np.testing.assert_allclose(gradient, gain_gradient(np.asarray(run(K, START).states)), rtol=1e-5)


def test_tangent_of_the_start_is_the_closed_loop_to_the_power_t():
    tangent = jnp.asarray([0.3, 0.7])
    _, moved = jax.jvp(lambda start: run(K, start).states, (START,), (tangent,))
    closed_loop = np.asarray(A + B @ K)
    for step in range(HORIZON + 1):
        np.testing.assert_allclose(moved[step], np.linalg.matrix_power(closed_loop, step) @ tangent, rtol=1e-5, atol=1e-7)


def test_jit_and_eager_agree():
    with jax.disable_jit():
        eager = run(K, START)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), jax.jit(run)(K, START), eager)


def test_vmap_is_each_rollout_alone():
    starts = jax.random.normal(toys.KEY, (3, 2))
    together = jax.vmap(functools.partial(run, K))(starts)
    for index, start in enumerate(starts):
        alone = run(K, start)
        jax.tree.map(lambda x, y, i=index: np.testing.assert_allclose(x[i], y, rtol=1e-6), together, alone)


def test_unrolling_the_loop_changes_nothing():
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), run(K, START, unroll=3), run(K, START))


def test_detached_states_are_constant_and_actions_keep_their_own_gradient():
    through_states = jax.grad(lambda gain: jnp.sum(run(gain, START, detach_states=True).states ** 2))(K)
    np.testing.assert_array_equal(through_states, np.zeros((1, 2)))
    to_the_start = jax.grad(lambda start: jnp.sum(run(K, start, detach_states=True).actions))(START)
    np.testing.assert_array_equal(to_the_start, np.zeros(2))
    # actions = K x_t with x_t constant: the gradient of their sum is the sum of the states
    through_actions = jax.grad(lambda gain: jnp.sum(run(gain, START, detach_states=True).actions))(K)
    np.testing.assert_allclose(through_actions[0], jnp.sum(run(K, START).states[:-1], axis=0), rtol=1e-6)
    # and the cut changes no value
    np.testing.assert_array_equal(run(K, START, detach_states=True).states, run(K, START).states)


def test_every_step_consumes_a_key_of_its_own():
    key = jax.random.key(3)
    trajectory = rollout(lambda x, k: jax.random.key_data(k), lambda x, a: x, START, key, horizon=50)
    seen = {tuple(row) for row in np.asarray(trajectory.actions).tolist()}
    assert len(seen) == 50
    assert tuple(np.asarray(jax.random.key_data(key)).tolist()) not in seen


class Simulator(struct.PyTreeNode):
    """A state as a simulator has it: more than what a policy sees, with a key of its own."""

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
    whole = go(lambda s: s).states
    np.testing.assert_array_equal(whole.obs, seen.states)
    assert whole.rng.shape == (4,)


@pytest.mark.parametrize("horizon", [0, -1, 2.0])
def test_a_horizon_of_no_step_is_refused(horizon: Any):
    with pytest.raises(ValueError, match=rf"horizon: expected a whole number of steps, at least 1, got {horizon}"):
        rollout(functools.partial(feedback, K), linear, START, toys.KEY, horizon=horizon)


REAL_A = jnp.asarray([[0.8, 0.3], [0.1, 1.1]])


def recorded() -> Trajectory:
    def real(x: jax.Array, action: jax.Array) -> jax.Array:
        return REAL_A @ x - B @ action

    return rollout(functools.partial(noisy, K), real, START, toys.KEY, horizon=HORIZON)


def test_along_a_recording_values_are_real_and_derivatives_the_models():
    real = recorded()
    followed = rollout_along(functools.partial(noisy, K), linear, real.states, toys.KEY)
    np.testing.assert_array_equal(followed.states, real.states)
    np.testing.assert_array_equal(followed.actions, real.actions)

    def cost(gain: jax.Array) -> jax.Array:
        return COST @ rollout_along(functools.partial(noisy, gain), linear, real.states, toys.KEY).states[-1]

    np.testing.assert_allclose(jax.grad(cost)(K), gain_gradient(np.asarray(real.states)), rtol=1e-5)


def test_along_a_recording_no_gradient_reaches_it():
    def cost(states: jax.Array) -> jax.Array:
        followed = rollout_along(functools.partial(feedback, K), linear, states, toys.KEY)
        return jnp.sum(followed.states) + jnp.sum(followed.actions)

    np.testing.assert_array_equal(jax.grad(cost)(recorded().states), np.zeros((HORIZON + 1, 2)))


def test_along_its_own_rollout_a_model_has_its_own_first_and_second_derivatives(x64: None):
    policy, start, direction = (jnp.asarray(m, float) for m in (K, START, [[0.5, -1.0]]))
    states = rollout(functools.partial(noisy, policy), bent, start, toys.KEY, horizon=HORIZON).states

    def free(gain: jax.Array) -> jax.Array:
        trajectory = rollout(functools.partial(noisy, gain), bent, start, toys.KEY, horizon=HORIZON)
        return jnp.sum(trajectory.states**2) + jnp.sum(trajectory.actions)

    def along(gain: jax.Array) -> jax.Array:
        trajectory = rollout_along(functools.partial(noisy, gain), bent, states, toys.KEY)
        return jnp.sum(trajectory.states**2) + jnp.sum(trajectory.actions)

    expected = jax.jvp(jax.grad(free), (policy,), (direction,))
    found = jax.jvp(jax.grad(along), (policy,), (direction,))
    assert np.max(np.abs(np.asarray(expected[1]))) > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), found, expected)


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


def test_a_state_that_is_not_finite_is_named_with_the_state_and_action_before_it():
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


def test_a_start_or_an_action_that_is_not_finite_is_named():
    states, actions = batch()
    actions[2, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"arm: rollout 2: the action of step 1 is not finite, \[nan\], at state \[18\. 19\.\]"
    ):
        rollouts.check_finite(Trajectory(states, actions), "arm")
    states[0, 0, 1] = np.inf
    with pytest.raises(ValueError, match=r"arm: rollout 0: the state it starts from is not finite, \[ 0\. inf\]"):
        rollouts.check_finite(Trajectory(states, actions), "arm")


def test_a_recorded_pytree_is_looked_at_whole():
    states, actions = batch()
    reward = np.zeros((3, 4))
    reward[1, 3] = np.nan
    trajectory = Trajectory({"obs": states, "reward": reward}, actions)
    with pytest.raises(ValueError, match=r"rollout 1: the state of step 3"):
        rollouts.check_finite(trajectory, "ant", batch_axes=1)
