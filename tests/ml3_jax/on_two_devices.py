"""The tests of `ml3_jax.sharding`, for a process whose JAX has two CPU devices: `test_sharding` starts it."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ml3_jax
from ml3_jax import sharding
from ml3_jax.checkpoint import Checkpoints
from tests.ml3_jax import toys

FIRST = jax.devices()[0]


def learning_context() -> ml3_jax.Problem:
    """`points` whose context is the mean of what all optimizees have become."""

    def refresh(context: Any, loss_params: Any, params: Any, tasks: Any, key: jax.Array) -> Any:
        del loss_params, tasks
        return context + jnp.mean(params["out"]) + 0.1 * jax.random.normal(key)

    problem = toys.points()
    return problem._replace(
        refresh=refresh,
        task_loss=lambda params, task, context, key: (
            problem.task_loss(params, task, None, key) + context * jnp.mean(params["in"])
        ),
    )


def noisy_ridge(loss_params: Any, task: Any, context: Any, key: jax.Array) -> jax.Array:
    """A term in phi alone whose weight is each task's own."""
    del task, context
    return jax.random.uniform(key) * optax.tree.norm(loss_params, squared=True)


LEARNERS: dict[str, dict[str, Any]] = {
    "whole lives": {"problem": toys.points()},
    "lives that go on": {"problem": toys.points(), "inner_steps": 6, "unroll": 2},
    "Adam inside": {"problem": toys.points(), "inner_optimizer": optax.adam(0.01, eps_root=1e-8), "unroll": 1},
    "data that are collected": {"problem": toys.stream(), "objective": "mean"},
    "a context that is renewed": {"problem": learning_context(), "refresh_every": 2},
    "an auxiliary loss": {"problem": toys.points(), "inner_steps": 6, "unroll": 2, "auxiliary_loss": noisy_ridge},
    "donated": {"problem": toys.points(), "donate": True},
}


def make(name: str, num_tasks: int = 4, **options: Any) -> ml3_jax.MetaLearner:
    return toys.learner(**{**LEARNERS[name], "num_tasks": num_tasks, **options})


def start(meta: ml3_jax.MetaLearner, name: str) -> ml3_jax.MetaState:
    return meta.init(toys.KEY, jnp.zeros(()) if "context" in name else None)


def devices(tree: Any) -> set[int]:
    """On how many devices the leaves of a pytree lie."""
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(tree)}


def test_there_are_two_devices():
    assert jax.local_device_count() == 2


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_steps_on_two_devices_are_those_on_one(name: str):
    meta = make(name)
    shared = meta.run(start(meta, name), 5)
    alone = meta.run(jax.device_put(start(meta, name), FIRST), 5)
    assert (devices(shared[0]), devices(alone[0])) == ({2}, {1})
    toys.assert_close(shared, alone)
    stepped = start(meta, name)
    if LEARNERS[name].get("refresh_every") is None:
        for _ in range(5):
            stepped, _ = meta.step(stepped)
        assert devices(stepped) == {2}
        toys.assert_close(stepped, alone[0])


def test_optimizees_lie_where_their_tasks_are_and_the_rest_everywhere():
    meta = make("lives that go on")
    state, _ = meta.step(start(meta, ""))
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(state.lives)} == {PartitionSpec("tasks")}
    assert {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(state.lives)} == {2}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.replace(lives=None)))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_tasks_that_do_not_divide_stay_together(num_tasks: int):
    meta = make("whole lives", num_tasks)
    assert devices(meta.run(start(meta, ""), 2)[0]) == {1}


def test_the_score_function_keeps_other_tasks_beside_each():
    def drawn(params, task, context, key, step):
        del context, key, step
        return -jnp.sum((task.x - 1.0 - params) ** 2)

    problem = toys.stream()._replace(log_prob=drawn)
    for num_tasks, expected in ((2, 1), (4, 2)):
        meta = toys.learner(problem, num_tasks=num_tasks, collect_gradient="score")
        assert devices(meta.run(meta.init(toys.KEY), 1)[0]) == {expected}


def test_under_a_callers_jit_tasks_stay_together():
    meta = make("lives that go on")
    state = start(meta, "")
    assert devices(jax.jit(lambda state: meta.run(state, 2))(state)[0]) == {1}


def test_where_only_a_part_of_the_state_is_traced_tasks_stay_together():
    meta = make("whole lives")
    state = start(meta, "")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), state.loss_params)
    made = jax.vmap(lambda phi: meta.step(state.replace(loss_params=phi))[0].loss_params)(several)
    assert devices(made) == {1}


def test_within_a_callers_mesh_tasks_stay_together():
    meta, mesh = make("whole lives"), jax.make_mesh((2,), ("mine",), axis_types=(AxisType.Auto,))
    state = start(meta, "")

    def shifted(by: jax.Array) -> Any:
        moved = jax.tree.map(lambda leaf: leaf + by[0], meta.step(state)[0].loss_params)
        return jax.tree.map(lambda leaf: leaf[None], moved)

    spec = PartitionSpec("mine")
    made = jax.shard_map(shifted, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(jnp.zeros(2))
    expected = meta.step(jax.device_put(state, FIRST))[0].loss_params
    for half in range(2):
        toys.assert_close(jax.tree.map(lambda leaf, half=half: leaf[half], made), expected)


def test_with_a_default_device_all_stays_there():
    second = jax.devices()[1]
    with jax.default_device(second):
        meta = make("lives that go on")
        state, _ = meta.run(start(meta, ""), 2)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set} == {second}


def test_a_state_that_was_put_on_a_device_stays_there():
    meta = make("lives that go on")
    second = jax.devices()[1]
    state, _ = meta.run(jax.device_put(start(meta, ""), second), 2)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set} == {second}


def test_nothing_is_compiled_again_for_the_state_that_came_back():
    problem = toys.points()
    observe, traces = toys.counting(problem.observe)
    meta = toys.learner(problem._replace(observe=observe), num_tasks=4, inner_steps=4, unroll=2)
    state, _ = meta.run(meta.init(toys.KEY), 3)
    before = len(traces)
    meta.run(state, 3)
    assert len(traces) == before


def test_a_run_goes_on_from_a_checkpoint_on_as_many_devices(tmp_path: pathlib.Path):
    meta = make("lives that go on")
    first, _ = meta.run(start(meta, ""), 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, first)
    found = checkpoints.restore_latest(start(meta, ""))
    checkpoints.close()
    assert found is not None
    toys.assert_same(found[1], first)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found[1]))
    resumed, whole = meta.run(found[1], 3)[0], meta.run(start(meta, ""), 5)[0]
    assert devices(resumed) == {2}
    toys.assert_close(resumed, whole)


def test_a_checkpoint_is_restored_to_where_the_template_was_put(tmp_path: pathlib.Path):
    meta = make("lives that go on")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, start(meta, ""))
    found = checkpoints.restore_latest(jax.device_put(start(meta, ""), jax.devices()[1]))
    checkpoints.close()
    assert found is not None
    assert {device for leaf in jax.tree.leaves(found[1]) for device in leaf.sharding.device_set} == {jax.devices()[1]}


def test_a_learned_loss_trained_on_two_devices_adapts_on_one():
    problem, meta = toys.points(), make("whole lives")
    state, _ = meta.run(start(meta, ""), 2)
    task = problem.sample_task(toys.KEY, None)
    loss = toys.smooth_loss()
    found = ml3_jax.adapt(problem, loss, state.loss_params, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=3)
    phi = jax.device_get(state.loss_params)
    expected = ml3_jax.adapt(problem, loss, phi, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=3)
    toys.assert_close(found.trace, expected.trace)


def test_what_is_freed_is_the_same_and_goes_with_any_computation():
    meta = make("lives that go on")
    state, _ = meta.run(start(meta, ""), 2)
    freed = sharding.free({"state": state, "none": None, "number": 2.0})
    toys.assert_same(freed["state"], state)
    assert (freed["none"], freed["number"]) == (None, 2.0)
    assert not any(leaf.committed for leaf in jax.tree.leaves(freed["state"]))
    elsewhere = jax.device_put(jnp.ones(()), jax.devices()[1])
    assert (elsewhere * freed["state"].step).sharding.device_set == {jax.devices()[1]}
    untouched = jnp.ones(3)
    assert sharding.free(untouched) is untouched


@pytest.mark.parametrize(("num_tasks", "least", "count"), [(8, 1, 2), (7, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)])
def test_a_mesh_has_the_most_devices_with_equally_many_tasks(num_tasks: int, least: int, count: int):
    mesh = sharding.mesh_for(num_tasks, least)
    assert (1 if mesh is None else mesh.size) == count


def test_spread_applies_a_function_of_many_tasks_to_each_devices_share():
    mesh = sharding.mesh_for(6)
    assert mesh is not None
    seen = []

    def twice(xs: jax.Array, offset: jax.Array) -> jax.Array:
        seen.append(xs.shape)
        return 2.0 * xs + offset

    xs = np.arange(6.0, dtype=np.float32)
    made = jax.jit(sharding.spread(twice, mesh))(xs, 1.0)
    np.testing.assert_array_equal(made, 2.0 * xs + 1.0)
    assert (seen, made.sharding) == ([(3,)], NamedSharding(mesh, PartitionSpec("tasks")))
