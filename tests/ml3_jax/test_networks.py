"""Networks: values by hand, initialisation, and bad names."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ml3_jax import networks
from tests.ml3_jax import toys


def initial(network: nn.Module, x: jax.Array) -> Any:
    return jax.jit(network.init)(toys.KEY, x)


def applied(network: nn.Module, params: Any, x: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(network.apply)(params, x))


def test_mlp_is_its_layers_written_out_by_hand():
    network = networks.MLP((4, 2), activation="tanh")
    x = jax.random.normal(toys.KEY, (5, 3))
    params = initial(network, x)
    first, last = (params["params"][name] for name in ("Dense_0", "Dense_1"))
    hidden = np.tanh(np.asarray(x) @ np.asarray(first["kernel"]) + np.asarray(first["bias"]))
    expected = hidden @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(applied(network, params, x), expected, rtol=1e-5, atol=1e-6)


def test_activations_are_finite_and_differentiable_twice():
    def values(x: jax.Array) -> dict[str, list[jax.Array]]:
        functions = {name: networks.activation_fn(name) for name in networks.ACTIVATIONS}
        return {name: [f(x), jax.grad(f)(x), jax.grad(jax.grad(f))(x)] for name, f in functions.items()}

    found = jax.jit(jax.vmap(values))(jnp.asarray([-1e4, -1.0, 0.0, 1.0, 1e4]))
    chex.assert_tree_all_finite(found)
    for name, (_, slope, _) in found.items():
        assert slope[3] > 0, name


def test_fan_in_initialisation_fills_its_bounds_and_biases_are_drawn():
    network = networks.MLP((400, 1))
    layers = initial(network, jnp.zeros((1, 16)))["params"]
    for layer, fan_in in (("Dense_0", 16), ("Dense_1", 400)):
        bound = fan_in**-0.5
        kernel = np.asarray(layers[layer]["kernel"])
        assert np.max(np.abs(kernel)) <= bound
        # The largest of 400 or more uniform draws is below the bound by about a 400th of it.
        assert np.max(np.abs(kernel)) > 0.97 * bound
        assert abs(np.mean(kernel)) < 0.1 * bound
    bias = np.asarray(layers["Dense_0"]["bias"])
    assert 0.97 / 4 < np.max(np.abs(bias)) <= 1 / 4
    assert abs(np.asarray(layers["Dense_1"]["bias"])[0]) <= 1 / 20


def test_fan_in_of_a_convolution_is_the_size_of_its_window():
    kernel = networks.fan_in_uniform()(toys.KEY, (3, 3, 4, 500))
    assert 0.99 / 6 < float(jnp.max(jnp.abs(kernel))) <= 1 / 6  # 3 * 3 * 4 = 36 inputs


def test_xavier_initialisation_has_its_bound_and_zero_biases():
    layers = initial(networks.MLP((40, 60), init_scheme="xavier"), jnp.zeros((1, 20)))["params"]
    for layer, fans in (("Dense_0", 60), ("Dense_1", 100)):
        bound = (6 / fans) ** 0.5
        kernel = np.asarray(layers[layer]["kernel"])
        assert 0.97 * bound < np.max(np.abs(kernel)) <= bound
        np.testing.assert_array_equal(layers[layer]["bias"], 0.0)


def test_last_scale_scales_the_weights_of_the_last_layer_alone():
    plain, scaled = (initial(networks.MLP((4, 2), last_scale=scale), jnp.zeros((1, 3)))["params"] for scale in (1.0, 0.01))
    toys.assert_same(plain["Dense_0"], scaled["Dense_0"])
    toys.assert_same(plain["Dense_1"]["bias"], scaled["Dense_1"]["bias"])
    kernels = [np.asarray(layers["Dense_1"]["kernel"]) for layers in (plain, scaled)]
    np.testing.assert_allclose(kernels[1], 0.01 * kernels[0], rtol=1e-6)


def test_bias_false_has_no_biases():
    layers = initial(networks.MLP((4, 2), bias=False), jnp.zeros((1, 3)))["params"]
    assert [set(layer) for layer in layers.values()] == [{"kernel"}, {"kernel"}]


def test_cnn_is_a_strided_convolution():
    network = networks.CNN(side=7, channels=(3,), classes=2)
    images = jax.random.normal(toys.KEY, (4, 49))
    params = initial(network, images)
    convolution, last = (params["params"][name] for name in ("Dense_0", "Dense_1"))
    maps = jax.lax.conv_general_dilated(
        images.reshape(4, 7, 7, 1),
        jnp.asarray(convolution["kernel"]).reshape(3, 3, 1, 3),
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert maps.shape == (4, 4, 4, 3)
    hidden = np.maximum(np.asarray(maps) + np.asarray(convolution["bias"]), 0.0).reshape(4, -1)
    expected = hidden @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(applied(network, params, images), expected, rtol=1e-4, atol=1e-6)


def test_cnn_keeps_the_axes_before_the_image():
    network = networks.CNN(side=4, channels=(2, 2), classes=3)
    images = jax.random.normal(toys.KEY, (2, 5, 16))
    params = initial(network, images)
    together = applied(network, params, images)
    assert together.shape == (2, 5, 3)
    np.testing.assert_allclose(applied(network, params, images[1]), together[1], rtol=1e-5, atol=1e-6)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"activation: expected one of elu, .*tanh, got 'rellu'"):
        networks.activation_fn("rellu")
    with pytest.raises(ValueError, match="init_scheme: expected 'xavier', 'lecun' or 'fan_in', got 'he'"):
        initial(networks.MLP((1,), init_scheme="he"), jnp.zeros((1, 3)))
