"""The inner loop's loss in another floating-point type, with float32 parameters, updates and meta-gradients.

`make_meta_learner` gives its inner loop the problem and the learned loss of `computed_in`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax.types import Context, LearnedLoss, LossParams, Params, Problem, PyTree, Task

DTYPES = ("bfloat16", "float16", "float32")


def check_compute_dtype(value: Any) -> Any:
    """Returns a name, a scalar type or a dtype as a dtype; None stays None.

    Raises:
      ValueError: it is not one of `DTYPES`.
    """
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"compute_dtype: expected {', '.join(DTYPES)} or None, got {value!r}")
    return dtype


def computed_in(dtype: Any, problem: Problem, learned_loss: LearnedLoss | None) -> tuple[Problem, LearnedLoss | None]:
    """The problem with `observe`, and the learned loss with `apply`, in `dtype`; unchanged if it is None.

    Their floating-point arguments are cast to `dtype`. The loss is returned in float32. The casts have derivatives, so that
    gradients arrive in the types of the parameters. All other functions of the problem keep their types.
    """
    if dtype is None or learned_loss is None:
        return problem, learned_loss
    apply_loss = learned_loss.apply

    def observe(params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> PyTree:
        params, task, context = _cast((params, task, context), dtype)
        return problem.observe(params, task, context, key, step)

    def apply(loss_params: LossParams, features: PyTree) -> jax.Array:
        # The features are cast too: constants of the problem may have made them float32 again.
        loss_params, features = _cast((loss_params, features), dtype)
        return jnp.asarray(apply_loss(loss_params, features), jnp.float32)

    return problem._replace(observe=observe), learned_loss._replace(apply=apply)


def _cast(tree: Any, dtype: Any) -> Any:
    """The pytree with its floating-point leaves in `dtype`; keys, whole numbers and booleans stay."""

    def of_leaf(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(of_leaf, tree)
