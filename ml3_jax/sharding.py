"""Tasks on several devices: each device has an equal share of the task axis.

`make_meta_learner` uses it by itself; `shard` is for your own function of many tasks. The learned loss, its optimizer and the
context are replicated; inner states are sharded by task. Devices communicate by one all-reduce a meta-step.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ml3_jax import aliases
from ml3_jax.types import LossParams, MetaState, PyTree

T = TypeVar("T")
AXIS = "tasks"
REPLICATED, BY_TASK = PartitionSpec(), PartitionSpec(AXIS)


def mesh_for(num_tasks: int) -> Mesh | None:
    """A mesh of the most devices of this process that can have equally many tasks each.

    Returns:
      A mesh with the one axis `AXIS`. None if that is one device, or if the caller has chosen devices: inside a mesh of the
      caller's (`jax.shard_map`, `jax.set_mesh`), with a default device (`jax.default_device`), or in one of several processes.
    """
    config: Any = jax.config  # pyright does not see its fields
    chosen = config.jax_default_device is not None or not jax.sharding.get_abstract_mesh().empty
    if chosen or jax.process_count() > 1:
        return None
    return _mesh(num_tasks, tuple(jax.local_devices()))


@functools.cache
def _mesh(num_tasks: int, devices: tuple[Any, ...]) -> Mesh | None:
    counts = [n for n in range(2, len(devices) + 1) if num_tasks % n == 0]
    return Mesh(np.array(devices[: counts[-1]]), (AXIS,), axis_types=(AxisType.Auto,)) if counts else None


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
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _replicated(mesh))


def place(state: MetaState, num_tasks: int) -> tuple[MetaState, Mesh | None]:
    """Puts the state of a meta-training on the devices that its meta-steps use.

    Returns:
      (the placed state, its mesh), or (the same state, None): if `mesh_for` finds no other, if any leaf is
      traced (the caller of a transformation chooses devices), or if any leaf was put on devices (`jax.device_put`), for
      example sharded over a mesh of the caller's: it stays there.
    """
    step = state.step
    mesh = mesh_for(num_tasks) if isinstance(step, jax.Array) else None
    if mesh is None or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return state, None
    everywhere = _replicated(mesh)
    if step.sharding == everywhere:
        return state, mesh
    if any(isinstance(leaf, jax.Array) and leaf.committed for leaf in jax.tree.leaves(state)):
        return state, None
    inner_state = jax.device_put(state.inner_state, NamedSharding(mesh, BY_TASK))
    return jax.device_put(state.replace(inner_state=None), everywhere).replace(inner_state=inner_state), mesh


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


@functools.cache
def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, REPLICATED)


__getattr__ = aliases.module_getattr(__name__)
