"""Tasks, gradients and updates that are not finite: what is left out, what is skipped, and what is counted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import chunks
from tests.ml3_jax import toys

TASKS = 4


def problem(where: str) -> ml3_jax.Problem:
    """The quadratic with a random target in each task. Tasks with a target below the context are not finite in `where`."""

    def sample_task(key: jax.Array, context: Any) -> toys.Target:
        target = jax.random.uniform(key)
        bad = target < jnp.asarray(context)
        return toys.Target(target, jnp.where(bad, jnp.nan, target) if where == "task loss" else target)

    def observe(params: Any, task: toys.Target, context: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        del key, step
        bad = (task.target < jnp.asarray(context)) & (where == "features")
        return jnp.stack([params, jnp.where(bad, jnp.inf, task.target)])[None]

    def task_loss(params: Any, task: toys.Target, context: Any, key: jax.Array) -> jax.Array:
        del key
        bad = (task.target < jnp.asarray(context)) & (where == "gradient")
        error = params - task.extra
        # A finite value with a gradient that is not: the root of zero.
        return 0.5 * error**2 + jnp.where(bad, jnp.sqrt(jnp.where(bad, 0.0 * error, 1.0)), 0.0)

    return toys.quadratic()._replace(sample_task=sample_task, observe=observe, task_loss=task_loss)


def make(where: str, **options: Any) -> ml3_jax.MetaLearner:
    return toys.learner(problem(where), toys.scaled_square(), **{"num_tasks": TASKS, "inner_steps": 2, **options})


@functools.cache
def first_targets() -> np.ndarray:
    """The targets of the first meta-step, in rising order."""
    seen: list[float] = []

    def init(key: jax.Array, task: toys.Target) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(float(x)), task.target)
        return jnp.asarray(3.0)

    watched = problem("nothing")._replace(init=init)
    spy = toys.learner(watched, toys.scaled_square(), num_tasks=TASKS, inner_steps=2)
    start = spy.init(toys.KEY, jnp.zeros(()))
    jax.effects_barrier()
    seen.clear()
    jax.block_until_ready(spy.step(start))
    jax.effects_barrier()
    return np.sort(seen)


@pytest.mark.parametrize("where", ["task loss", "features", "gradient"])
@pytest.mark.parametrize("size", [TASKS, 1])
def test_the_mean_is_over_the_finite_tasks(where: str, size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "chunk_size", lambda *args, **options: size)
    meta = make(where, non_finite_tasks="leave_out", auxiliary_loss=lambda phi, task, context, key: task.target * phi)
    targets = first_targets()
    start = meta.init(toys.KEY, jnp.asarray(targets[:2].mean()))
    state, metrics = meta.step(start)
    assert (int(metrics.left_out), int(metrics.skipped)) == (1, 0)
    # e_1 = e (1 - 0.1 phi), twice: J = e^2 (1 - 0.1 phi)^4 / 2, dJ/dphi = -0.2 e^2 (1 - 0.1 phi)^3, plus the target.
    kept = targets[1:]
    error = 3.0 - kept
    np.testing.assert_allclose(metrics.task_loss, np.mean(0.5 * error**2 * 0.95**4), rtol=1e-5)
    slope = np.mean(-0.2 * error**2 * 0.95**3 + kept)
    np.testing.assert_allclose(state.loss_params, 0.5 - 0.1 * slope, rtol=1e-5)
    with pytest.raises(ValueError, match=r"the (task loss|meta-gradient) .* expected a finite number"):
        make(where).step(start)


def test_without_a_broken_task_leaving_out_changes_nothing():
    finite = jnp.zeros(())
    made = []
    for choice in ("skip_update", "leave_out"):
        meta = make("task loss", non_finite_tasks=choice, unroll=1)
        made.append(meta.run(meta.init(toys.KEY, finite), 3))
    toys.assert_close(*made)


def test_an_update_without_any_finite_task_is_skipped():
    meta = make("task loss", non_finite_tasks="leave_out", meta_optimizer=optax.adam(0.1))
    start = meta.init(toys.KEY, jnp.asarray(2.0)).replace(step=jnp.asarray(1, jnp.int32))
    state, metrics = meta.step(start)
    assert (int(metrics.left_out), int(metrics.skipped)) == (TASKS, 1)
    toys.assert_same((state.loss_params, state.opt_state), (start.loss_params, start.opt_state))


def test_a_task_that_is_left_out_starts_anew():
    meta = make("features", non_finite_tasks="leave_out", inner_steps=4, unroll=1)
    start = meta.init(toys.KEY, jnp.asarray(0.5))
    state, metrics = meta.run(start, 6)
    assert 0 < np.max(metrics.left_out) < TASKS
    assert not np.any(metrics.skipped)
    assert np.isfinite(state.loss_params)


def test_an_update_that_is_not_finite_is_skipped_though_the_gradient_is():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), meta_optimizer=optax.scale(jnp.inf))
    start = meta.init(toys.KEY).replace(step=jnp.asarray(1, jnp.int32))
    state, metrics = meta.step(start)
    assert np.isfinite(metrics.meta_grad_norm)
    assert metrics.skipped == 1
    toys.assert_same(state.loss_params, start.loss_params)


def test_a_loss_without_a_meta_gradient_is_counted_as_dead():
    dead = toys.scaled_square()._replace(apply=lambda phi, features: 0.0 * phi * jnp.mean(features))
    for loss, flag in ((dead, 1), (toys.scaled_square(), 0)):
        meta = toys.learner(toys.quadratic(), loss)
        assert int(meta.step(meta.init(toys.KEY))[1].dead) == flag


def test_a_choice_without_meaning_is_refused():
    with pytest.raises(ValueError, match="non_finite_tasks: expected one of 'skip_update', 'leave_out', got 'ignore'"):
        make("features", non_finite_tasks="ignore")
    scored = toys.stream()._replace(log_prob=lambda params, task, context, key, step: params)
    with pytest.raises(ValueError, match='non_finite_tasks="leave_out" needs a gradient of each task alone'):
        toys.learner(scored, collect_gradient="score", non_finite_tasks="leave_out")


def scaled_by_context() -> ml3_jax.Problem:
    plain = toys.quadratic()
    return plain._replace(task_loss=lambda params, task, context, key: plain.task_loss(params, task, context, key) * context)


@pytest.mark.parametrize("meta_optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("factor", [1e12, 1e22, 1e30])
def test_a_meta_gradient_that_explodes_is_skipped(factor: float, meta_optimizer: optax.GradientTransformation):
    """Each of its numbers is finite. Its update would destroy the loss or the moments of the optimizer."""
    meta = toys.learner(scaled_by_context(), toys.scaled_square(), num_tasks=2, inner_steps=2, meta_optimizer=meta_optimizer)
    before, _ = meta.step(meta.init(toys.KEY, jnp.ones(())))
    after, metrics = meta.run(before.replace(context=jnp.asarray(factor)), 3)
    assert np.isfinite(metrics.task_loss).all()
    assert metrics.skipped.tolist() == [1, 1, 1]
    toys.assert_same((after.loss_params, after.opt_state), (before.loss_params, before.opt_state))
    assert "the meta-gradient explodes: its norm is " in meta.diagnose(after)
    recovered, metrics = meta.step(after.replace(context=jnp.ones(())))
    assert int(metrics.skipped) == 0
    assert abs(float(recovered.loss_params - before.loss_params)) > 1e-3


def test_an_explosion_in_the_first_meta_step_is_an_error_and_the_limit_can_be_raised():
    options: dict[str, Any] = {"num_tasks": 2, "inner_steps": 2}
    meta = toys.learner(scaled_by_context(), toys.scaled_square(), **options)
    with pytest.raises(ValueError, match=r"has norm .*e\+1\d; expected at most max_meta_grad_norm = 1e\+10: it explodes"):
        meta.step(meta.init(toys.KEY, jnp.asarray(1e12)))
    meta = toys.learner(scaled_by_context(), toys.scaled_square(), max_meta_grad_norm=1e15, **options)
    assert int(meta.step(meta.init(toys.KEY, jnp.asarray(1e12)))[1].skipped) == 0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_meta_grad_norm: expected a positive, finite number, got"):
            toys.learner(scaled_by_context(), toys.scaled_square(), max_meta_grad_norm=wrong, **options)


def test_a_task_loss_that_is_not_finite_is_skipped_though_its_gradient_is():
    def task_loss(params: Any, task: toys.Target, context: Any, key: jax.Array) -> jax.Array:
        return 0.5 * (params - task.extra) ** 2 + jax.lax.stop_gradient(context)

    meta = toys.learner(toys.quadratic()._replace(task_loss=task_loss), toys.scaled_square(), num_tasks=2, inner_steps=2)
    before, _ = meta.step(meta.init(toys.KEY, jnp.zeros(())))
    after, metrics = meta.step(before.replace(context=jnp.asarray(jnp.nan)))
    assert int(metrics.skipped) == 1
    assert np.isfinite(metrics.meta_grad_norm)
    toys.assert_same(after.loss_params, before.loss_params)
