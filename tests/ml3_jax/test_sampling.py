"""The meta-gradient through sampled data: biased if they are constants, unbiased with the score-function term.

A bandit of two arms, small enough to enumerate: theta is the logit of arm 1, collect draws an arm, the learned loss
sees (log-probability of the arm, its reward), and the task loss is the expected loss of the policy.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import ml3_jax
from ml3_jax import estimators, inner

REWARDS = np.array([0.2, 1.0], np.float32)
STEP_SIZE, STEPS, START = 2.0, 2, -0.4


class Bandit(struct.PyTreeNode):
    """The drawn arm."""

    arm: jax.Array  # [] int32


def log_policy(theta: jax.Array) -> jax.Array:
    """[2] log-probabilities of the arms."""
    return jnp.stack([jax.nn.log_sigmoid(-theta), jax.nn.log_sigmoid(theta)])


def features(theta: jax.Array, arm: jax.Array) -> jax.Array:
    return jnp.stack([log_policy(theta)[arm], jnp.asarray(REWARDS)[arm]])[None]


def expected_loss(theta: jax.Array) -> jax.Array:
    return -jnp.exp(log_policy(theta)) @ jnp.asarray(REWARDS)


PROBLEM = ml3_jax.Problem(
    sample_task=lambda key, context: Bandit(jnp.zeros((), jnp.int32)),
    init=lambda key, task: jnp.asarray(START),
    observe=lambda theta, task, context, key, step: features(theta, task.arm),
    task_loss=lambda theta, task, context, key: expected_loss(theta),
    evaluate=lambda theta, task, context, key: {"loss": expected_loss(theta)},
    collect=lambda theta, task, context, key, step: task.replace(
        arm=jax.random.bernoulli(key, jax.nn.sigmoid(theta)).astype(jnp.int32)
    ),
    log_prob=lambda theta, task, context, key, step: log_policy(theta)[task.arm],
)


def loss_of_drawn_arm(theta: jax.Array, task: Bandit, context: None) -> jax.Array:
    """The loss of the drawn arm: its expectation is `expected_loss`, in value and in gradient."""
    reward = jnp.asarray(REWARDS)[task.arm]
    surrogate = -reward * log_policy(theta)[task.arm]
    return surrogate - jax.lax.stop_gradient(surrogate) - reward


REUSED = PROBLEM._replace(reused_rollout_loss=loss_of_drawn_arm)


def loss_of(phi: jax.Array, seen: jax.Array) -> jax.Array:
    """-(phi_0 + phi_1 reward) log-probability: REINFORCE with a learned weight."""
    return -jnp.mean((phi[0] + phi[1] * seen[:, 1]) * seen[:, 0])


LOSS = ml3_jax.LearnedLoss(lambda key, features: jnp.array([-0.3, 0.8]), loss_of)
PHI = jnp.array([-0.3, 0.8])


@functools.cache
def exact(objective: str) -> np.ndarray:
    """[2] the gradient of the expected objective, over all possible draws of the arms."""

    def expected(phi: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for arms in itertools.product((0, 1), repeat=STEPS):
            theta, likely, losses = jnp.asarray(START), jnp.zeros(()), []
            for arm in arms:
                likely = likely + log_policy(theta)[arm]
                theta = theta - STEP_SIZE * jax.grad(lambda t, arm=arm: loss_of(phi, features(t, jnp.asarray(arm))))(theta)
                losses.append(expected_loss(theta))
            total = total + jnp.exp(likely) * (losses[-1] if objective == "last" else sum(losses) / STEPS)
        return total

    return np.asarray(jax.jit(jax.grad(expected))(PHI))


def meta_gradients(collect_gradient: str, objective: str, problem: ml3_jax.Problem) -> tuple[np.ndarray, np.ndarray]:
    """([2] mean, [2] its standard error) of independent estimates, each over 64 tasks; from a step of gradient descent."""
    learner = ml3_jax.make_meta_learner(
        problem,
        LOSS,
        inner_optimizer=optax.sgd(STEP_SIZE),
        meta_optimizer=optax.sgd(1.0),
        num_tasks=64,
        inner_steps=STEPS,
        objective=objective,
        collect_gradient=collect_gradient,
    )

    def estimate(key: jax.Array) -> jax.Array:
        return PHI - learner.step(learner.init(key))[0].loss_params

    estimates = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(11), 2000)))
    return estimates.mean(axis=0), estimates.std(axis=0) / np.sqrt(len(estimates))


CASES = {"last": ("last", PROBLEM, 0.02), "mean": ("mean", PROBLEM, 0.02), "reused rollouts": ("mean", REUSED, 0.05)}
EACH = pytest.mark.parametrize(("objective", "problem", "most"), CASES.values(), ids=list(CASES))


@EACH
def test_the_score_term_makes_the_meta_gradient_unbiased(objective: str, problem: ml3_jax.Problem, most: float):
    mean, error = meta_gradients("score", objective, problem)
    assert np.all(np.abs(mean - exact(objective)) < 4 * error)
    assert np.all(error < most * np.linalg.norm(exact(objective)))


def test_without_the_score_term_the_meta_gradient_is_biased_by_far_more_than_it_varies():
    mean, error = meta_gradients("cut", "last", PROBLEM)
    assert np.max(np.abs(mean - exact("last")) / error) > 8


@EACH
def test_the_gradient_modes_agree_with_the_score_term(objective: str, problem: ml3_jax.Problem, most: float):
    optimizer = optax.sgd(STEP_SIZE)

    def surrogate(phi: jax.Array, mode: str) -> jax.Array:
        how = {"gradient": mode, "objective": objective, "collect_gradient": "score"}
        segment = inner.make_segment(problem, LOSS, optimizer, steps=STEPS, **how)

        def one(key: jax.Array):
            theta, task = jnp.asarray(START), problem.sample_task(key, None)
            return segment(phi, theta, optimizer.init(theta), task, None, inner.split_keys(key), jnp.int32(0))[0]

        return estimators.score_surrogate(*jax.vmap(one)(jax.random.split(jax.random.key(3), 8)))

    modes = jax.jit(lambda phi: [jax.grad(surrogate)(phi, mode) for mode in ml3_jax.GRADIENT_MODES])(PHI)
    assert np.all(np.asarray(modes[0]) != 0.0)
    for other in modes[1:]:
        np.testing.assert_allclose(other, modes[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("objective", "times"), [("mean", 4), ("last", 3)])
def test_reused_rollouts_are_collected_once_an_inner_step_and_once_at_the_end(objective: str, times: int):
    drawn = []

    def collect(theta, task, context, key, step):
        jax.debug.callback(lambda step: drawn.append(int(step)), step)
        assert PROBLEM.collect is not None
        return PROBLEM.collect(theta, task, context, key, step)

    segment = inner.make_segment(
        REUSED._replace(collect=collect), LOSS, optax.sgd(1.0), steps=3, gradient="mixed", objective=objective
    )
    task, key = REUSED.sample_task(jax.random.key(0), None), inner.split_keys(jax.random.key(1))
    state = optax.sgd(1.0).init(jnp.asarray(START))
    jax.block_until_ready(jax.jit(segment)(PHI, jnp.asarray(START), state, task, None, key, jnp.int32(5)))
    jax.effects_barrier()
    assert sorted(drawn) == list(range(5, 5 + times))


def test_the_surrogate_has_the_mean_loss_as_value_and_the_leave_one_out_score_as_gradient():
    losses, slopes = jnp.array([[1.0], [4.0], [7.0]]), jnp.array([[0.5], [-1.0], [2.0]])

    @jax.jit
    def both(x):
        # One task has no other tasks: its baseline is zero.
        alone = jax.grad(lambda x: estimators.score_surrogate(losses[:1], x * slopes[:1]))(x)
        return jax.value_and_grad(lambda x: estimators.score_surrogate(losses, x * slopes))(x), alone

    (value, slope), alone = both(1.0)
    np.testing.assert_allclose(value, 4.0)
    # Baselines: the means of the others, 5.5, 4 and 2.5; credits -4.5, 0 and 4.5; ((-4.5) 0.5 + 0 + 4.5 * 2) / 3.
    np.testing.assert_allclose(slope, 2.25, rtol=1e-6)
    np.testing.assert_allclose(alone, 0.5)


def test_a_reused_rollout_loss_without_collect_is_refused():
    with pytest.raises(ValueError, match="has reused_rollout_loss and no collect"):
        inner.make_segment(REUSED._replace(collect=None), LOSS, optax.sgd(1.0), steps=1, gradient="mixed", objective="mean")


def test_score_without_a_log_prob_is_refused():
    with pytest.raises(ValueError, match='collect_gradient="score" needs a problem that has collect and log_prob'):
        ml3_jax.make_meta_learner(
            PROBLEM._replace(log_prob=None),
            LOSS,
            inner_optimizer=optax.sgd(1.0),
            meta_optimizer=optax.sgd(1.0),
            num_tasks=1,
            inner_steps=1,
            collect_gradient="score",
        )
    with pytest.raises(ValueError, match="collect_gradient: expected one of 'cut', 'score', got 'dice'"):
        inner.make_segment(PROBLEM, LOSS, optax.sgd(1.0), steps=1, gradient="mixed", objective="last", collect_gradient="dice")
