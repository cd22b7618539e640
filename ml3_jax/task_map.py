"""The mean over the task axis: `mean_over_tasks` chooses chunks of tasks and shares tasks out among devices.

`meta_gradient` calls it once. The size of a chunk is of `chunks`, the devices are of `sharding`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ml3_jax import chunks, sharding
from ml3_jax.types import Context, LossParams, PyTree

# ((mean value, outputs [M, ...]), gradient of the mean value)
MeanGradient = tuple[tuple[jax.Array, PyTree], LossParams]


def mean_over_tasks(
    gradient_of: Callable[[PyTree, LossParams, Context, PyTree], MeanGradient],
    tasks: PyTree,
    loss_params: LossParams,
    context: Context,
    *,
    draw: Callable[[PyTree, Context], PyTree],
    cost: Callable[[PyTree, LossParams, Context], tuple[int, bool]],
    mesh: Mesh | None,
    sum_first: Callable[[PyTree, LossParams, Context], PyTree] | None = None,
    at_once: int | None = None,
) -> MeanGradient:
    """The gradient of the mean over all tasks, as gradient_of(draw(tasks, context), loss_params, context, sums) gives it.

    Args:
      gradient_of: (drawn tasks [m, ...], loss_params, context, sums) -> ((mean value, outputs [m, ...]), gradient), for any m.
      tasks: a pytree of [M, ...].
      loss_params: phi, equal on all devices.
      context: equal on all devices.
      draw: (tasks [m, ...], context) -> the same tasks with their random draws, [m, ...].
      cost: (shapes of one drawn task, loss_params, context) -> (bytes of an inner step, whether it simulates a system).
      mesh: of `sharding.place`.
      sum_first: (drawn tasks [m, ...], loss_params, context) -> sums over these tasks. gradient_of gets the sums over all
        tasks of all chunks and devices, computed in a pass before it. It gets None without sum_first, and if one chunk
        on one device has all tasks.
      at_once: most tasks in a chunk; None for the size of `chunks.chunk_size`.

    Returns:
      ((mean value, outputs [M, ...]), gradient).
    """

    def of_share(tasks: PyTree, loss_params: LossParams, context: Context) -> MeanGradient:
        """The mean over the tasks of one device, one chunk after the other."""
        drawn = jax.eval_shape(draw, tasks, context)
        small = chunks.tree_bytes(drawn) - chunks.tree_bytes(tasks) <= chunks.DRAW_BYTES
        draw_first = small and at_once is None

        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), drawn)
        num_tasks = jax.tree.leaves(tasks)[0].shape[0]
        if at_once is None:
            bytes_per_task, simulates = cost(one, loss_params, context)
            size = chunks.chunk_size(num_tasks, bytes_per_task, simulates=simulates, platform=jax.default_backend())
        else:
            size = min(at_once, num_tasks)
        tasks = draw(tasks, context) if draw_first else tasks

        def drawn_of(chunk: PyTree) -> PyTree:
            return chunk if draw_first else draw(chunk, context)

        sums = None
        if sum_first is not None and (size < num_tasks or mesh is not None):

            def sums_of(chunk: PyTree, sum_first: Callable[..., PyTree] = sum_first) -> PyTree:
                return sum_first(drawn_of(chunk), loss_params, context)

            sums = _sum_over_chunks(sums_of, tasks, size)
            sums = sums if mesh is None else jax.lax.psum(sums, sharding.AXIS)

        def of_chunk(chunk: PyTree) -> MeanGradient:
            return gradient_of(drawn_of(chunk), loss_params, context, sums)

        return mean_over_chunks(of_chunk, tasks, loss_params, size)

    return sharding.mean_over_devices(of_share, mesh)(tasks, loss_params, context)


def mean_over_chunks(
    of_chunk: Callable[[PyTree], MeanGradient], tasks: PyTree, loss_params: LossParams, size: int
) -> MeanGradient:
    """Applies a function that averages over tasks to one chunk of the task axis after the other.

    Args:
      of_chunk: tasks of a chunk -> ((mean value, outputs), gradient of the mean value).
      tasks: a pytree of [M, ...].
      loss_params: a pytree like the gradient.
      size: tasks in a chunk, from 1 to M.

    Returns:
      ((mean value, outputs [M, ...]), gradient), as of_chunk(tasks) gives them.
    """
    num_tasks = jax.tree.leaves(tasks)[0].shape[0]
    full, rest = divmod(num_tasks, size)
    if full + (rest > 0) == 1:
        return of_chunk(tasks)
    head, tail = _full_chunks(tasks, full, size)

    def add_chunk(total: LossParams, chunk: PyTree) -> tuple[LossParams, tuple[jax.Array, PyTree]]:
        (value, outputs), gradient = of_chunk(chunk)
        return jax.tree.map(jnp.add, total, gradient), (value, outputs)

    total, (values, outputs) = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, loss_params), head)
    share = size / num_tasks  # weight of a full chunk in the mean
    value = share * jnp.sum(values)
    gradient = jax.tree.map(lambda g: share * g, total)
    outputs = jax.tree.map(lambda x: x.reshape(full * size, *x.shape[2:]), outputs)
    if rest:
        (last_value, last_outputs), last = of_chunk(tail)
        value = value + rest / num_tasks * last_value
        gradient = jax.tree.map(lambda g, h: g + rest / num_tasks * h, gradient, last)
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, last_outputs)
    return (value, outputs), gradient


def _full_chunks(tasks: PyTree, full: int, size: int) -> tuple[PyTree, PyTree]:
    """The full chunks [full, size, ...], and the rest [m, ...]."""
    head = jax.tree.map(lambda x: x[: full * size].reshape(full, size, *x.shape[1:]), tasks)
    return head, jax.tree.map(lambda x: x[full * size :], tasks)


def _sum_over_chunks(of_chunk: Callable[[PyTree], PyTree], tasks: PyTree, size: int) -> PyTree:
    """The sum of a function of tasks [m, ...] over the chunks of the task axis."""
    full, rest = divmod(jax.tree.leaves(tasks)[0].shape[0], size)
    head, tail = _full_chunks(tasks, full, size)
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_chunk, head))
    return jax.tree.map(jnp.add, total, of_chunk(tail)) if rest else total
