"""Optimizers with learned step sizes: shapes, updates, differentiability, and errors."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml3_jax import optimizers
from tests.ml3_jax import toys

PARAMS = {"in": jnp.ones((2, 3)), "bias": jnp.arange(3.0)}
GRADIENT = {"in": jnp.full((2, 3), 2.0), "bias": jnp.array([1.0, 0.0, -1.0])}
MAKERS = {"sgd": (optimizers.learned_sgd, optax.sgd), "adam": (optimizers.learned_adam, optax.adam)}
SHAPES: dict[str, Any] = {"all": (), "layer": {"in": (), "bias": ()}, "parameter": {"in": (2, 3), "bias": (3,)}}


def moved(optimizer: optax.GradientTransformation, params: Any = None, steps: int = 2) -> Any:
    """Parameters after some steps along `GRADIENT`."""
    params = PARAMS if params is None else params
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("per", optimizers.PER)
@pytest.mark.parametrize("name", MAKERS)
def test_at_first_a_learned_optimizer_is_the_one_of_optax_with_one_step_size(name: str, per: str):
    make, of_optax = MAKERS[name]
    learned = make(0.1, per)
    optimizer_params = learned.init(toys.KEY, PARAMS)
    sizes = optimizers.step_sizes(optimizer_params)
    assert jax.tree.map(jnp.shape, sizes) == SHAPES[per]
    np.testing.assert_allclose(toys.flat(sizes), 0.1, rtol=1e-6)
    expected = of_optax(0.1, eps_root=1e-8) if name == "adam" else of_optax(0.1)
    toys.assert_close(moved(learned.make(optimizer_params)), moved(expected))


@pytest.mark.parametrize("name", MAKERS)
def test_each_layer_moves_by_its_step_size(name: str):
    learned = MAKERS[name][0](0.1, per="layer")
    doubled = {"log_step_size": {"in": jnp.log(0.2), "bias": jnp.log(0.1)}}
    once, twice = (moved(learned.make(params), steps=1) for params in (learned.init(toys.KEY, PARAMS), doubled))
    np.testing.assert_allclose(twice["in"] - PARAMS["in"], 2.0 * (once["in"] - PARAMS["in"]), rtol=1e-5)
    toys.assert_close(twice["bias"], once["bias"])


def test_step_sizes_stay_positive_and_parameters_keep_their_dtype():
    learned = optimizers.learned_sgd(0.1, per="parameter")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    optimizer_params = learned.init(toys.KEY, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(optimizer_params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moved(learned.make(optimizer_params), half))} == {jnp.dtype("bfloat16")}
    lowered = jax.tree.map(lambda leaf: leaf - 50.0, optimizer_params)
    assert np.all(toys.flat(optimizers.step_sizes(lowered)) > 0.0)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: optimizers.learned_sgd(0.0), ValueError, r"initial_step_size: expected a positive, finite number, got 0\.0"),
    (
        lambda: optimizers.learned_sgd(float("nan")),
        ValueError,
        "initial_step_size: expected a positive, finite number, got nan",
    ),
    (
        lambda: optimizers.learned_sgd(cast(Any, "0.1")),
        ValueError,
        r"initial_step_size: expected a positive, finite number, got '0\.1'",
    ),
    (
        lambda: optimizers.learned_adam(0.1, per="leaf"),
        ValueError,
        "per: expected one of 'all', 'layer', 'parameter', got 'leaf'",
    ),
    (lambda: optimizers.learned_adam(0.1, eps_root=0.0), ValueError, r"eps_root: expected a positive number, got 0\.0"),
    (lambda: optimizers.step_sizes(None), TypeError, "optimizer_params: expected those of learned_sgd or learned_adam"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_learned_optimizers_refuse(call: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        call()


def test_step_sizes_per_layer_or_parameter_fit_one_architecture_and_one_for_all_fits_any():
    wider, other = {**PARAMS, "in": jnp.ones((2, 4))}, {"in": jnp.ones((2, 3))}
    for per, fitting, refused in (
        ("all", (wider, other), ()),
        ("layer", (wider,), (other,)),
        ("parameter", (), (wider, other)),
    ):
        learned = optimizers.learned_sgd(0.1, per)
        optimizer = learned.make(learned.init(toys.KEY, PARAMS))
        for params in fitting:
            optimizer.init(params)
        for params in refused:
            with pytest.raises(ValueError, match=rf'step sizes per="{per}" were learned, .*or meta-train with per="all"'):
                optimizer.init(params)
