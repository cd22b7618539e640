"""The gradient of an inner loss with respect to the optimizee, differentiable once more, in three modes.

`make_inner_gradient` is the step direction of `ml3_jax.inner`; its derivative is part of the meta-gradient.

Both derivative rules here hold for every argument and for values that the loss closes over. These become arguments
(`_hoisted`), so that a caller may vmap or differentiate over them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex_core

from ml3_jax.arguments import check_choice
from ml3_jax.types import GRADIENT_MODES, Context, LossParams, Params, PyTree, Task

FORWARD_OVER_REVERSE = ("mixed", "nested")
# (loss_params, params, task, context, key, step) -> scalar, or its gradient
InnerFn = Callable[[LossParams, Params, Task, Context, jax.Array, jax.Array], Any]


def make_inner_gradient(loss_fn: InnerFn, gradient: str) -> InnerFn:
    """grad_theta of an inner loss.

    Args:
      loss_fn: (loss_params, params, task, context, key, step) -> scalar.
      gradient: "mixed" and "nested" (forward over reverse; under "nested" the inner loop rematerialises blocks of steps),
        "remat" or "reverse" (both plain: under "remat" the inner loop rematerialises each step). All agree to rounding. The
        first two have no forward-mode derivative (`jax.jvp`); the others have.

    Returns:
      A function of the same arguments that returns the gradient with respect to params.

    Raises:
      ValueError: `gradient` is unknown.
    """
    check_choice("gradient", gradient, GRADIENT_MODES)
    return _mixed_gradient(loss_fn) if gradient in FORWARD_OVER_REVERSE else jax.grad(loss_fn, argnums=1)


class _Hoisted(NamedTuple):
    """A loss as a function of flat leaves, the values that it closes over first."""

    loss: Callable[[Sequence[jax.Array]], jax.Array]
    leaves: list[Any]  # of the closed-over values and of the arguments
    starts: list[int]  # index of the first leaf of each argument, and the number of leaves


def _hoisted(loss_fn: Callable[..., jax.Array], *args: PyTree) -> _Hoisted:
    """Traces a loss, and makes the values that it closes over leaves beside those of its arguments.

    A derivative rule is traced later than the loss. By then a closed-over value of an enclosing transformation is invalid.
    """
    flat, treedef = jax.tree.flatten(args)
    closed = jax.make_jaxpr(lambda *leaves: loss_fn(*jax.tree.unflatten(treedef, leaves)))(*flat)
    split = len(closed.consts)

    def loss(leaves: Sequence[jax.Array]) -> jax.Array:
        traced = jex_core.ClosedJaxpr(closed.jaxpr, list(leaves[:split]))
        return jex_core.jaxpr_as_fun(traced)(*leaves[split:])[0]

    starts = [split]
    for arg in args:
        starts.append(starts[-1] + len(jax.tree.leaves(arg)))
    return _Hoisted(loss, [*closed.consts, *flat], starts)


def _replaced(leaves: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    new = list(leaves)
    for place, value in zip(places, values, strict=True):
        new[place] = value
    return new


@jax.tree_util.register_static
class _Places(tuple):
    """Numbers of the leaves that a derivative is wanted for; no array, so that it may be a residual."""


def _mixed_gradient(loss_fn: InnerFn) -> InnerFn:
    """grad_theta of `loss_fn` with a VJP of one forward-over-reverse pass (MixFlow-MG, arXiv:2505.00793).

    With g = grad_theta L and a cotangent v, d<g, v>/d(phi, theta) is the derivative of grad_{(phi, theta)} L in the
    direction (0, v), because second derivatives commute: one jvp of one gradient. The residuals are the arguments alone.
    A scan over inner steps stores one optimizee a step and no activations of the second-order graph.
    """

    def gradient(*args: PyTree) -> Params:
        loss, leaves, starts = _hoisted(loss_fn, *args)
        theta = range(starts[1], starts[2])  # params are the second argument

        def slope(leaves: Sequence[Any], places: Sequence[int]) -> tuple[jax.Array, ...]:
            """The derivatives of the loss with respect to the leaves at these places."""
            chosen = tuple(leaves[place] for place in places)
            return jax.grad(lambda values: loss(_replaced(leaves, places, values)))(chosen)

        @jax.custom_vjp
        def mixed(*leaves):
            return slope(leaves, theta)

        def forward(*leaves):
            values = tuple(leaf.value for leaf in leaves)
            return slope(values, theta), (values, _Places(i for i, leaf in enumerate(leaves) if leaf.perturbed))

        def backward(residuals, cotangents):
            values, places = residuals
            given = zip(theta, cotangents, strict=True)
            direction = {place: cotangent for place, cotangent in given if not isinstance(cotangent, SymbolicZero)}
            if not direction or not places:
                return (None,) * len(values)
            _, products = jax.jvp(
                lambda *moved: slope(_replaced(values, list(direction), moved), places),
                tuple(values[place] for place in direction),
                tuple(direction.values()),
            )
            return tuple(_replaced([None] * len(values), places, products))

        mixed.defvjp(forward, backward, symbolic_zeros=True)
        return jax.tree.unflatten(jax.tree.structure(args[1]), mixed(*leaves))

    return gradient


def with_gradient(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A scalar loss of any arguments that computes its gradient in the forward pass.

    The residual is as small as the arguments with a derivative, and nothing is computed twice. A task loss that samples
    trajectories simulates them once; rematerialisation would simulate them again.
    """

    def with_rule(*args: PyTree) -> jax.Array:
        loss, leaves, _ = _hoisted(loss_fn, *args)

        @jax.custom_jvp
        def value(*leaves):
            return loss(leaves)

        def value_and_tangent(leaves, tangents):
            moving = {i: t for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)}
            out, slopes = jax.value_and_grad(lambda values: loss(_replaced(leaves, list(moving), values)))(
                tuple(leaves[i] for i in moving)
            )
            products = [jnp.sum(slope * tangent) for slope, tangent in zip(slopes, moving.values(), strict=True)]
            return out, sum((product.astype(out.dtype) for product in products), jnp.zeros_like(out))

        value.defjvp(value_and_tangent, symbolic_zeros=True)
        return value(*leaves)

    return with_rule
