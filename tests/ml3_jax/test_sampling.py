"""The meta-gradient through sampled data: biased where they are constants, unbiased with the score-function term.

A bandit of two arms that is small enough to enumerate: theta is the logit of arm 1, collect draws an arm, the learned loss
sees (log-probability of the arm, its reward), and the task loss is the expected loss of the policy itself.
"""

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
    """The arm that was drawn, if any."""

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


def judged(theta: jax.Array, task: Bandit, context: None) -> jax.Array:
    """The loss of the arm that was drawn: its expectation is `expected_loss`, in value and in gradient."""
    reward = jnp.asarray(REWARDS)[task.arm]
    surrogate = -reward * log_policy(theta)[task.arm]
    return surrogate - jax.lax.stop_gradient(surrogate) - reward


SHARED = PROBLEM._replace(collected_loss=judged)


def loss_of(phi: jax.Array, seen: jax.Array) -> jax.Array:
    """-(phi_0 + phi_1 reward) log-probability: REINFORCE with a learned weight."""
    return -jnp.mean((phi[0] + phi[1] * seen[:, 1]) * seen[:, 0])


LOSS = ml3_jax.LearnedLoss(lambda key, features: jnp.array([-0.3, 0.8]), loss_of)
PHI = jnp.array([-0.3, 0.8])


def exact(phi: jax.Array, objective: str) -> jax.Array:
    """The expectation of the objective, over all ways in which the arms can be drawn."""
    total = jnp.zeros(())
    for arms in itertools.product((0, 1), repeat=STEPS):
        theta, likely, losses = jnp.asarray(START), jnp.zeros(()), []
        for arm in arms:
            likely = likely + log_policy(theta)[arm]
            theta = theta - STEP_SIZE * jax.grad(lambda t, arm=arm: loss_of(phi, features(t, jnp.asarray(arm))))(theta)
            losses.append(expected_loss(theta))
        total = total + jnp.exp(likely) * (losses[-1] if objective == "last" else sum(losses) / STEPS)
    return total


def meta_gradients(
    collect_gradient: str, objective: str, gradient: str = "mixed", problem: ml3_jax.Problem = PROBLEM
) -> np.ndarray:
    """[S, 2] independent estimates, each over 64 tasks; read off a step of plain gradient descent."""
    learner = ml3_jax.make_meta_learner(
        problem,
        LOSS,
        inner_optimizer=optax.sgd(STEP_SIZE),
        meta_optimizer=optax.sgd(1.0),
        num_tasks=64,
        inner_steps=STEPS,
        objective=objective,
        gradient=gradient,
        collect_gradient=collect_gradient,
    )

    def estimate(key: jax.Array) -> jax.Array:
        return PHI - learner.step(learner.init(key))[0].loss_params

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(11), 2000)))


@pytest.mark.parametrize("objective", ["last", "mean"])
@pytest.mark.parametrize("gradient", ["mixed", "remat", "reverse"])
def test_the_score_term_makes_the_meta_gradient_unbiased(objective: str, gradient: str):
    estimates = meta_gradients("score", objective, gradient)
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    truth = np.asarray(jax.grad(exact)(PHI, objective))
    assert np.all(np.abs(estimates.mean(axis=0) - truth) < 4 * error)
    assert np.all(error < 0.02 * np.linalg.norm(truth))


@pytest.mark.parametrize("gradient", ["mixed", "remat", "reverse"])
def test_it_is_unbiased_too_where_an_update_is_judged_by_what_the_next_one_learns_from(gradient: str):
    estimates = meta_gradients("score", "mean", gradient, SHARED)
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    truth = np.asarray(jax.grad(exact)(PHI, "mean"))
    assert np.all(np.abs(estimates.mean(axis=0) - truth) < 4 * error)
    assert np.all(error < 0.05 * np.linalg.norm(truth))


@pytest.mark.parametrize(("objective", "times"), [("mean", 4), ("last", 3)])
def test_shared_data_are_collected_once_an_inner_step_and_once_at_the_end(objective: str, times: int):
    drawn = []

    def collect(theta, task, context, key, step):
        jax.debug.callback(lambda step: drawn.append(int(step)), step)
        assert PROBLEM.collect is not None
        return PROBLEM.collect(theta, task, context, key, step)

    segment = inner.make_segment(
        SHARED._replace(collect=collect), LOSS, optax.sgd(1.0), steps=3, gradient="mixed", objective=objective
    )
    task, key = SHARED.sample_task(jax.random.key(0), None), inner.split_keys(jax.random.key(1))
    state = optax.sgd(1.0).init(jnp.asarray(START))
    segment(PHI, jnp.asarray(START), state, task, None, key, jnp.int32(5))
    jax.effects_barrier()
    assert sorted(drawn) == list(range(5, 5 + times))


def test_without_it_the_meta_gradient_is_biased_by_far_more_than_it_varies():
    estimates = meta_gradients("cut", "last")
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    truth = np.asarray(jax.grad(exact)(PHI, "last"))
    assert np.max(np.abs(estimates.mean(axis=0) - truth) / error) > 8


def test_the_surrogate_s_value_is_the_mean_loss_and_its_gradient_the_leave_one_out_score():
    losses, slopes = jnp.array([[1.0], [4.0], [7.0]]), jnp.array([[0.5], [-1.0], [2.0]])
    value, slope = jax.value_and_grad(lambda x: estimators.score_surrogate(losses, x * slopes))(1.0)
    np.testing.assert_allclose(value, 4.0)
    # Baselines: the means of the others, 5.5, 4 and 2.5; credits -4.5, 0 and 4.5; ((-4.5) 0.5 + 0 + 4.5 * 2) / 3.
    np.testing.assert_allclose(slope, 2.25, rtol=1e-6)
    # One task has no others: its credit is its loss.
    np.testing.assert_allclose(jax.grad(lambda x: estimators.score_surrogate(losses[:1], x * slopes[:1]))(1.0), 0.5)


def test_a_loss_on_collected_data_without_collect_is_refused():
    with pytest.raises(ValueError, match="has collected_loss and no collect"):
        inner.make_segment(SHARED._replace(collect=None), LOSS, optax.sgd(1.0), steps=1, gradient="mixed", objective="mean")


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
