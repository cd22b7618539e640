"""The loop over the inner steps of a large optimizee: the same numbers as a scan, and the memory of a few optimizees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import unroll
from tests.ml3_jax import toys

WIDTH = 512


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_stored_loop_and_its_derivative_are_those_of_a_scan(count: int, x64: None):
    factor, key = jnp.asarray([0.5, 1.5]), jax.random.key(3)

    def step(carry: Any, x: jax.Array) -> tuple[Any, Any]:
        state, number, key = carry
        key, noise = jax.random.split(key)
        state = jnp.sin(factor_of[0] * state + x) + jax.random.normal(noise, state.shape)
        return (state, number + 1, key), (jnp.sum(state**2), number)

    factor_of = [factor]

    def outputs(loop: Any, factor: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        factor_of[0] = factor  # closed over, and differentiated
        (state, number, last), (values, numbers) = loop(step, (start, jnp.asarray(0), key), jnp.linspace(0.0, 1.0, count))
        return jnp.sum(state) + jnp.sum(values**2), (state, number, jax.random.key_data(last), numbers)

    def slopes(loop: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *args: outputs(loop, *args), argnums=(0, 1), has_aux=True))(factor, start)

    start = jnp.asarray([0.3, -0.7])
    toys.assert_close(slopes(unroll.stored), slopes(jax.lax.scan), rtol=1e-12)


@pytest.mark.parametrize("gradient", ["mixed", "nested"])
@pytest.mark.parametrize("objective", ["last", "mean"])
def test_meta_gradients_of_large_optimizees_are_those_of_small_ones(
    gradient: str, objective: str, monkeypatch: pytest.MonkeyPatch
):
    def made() -> Any:
        meta = toys.learner(
            toys.stream() if objective == "mean" else toys.points(),
            num_tasks=2,
            inner_steps=5,
            inner_optimizer=optax.adam(0.05, eps_root=1e-8),
            gradient=gradient,
            objective=objective,
        )
        return meta.step(meta.init(toys.KEY))

    expected = made()
    monkeypatch.setattr(unroll, "LARGE_BYTES", 0)
    toys.assert_close(made(), expected, rtol=1e-5)


def wide_network() -> ml3_jax.Problem:
    """A network of two hidden layers of `WIDTH` and four samples: its parameters are much larger than its activations."""
    problem = toys.points(samples=4)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tile(x[:, None], (1, WIDTH))
        for layer in params:
            hidden = jnp.tanh(hidden @ layer)
        return jnp.mean(hidden, axis=1)

    return problem._replace(
        init=lambda key, task: [0.05 * jax.random.normal(k, (WIDTH, WIDTH)) for k in jax.random.split(key, 2)],
        observe=lambda params, task, context, key, step: jnp.stack([apply(params, task.x), task.y], axis=-1),
        task_loss=lambda params, task, context, key: jnp.mean((apply(params, task.x) - task.extra) ** 2),
    )


def temporaries(**options: Any) -> float:
    """Bytes of the temporaries of a meta-step of four inner steps, as a multiple of those of the optimizee."""
    meta = toys.learner(wide_network(), toys.scaled_square(), **{"num_tasks": 1, "inner_steps": 4, **options})
    analysis = jax.jit(meta.step).lower(jax.eval_shape(meta.init, toys.KEY)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / (2 * WIDTH * WIDTH * np.dtype(np.float32).itemsize)


ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts the copies of XLA's CPU compiler")


@ON_CPU
def test_temporaries_are_at_most_eight_optimizees_and_nested_has_fewer():
    mixed, nested = temporaries(), temporaries(gradient="nested")
    assert mixed <= 8.0
    assert nested < mixed


@ON_CPU
def test_memory_grows_with_the_tasks_at_once_and_not_with_all_tasks():
    one_by_one = temporaries(num_tasks=4, tasks_at_once=1)
    assert one_by_one < 1.3 * temporaries()
    assert temporaries(num_tasks=4, tasks_at_once=4) > 2.5 * one_by_one
