"""The tests of `ml3_jax.sharding` that need two CPU devices; `test_sharding` runs them in a process of its own."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ml3_jax
from ml3_jax import optimizers, sharding
from ml3_jax.checkpoint import Checkpoints
from tests.ml3_jax import toys

FIRST = jax.devices()[0]


def learning_context() -> ml3_jax.Problem:
    """`points` with a context that sums the mean parameters of all optimizees."""

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
    """A term in phi alone with a random weight for each task."""
    del task, context
    return jax.random.uniform(key) * optax.tree.norm(loss_params, squared=True)


def scored_stream() -> ml3_jax.Problem:
    """`stream` with the log-probability of its data."""

    def log_prob(params: Any, task: Any, context: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        return -jnp.sum((task.x - 1.0 - params - 0.1 * step) ** 2) / (2.0 * 0.3**2)

    return toys.stream()._replace(log_prob=log_prob)


LEARNERS: dict[str, dict[str, Any]] = {
    "full unroll": {"problem": toys.points()},
    "carried inner state": {"problem": toys.points(), "inner_steps": 6, "unroll": 2},
    "Adam inside": {"problem": toys.points(), "inner_optimizer": optax.adam(0.01, eps_root=1e-8), "unroll": 1},
    "collected data": {"problem": toys.stream(), "objective": "mean"},
    "refreshed context": {"problem": learning_context(), "refresh_every": 2},
    "auxiliary loss": {"problem": toys.points(), "inner_steps": 6, "unroll": 2, "auxiliary_loss": noisy_ridge},
    "score function": {"problem": scored_stream(), "collect_gradient": "score", "objective": "mean"},
    "score function, one task on a device": {"problem": scored_stream(), "collect_gradient": "score", "num_tasks": 2},
    "evolution strategy": {"problem": toys.points(), "estimator": "es"},
    "persistent evolution strategy": {"problem": toys.points(), "estimator": "pes", "unroll": 1},
    "donated": {"problem": toys.points(), "donate": True},
    "MAML": {"problem": toys.points(), "loss": None, "learn_init": True},
    "everything learned": {
        "problem": toys.points(),
        "learn_init": True,
        "inner_optimizer": optimizers.learned_sgd(0.1, per="parameter"),
        "inner_steps": 6,
        "unroll": 2,
        "donate": True,
    },
}


def sharded_network(mesh: jax.sharding.Mesh | None, width: int = 256) -> ml3_jax.Problem:
    """A network with two layers of weights; each device of a mesh has one half of each, along the hidden units."""

    def constrained(leaf: jax.Array, *spec: str | None) -> jax.Array:
        return leaf if mesh is None else jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    def init(key: jax.Array, task: Any) -> dict[str, jax.Array]:
        widen, narrow = 0.05 * jax.random.normal(key, (2, width, width))
        return {"widen": constrained(widen, None, "model"), "narrow": constrained(narrow, "model", None)}

    def network(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(jnp.tile(x[:, None], (1, width)) @ params["widen"]) @ params["narrow"], axis=1)

    return toys.points(samples=4)._replace(
        init=init,
        observe=lambda params, task, context, key, step: jnp.stack([network(params, task.x), task.y], axis=-1),
        task_loss=lambda params, task, context, key: jnp.mean((network(params, task.x) - task.extra) ** 2),
    )


def make(name: str, num_tasks: int = 4, **options: Any) -> ml3_jax.MetaLearner:
    return toys.learner(**{"num_tasks": num_tasks, **LEARNERS[name], **options})


def start(meta: ml3_jax.MetaLearner, name: str) -> ml3_jax.MetaState:
    return meta.init(toys.KEY, jnp.zeros(()) if "context" in name else None)


def devices(tree: Any) -> set[int]:
    """The numbers of devices of the leaves of a pytree."""
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(tree)}


def test_there_are_two_devices():
    assert jax.local_device_count() == 2


@pytest.mark.parametrize("name", LEARNERS)
def test_meta_steps_on_two_devices_are_those_on_one(name: str):
    meta = make(name)
    shared = meta.run(start(meta, name), 5)
    alone = meta.run(jax.device_put(start(meta, name), FIRST), 5)
    assert (devices(shared[0]), devices(alone[0])) == ({2}, {1})
    atol = 1e-5 if "evolution strategy" in name else 1e-6  # it divides differences of objectives by 2 sigma = 0.02
    toys.assert_close(shared, alone, atol=atol)
    stepped = start(meta, name)
    if LEARNERS[name].get("refresh_every") is None:
        for _ in range(5):
            stepped, _ = meta.step(stepped)
        assert devices(stepped) == {2}
        toys.assert_close(stepped, alone[0], atol=atol)


@pytest.mark.parametrize(
    ("name", "num_seeds"),
    [
        ("carried inner state", 2),
        ("carried inner state", 3),
        ("refreshed context", 3),
        ("score function", 2),
        ("everything learned", 3),
    ],
)
def test_seeds_in_one_program_are_those_alone(name: str, num_seeds: int):
    meta = make(name)
    keys = jax.random.split(toys.KEY, num_seeds)
    starts = [meta.init(key, jnp.zeros(()) if "context" in name else None) for key in keys]
    states, metrics = meta.run_seeds(sharding.stack(starts), 3)
    assert devices(states) == {2}
    assert metrics.task_loss.shape == (num_seeds, 3)
    again, _ = meta.run_seeds(jax.tree.map(jnp.copy, states), 2)
    assert devices(again) == {2}
    for index, key in enumerate(keys):
        start_of_one = meta.init(key, jnp.zeros(()) if "context" in name else None)
        alone = meta.run(jax.device_put(start_of_one, FIRST), 3)
        of_one = jax.tree.map(lambda leaf, i=index: leaf[i], (states, metrics))
        toys.assert_close(of_one, alone)


def test_an_even_number_of_seeds_is_sharded_by_seed_and_an_odd_one_by_task():
    meta = make("carried inner state")
    for num_seeds in (2, 3):
        states, _ = meta.run_seeds(jax.vmap(meta.init)(jax.random.split(toys.KEY, num_seeds)), 1)
        shards = {leaf.addressable_shards[0].data.shape[:2] for leaf in jax.tree.leaves(states.inner_state)}
        assert shards == ({(1, 4)} if num_seeds == 2 else {(3, 2)})


def test_seeds_compile_once():
    optimizer = toys.traced_at_most(optax.sgd(0.1), 1)
    meta = toys.learner(toys.points(), num_tasks=4, inner_steps=4, unroll=2, meta_optimizer=optimizer)
    states, _ = meta.run_seeds(jax.vmap(meta.init)(jax.random.split(toys.KEY, 3)), 3)
    states, metrics = meta.run_seeds(states, 3)  # `traced_at_most` raises at a second trace
    assert states.step.tolist() == [6, 6, 6]
    assert metrics.task_loss.shape == (3, 3)


def test_inner_states_are_sharded_by_task_and_the_rest_is_replicated():
    meta = make("carried inner state")
    state, _ = meta.step(start(meta, ""))
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(state.inner_state)} == {PartitionSpec("tasks")}
    assert {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(state.inner_state)} == {2}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.replace(inner_state=None)))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_a_number_of_tasks_that_devices_do_not_divide_stays_on_one(num_tasks: int):
    meta = make("full unroll", num_tasks)
    assert devices(meta.run(start(meta, ""), 2)[0]) == {1}


def test_under_a_callers_jit_tasks_are_on_one_device():
    meta = make("carried inner state")
    state = start(meta, "")
    assert devices(jax.jit(lambda state: meta.run(state, 2))(state)[0]) == {1}


def test_a_state_that_is_traced_in_part_is_on_one_device():
    meta = make("full unroll")
    state = start(meta, "")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), state.loss_params)
    made = jax.vmap(lambda phi: meta.step(state.replace(loss_params=phi))[0].loss_params)(several)
    assert devices(made) == {1}


def test_inside_a_callers_mesh_tasks_are_not_sharded_again():
    meta, mesh = make("full unroll"), jax.make_mesh((2,), ("mine",), axis_types=(AxisType.Auto,))
    state = start(meta, "")

    def shifted(by: jax.Array) -> Any:
        moved = jax.tree.map(lambda leaf: leaf + by[0], meta.step(state)[0].loss_params)
        return jax.tree.map(lambda leaf: leaf[None], moved)

    spec = PartitionSpec("mine")
    made = jax.shard_map(shifted, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(jnp.zeros(2))
    expected = meta.step(jax.device_put(state, FIRST))[0].loss_params
    for half in range(2):
        toys.assert_close(jax.tree.map(lambda leaf, half=half: leaf[half], made), expected)


def test_a_default_device_has_all_tasks():
    second = jax.devices()[1]
    with jax.default_device(second):
        meta = make("carried inner state")
        state, _ = meta.run(start(meta, ""), 2)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set} == {second}


def test_a_state_put_on_a_device_stays_on_it():
    meta = make("carried inner state")
    second = jax.devices()[1]
    state, _ = meta.run(jax.device_put(start(meta, ""), second), 2)
    assert {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set} == {second}


def test_the_returned_state_compiles_nothing_again():
    optimizer = toys.traced_at_most(optax.sgd(0.1), 1)
    meta = toys.learner(toys.points(), num_tasks=4, inner_steps=4, unroll=2, meta_optimizer=optimizer)
    state, _ = meta.run(meta.init(toys.KEY), 3)
    assert devices(meta.run(state, 3)[0]) == {2}


def test_seeds_sharded_by_the_caller_are_the_seeds_on_one_device():
    meta = toys.learner(toys.stream(), inner_steps=2)
    mesh, spec = jax.make_mesh((2,), ("seeds",), axis_types=(AxisType.Auto,)), PartitionSpec("seeds")
    keys = jax.random.split(toys.KEY, 2)
    on_mesh = jax.device_put(keys, NamedSharding(mesh, spec))
    train = jax.vmap(lambda key: meta.run(meta.init(key), 3)[0].loss_params)
    sharded = jax.jit(train)(on_mesh)
    mapped = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(on_mesh)
    alone = train(keys)
    assert [devices(x) for x in (sharded, mapped, alone)] == [{2}, {2}, {1}]
    toys.assert_close(sharded, alone, rtol=1e-5)
    toys.assert_close(mapped, alone, rtol=1e-5)


def test_a_run_resumed_from_a_checkpoint_is_on_as_many_devices(tmp_path: pathlib.Path):
    meta = make("carried inner state")
    first, _ = meta.run(start(meta, ""), 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, first)
    found = checkpoints.restore_latest(start(meta, ""))
    checkpoints.close()
    assert found is not None
    toys.assert_same(found[1], first)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found[1]))
    resumed, uninterrupted = meta.run(found[1], 3)[0], meta.run(start(meta, ""), 5)[0]
    assert devices(resumed) == {2}
    toys.assert_close(resumed, uninterrupted)


def test_a_checkpoint_is_restored_to_the_device_of_the_template(tmp_path: pathlib.Path):
    meta = make("carried inner state")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, start(meta, ""))
    found = checkpoints.restore_latest(jax.device_put(start(meta, ""), jax.devices()[1]))
    checkpoints.close()
    assert found is not None
    assert {device for leaf in jax.tree.leaves(found[1]) for device in leaf.sharding.device_set} == {jax.devices()[1]}


def test_a_learned_loss_trained_on_two_devices_adapts_on_one():
    problem, meta = toys.points(), make("full unroll")
    state, _ = meta.run(start(meta, ""), 2)
    task = problem.sample_task(toys.KEY, None)
    loss = toys.smooth_loss()
    found = ml3_jax.adapt(problem, loss, state.loss_params, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=3)
    phi = jax.device_get(state.loss_params)
    expected = ml3_jax.adapt(problem, loss, phi, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=3)
    toys.assert_close(found.trace, expected.trace)


def test_an_uncommitted_state_is_equal_and_joins_any_computation():
    meta = make("carried inner state")
    state, _ = meta.run(start(meta, ""), 2)
    uncommitted = sharding.uncommit({"state": state, "none": None, "number": 2.0})
    toys.assert_same(uncommitted["state"], state)
    assert (uncommitted["none"], uncommitted["number"]) == (None, 2.0)
    assert not any(leaf.committed for leaf in jax.tree.leaves(uncommitted["state"]))
    elsewhere = jax.device_put(jnp.ones(()), jax.devices()[1])
    assert (elsewhere * uncommitted["state"].step).sharding.device_set == {jax.devices()[1]}
    untouched = jnp.ones(3)
    assert sharding.uncommit(untouched) is untouched


@pytest.mark.parametrize(("num_tasks", "count"), [(8, 2), (7, 1), (2, 2)])
def test_a_mesh_has_the_most_devices_with_equally_many_tasks(num_tasks: int, count: int):
    mesh = sharding.mesh_for(num_tasks)
    assert (1 if mesh is None else mesh.size) == count


def test_shard_applies_a_function_of_many_tasks_to_the_share_of_each_device():
    mesh = sharding.mesh_for(6)
    assert mesh is not None
    seen = []

    def twice(xs: jax.Array, offset: jax.Array) -> jax.Array:
        seen.append(xs.shape)
        return 2.0 * xs + offset

    xs = np.arange(6.0, dtype=np.float32)
    made = jax.jit(sharding.shard(twice, mesh))(xs, 1.0)
    np.testing.assert_array_equal(made, 2.0 * xs + 1.0)
    assert (seen, made.sharding) == ([(3,)], NamedSharding(mesh, PartitionSpec("tasks")))


def test_loops_that_read_no_result_do_not_hang():
    one, other = (toys.learner(toys.points(width=width), num_tasks=10, inner_steps=1) for width in (3, 4))
    first, second = one.init(toys.KEY), other.init(toys.KEY)
    for _ in range(300):
        first, _ = one.step(first)
        second, _ = other.run(second, 2)
    assert (int(first.step), int(second.step)) == (300, 600)


SHARDED: dict[str, dict[str, Any]] = {
    "drawn at each step": {"num_tasks": 2, "inner_steps": 4},
    "carried": {"num_tasks": 2, "inner_steps": 4, "unroll": 2},
    "nested, one task": {"num_tasks": 1, "inner_steps": 4, "gradient": "nested"},
}


@pytest.mark.parametrize("name", SHARDED)
def test_optimizees_that_the_caller_shards_stay_sharded_and_need_half_the_memory(name: str):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    options = {**SHARDED[name], "loss": toys.smooth_loss(), "tasks_at_once": 1}
    sharded, alone = (toys.learner(sharded_network(m), **options) for m in (mesh, None))
    context = jax.device_put(jnp.zeros(()), NamedSharding(mesh, PartitionSpec()))
    state, whole = sharded.init(toys.KEY, context), jax.device_put(alone.init(toys.KEY, jnp.zeros(())), FIRST)
    compiled = [jax.jit(meta.step).lower(start).compile() for meta, start in ((sharded, state), (alone, whole))]
    half, full = (found for one in compiled if (found := one.memory_analysis()) is not None)
    assert half.temp_size_in_bytes < 0.6 * full.temp_size_in_bytes
    if name == "carried":
        assert half.argument_size_in_bytes < 0.6 * full.argument_size_in_bytes
    for _ in range(2):
        state, metrics = sharded.step(state)
        whole, expected = alone.step(whole)
        toys.assert_close((metrics, jax.device_get(state)), (expected, jax.device_get(whole)), rtol=1e-5)
    assert devices(state) == {2}
    if state.inner_state is not None:
        assert {leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.inner_state.params)} == {2 * 256 * 128}
    toys.assert_close(sharded.run(state, 2)[1], alone.run(whole, 2)[1], rtol=1e-5)


def test_a_learned_loss_that_the_caller_shards_stays_sharded_under_shardings_of_their_jit():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    meta = make("full unroll")
    state = start(meta, "")

    def split(leaf: jax.Array) -> NamedSharding:
        by_row = leaf.ndim == 2 and leaf.shape[0] % 2 == 0
        return NamedSharding(mesh, PartitionSpec("model") if by_row else PartitionSpec())

    placed = jax.tree.map(split, state)
    expected, _ = meta.step(jax.device_put(state, FIRST))
    step = jax.jit(meta.step, in_shardings=(placed,), out_shardings=(placed, None))
    toys.assert_close(step(state)[0], expected, rtol=1e-5)
    after, _ = meta.step(jax.device_put(state, placed))
    assert devices(after) == {2}
    toys.assert_close(after, expected, rtol=1e-5)


def test_a_state_that_is_in_part_on_a_device_stays_on_it():
    meta = make("full unroll")
    state = start(meta, "")
    on_second = state.replace(loss_params=jax.device_put(state.loss_params, jax.devices()[1]))
    after, _ = meta.step(on_second)
    assert {device for leaf in jax.tree.leaves(after) for device in leaf.sharding.device_set} == {jax.devices()[1]}
