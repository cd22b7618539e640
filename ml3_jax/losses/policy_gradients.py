"""A learned loss for stochastic policies: a weighted policy gradient and a pull towards learned actions."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.arguments import check_count
from ml3_jax.losses.forms import check_features, check_widths, first_kernel_rows, make_spec, mean_of, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree

LEAST_STD = 1e-3  # smaller standard deviations are raised to this: the likelihood of a deterministic policy has no bound


def guided_policy_gradient(
    actions: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    last_scale: float = 0.1,
    target_scale: float = 3.0,
    min_weight: float = 1e-2,
) -> LearnedLoss:
    """mean_n [ sum_d w_nd (mean_nd - target_nd)^2 - gain_n A_n log pi(a_n) ]: a learned prior and the policy gradient.

    Targets, weights w > 0 and gains > 0 are outputs of one network of the features s before the advantage. The first term
    pulls the mean of the policy towards a target from meta-training; it does not need a sample that is better than others.
    The second term is the policy gradient, which corrects the target for this task. If s contains the number of updates,
    the weight can move from the first term to the second during training.

    Args:
      actions: A. The last columns of the features are the advantage, and A columns each of the sampled action, the mean and
        the standard deviation of the policy.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of the last layer; small ones make the first targets small.
      target_scale: the target at a network output of 1, in units of the action.
      min_weight: the least weight; positive.

    Returns:
      A LearnedLoss over features [N, F], F > 3 A + 1.

    Raises:
      ValueError: actions or a width below 1, an unknown activation, a scale or least weight that is not positive, or no
        feature before the advantage.
    """
    hidden = check_widths(hidden)
    check_count("actions", actions)
    networks.activation_fn(activation)
    for name, value in (("target_scale", target_scale), ("min_weight", min_weight)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    network = networks.MLP((*hidden, 2 * actions + 1), activation, init_scheme="lecun", last_scale=last_scale)
    tail = 3 * actions + 1  # columns of advantage, action, mean and standard deviation

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = num_features(features, "N, F")
        if count <= tail:
            raise ValueError(
                f"guided_policy_gradient: expected features (state, ..., advantage, {actions} columns each of action, mean and "
                f"standard deviation), got {count} columns in all"
            )
        return network.init(key, jnp.zeros((1, count - tail)))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_features(features, "N, F", first_kernel_rows(loss_params) + tail)
        seen, advantage = features[:, :-tail], features[:, -tail]
        action, mean, std = jnp.split(features[:, 1 - tail :], 3, axis=-1)
        std = jnp.maximum(std, LEAST_STD)
        outputs = jnp.asarray(network.apply(loss_params, seen))
        target, weight, gain = jnp.split(outputs, (actions, 2 * actions), axis=-1)
        pull = jnp.sum((jax.nn.softplus(weight) + min_weight) * (mean - target_scale * target) ** 2, axis=-1)
        squares = ((action - mean) / std) ** 2
        log_prob = -0.5 * jnp.sum(squares + 2.0 * jnp.log(std) + math.log(2.0 * math.pi), axis=-1)
        return pull - jax.nn.softplus(gain[:, 0]) * advantage * log_prob

    def target(loss_params: LossParams, seen: jax.Array) -> jax.Array:
        return target_scale * jnp.asarray(network.apply(loss_params, seen))[..., :actions]

    arguments: dict[str, Any] = {"activation": activation, "last_scale": last_scale}
    arguments |= {"target_scale": target_scale, "min_weight": min_weight}
    spec = make_spec("guided_policy_gradient", actions=actions, hidden=list(hidden), **arguments)
    columns = ("...", "advantage", "action", "mean", "standard deviation")
    return mean_of(per_example, init, spec)._replace(target=target, columns=columns)
