"""How many tasks a meta-step works on at a time: a chunk of the task axis that stays in a CPU's cache.

XLA on a CPU runs a step that is vmapped over a hundred tasks as large arrays that travel through main memory; a scan
over chunks of a few tasks keeps them in cache. Accelerators want the whole axis at once. The library chooses; nothing is
to set.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from ml3_jax.types import LossParams, PyTree

# Bytes of forward intermediates that one chunk may have. Measured with 1 MiB of second-level cache a core: for the sine
# problem (0.22 MB a task) 5 tasks are best, 10 cost a fifth more; a digits MLP and a two-parameter problem lose less than
# a quarter.
CPU_CHUNK_BYTES = 1_200_000
# The same where tasks simulate a system step by step: each chunk pays anew for a thousand small operations. Measured on
# 16 tasks of 0.8 MB (a reacher in closed form) and of 3.5 MB (Brax's ant): all at once take 0.83 and 0.69 of the time.
CPU_CHUNK_BYTES_SIMULATING = 64_000_000
# Bytes that the newborn optimizees and tasks of a meta-step may have to be drawn all at once, before the chunks: random
# numbers cost a fixed number of small operations a draw, which a chunk of few tasks pays anew.
DRAW_BYTES = 16_000_000


def intermediate_bytes(fn: Callable[..., Any], *args: PyTree) -> int:
    """Bytes of all arrays that `fn` computes along its way, by tracing it on the shapes of `args`."""
    return _jaxpr_bytes(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_bytes(jaxpr: jex_core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        inner = [sub for value in eqn.params.values() if (sub := _as_jaxpr(value)) is not None]
        if inner:
            total += sum(_jaxpr_bytes(sub) for sub in inner)
        else:
            total += sum(_aval_bytes(var.aval) for var in eqn.outvars)
    return total


def _as_jaxpr(value: Any) -> jex_core.Jaxpr | None:
    if isinstance(value, jex_core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, jex_core.Jaxpr) else None


def _aval_bytes(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 4)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a pytree of arrays or of their shapes."""
    return sum(_aval_bytes(leaf) for leaf in jax.tree.leaves(tree))


def has_loop(fn: Callable[..., Any], *args: PyTree) -> bool:
    """Whether `fn` goes step by step through a scan or a while loop, as a simulation does, by tracing it on shapes."""
    return _jaxpr_loops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_loops(jaxpr: jex_core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while"):
            return True
        inner = [_as_jaxpr(value) for value in eqn.params.values()]
        if any(sub is not None and _jaxpr_loops(sub) for sub in inner):
            return True
    return False


def chunk_size(num_tasks: int, bytes_per_task: int, *, simulates: bool = False) -> int:
    """Tasks in a chunk: all of them off the CPU, else as many as stay within `CPU_CHUNK_BYTES` (or, for tasks that simulate
    a system, `CPU_CHUNK_BYTES_SIMULATING`), in chunks of equal size where a divisor is near."""
    if jax.default_backend() != "cpu":
        return num_tasks
    budget = CPU_CHUNK_BYTES_SIMULATING if simulates else CPU_CHUNK_BYTES
    most = max(1, min(num_tasks, budget // max(1, bytes_per_task)))
    divisors = [n for n in range(1, most + 1) if num_tasks % n == 0]
    return divisors[-1] if 2 * divisors[-1] > most else most


def mean_over_chunks(
    of_chunk: Callable[[PyTree], tuple[tuple[jax.Array, PyTree], LossParams]],
    xs: PyTree,
    loss_params: LossParams,
    size: int,
) -> tuple[tuple[jax.Array, PyTree], LossParams]:
    """Applies a function that averages over tasks to chunks of the task axis, one after the other.

    Args:
      of_chunk: xs of a chunk -> ((mean value, per-task outputs), gradient of the mean value).
      xs: a pytree whose leaves have the task axis M first.
      loss_params: what the gradient is like, leaf by leaf.
      size: tasks in a chunk, from 1 to M.

    Returns:
      ((mean value, per-task outputs [M, ...]), gradient), as of_chunk(xs) gives them in one go.
    """
    num_tasks = jax.tree.leaves(xs)[0].shape[0]
    whole, rest = divmod(num_tasks, size)
    if whole + (rest > 0) == 1:
        return of_chunk(xs)
    head = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), xs)

    def add_chunk(total: LossParams, chunk: PyTree) -> tuple[LossParams, tuple[jax.Array, PyTree]]:
        (value, outputs), gradient = of_chunk(chunk)
        return jax.tree.map(jnp.add, total, gradient), (value, outputs)

    total, (values, outputs) = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, loss_params), head)
    share = size / num_tasks  # of one whole chunk in the mean
    value = share * jnp.sum(values)
    gradient = jax.tree.map(lambda g: share * g, total)
    outputs = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), outputs)
    if rest:
        (last_value, last_outputs), last = of_chunk(jax.tree.map(lambda x: x[whole * size :], xs))
        value = value + rest / num_tasks * last_value
        gradient = jax.tree.map(lambda g, h: g + rest / num_tasks * h, gradient, last)
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, last_outputs)
    return (value, outputs), gradient
