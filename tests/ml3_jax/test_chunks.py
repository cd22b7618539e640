"""The size of a chunk of the task axis, on any platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import chunks


@pytest.mark.parametrize(
    ("num_tasks", "share", "size"),
    [
        (100, 1000, 100),  # all fit
        (100, 100, 100),  # exactly
        (100, 12, 10),  # the largest divisor that fits is near enough
        (97, 12, 12),  # a prime: no divisor is near
        (14, 6, 6),  # 2 is too far from 6
        (1, 0, 1),  # at least one task
        (100, 0, 1),
    ],
)
def test_on_a_cpu_chunks_fit_and_are_equal_if_a_divisor_is_near(num_tasks: int, share: int, size: int):
    per_task = chunks.CPU_CHUNK_BYTES // share if share else 2 * chunks.CPU_CHUNK_BYTES
    assert chunks.chunk_size(num_tasks, per_task, platform="cpu") == size


def test_on_a_cpu_chunks_of_tasks_that_simulate_a_system_are_larger():
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES, simulates=True, platform="cpu") == 16
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES, platform="cpu") == 1
    assert chunks.chunk_size(16, chunks.CPU_CHUNK_BYTES_SIMULATING // 4, simulates=True, platform="cpu") == 4


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_has_one_chunk(platform: str):
    assert chunks.chunk_size(1000, 10 * chunks.CPU_CHUNK_BYTES, platform=platform) == 1000


def test_a_loop_is_found_at_any_depth():
    def scans(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0]

    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    batch = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    assert chunks.has_loop(scans, x)
    assert chunks.has_loop(jax.jit(scans), x)
    assert chunks.has_loop(jax.vmap(lambda y: jax.lax.cond(y[0] > 0, scans, jnp.cos, y)), batch)
    assert chunks.has_loop(lambda y: jax.lax.while_loop(lambda z: z[0] < 3, lambda z: z + 1, y), x)
    assert not chunks.has_loop(lambda y: jax.lax.dynamic_slice_in_dim(jnp.sin(y), 0, 1), x)
    assert not chunks.has_loop(lambda key: jax.random.normal(key, (3,)), jax.random.key(0))


def test_intermediate_bytes_are_those_of_all_computed_arrays():
    x = jax.ShapeDtypeStruct((10, 3), jnp.float32)
    # sin: 10 * 3 * 4 bytes; sum: 4 bytes
    assert chunks.intermediate_bytes(lambda x: jnp.sum(jnp.sin(x)), x) == 124
    assert chunks.intermediate_bytes(lambda x: jax.jit(lambda y: jnp.sum(jnp.sin(y)))(x), x) == 124
    assert chunks.intermediate_bytes(lambda x: x, np.zeros(3)) == 0
