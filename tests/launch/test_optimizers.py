"""Optimizers by name: differentiable in the inner loop, tuned with one compilation, with decaying step sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import optimizers


def first_update(optimizer: optax.GradientTransformation, gradient: Any) -> Any:
    """What the optimizer's first step adds to parameters that are zero."""
    params = jnp.zeros_like(gradient)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", optimizers.INNER)
def test_a_meta_gradient_through_an_inner_step_is_finite_even_at_a_zero_gradient(name):
    def after_two_steps(scale):
        params: Any = jnp.array([1.0, 0.0])
        optimizer = optimizers.inner(name, 0.1)
        state = optimizer.init(params)
        for _ in range(2):
            gradient = scale * params * jnp.array([1.0, 0.0])  # the second entry has no gradient at all
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params)

    gradient = jax.grad(after_two_steps)(jnp.asarray(1.5))
    assert np.isfinite(gradient)
    assert gradient != 0


@pytest.mark.parametrize("name", optimizers.INNER)
def test_one_compilation_serves_every_step_size(name):
    traced = []

    @jax.jit
    def step(learning_rate):
        traced.append(1)
        return first_update(optimizers.inner(name, learning_rate), jnp.ones(()))

    # The first step of all three moves a unit gradient by the step size.
    np.testing.assert_allclose([step(np.float32(0.1)), step(np.float32(0.5))], [-0.1, -0.5], rtol=1e-5)
    assert len(traced) == 1


def test_the_meta_step_size_decays_over_a_length_of_its_own():
    optimizer = optimizers.meta("sgd", 0.5, decay_steps=10)
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(15):
        update, state = optimizer.update(jnp.ones(()), state)
        moves.append(-float(jnp.asarray(update)))
    assert moves[0] == 0.5
    # Half-way along the cosine from 1 to 0.01: 0.505 of the start.
    assert moves[5] == pytest.approx(0.5 * 0.505)
    assert moves[10:] == pytest.approx([0.5 * optimizers.DECAY_END] * 5)


@pytest.mark.parametrize("name", optimizers.INNER)
def test_an_inner_step_size_decays_too_and_may_be_traced(name):
    @jax.jit
    def moves(learning_rate):
        constant, decaying = optimizers.inner(name, learning_rate), optimizers.inner(name, learning_rate, decay_steps=4)
        states, found = [constant.init(jnp.zeros(())), decaying.init(jnp.zeros(()))], []
        for _ in range(6):
            fixed, states[0] = constant.update(jnp.ones(()), states[0])
            fallen, states[1] = decaying.update(jnp.ones(()), states[1])
            found.append(jnp.asarray(fallen) / jnp.asarray(fixed))
        return jnp.stack(found)

    # A cosine from 1 over 0.505 half-way to 0.01, whatever the optimiser makes of the gradient.
    end = optimizers.DECAY_END
    np.testing.assert_allclose(moves(np.float32(0.3))[jnp.array([0, 2, 4, 5])], [1.0, 0.505, end, end], rtol=1e-4)


def test_mup_adam_moves_the_output_of_a_wide_layer_no_further_than_that_of_a_narrow_one():
    def moved(name: str, inputs: int, leaf: str) -> float:
        params = {"kernel": jnp.zeros((inputs, 2)), "bias": jnp.zeros(2)}
        optimizer = optimizers.inner(name, 0.1)
        gradient = jax.tree.map(jnp.ones_like, params)
        updates: Any = optimizer.update(gradient, optimizer.init(params), params)[0]
        return float(jnp.sum(jnp.abs(updates[leaf]))) / 2  # of one output, all inputs being 1

    # Up to 64 inputs it is Adam; a layer of 256 moves as far as one of 64, where Adam's moves four times as far.
    for inputs in (8, 64):
        assert moved("mup_adam", inputs, "kernel") == moved("adam", inputs, "kernel")
    assert moved("mup_adam", 256, "kernel") == pytest.approx(moved("adam", 64, "kernel"))
    assert moved("adam", 256, "kernel") == pytest.approx(4 * moved("adam", 64, "kernel"))
    assert moved("mup_adam", 256, "bias") == moved("adam", 256, "bias")


@pytest.mark.parametrize("name", optimizers.META)
def test_every_meta_optimizer_descends(name):
    update = first_update(optimizers.meta(name, 0.1), jnp.array([2.0, -3.0]))
    assert update[0] < 0 < update[1]


def test_clipping_bounds_the_global_norm():
    update = first_update(optimizers.meta("sgd", 1.0, clip=1.0), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(update, [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("make", [optimizers.inner, optimizers.meta])
def test_unknown_names_are_refused(make):
    with pytest.raises(ValueError, match=r"unknown .* optimizer 'sdg': expected one of"):
        make("sdg", 0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0] * 10),
        ("cosine", [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k / 10)) for k in range(10)]),
        ("warmup_10", [1.0] + [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k / 9)) for k in range(9)]),
        ("warmup_30", [1 / 3, 2 / 3, 1.0] + [0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k / 7)) for k in range(7)]),
    ],
)
def test_a_schedule_warms_up_along_a_line_and_decays_along_a_cosine(name: str, expected: list[float]):
    rate = optimizers.scheduled(2.0, optimizers.SCHEDULES[name], 10)
    np.testing.assert_allclose([rate(count) for count in range(10)], 2.0 * np.array(expected), rtol=1e-5)
    assert rate(1000) == pytest.approx(2.0 if name == "constant" else 0.02)
