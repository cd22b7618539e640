"""The mean over the task axis does not depend on the size of a chunk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ml3_jax
from ml3_jax import chunks, estimators, task_map
from tests.ml3_jax import toys


def of_chunk(tasks):
    """((mean value, outputs), gradient) of sum(phi * a)^2 + b."""

    def objective(phi):
        values = jax.vmap(lambda x: jnp.sum(phi * x["a"]) ** 2 + x["b"])(tasks)
        return jnp.mean(values), {"values": values}

    return jax.value_and_grad(objective, has_aux=True)(jnp.asarray([0.5, -1.0]))


def test_the_mean_over_chunks_is_the_mean_over_tasks():
    tasks = {"a": jax.random.normal(toys.KEY, (7, 2)), "b": jnp.arange(7.0)}

    @jax.jit
    def by_size(tasks):
        # One task a chunk, chunks and a rest of 1, one chunk and a rest of 3, one chunk.
        return [task_map.mean_over_chunks(of_chunk, tasks, jnp.zeros(2), size) for size in (1, 3, 4, 7)]

    *chunked, at_once = by_size(tasks)
    for made in chunked:
        toys.assert_close(made, at_once)


def scored_stream() -> ml3_jax.Problem:
    return toys.stream()._replace(log_prob=lambda params, task, context, key, step: -5.0 * jnp.sum((task.x - 1 - params) ** 2))


PAIRS = estimators.persistent_evolution_strategy(sigma=0.1, pairs=2)
MODES: dict[str, dict[str, Any]] = {
    "backprop": {"problem": toys.stream(), "unroll": 1},
    "score function, last": {"problem": scored_stream(), "collect_gradient": "score"},
    "score function, mean": {"problem": scored_stream(), "collect_gradient": "score", "objective": "mean"},
    "evolution strategy": {"problem": toys.stream(), "estimator": "es"},
    "persistent evolution strategy": {"problem": toys.stream(), "estimator": PAIRS, "unroll": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_meta_training_does_not_depend_on_chunks_or_on_when_tasks_are_drawn(mode: str, monkeypatch: pytest.MonkeyPatch):
    def trained():
        meta = toys.learner(**{"num_tasks": 5, "inner_steps": 2, **MODES[mode]}, loss=toys.scaled_square())
        return meta.run(meta.init(toys.KEY), 2)

    sizes = []

    def smaller(num_tasks: int, bytes_per_task: int, *, simulates: bool, platform: str) -> int:
        assert not simulates  # its collect has no loop
        assert platform == jax.default_backend()
        sizes.append((num_tasks, bytes_per_task))
        return 2

    at_once = trained()  # five tasks of a few bytes are one chunk
    monkeypatch.setattr(chunks, "chunk_size", smaller)
    toys.assert_close(trained(), at_once)
    monkeypatch.setattr(chunks, "DRAW_BYTES", 0)  # each chunk draws its tasks
    toys.assert_close(trained(), at_once)
    assert {num_tasks for num_tasks, _ in sizes} == {5}
    assert all(0 < size < chunks.CPU_CHUNK_BYTES // 5 for _, size in sizes)


@pytest.mark.parametrize("mode", MODES)
def test_meta_training_does_not_depend_on_the_tasks_at_once(mode: str):
    def trained(tasks_at_once: int | None, transform: Callable[..., Any] = lambda run: run) -> Any:
        options = {"num_tasks": 5, "inner_steps": 2, **MODES[mode], "tasks_at_once": tasks_at_once}
        meta = toys.learner(**options, loss=toys.scaled_square())
        return transform(lambda state: meta.run(state, 2))(meta.init(toys.KEY))

    expected = trained(None)
    toys.assert_close(trained(2), expected)
    toys.assert_close(trained(1, jax.jit), expected)  # under a caller's jit
