"""Chunks of the task axis: their size, and that results do not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import chunks
from tests.ml3_jax import toys


def of_chunk(xs):
    """((mean value, per-task outputs), gradient) of sum(phi * x)^2, as the outer loop asks for."""

    def objective(phi):
        values = jax.vmap(lambda x: jnp.sum(phi * x["a"]) ** 2 + x["b"])(xs)
        return jnp.mean(values), {"values": values}

    return jax.value_and_grad(objective, has_aux=True)(jnp.asarray([0.5, -1.0]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
def test_the_mean_over_chunks_is_the_mean_over_tasks(size: int):
    xs = {"a": jax.random.normal(toys.KEY, (7, 2)), "b": jnp.arange(7.0)}
    whole = of_chunk(xs)
    chunked = chunks.mean_over_chunks(of_chunk, xs, jnp.zeros(2), size)
    toys.assert_close(chunked, whole)


@pytest.mark.parametrize(("most", "unroll"), [(1, None), (2, 2), (3, 2)])
def test_meta_training_does_not_depend_on_the_size_of_a_chunk(monkeypatch, most: int, unroll: int | None):
    def trained():
        meta = toys.learner(toys.stream(), num_tasks=5, inner_steps=4, unroll=unroll)
        return meta.run(meta.init(toys.KEY), 2)

    whole = trained()  # five tasks of a few bytes are one chunk
    sizes = []

    def smaller(num_tasks: int, bytes_per_task: int, *, simulates: bool) -> int:
        assert not simulates  # its collect looks its data up
        sizes.append((num_tasks, bytes_per_task))
        return most

    monkeypatch.setattr(chunks, "chunk_size", smaller)
    toys.assert_close(trained(), whole)
    assert {num_tasks for num_tasks, _ in sizes} == {5}
    assert all(0 < size < chunks.CPU_CHUNK_BYTES // 5 for _, size in sizes)


@pytest.mark.parametrize(
    ("num_tasks", "share", "size"),
    [
        (100, 1000, 100),  # all fit
        (100, 100, 100),  # exactly
        (100, 12, 10),  # the largest divisor that fits, near enough
        (97, 12, 12),  # a prime: no divisor is near
        (14, 6, 6),  # 2 is too far from 6
        (1, 0, 1),  # never less than a task
        (100, 0, 1),
    ],
)
def test_chunks_fit_and_are_equal_where_a_divisor_is_near(num_tasks: int, share: int, size: int):
    per_task = chunks.CPU_CHUNK_BYTES // share if share else 2 * chunks.CPU_CHUNK_BYTES
    assert chunks.chunk_size(num_tasks, per_task) == size


def test_tasks_that_simulate_a_system_run_side_by_side():
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES, simulates=True) == 16
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES) == 1
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES_SIMULATING // 4, simulates=True) == 4


def test_a_loop_is_found_wherever_it_stands():
    def scans(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0]

    x = jnp.ones(2)
    assert chunks.has_loop(scans, x)
    assert chunks.has_loop(jax.jit(scans), x)
    assert chunks.has_loop(jax.vmap(lambda y: jax.lax.cond(y[0] > 0, scans, jnp.cos, y)), x[None])
    assert chunks.has_loop(lambda y: jax.lax.while_loop(lambda z: z[0] < 3, lambda z: z + 1, y), x)
    assert not chunks.has_loop(lambda y: jax.lax.dynamic_slice_in_dim(jnp.sin(y), 0, 1), x)
    assert not chunks.has_loop(lambda key: jax.random.normal(key, (3,)), jax.random.key(0))


def test_an_accelerator_takes_all_tasks_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chunks.chunk_size(1000, 10 * chunks.CPU_CHUNK_BYTES) == 1000


def test_intermediate_bytes_are_those_of_what_is_computed():
    x = jnp.zeros((10, 3))
    # sin: 10 * 3 * 4 bytes; sum: 4 bytes
    assert chunks.intermediate_bytes(lambda x: jnp.sum(jnp.sin(x)), x) == 124
    inside = chunks.intermediate_bytes(lambda x: jax.jit(lambda y: jnp.sum(jnp.sin(y)))(x), x)
    assert inside == 124
    assert chunks.intermediate_bytes(lambda x: x, np.zeros(3)) == 0
