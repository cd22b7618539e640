"""`train` reports to a callback, keeps the best learned loss by validation tasks, and computes what `run` computes."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from tests.ml3_jax import toys

PROBLEM, LOSS = toys.quadratic(), toys.scaled_square()


def learner(**options: Any) -> ml3_jax.MetaLearner:
    return toys.learner(PROBLEM, LOSS, **{"num_tasks": 2, "inner_steps": 2, **options})


def test_training_in_blocks_computes_the_same_and_reports_means():
    meta, seen = learner(), []
    start = meta.init(toys.KEY)
    trained = ml3_jax.train(meta, start, 7, every=3, callback=lambda step, metrics: seen.append((step, dict(metrics))))
    state, metrics = meta.run(start, 7)
    toys.assert_close(trained.state.loss_params, state.loss_params)
    assert [step for step, _ in seen] == [3, 6, 7]
    assert set(seen[0][1]) == {"task_loss", "meta_grad_norm", "skipped", "left_out", "dead"}
    np.testing.assert_allclose(seen[1][1]["task_loss"], metrics.task_loss[3:6].mean(), rtol=1e-5)
    assert (trained.best_step, trained.best_value) == (7, None)
    toys.assert_same(trained.best, trained.state.loss_params)


def test_the_best_loss_by_validation_is_kept_and_training_goes_on_from_the_last():
    meta, seen = learner(), {}
    start = meta.init(toys.KEY)
    phis = [float(meta.run(start, n)[0].loss_params) for n in (2, 4, 6)]
    wanted = phis[1]

    def validate(phi: jax.Array) -> jax.Array:
        return (phi - wanted) ** 2

    trained = ml3_jax.train(
        meta, start, 6, every=2, validate=validate, callback=lambda step, metrics: seen.update({step: metrics["validation"]})
    )
    assert trained.best_step == 4
    assert float(trained.best) == pytest.approx(wanted)
    assert trained.best_value == seen[4] < min(seen[2], seen[6])
    assert float(trained.state.loss_params) == pytest.approx(phis[2])
    further = ml3_jax.train(meta, trained.state, 2, validate=validate)
    assert (int(further.state.step), further.best_step) == (8, 6)  # the start counts as well


def test_a_validation_that_is_not_finite_is_never_the_best():
    meta = learner()
    start = meta.init(toys.KEY)

    def broken_at_first(phi: jax.Array) -> jax.Array:
        return jnp.where(phi == start.loss_params, jnp.nan, phi)

    assert ml3_jax.train(meta, start, 2, every=1, validate=broken_at_first).best_step > 0
    trained = ml3_jax.train(meta, start, 2, every=1, validate=lambda phi: jnp.where(phi == start.loss_params, 1.0, jnp.nan))
    assert (trained.best_step, trained.best_value) == (0, 1.0)


@pytest.mark.parametrize("broken", [jnp.nan, jnp.inf, -jnp.inf])
def test_no_value_that_is_not_finite_replaces_a_finite_one_and_any_finite_one_replaces_it(broken: Any):
    meta = learner()
    start = meta.init(toys.KEY)
    trained = ml3_jax.train(meta, start, 2, every=1, validate=lambda phi: jnp.where(phi == start.loss_params, 1.0, broken))
    assert (trained.best_step, trained.best_value) == (0, 1.0)
    trained = ml3_jax.train(meta, start, 2, every=2, validate=lambda phi: jnp.where(phi == start.loss_params, broken, 1.0))
    assert (trained.best_step, trained.best_value) == (2, 1.0)


def test_a_learner_that_donates_its_state_leaves_the_best_loss_valid():
    meta = learner(donate=True)
    trained = ml3_jax.train(meta, meta.init(toys.KEY), 2, every=1, validate=lambda phi: 0.0 * phi)
    assert trained.best_step == 0  # all are equal: the first stays
    assert float(trained.best) == pytest.approx(0.5)
    meta.run(trained.state, 1)  # donates the last state
    assert np.isfinite(trained.best)


@pytest.mark.parametrize("maximize", [False, True])
def test_validation_is_the_mean_metric_after_the_last_step(maximize: bool):
    optimizer = optax.sgd(0.1)
    validate = ml3_jax.make_validation(
        PROBLEM, LOSS, "error", toys.KEY, optimizer=optimizer, steps=3, num_tasks=4, maximize=maximize
    )
    # e_k = e (1 - 0.1 phi)^k with e = 2.
    expected = 2.0 * (1 - 0.1 * 0.5) ** 3
    np.testing.assert_allclose(validate(jnp.asarray(0.5)), -expected if maximize else expected, rtol=1e-5)


def test_wrong_arguments_are_refused():
    meta, nothing, text = learner(), cast(Any, None), cast(Any, "print")
    state = meta.init(toys.KEY)
    with pytest.raises(TypeError, match="meta: expected a MetaLearner, as make_meta_learner returns it, got None"):
        ml3_jax.train(nothing, state, 1)
    for num_steps, every, word in ((0, 1, "num_steps"), (1, 0, "every")):
        with pytest.raises(ValueError, match=f"{word}: expected a whole number of at least 1, got 0"):
            ml3_jax.train(meta, state, num_steps, every=every)
    with pytest.raises(TypeError, match="callback: expected a function or None, got 'print'"):
        ml3_jax.train(meta, state, 1, callback=text)
    validate = ml3_jax.make_validation(PROBLEM, LOSS, "mse", toys.KEY, optimizer=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="metric: expected one of error, got 'mse'"):
        validate(jnp.asarray(0.5))
