"""The size of a chunk: tasks that a meta-step works on at a time, so that they stay in a CPU's cache.

XLA on a CPU runs a step that is vmapped over a hundred tasks on large arrays in main memory. A scan over chunks of a few
tasks keeps the arrays in cache. An accelerator takes the full task axis at once. `task_map` calls this; there is no option.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core as jex_core

from ml3_jax.inner import collected, inner_loss
from ml3_jax.types import Context, InnerState, LearnedLoss, LossParams, Problem, PyTree, Task

# Most bytes of forward intermediates in a chunk. Measured with 1 MiB of second-level cache a core. For the sine problem
# (0.22 MB a task) 5 tasks are fastest and 10 take a fifth longer. A digits MLP and a two-parameter problem lose less than
# a quarter.
CPU_CHUNK_BYTES = 1_200_000
# The same for tasks that simulate a system step by step: each chunk repeats a thousand small operations. Measured on
# 16 tasks of 0.8 MB (a reacher in closed form) and of 3.5 MB (Brax's ant): one chunk takes 0.83 and 0.69 of the time.
CPU_CHUNK_BYTES_SIMULATING = 64_000_000
# Most bytes of fresh optimizees and tasks that are drawn at once, before the chunks. A draw of random numbers costs a fixed
# number of small operations, and each chunk would repeat them.
DRAW_BYTES = 16_000_000


_SEEDS = contextvars.ContextVar("seeds", default=1)  # of `side_by_side`


def intermediate_bytes(fn: Callable[..., Any], *args: PyTree) -> int:
    """Bytes of all arrays that `fn` computes, from a trace on the shapes of `args`."""
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
    """Bytes of all leaves of a pytree; leaves are arrays or their shapes."""
    return sum(_aval_bytes(leaf) for leaf in jax.tree.leaves(tree))


def has_loop(fn: Callable[..., Any], *args: PyTree) -> bool:
    """Whether `fn` contains a scan or a while loop, as a simulation does, from a trace on the shapes of `args`."""
    return _jaxpr_loops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_loops(jaxpr: jex_core.Jaxpr) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while"):
            return True
        inner = [_as_jaxpr(value) for value in eqn.params.values()]
        if any(sub is not None and _jaxpr_loops(sub) for sub in inner):
            return True
    return False


def inner_step_cost(problem: Problem, learned_loss: LearnedLoss | None) -> Callable[..., tuple[int, bool]]:
    """Builds the cost of an inner step of one task, from shapes alone.

    Returns:
      (inner state, loss_params, context, key) -> (bytes of the forward pass, whether collect simulates a system).
    """

    def collect(*args: Any) -> Task:
        return collected(problem, *args)

    def cost(state: InnerState, loss_params: LossParams, context: Context, key: Any) -> tuple[int, bool]:
        args = (state.params, state.task, context, key, state.age)
        data = jax.eval_shape(collect, *args)
        loss = inner_loss(problem, learned_loss)
        amount = intermediate_bytes(loss, loss_params, state.params, data, context, key, state.age)
        return amount, has_loop(collect, *args)

    return cost


@contextlib.contextmanager
def side_by_side(seeds: int) -> Iterator[None]:
    """While it is traced, a program computes this many seeds side by side on a device: their chunks share its cache."""
    token = _SEEDS.set(seeds)
    try:
        yield
    finally:
        _SEEDS.reset(token)


def chunk_size(num_tasks: int, bytes_per_task: int, *, simulates: bool = False, platform: str) -> int:
    """Tasks in a chunk.

    Args:
      num_tasks: M, tasks on one device.
      bytes_per_task: of an inner step (`inner_step_cost`).
      simulates: whether a task simulates a system.
      platform: of JAX, for example "cpu" or "gpu".

    Returns:
      On a CPU, the most tasks within `CPU_CHUNK_BYTES` (or `CPU_CHUNK_BYTES_SIMULATING`), or a divisor of M of over half as
      many, shared out among the seeds of `side_by_side`; elsewhere M.
    """
    if platform != "cpu":
        return num_tasks
    budget = CPU_CHUNK_BYTES_SIMULATING if simulates else CPU_CHUNK_BYTES
    most = max(1, min(num_tasks, budget // max(1, bytes_per_task)))
    most = max(1, round(most / _SEEDS.get()))
    divisors = [n for n in range(1, most + 1) if num_tasks % n == 0]
    return divisors[-1] if 2 * divisors[-1] > most else most
