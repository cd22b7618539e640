"""Tasks on several devices: each device has an equal share of the task axis.

`make_meta_learner` uses it on its own; `spread` is for a caller's own function of many tasks. The learned loss, its optimizer
and the context are whole on every device, optimizees live where their tasks are, and one all-reduce a meta-step is all that
devices tell each other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ml3_jax.types import LossParams, MetaState, PyTree

AXIS = "tasks"
WHOLE, BY_TASK = PartitionSpec(), PartitionSpec(AXIS)


def mesh_for(num_tasks: int, least: int = 1) -> Mesh | None:
    """A mesh of the most devices of this process that can have equally many tasks each, and at least `least`.

    Returns:
      A mesh with the one axis `AXIS`; None where that is one device, and where the caller has spoken: within a mesh of the
      caller's (`jax.shard_map`, `jax.set_mesh`), with a default device (`jax.default_device`), in one of several processes.
    """
    config: Any = jax.config  # pyright does not see its fields
    chosen = config.jax_default_device is not None or not jax.sharding.get_abstract_mesh().empty
    if chosen or jax.process_count() > 1:
        return None
    return _mesh(num_tasks, least, tuple(jax.local_devices()))


@functools.cache
def _mesh(num_tasks: int, least: int, devices: tuple[Any, ...]) -> Mesh | None:
    counts = [n for n in range(2, len(devices) + 1) if num_tasks % n == 0 and num_tasks // n >= least]
    return Mesh(np.array(devices[: counts[-1]]), (AXIS,), axis_types=(AxisType.Auto,)) if counts else None


def spread(of_tasks: Callable[..., PyTree], mesh: Mesh | None) -> Callable[..., PyTree]:
    """A function of many tasks, each device of a mesh applying it to its share.

    Args:
      of_tasks: (xs, *common) -> outputs; all leaves of xs and of the outputs have the task axis first, and the tasks do not
        depend on each other.
      mesh: of `mesh_for`, for the number of tasks; None: of_tasks as it is.
    """
    return of_tasks if mesh is None else _mapped(of_tasks, mesh, BY_TASK)


def mean_over_devices(
    of_tasks: Callable[..., tuple[tuple[jax.Array, PyTree], LossParams]], mesh: Mesh | None
) -> Callable[..., tuple[tuple[jax.Array, PyTree], LossParams]]:
    """As `spread`, of a function that averages over its tasks.

    Args:
      of_tasks: (xs, *common) -> ((mean value, per-task outputs), gradient of the mean value).
      mesh: as of `spread`.
    """
    if mesh is None:
        return of_tasks

    def of_share(xs: PyTree, *common: PyTree) -> tuple[tuple[jax.Array, PyTree], LossParams]:
        (value, outputs), gradient = of_tasks(xs, *common)
        # As one vector: devices wait for each other once, not for every leaf.
        flat, unravel = ravel_pytree((value, gradient))
        value, gradient = unravel(jax.lax.pmean(flat, AXIS))
        return (value, outputs), gradient

    return _mapped(of_share, mesh, ((WHOLE, BY_TASK), WHOLE))


def _mapped(function: Callable[..., Any], mesh: Mesh, out_specs: Any) -> Callable[..., Any]:
    """The function on each device, its first argument split by task and the others whole."""

    def mapped(xs: PyTree, *common: PyTree) -> Any:
        in_specs = (BY_TASK, *(WHOLE for _ in common))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(xs, *common)

    return mapped


def whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Under jit: the same values, whole on every device of the mesh; what is made of them is made on each, without a word."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _whole(mesh))


def place(state: MetaState, num_tasks: int, least: int = 1) -> tuple[MetaState, Mesh | None]:
    """(the state as meta-steps on several devices want and leave it, the mesh); None, and the state as it is, for one device.

    One device it is where `mesh_for` finds no other, where any of the state is traced (what a caller transforms is the
    caller's to place) and where somebody put it on a device (`jax.device_put`).
    """
    step = state.step
    mesh = mesh_for(num_tasks, least) if isinstance(step, jax.Array) else None
    if mesh is None or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return state, None
    everywhere = _whole(mesh)
    if step.sharding == everywhere:
        return state, mesh
    if step.committed:
        return state, None
    lives = jax.device_put(state.lives, NamedSharding(mesh, BY_TASK))
    return jax.device_put(state.replace(lives=None), everywhere).replace(lives=lives), mesh


def free(tree: PyTree) -> PyTree:
    """The same values, tied to no device (through the host, where they were tied to one): they go where a computation is."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not leaf.committed:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(of_leaf(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jnp.array(np.asarray(leaf))

    return jax.tree.map(of_leaf, tree)


@functools.cache
def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, WHOLE)
