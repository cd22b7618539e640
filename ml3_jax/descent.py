"""One update of an optimizer, for optimizees and for learned losses alike; any optax optimizer is one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml3_jax.types import PyTree


def descend(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    opt_state: optax.OptState,
    params: PyTree,
    value_fn: Callable[[PyTree], jax.Array],
    value: jax.Array | None = None,
) -> tuple[PyTree, optax.OptState]:
    """Returns (params, opt_state) after one update.

    Optimizers that read them, such as `optax.polyak_sgd` or a line search, also get `value` (the loss at params), `grad` and
    `value_fn` (params -> loss on the same data). For the others nothing is computed, and no side effect of the loss repeated.
    """
    if isinstance(optimizer, optax.GradientTransformation) and not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    update: Callable[..., Any] = optimizer.update
    if _reads_value(update, gradient, opt_state, params):
        value = value_fn(params) if value is None else value
    else:
        value = jnp.zeros(())
    updates, opt_state = update(gradient, opt_state, params, value=value, grad=gradient, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt_state


def _reads_value(update: Callable[..., Any], gradient: PyTree, opt_state: optax.OptState, params: PyTree) -> bool:
    """Whether an update depends on the value of the loss, from a trace."""

    def with_value(value: jax.Array) -> Any:
        return update(gradient, opt_state, params, value=value, grad=gradient, value_fn=lambda params: value)

    traced = jax.make_jaxpr(with_value)(jnp.zeros(())).jaxpr
    (value,) = traced.invars
    return any(value is read for eqn in traced.eqns for read in eqn.invars) or any(value is out for out in traced.outvars)


def in_float32(tree: PyTree) -> PyTree:
    """Leaves in float32 at least, for their norm: the squares of float16 overflow."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def all_finite(tree: PyTree) -> jax.Array:
    """[] bool, whether all numbers of a pytree are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def check_real(name: str, params: PyTree) -> None:
    """Checks that all leaves are real floating-point numbers, which gradient descent needs.

    Raises:
      ValueError: a leaf is not; the message has `name`, the leaf's path and its dtype.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype: Any = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            continue
        where = f"{name}{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            advice = "keep real and imaginary part as two real arrays (the gradient of complex numbers needs a conjugation)"
        else:
            advice = "move what is not trained into the task, or close over it"
        raise ValueError(f"{where}: expected real floating-point parameters, got {dtype}: {advice}")
