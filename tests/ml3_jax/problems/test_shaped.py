"""Shaped regression: values by hand, and the true parameters reach the task loss alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax.problems import shaped
from tests.ml3_jax import toys


def test_a_task_is_samples_of_its_own_function():
    problem = toys.frequency()
    task = problem.sample_task(toys.KEY, None)
    np.testing.assert_allclose(task.targets, np.sin(np.asarray(task.extra) * np.asarray(task.inputs)), rtol=1e-5)
    seen = problem.observe(jnp.asarray(2.0), task, None, toys.KEY, jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(seen[:, 0], np.sin(2.0 * np.asarray(task.inputs)), rtol=1e-5, atol=1e-7)
    toys.assert_same(seen[:, 1:], jnp.stack([task.targets, task.inputs], axis=-1))


def test_extra_losses_by_hand():
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(0.0)}
    truth = {"a": jnp.asarray([0.0, 4.0]), "b": jnp.asarray(2.0)}
    np.testing.assert_allclose(shaped.squared_distance(params, truth), 1 + 4 + 4, rtol=1e-6)
    np.testing.assert_allclose(shaped.log_squared_distance(1.0)(params, truth), np.log(10), rtol=1e-6)
    at_the_truth = jax.value_and_grad(shaped.log_squared_distance(1e-6))(truth, truth)
    np.testing.assert_allclose(toys.flat(at_the_truth), [np.log(1e-6), 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("extra", [True, False])
def test_the_task_loss_is_the_error_of_the_parameter_with_extra_and_of_the_prediction_without(extra: bool):
    problem = toys.frequency() if extra else toys.frequency(extra_loss=None)
    task, w = problem.sample_task(toys.KEY, None), jnp.asarray(2.0)
    x = np.asarray(task.inputs)
    mse = np.mean((np.sin(2.0 * x) - np.asarray(task.targets)) ** 2)
    error = abs(2.0 - float(task.extra))
    np.testing.assert_allclose(problem.task_loss(w, task, None, toys.KEY), error**2 if extra else mse, rtol=1e-5)
    report = problem.evaluate(w, task, None, toys.KEY)
    np.testing.assert_allclose(report["parameter_error"], error, rtol=1e-5)
    np.testing.assert_allclose(report["mse"], mse, rtol=1e-5)
    assert problem.plain_loss is not None
    plain = problem.plain_loss(w, task, None, toys.KEY, jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(plain, mse, rtol=1e-5)


def test_without_extra_the_task_loss_does_not_read_the_truth():
    problem = toys.frequency(extra_loss=None)
    task, w = problem.sample_task(toys.KEY, None), jnp.asarray(2.0)
    slope = jax.jit(jax.value_and_grad(problem.task_loss))
    toys.assert_same(slope(w, task, None, toys.KEY), slope(w, task.replace(extra=jnp.asarray(jnp.nan)), None, toys.KEY))


@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan")])
def test_a_floor_that_is_not_positive_is_refused(floor: float):
    with pytest.raises(ValueError, match=f"floor: expected a positive number, got {floor}"):
        shaped.log_squared_distance(floor)
