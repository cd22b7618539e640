"""Learned losses of a policy: the distance of its actions from learned targets."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.arguments import check_count
from ml3_jax.losses.forms import check_features, check_parts, check_widths, first_kernel_rows, make_spec, mean_of, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree

COLUMNS = ("...", "action")
ODD = ("identity", "tanh")  # activations with f(-x) = -f(x)


def action_target(
    actions: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    symmetric: bool = False,
    last_scale: float = 0.1,
    target_scale: float = 3.0,
    min_weight: float = 1e-2,
) -> LearnedLoss:
    """The squared distance of actions from learned targets: mean_n sum_d w_nd (a_nd - target_nd)^2.

    Weights w = softplus(net_w(s_n)) + min_weight and targets = target_scale net_t(s_n) are functions of the other
    features s (state, goal, ...) alone. As a function of the action the loss is a parabola of positive curvature for any
    network. Its gradient is zero at the target alone, and an optimizee that descends it settles there. The network learns
    the target action of each state, and its weight.

    Args:
      actions: A. The last A columns of the features are the action.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      symmetric: whether targets are odd in s and weights even, so that both sides of the origin share their targets. The
        network then has no biases and the weights are of its square. It needs an odd activation (tanh, identity).
      last_scale: factor on the initial weights of the last layer; small ones make the first targets small.
      target_scale: the target at a network output of 1, in units of the action.
      min_weight: the least weight; positive.

    Returns:
      A LearnedLoss over features [N, F], F > A.

    Raises:
      ValueError: actions or a width below 1, an unknown activation, a scale or least weight that is not positive, or
        no feature besides the action.
    """
    hidden = check_widths(hidden)
    check_count("actions", actions)
    networks.activation_fn(activation)
    if symmetric and activation not in ODD:
        raise ValueError(f"symmetric: expected an odd activation, one of {', '.join(ODD)}, got {activation!r}")
    for name, value in (("target_scale", target_scale), ("min_weight", min_weight)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    network = networks.MLP((*hidden, 2 * actions), activation, not symmetric, init_scheme="lecun", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return network.init(key, jnp.zeros((1, _other_features("action_target", features, actions))))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_features(features, "N, F", first_kernel_rows(loss_params) + actions)
        seen, action = features[:, :-actions], features[:, -actions:]
        target, weight = jnp.split(jnp.asarray(network.apply(loss_params, seen)), 2, axis=-1)
        if symmetric:
            weight = weight**2
        return jnp.sum((jax.nn.softplus(weight) + min_weight) * (action - target_scale * target) ** 2, axis=-1)

    arguments: dict[str, Any] = {"activation": activation, "symmetric": symmetric, "last_scale": last_scale}
    arguments |= {"target_scale": target_scale, "min_weight": min_weight}
    spec = make_spec("action_target", actions=actions, hidden=list(hidden), **arguments)
    return mean_of(per_example, init, spec)._replace(columns=COLUMNS)


def fitted_action_target(
    actions: int,
    hidden: Sequence[int] = (32, 32),
    activation: str = "tanh",
    last_scale: float = 0.1,
    target_scale: float = 3.0,
    ridge: float = 1e-5,
) -> LearnedLoss:
    """As `action_target`, for the least-squares fit of the deviation: sum_id g_i c_id^2, c the fit of (a - target) by s.

    c [F - A, A] are the coefficients of a linear function of the features s that fits the deviation over the batch; g > 0
    are learned gains. The mean square of `action_target` is steep along the directions of s with a large spread in the
    batch, and the spread depends on the policy. The coefficients do not depend on the spread. For a policy linear in s
    they are its distance from the target policy: one step of the right size reaches the target from any start.

    Args:
      actions: how many of the last columns of the features are the action, A.
      hidden: widths of the hidden layers of the network of the targets.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of its last layer.
      target_scale: the target at a network output of 1, in units of the action.
      ridge: ridge (1 + sum of the mean squares of s) is added to the mean squares. A direction of s with a smaller mean
        square has almost no weight.

    Returns:
      A LearnedLoss over features [N, F], F > A. It is a function of the full batch, without a per_example form.

    Raises:
      ValueError: as `action_target`, or a ridge that is not positive.
    """
    hidden = check_widths(hidden)
    check_count("actions", actions)
    networks.activation_fn(activation)
    for name, value in (("target_scale", target_scale), ("ridge", ridge)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    network = networks.MLP((*hidden, actions), activation, init_scheme="lecun", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = _other_features("fitted_action_target", features, actions)
        return {"target": network.init(key, jnp.zeros((1, count))), "log_gain": jnp.zeros(count)}

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_parts(loss_params, "target", "log_gain")
        samples, width = check_features(features, "N, F", first_kernel_rows(loss_params["target"]) + actions)
        seen, action = features[:, :-actions], features[:, -actions:]
        deviation = action - target_scale * jnp.asarray(network.apply(loss_params["target"], seen))
        gram = seen.T @ seen / samples
        # In proportion to the features: rounding would make the matrix of large, equal features singular.
        gram = gram + ridge * (1.0 + jnp.trace(gram)) * jnp.eye(width - actions)
        coefficients = jnp.linalg.solve(gram, seen.T @ deviation / samples)
        return jnp.sum(jnp.exp(loss_params["log_gain"])[:, None] * coefficients**2)

    arguments: dict[str, Any] = {"activation": activation, "last_scale": last_scale, "target_scale": target_scale}
    spec = make_spec("fitted_action_target", actions=actions, hidden=list(hidden), **arguments, ridge=ridge)
    return LearnedLoss(init, apply, spec, columns=COLUMNS)


def _other_features(name: str, features: int | PyTree, actions: int) -> int:
    """The number of features besides the action, at least 1."""
    count = num_features(features, "N, F")
    if count <= actions:
        raise ValueError(f"{name}: expected features (state, ..., {actions} columns of action), got {count} columns in all")
    return count - actions
