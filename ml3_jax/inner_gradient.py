"""The gradient of an inner loss with respect to the optimizee, differentiable once more, in three modes.

`make_inner_gradient` is the step direction of `ml3_jax.inner`; its derivative is part of the meta-gradient.
"""

from collections.abc import Callable
from typing import Any

import jax

from ml3_jax.types import GRADIENT_MODES, Context, LossParams, Params, Task

# (loss_params, params, task, context, key, step) -> scalar, or its gradient
InnerFn = Callable[[LossParams, Params, Task, Context, jax.Array, jax.Array], Any]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`; the message names the argument."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def make_inner_gradient(loss_fn: InnerFn, gradient: str) -> InnerFn:
    """grad_theta of an inner loss.

    Args:
      loss_fn: (loss_params, params, task, context, key, step) -> scalar.
      gradient: "mixed" (forward over reverse), "remat" or "reverse" (both plain: under "remat" the inner loop
        rematerialises each step). All agree to rounding.

    Returns:
      A function of the same arguments that returns the gradient with respect to params.

    Raises:
      ValueError: `gradient` is unknown.
    """
    check_choice("gradient", gradient, GRADIENT_MODES)
    return _mixed_gradient(loss_fn) if gradient == "mixed" else jax.grad(loss_fn, argnums=1)


def _mixed_gradient(loss_fn: InnerFn) -> InnerFn:
    """grad_theta of `loss_fn` with a VJP of one forward-over-reverse pass (MixFlow-MG, arXiv:2505.00793).

    With g = grad_theta L and a cotangent v, d<g, v>/d(phi, theta) is the derivative of grad_{(phi, theta)} L in the
    direction (0, v), because second derivatives commute: one jvp of one gradient. The residuals are the arguments alone.
    A scan over inner steps stores one optimizee a step and no activations of the second-order graph.
    """
    gradient = jax.grad(loss_fn, argnums=1)

    @jax.custom_vjp
    def mixed(loss_params, params, task, context, key, step):
        return gradient(loss_params, params, task, context, key, step)

    def forward(loss_params, params, task, context, key, step):
        residuals = (loss_params, params, task, context, key, step)
        return gradient(*residuals), residuals

    def backward(residuals, cotangent):
        loss_params, params, task, context, key, step = residuals

        def both(theta: Params) -> tuple[LossParams, Params]:
            return jax.grad(loss_fn, argnums=(0, 1))(loss_params, theta, task, context, key, step)

        _, (d_loss_params, d_params) = jax.jvp(both, (params,), (cotangent,))
        return d_loss_params, d_params, None, None, None, None

    mixed.defvjp(forward, backward)
    return mixed


def with_gradient(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A scalar loss of (params, task, context, key) that computes its gradient in the forward pass.

    The residual is as small as params, and nothing is computed twice. A task loss that samples trajectories simulates
    them once; rematerialisation would simulate them again.
    """

    @jax.custom_vjp
    def loss(params, task, context, key):
        return loss_fn(params, task, context, key)

    def forward(params, task, context, key):
        return jax.value_and_grad(loss_fn)(params, task, context, key)

    def backward(gradient, cotangent):
        return jax.tree.map(lambda g: cotangent * g, gradient), None, None, None

    loss.defvjp(forward, backward)
    return loss
