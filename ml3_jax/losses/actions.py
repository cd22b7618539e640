"""Learned losses of a policy: how far its actions are from those that the loss has learned to want."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.losses.forms import check_features, check_widths, first_kernel_rows, make_spec, mean_of, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree

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
    features s (state, goal, ...) alone. In the action it is a convex parabola that cannot go flat, whatever the network
    has become: a gradient is zero only where the action is the wanted one, and an optimizee that descends it settles
    there instead of running on. What is learned is what to do where, and how much it counts.

    Args:
      actions: how many of the last columns of the features are the action, A.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      symmetric: whether targets are odd in s and weights even, so that what was learned on one side of the origin holds on
        the other: no biases, and weights of the network's square. It needs an odd activation (tanh, identity).
      last_scale: factor on the initial weights of the last layer; small ones make the first targets small.
      target_scale: the target where the network gives 1, in units of the action.
      min_weight: the least weight; positive.

    Returns:
      A LearnedLoss over features [N, F], F > A.

    Raises:
      ValueError: actions or a width below 1, an unknown activation, a scale or least weight that is not positive, or
        no feature beside the action.
    """
    hidden = tuple(hidden)
    check_widths((*hidden, actions))
    networks.activation_fn(activation)
    if symmetric and activation not in ODD:
        raise ValueError(f"symmetric: expected an odd activation, one of {', '.join(ODD)}, got {activation!r}")
    for name, value in (("target_scale", target_scale), ("min_weight", min_weight)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    network = networks.MLP((*hidden, 2 * actions), activation, not symmetric, init_scheme="lecun", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return network.init(key, jnp.zeros((1, _beside("action_target", features, actions))))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_features(features, "N, F", first_kernel_rows(loss_params) + actions)
        seen, action = features[:, :-actions], features[:, -actions:]
        target, weight = jnp.split(jnp.asarray(network.apply(loss_params, seen)), 2, axis=-1)
        if symmetric:
            weight = weight**2
        return jnp.sum((jax.nn.softplus(weight) + min_weight) * (action - target_scale * target) ** 2, axis=-1)

    arguments: dict[str, Any] = {"activation": activation, "symmetric": symmetric, "last_scale": last_scale}
    arguments |= {"target_scale": target_scale, "min_weight": min_weight}
    return mean_of(per_example, init, make_spec("action_target", actions=actions, hidden=list(hidden), **arguments))


def fitted_action_target(
    actions: int,
    hidden: Sequence[int] = (32, 32),
    activation: str = "tanh",
    last_scale: float = 0.1,
    target_scale: float = 3.0,
    ridge: float = 1e-5,
) -> LearnedLoss:
    """As `action_target`, but of the deviation's least-squares fit: sum_id g_i c_id^2, c the fit of (a - target) by s.

    c [F - A, A] are the coefficients by which a linear function of the features s fits the deviation over the batch; g > 0
    are learned gains. The mean square that `action_target` takes is steep along the directions of s that the batch is
    wide in and flat along the others, and how wide it is depends on what the policy did; the coefficients are not. For a
    policy that is linear in s they are its distance to the wanted policy itself, so that one step with the right step
    size can go all the way from wherever it starts.

    Args:
      actions: how many of the last columns of the features are the action, A.
      hidden: widths of the hidden layers of the network of the targets.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of its last layer.
      target_scale: the target where the network gives 1, in units of the action.
      ridge: ridge (1 + sum of the mean squares of s) is added to the mean squares; a direction of s whose own is below
        that hardly counts.

    Returns:
      A LearnedLoss over features [N, F], F > A. It looks at the batch as a whole and has no per_example form.

    Raises:
      ValueError: as `action_target`, or a ridge that is not positive.
    """
    hidden = tuple(hidden)
    check_widths((*hidden, actions))
    networks.activation_fn(activation)
    for name, value in (("target_scale", target_scale), ("ridge", ridge)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    network = networks.MLP((*hidden, actions), activation, init_scheme="lecun", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = _beside("fitted_action_target", features, actions)
        return {"target": network.init(key, jnp.zeros((1, count))), "log_gain": jnp.zeros(count)}

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        samples, width = check_features(features, "N, F", first_kernel_rows(loss_params["target"]) + actions)
        seen, action = features[:, :-actions], features[:, -actions:]
        deviation = action - target_scale * jnp.asarray(network.apply(loss_params["target"], seen))
        gram = seen.T @ seen / samples
        # In proportion to the features where they are large, or rounding would make the matrix of equal ones singular.
        gram = gram + ridge * (1.0 + jnp.trace(gram)) * jnp.eye(width - actions)
        coefficients = jnp.linalg.solve(gram, seen.T @ deviation / samples)
        return jnp.sum(jnp.exp(loss_params["log_gain"])[:, None] * coefficients**2)

    arguments: dict[str, Any] = {"activation": activation, "last_scale": last_scale, "target_scale": target_scale}
    spec = make_spec("fitted_action_target", actions=actions, hidden=list(hidden), **arguments, ridge=ridge)
    return LearnedLoss(init, apply, spec)


def _beside(name: str, features: int | PyTree, actions: int) -> int:
    """The number of features beside the action, at least 1."""
    count = num_features(features, "N, F")
    if count <= actions:
        raise ValueError(f"{name}: expected features (state, ..., {actions} columns of action), got {count} columns in all")
    return count - actions
