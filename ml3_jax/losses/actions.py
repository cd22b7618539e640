"""A learned loss of a policy: how far its actions are from those that the loss has learned to want."""

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
        count = num_features(features, "N, F")
        if count <= actions:
            raise ValueError(
                f"action_target: expected features (state, ..., {actions} columns of action), got {count} columns in all"
            )
        return network.init(key, jnp.zeros((1, count - actions)))

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
