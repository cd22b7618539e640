"""A loop over inner steps, and what it stores for the backward pass; `inner` calls it.

A small optimizee goes through `jax.lax.scan`. For a large one, every copy counts: `stored` keeps the optimizee before each
step and nothing else, and differentiates one step at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex_core

from ml3_jax.types import Params, PyTree

# (carry, x) -> (carry, y), as for jax.lax.scan
Step = Callable[[Any, Any], tuple[Any, Any]]

# Bytes of an optimizee from which on a loop is `stored`. Below it a scan is faster: it may keep what an optimizer computes.
LARGE_BYTES = 1_000_000


def unrolled(inner_step: Step, start: PyTree, steps: jax.Array, gradient: str, params: Params) -> tuple[Any, Any]:
    """A loop over inner steps.

    Under "nested" it stores the optimizee at the start of each of about sqrt(K) blocks of sqrt(K) steps, and computes each
    block again in the backward pass (Griewank 1992): memory grows as sqrt(K), and one more forward pass is taken.

    Args:
      inner_step: (carry, number of the step) -> (carry, output).
      start: the carry before the first step.
      steps: [K] the numbers of the steps.
      gradient: a member of `GRADIENT_MODES`; under "mixed" and "nested" the loop over a large optimizee is `stored`.
      params: the optimizee, or its shapes.

    Returns:
      (the carry after the last step, the outputs [K, ...]).
    """
    count = steps.shape[0]
    if count == 1:
        return jax.lax.scan(inner_step, start, steps, unroll=True)
    large = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) >= LARGE_BYTES
    large = large and gradient in ("mixed", "nested")
    loop = stored if large else jax.lax.scan
    length = math.isqrt(count - 1) + 1  # sqrt(K), rounded up
    if gradient != "nested" or length >= count:
        return loop(inner_step, start, steps)

    def block(carry: Any, some: jax.Array) -> tuple[Any, Any]:
        return loop(inner_step, carry, some)

    if not large:
        block = jax.checkpoint(block, prevent_cse=False)  # inside a scan nothing is merged anyway
    full = count // length * length
    carry, after = loop(block, start, steps[:full].reshape(-1, length))
    after = jax.tree.map(lambda leaf: leaf.reshape(full, *leaf.shape[2:]), after)
    if full == count:
        return carry, after
    carry, rest = block(carry, steps[full:])
    return carry, jax.tree.map(lambda one, other: jnp.concatenate([one, other]), after, rest)


def stored(step: Step, start: PyTree, xs: PyTree) -> tuple[Any, Any]:
    """`jax.lax.scan` that stores the K carries alone, and computes each step again in the backward pass.

    A scan would also store what a step's derivative needs, such as the gradients and the square roots of Adam. It would copy
    each carry out of its stack, too: here the first and the last one are not in the stack. It has no forward-mode derivative.
    """
    count = jax.tree.leaves(xs)[0].shape[0]
    if count == 1:
        return jax.lax.scan(step, start, xs)
    flat, treedef = jax.tree.flatten(start)
    flat_xs, xs_def = jax.tree.flatten(xs)
    closed, shapes = jax.make_jaxpr(
        lambda carry, x: step(jax.tree.unflatten(treedef, carry), jax.tree.unflatten(xs_def, x)), return_shape=True
    )(flat, [x[0] for x in flat_xs])
    flat_step = _FlatStep(closed.jaxpr, len(flat))
    carry, ys = _stored(flat_step, count)(tuple(flat), tuple(flat_xs), tuple(closed.consts))
    return jax.tree.unflatten(treedef, carry), jax.tree.unflatten(jax.tree.structure(shapes[1]), ys)


class _FlatStep:
    """A step as a function of flat leaves; values that it closes over are arguments (see `inner_gradient`)."""

    def __init__(self, jaxpr: jex_core.Jaxpr, width: int):
        self.jaxpr, self.width = jaxpr, width

    def __call__(
        self, carry: Sequence[Any], x: Sequence[Any], consts: Sequence[Any]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """(carry, x, consts) -> (carry, y)."""
        out = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(self.jaxpr, list(consts)))(*carry, *x)
        return tuple(out[: self.width]), tuple(out[self.width :])


@jax.tree_util.register_static
class _Places(tuple):
    """Numbers of leaves; no array, so that it may be a residual."""


def _differentiable(leaves: Sequence[Any]) -> list[int]:
    return [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _filled(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> tuple[Any, ...]:
    new = dict(zip(places, values, strict=True))
    return tuple(new.get(i, leaf) for i, leaf in enumerate(leaves))


def _row(rows: Sequence[jax.Array], index: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dynamic_index_in_dim(row, index, keepdims=False) for row in rows)


def _stored(step: _FlatStep, count: int) -> Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """(start, xs, consts) -> (carry, ys) after `count` >= 2 steps, with the derivative rule of `stored`."""

    @jax.custom_vjp
    def loop(start, xs, consts):
        return jax.lax.scan(lambda carry, x: step(carry, x, consts), start, xs)

    def forward(start, xs, consts):
        perturbed = _Places(i for i, const in enumerate(consts) if const.perturbed)
        start, xs, consts = (tuple(leaf.value for leaf in leaves) for leaves in (start, xs, consts))
        # Rows are the carries before the steps 1, ..., K - 2; those before the first and the last step stand alone.
        rows = tuple(jnp.broadcast_to(leaf, (count - 2, *leaf.shape)) for leaf in start)

        def one(state, numbered):
            (before, carry, rows), (i, x) = state, numbered
            if count > 2:  # at first a row is written that the next ones overwrite
                place = jnp.maximum(i - 2, 0)
                rows = tuple(
                    jax.lax.dynamic_update_index_in_dim(row, leaf, place, 0) for row, leaf in zip(rows, before, strict=True)
                )
            after, y = step(carry, x, consts)
            return (carry, after, rows), y

        (last, carry, rows), ys = jax.lax.scan(one, (start, start, rows), (jnp.arange(count), xs))
        return (carry, ys), (start, rows, last, xs, consts, perturbed)

    def backward(residuals, cotangents):
        start, rows, last, xs, consts, perturbed = residuals
        moving, outputs = _differentiable(start), _differentiable(cotangents[1])
        carry_slopes, y_slopes = (
            tuple(_instantiated(of[i]) for i in places) for of, places in zip(cotangents, (moving, outputs), strict=True)
        )

        def one(state, numbered):
            (carry, slopes, total), (i, x, y_slopes) = state, numbered

            def outputs_of(carry_leaves, const_leaves):
                after, y = step(_filled(carry, moving, carry_leaves), x, _filled(consts, perturbed, const_leaves))
                return tuple(after[i] for i in moving), tuple(y[i] for i in outputs)

            args = tuple(carry[i] for i in moving), tuple(consts[i] for i in perturbed)
            slopes, more = jax.vjp(outputs_of, *args)[1]((slopes, y_slopes))
            total = tuple(a + b for a, b in zip(total, more, strict=True))
            later = i + _zero_after(slopes)
            if count > 2:
                row = _row(rows, jnp.maximum(later - 2, 0))
                before = tuple(jnp.where(later >= 2, leaf, first) for leaf, first in zip(row, start, strict=True))
            else:
                before = tuple(jnp.where(later >= 0, first, leaf) for first, leaf in zip(start, carry, strict=True))
            return (before, slopes, total), None

        zeros = tuple(jnp.zeros_like(consts[i]) for i in perturbed)
        numbered = (jnp.arange(count), xs, y_slopes)
        (_, slopes, total), _ = jax.lax.scan(one, (last, carry_slopes, zeros), numbered, reverse=True)
        none = [None] * max(len(start), len(xs), len(consts))
        return (
            _filled(none[: len(start)], moving, slopes),
            tuple(none[: len(xs)]),
            _filled(none[: len(consts)], perturbed, total),
        )

    loop.defvjp(forward, backward, symbolic_zeros=True)
    return loop


def _zero_after(slopes: Sequence[jax.Array]) -> jax.Array:
    """[] int32, zero once all slopes are known. No number is both NaN and 0, but XLA's compiler does not know.

    A carry that is read with this number shares its memory with the one before it. XLA's scheduler on a CPU would read it
    early, and ignores `jax.lax.optimization_barrier`.
    """
    probe = sum(slope[(0,) * slope.ndim].astype(jnp.float32) for slope in slopes if slope.size)
    return (jnp.isnan(probe) & (probe == 0.0)).astype(jnp.int32)


def _instantiated(slope: Any) -> jax.Array:
    dtype: Any = slope.dtype
    return jnp.zeros(slope.shape, dtype) if isinstance(slope, SymbolicZero) else slope
