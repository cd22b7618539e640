"""Every estimator of the meta-gradient through one suite, and evolution strategies against backpropagation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml3_jax import estimators
from tests.ml3_jax import toys

SLOPE = np.array([1.0, -2.0, 0.5, 3.0])


def linear(phi):
    """An objective with the gradient SLOPE, and something beside it."""
    return jnp.dot(jnp.asarray(SLOPE, phi["w"].dtype), phi["w"]), {"seen": phi["w"]}


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_value_and_aux_are_those_at_phi_and_the_gradient_is_like_phi(name: str):
    phi = {"w": jnp.arange(4.0)}
    (value, aux), gradient = estimators.resolve(name)(linear, phi, toys.KEY)
    # 1 * 0 - 2 * 1 + 0.5 * 2 + 3 * 3 = 8
    np.testing.assert_allclose(value, 8.0, rtol=1e-6)
    toys.assert_same(aux, {"seen": phi["w"]})
    assert jax.tree.structure(gradient) == jax.tree.structure(phi)
    assert gradient["w"].shape == (4,)
    assert gradient["w"].dtype == phi["w"].dtype


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_estimators_are_deterministic_in_their_key(name: str):
    estimate = jax.jit(lambda key: estimators.resolve(name)(linear, {"w": jnp.arange(4.0)}, key))
    toys.assert_same(estimate(toys.KEY), estimate(toys.KEY))


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_estimators_meta_train(name: str):
    meta = toys.learner(toys.points(), estimator=name, meta_optimizer=optax.adam(1e-2), inner_steps=4, unroll=2)
    start = meta.init(toys.KEY)
    state, metrics = meta.run(start, 3)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
    assert np.all(np.isfinite(toys.flat(state.loss_params)))
    assert np.all(toys.flat(start.loss_params) != toys.flat(state.loss_params))
    assert state.lives is not None
    assert np.asarray(state.lives.age).shape == (3,)


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
    # The sign has no useful derivative: backpropagation sees nothing, the smoothed objective has a slope.
    def objective(phi):
        return jnp.sign(phi), None

    _, exact = estimators.backprop()(objective, jnp.asarray(0.001), toys.KEY)
    _, smooth = estimators.evolution_strategy(sigma=0.1, pairs=64)(objective, jnp.asarray(0.001), toys.KEY)
    assert exact == 0.0
    # d/dphi E[sign(phi + 0.1 e)] = 2 / 0.1 * density(0.01) = 7.98, known to about 10 % from 64 pairs
    np.testing.assert_allclose(smooth, 7.98, rtol=0.4)


def test_evolution_strategy_points_where_backpropagation_does_on_the_points_problem(x64: None):
    # P pairs in D dimensions: the cosine with the gradient is about 1 / sqrt(1 + (D + 1) / P); D = 21, P = 600: 0.98.
    gradients = {}
    for name, estimator in {"backprop": "backprop", "es": estimators.evolution_strategy(1e-3, 600)}.items():
        meta = toys.learner(toys.points(), estimator=estimator, meta_optimizer=optax.sgd(1.0), inner_steps=2)
        before = meta.init(toys.KEY)
        gradients[name] = toys.flat(before.loss_params) - toys.flat(meta.step(before)[0].loss_params)
    exact, sampled = gradients["backprop"], gradients["es"]
    assert exact.size == 21
    cosine = exact @ sampled / np.linalg.norm(exact) / np.linalg.norm(sampled)
    assert cosine > 0.95
    assert 0.8 < np.linalg.norm(sampled) / np.linalg.norm(exact) < 1.25


def test_an_estimator_of_ones_own_is_used_as_it_is():
    def half(objective, loss_params, key):
        out, gradient = jax.value_and_grad(objective, has_aux=True)(loss_params)
        return out, jax.tree.map(lambda g: 0.5 * g, gradient)

    assert estimators.resolve(half) is half
    steps = {}
    for estimator in ("backprop", half):
        meta = toys.learner(toys.points(), estimator=estimator, meta_optimizer=optax.sgd(1.0))
        before = meta.init(toys.KEY)
        steps[estimator] = toys.flat(before.loss_params) - toys.flat(meta.step(before)[0].loss_params)
    np.testing.assert_allclose(steps[half], 0.5 * steps["backprop"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_sigma_that_is_not_positive_is_refused(sigma: float):
    with pytest.raises(ValueError, match=f"sigma: expected a positive number, got {sigma}"):
        estimators.evolution_strategy(sigma=sigma)


def test_fewer_than_one_pair_is_refused():
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        estimators.evolution_strategy(pairs=0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="estimator: expected one of backprop, es or a function, got 'forward'"):
        estimators.resolve("forward")
