"""Tasks on several devices, of one process or of many: each device has an equal share of the task axis.

`make_meta_learner` uses it by itself; `shard` is for your own function of many tasks. The learned loss, its optimizer and the
context are replicated; inner states are sharded by task. Devices communicate by one all-reduce a meta-step. With several seeds
the devices are shared out among the seeds first: seeds never communicate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ml3_jax import aliases
from ml3_jax.types import LossParams, MetaState, PyTree

T = TypeVar("T")
AXIS, SEEDS = "tasks", "seeds"
REPLICATED, BY_TASK = PartitionSpec(), PartitionSpec(AXIS)


def mesh_for(num_tasks: int) -> Mesh | None:
    """A mesh of the most devices of this process that can have equally many tasks each.

    Returns:
      A mesh with the one axis `AXIS`. None if that is one device, or if the caller has chosen devices: inside a mesh of the
      caller's (`jax.shard_map`, `jax.set_mesh`), or with a default device (`jax.default_device`).
    """
    return None if _caller_has_chosen() else _mesh(num_tasks, None, tuple(jax.local_devices()))


def _mesh_of_all_processes(num_tasks: int, num_seeds: int | None) -> Mesh | None:
    """As `mesh_for`, of the devices of all processes, equally many of each.

    Raises:
      ValueError: the tasks cannot be shared out equally among the processes.
    """
    if _caller_has_chosen():
        return None
    mesh = _mesh(num_tasks, num_seeds, tuple(jax.devices()))
    if mesh is None and jax.process_count() > 1:
        shared = f"num_tasks = {num_tasks}" + ("" if num_seeds is None else f", {num_seeds} seeds")
        raise ValueError(
            f"{shared}: cannot be shared out equally among {jax.process_count()} processes; choose a multiple of their number"
        )
    return mesh


def _caller_has_chosen() -> bool:
    config: Any = jax.config  # pyright does not see its fields
    return config.jax_default_device is not None or not jax.sharding.get_abstract_mesh().empty


@functools.cache
def _mesh(num_tasks: int, num_seeds: int | None, devices: tuple[Any, ...]) -> Mesh | None:
    """The mesh of the most devices; without seeds it has the one axis `AXIS`, with seeds also `SEEDS`."""
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    for of_each in range(min(map(len, by_process.values())), 0, -1):
        used = np.array([device for own in by_process.values() for device in own[:of_each]])
        if used.size == 1:
            break
        for seeds in range(min(used.size, num_seeds or 1), 0, -1):
            if used.size % seeds == 0 and (num_seeds or 1) % seeds == 0 and num_tasks % (used.size // seeds) == 0:
                axes = (AXIS,) if num_seeds is None else (SEEDS, AXIS)
                return Mesh(
                    used if num_seeds is None else used.reshape(seeds, -1), axes, axis_types=(AxisType.Auto,) * len(axes)
                )
    return None


def shard(of_tasks: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """A function of many tasks, applied by each device of a mesh to its share.

    Args:
      of_tasks: (xs, *common) -> outputs. All leaves of xs and of the outputs have the task axis first, and no task depends
        on another.
      mesh: of `mesh_for`, for the number of tasks. None returns of_tasks unchanged.
    """
    return of_tasks if mesh is None else _mapped(of_tasks, mesh, BY_TASK)


def mean_over_devices(
    of_tasks: Callable[..., tuple[tuple[jax.Array, PyTree], LossParams]], mesh: Mesh | None
) -> Callable[..., tuple[tuple[jax.Array, PyTree], LossParams]]:
    """As `shard`, for a function that averages over its tasks.

    Args:
      of_tasks: (xs, *common) -> ((mean value, outputs of each task), gradient of the mean value).
      mesh: as in `shard`.
    """
    if mesh is None:
        return of_tasks

    def of_share(xs: PyTree, *common: PyTree) -> tuple[tuple[jax.Array, PyTree], LossParams]:
        (value, outputs), gradient = of_tasks(xs, *common)
        # As one vector: devices wait for each other once, not for every leaf.
        flat, unravel = ravel_pytree((value, gradient))
        value, gradient = unravel(jax.lax.pmean(flat, AXIS))
        return (value, outputs), gradient

    return _mapped(of_share, mesh, ((REPLICATED, BY_TASK), REPLICATED))


def _mapped(function: Callable[..., Any], mesh: Mesh, out_specs: Any) -> Callable[..., Any]:
    """The function on each device, with its first argument sharded by task and the others replicated."""

    def mapped(xs: PyTree, *common: PyTree) -> Any:
        in_specs = (BY_TASK, *(REPLICATED for _ in common))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(xs, *common)

    return mapped


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Under jit: the same values, replicated on the mesh. Every device computes with them, without communication."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _sharding(mesh, REPLICATED))


def place(state: MetaState, num_tasks: int, num_seeds: int | None = None) -> tuple[MetaState, Mesh | None]:
    """Puts the state of a meta-training on the devices that its meta-steps use, in all processes.

    Args:
      state: the same in each process, or placed already; with `num_seeds` each leaf is [S, ...].
      num_tasks: M.
      num_seeds: S; None for one state without the axis.

    Returns:
      (the placed state, its mesh), or (the same state, None): if there is one device, if any leaf is traced (the caller of a
      transformation chooses devices), or if any leaf was put on devices (`jax.device_put`), for example sharded over a mesh of
      the caller's: it stays there.

    Raises:
      ValueError: the tasks cannot be shared out equally among the processes.
    """
    step = state.step
    if not isinstance(step, jax.Array) or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return state, None
    mesh = _mesh_of_all_processes(num_tasks, num_seeds)
    if mesh is None:
        return state, None
    if step.sharding == _sharding(mesh, REPLICATED):
        return state, mesh
    if any(isinstance(leaf, jax.Array) and leaf.committed for leaf in jax.tree.leaves(state)):
        return state, None
    shardings = shardings_of(state, mesh)
    if jax.process_count() == 1:
        return jax.device_put(state, shardings), mesh
    return jax.jit(lambda tree: tree, out_shardings=shardings)(state), mesh  # device_put takes no keys to other processes


def shardings_of(state: MetaState, mesh: Mesh) -> MetaState:
    """The sharding of each leaf of a state on a mesh: the inner state by task, with an axis of seeds all but `step` by seed."""
    seeds = (SEEDS,) if SEEDS in mesh.axis_names else ()
    of_all, of_tasks = _sharding(mesh, PartitionSpec(*seeds)), _sharding(mesh, PartitionSpec(*seeds, AXIS))
    shardings = jax.tree.map(lambda _: of_all, state.replace(inner_state=None))
    inner = jax.tree.map(lambda _: of_tasks, state.inner_state)
    return shardings.replace(step=_sharding(mesh, REPLICATED), inner_state=inner)


def finished(outputs: T) -> T:
    """The outputs of a computation; on several CPU devices they are awaited.

    XLA's CPU devices share one pool of threads. With several all-reduces in flight, as in a loop that reads no result, each may
    hold threads that another one waits for, and XLA ends the process after 40 s.
    """
    first = jax.tree.leaves(outputs)[0]  # all outputs of one computation are on the same devices
    if isinstance(first, Tracer):
        return outputs
    devices = first.sharding.device_set
    on_cpus = len(devices) > 1 and next(iter(devices)).platform == "cpu"
    return jax.block_until_ready(outputs) if on_cpus else outputs


def uncommit(tree: PyTree) -> PyTree:
    """The same values, committed to no device, so that a computation can take them to its own. Committed leaves are copied."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not leaf.committed:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(of_leaf(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jnp.array(np.asarray(leaf))

    return jax.tree.map(of_leaf, tree)


def local(tree: PyTree) -> PyTree:
    """The same values as arrays that this process has whole. All processes must call it together."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(of_leaf(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        whole = leaf if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)
        return jnp.asarray(np.asarray(whole))

    return jax.tree.map(of_leaf, tree)


def stack(states: Sequence[MetaState]) -> MetaState:
    """The states of several seeds as one, [S, ...]."""
    return _stack(*states)


def unstack(states: MetaState, index: int) -> MetaState:
    """The state of one seed, of those that `stack` has put together."""
    return _unstack(states, index)


@jax.jit
def _stack(*states: MetaState) -> MetaState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def _unstack(states: MetaState, index: jax.Array) -> MetaState:
    return jax.tree.map(lambda leaf: leaf[index], states)


@functools.cache
def _sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh, spec)


__getattr__ = aliases.module_getattr(__name__)
