"""Inner optimizers with parameters that are meta-learned: SGD and Adam with learned, positive step sizes.

`make_meta_learner(inner_optimizer=...)` learns the parameters of a `LearnedOptimizer`. At meta-test its `make` returns an optax
optimizer, for `ml3_jax.adapt` and `ml3_jax.baseline`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.arguments import check_choice
from ml3_jax.types import OptimizerParams, Params, PyTree

PER = ("all", "layer", "parameter")


class LearnedOptimizer(NamedTuple):
    """An optimizer of optimizees with parameters. Any pair (init, make) is one.

    Attributes:
      init: (key, params) -> optimizer_params, for optimizees like params.
      make: optimizer_params -> the optax optimizer. Its updates must be differentiable with respect to optimizer_params.
    """

    init: Callable[[jax.Array, Params], OptimizerParams]
    make: Callable[[OptimizerParams], optax.GradientTransformation]


def learned_sgd(initial_step_size: float, per: str = "all") -> LearnedOptimizer:
    """Gradient descent with learned step sizes; per parameter and with a learned initialisation it is Meta-SGD.

    A step size is the exponential of a learned number, so it stays positive. Meta-SGD's may become negative (Li et al. 2017,
    arXiv:1707.09835). With a learned loss, its scale and one step size for all parameters are the same thing: fix the step
    size (`optax.sgd`), since the loss then works with it at meta-test.

    Args:
      initial_step_size: before meta-training; positive.
      per: "all" (one step size for all parameters), "layer" (one for each leaf of params, such as the weights or the biases of
        a layer) or "parameter" (one for each number). The last two fit one architecture alone.

    Raises:
      ValueError: initial_step_size is not positive and finite, or an unknown per.
    """
    return _with_learned_step_sizes(optax.identity(), initial_step_size, per)


def learned_adam(
    initial_step_size: float, per: str = "all", *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 1e-8
) -> LearnedOptimizer:
    """Adam with learned step sizes. Unlike with `learned_sgd`, the scale of a learned loss hardly matters.

    Args:
      initial_step_size: as for `learned_sgd`.
      per: as for `learned_sgd`.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: as in `optax.adam`.
      eps_root: as in `optax.adam`; positive, since the derivative of the square root at a zero gradient is infinite.

    Raises:
      ValueError: as `learned_sgd`, or eps_root is not positive.
    """
    if not eps_root > 0.0:
        raise ValueError(
            f"eps_root: expected a positive number, got {eps_root}: the derivative of Adam's square root is infinite at zero"
        )
    return _with_learned_step_sizes(optax.scale_by_adam(b1, b2, eps, eps_root), initial_step_size, per)


def step_sizes(optimizer_params: OptimizerParams) -> PyTree:
    """The step sizes of `learned_sgd` or `learned_adam`: a number, or a pytree like params.

    Raises:
      TypeError: optimizer_params of another optimizer.
    """
    if not isinstance(optimizer_params, dict) or _LOG not in optimizer_params:
        kind = type(optimizer_params).__name__
        raise TypeError(
            f"optimizer_params: expected those of learned_sgd or learned_adam, such as {{'{_LOG}': ...}}, got a {kind}"
        )
    return jax.tree.map(jnp.exp, optimizer_params[_LOG])


_LOG = "log_step_size"


def _with_learned_step_sizes(direction: optax.GradientTransformation, initial: float, per: str) -> LearnedOptimizer:
    """Steps along the updates of `direction`, backwards, with learned step sizes."""
    check_choice("per", per, PER)
    if isinstance(initial, jax.Array) or not (isinstance(initial, int | float) and 0.0 < initial < math.inf):
        raise ValueError(f"initial_step_size: expected a positive, finite number, got {initial!r}")

    def init(key: jax.Array, params: Params) -> OptimizerParams:
        del key
        if per == "all":
            return {_LOG: jnp.asarray(math.log(initial), _dtype(*jax.tree.leaves(params)))}
        shape: Callable[[Any], Any] = jnp.shape if per == "parameter" else lambda leaf: ()
        return {_LOG: jax.tree.map(lambda leaf: jnp.full(shape(leaf), math.log(initial), _dtype(leaf)), params)}

    def make(optimizer_params: OptimizerParams) -> optax.GradientTransformation:
        sizes = step_sizes(optimizer_params)

        def start(params: Params) -> optax.OptState:
            if per != "all":
                _check_fits(sizes, params, per)
            return direction.init(params)

        def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
            updates, state = direction.update(updates, state, params)
            each = jax.tree.map(lambda _: sizes, updates) if per == "all" else sizes
            return jax.tree.map(lambda u, size: (-size * u).astype(u.dtype), updates, each), state

        return optax.GradientTransformation(start, update)

    return LearnedOptimizer(init, make)


def _dtype(*leaves: Any) -> Any:
    """Of a logarithm: float32 at least, since bfloat16 would round a step size to half a percent."""
    return jnp.result_type(jnp.float32, *leaves)


def _check_fits(sizes: PyTree, params: Params, per: str) -> None:
    """Checks that there is a step size for each layer or parameter of an optimizee.

    Raises:
      ValueError: the optimizee has another architecture.
    """
    learned, given = (jax.tree.map(lambda leaf: tuple(jnp.shape(leaf)), tree) for tree in (sizes, params))
    same = jax.tree.structure(sizes) == jax.tree.structure(params)
    if same and (per == "layer" or learned == given):
        return
    raise ValueError(
        f'params: expected the architecture for which step sizes per="{per}" were learned, {learned}, got {given}: '
        'use an optimizee like that, or meta-train with per="all"'
    )
