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
    *,
    value: jax.Array,
    value_fn: Callable[[PyTree], jax.Array],
) -> tuple[PyTree, optax.OptState]:
    """Returns (params, opt_state) after one update.

    Optimizers that ask for them, such as `optax.polyak_sgd` or a line search, also get `value` (the loss at params), `grad` and
    `value_fn` (params -> loss on the same data). A value that no optimizer reads is not computed.
    """
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(gradient, opt_state, params, value=value, grad=gradient, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt_state


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
