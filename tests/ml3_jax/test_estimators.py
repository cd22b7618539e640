"""Estimators of an objective through one suite, and evolution strategies against backpropagation.

`test_persistent` has persistent evolution strategies, and all estimators on inner loops in several unrolls.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml3_jax import estimators
from ml3_jax.estimators import Estimator
from tests.ml3_jax import toys

SLOPE = np.array([1.0, -2.0, 0.5, 3.0])
EACH = pytest.mark.parametrize("estimator", [estimators.backprop(), estimators.evolution_strategy()], ids=["backprop", "es"])


def linear(phi):
    """An objective with the gradient SLOPE, and an auxiliary output."""
    return jnp.dot(jnp.asarray(SLOPE, phi["w"].dtype), phi["w"]), {"seen": phi["w"]}


@EACH
def test_value_and_aux_are_those_at_phi_and_the_gradient_is_like_phi(estimator: Estimator):
    phi = {"w": jnp.arange(4.0)}
    estimate = jax.jit(lambda key: estimator(linear, phi, key))
    (value, aux), gradient = estimate(toys.KEY)
    # 1 * 0 - 2 * 1 + 0.5 * 2 + 3 * 3 = 8
    np.testing.assert_allclose(value, 8.0, rtol=1e-6)
    toys.assert_same(aux, {"seen": phi["w"]})
    assert jax.tree.structure(gradient) == jax.tree.structure(phi)
    assert (gradient["w"].shape, gradient["w"].dtype) == ((4,), phi["w"].dtype)
    toys.assert_same(estimate(toys.KEY), ((value, aux), gradient))  # deterministic in its key


def test_evolution_strategy_meta_trains_and_carries_inner_states():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), estimator="es", inner_steps=2, unroll=1)
    start = meta.init(toys.KEY)
    state, metrics = meta.run(start, 3)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
    assert np.all(np.isfinite(toys.flat(state.loss_params)))
    assert np.all(toys.flat(start.loss_params) != toys.flat(state.loss_params))
    assert state.inner_state is not None
    assert np.asarray(state.inner_state.age).shape == (3,)


def test_backprop_is_exact():
    _, gradient = estimators.backprop()(linear, {"w": jnp.arange(4.0)}, toys.KEY)
    np.testing.assert_array_equal(gradient["w"], SLOPE.astype(np.float32))


def test_evolution_strategy_is_the_gradient_within_its_sampling_error(x64: None):
    # On a linear objective each mirrored pair gives (g . e) e with e ~ N(0, I): its mean is g, and the variance of its
    # component i is |g|^2 + g_i^2. The mean of P pairs is therefore within 4 standard errors of g, for this key.
    pairs = 6000
    estimate = estimators.evolution_strategy(sigma=0.1, pairs=pairs)
    _, gradient = jax.jit(lambda key: estimate(linear, {"w": jnp.arange(4.0)}, key))(toys.KEY)
    error = np.sqrt((SLOPE @ SLOPE + SLOPE**2) / pairs)
    assert np.all(np.abs(gradient["w"] - SLOPE) < 4 * error)
    assert np.all(4 * error < 0.3)  # of slopes between 0.5 and 3: the bound says something


def test_evolution_strategy_needs_no_derivative_of_the_inner_loop():
    # The sign has no useful derivative: backpropagation returns zero, the smoothed objective has a slope.
    def objective(phi):
        return jnp.sign(phi), None

    @jax.jit
    def both(phi):
        estimates = estimators.backprop(), estimators.evolution_strategy(sigma=0.1, pairs=64)
        return [estimate(objective, phi, toys.KEY)[1] for estimate in estimates]

    exact, smooth = both(jnp.asarray(0.001))
    assert exact == 0.0
    # d/dphi E[sign(phi + 0.1 e)] = 2 / 0.1 * density(0.01) = 7.98, known to about 10 % from 64 pairs
    np.testing.assert_allclose(smooth, 7.98, rtol=0.4)


def test_evolution_strategy_points_in_the_direction_of_backpropagation_on_an_inner_step(x64: None):
    # P pairs in D dimensions: the cosine with the gradient is about 1 / sqrt(1 + (D + 1) / P); D = 21, P = 600: 0.98.
    problem, loss, task, params, loss_params = toys.start()

    def objective(phi):
        step = jnp.zeros((), jnp.int32)
        slope = jax.grad(lambda p: loss.apply(phi, problem.observe(p, task, None, toys.KEY, step)))(params)
        return problem.task_loss(jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), task, None, toys.KEY), None

    @jax.jit
    def both(phi):
        estimates = estimators.backprop(), estimators.evolution_strategy(1e-3, 600)
        return [estimate(objective, phi, toys.KEY)[1] for estimate in estimates]

    exact, sampled = (toys.flat(g) for g in both(jax.tree.map(lambda x: x.astype(jnp.float64), loss_params)))
    assert exact.size == 21
    cosine = exact @ sampled / np.linalg.norm(exact) / np.linalg.norm(sampled)
    assert cosine > 0.95
    assert 0.8 < np.linalg.norm(sampled) / np.linalg.norm(exact) < 1.25


def test_a_function_is_used_as_the_estimator():
    def half(objective, loss_params, key):
        out, gradient = jax.value_and_grad(objective, has_aux=True)(loss_params)
        return out, jax.tree.map(lambda g: 0.5 * g, gradient)

    assert estimators.resolve(half) is half
    options = {"meta_optimizer": optax.sgd(1.0), "inner_steps": 1, "num_tasks": 1}
    steps = {}
    for estimator in ("backprop", half):
        meta = toys.learner(toys.quadratic(), toys.scaled_square(), estimator=estimator, **options)
        before = meta.init(toys.KEY)
        steps[estimator] = before.loss_params - meta.step(before)[0].loss_params
    assert steps["backprop"] != 0.0
    np.testing.assert_allclose(steps[half], 0.5 * steps["backprop"], rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_sigma_that_is_not_positive_is_refused(sigma: float):
    with pytest.raises(ValueError, match=f"sigma: expected a positive number, got {sigma}"):
        estimators.evolution_strategy(sigma=sigma)


def test_fewer_than_one_pair_is_refused():
    with pytest.raises(ValueError, match="pairs: expected a whole number of at least 1, got 0"):
        estimators.evolution_strategy(pairs=0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="estimator: expected one of backprop, es, pes or a function, got 'forward'"):
        estimators.resolve("forward")
