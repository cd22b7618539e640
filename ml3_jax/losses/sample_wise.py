"""Learned losses that are a mean over samples: the paper's network, a weighted squared error, a loss shared by classes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.arguments import check_kind
from ml3_jax.losses.forms import check_features, check_widths, first_kernel_rows, make_spec, mean_of, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree


def mlp(
    hidden: Sequence[int] = (50, 50),
    activation: str = "relu",
    positive: bool = True,
    bias: bool = False,
    last_scale: float = 1.0,
) -> LearnedLoss:
    """The paper's learned loss: the mean over samples of a network of the features (Bechtle et al. 2020, section III).

    Args:
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      positive: whether a softplus makes the output positive.
      bias: whether layers have biases (they start at zero).
      last_scale: factor on the initial weights of the last layer.

    Returns:
      A LearnedLoss over features [N, F]; the weights start Xavier-uniform. The defaults are the released code's.

    Raises:
      ValueError: an unknown activation or a width below 1; from apply, features of another rank or number.
    """
    hidden = check_widths(hidden)
    networks.activation_fn(activation)
    network = networks.MLP((*hidden, 1), activation, bias, init_scheme="xavier", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return network.init(key, jnp.zeros((1, num_features(features, "N, F"))))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_features(features, "N, F", first_kernel_rows(loss_params))
        output = jnp.asarray(network.apply(loss_params, features))[:, 0]
        return jax.nn.softplus(output) if positive else output

    arguments: dict[str, Any] = {"activation": activation, "positive": positive, "bias": bias, "last_scale": last_scale}
    return mean_of(per_example, init, make_spec("mlp", hidden=list(hidden), **arguments))


def weighted_squared_error(
    hidden: Sequence[int] = (20, 20, 20), activation: str = "elu", last_scale: float = 0.3, max_log_weight: float = 20.0
) -> LearnedLoss:
    """The squared error times a learned positive weight: mean_n (prediction - target)^2 exp(net(features_n)).

    It starts near the mean squared error. For any network its minimum is zero, at predictions equal to their targets. The
    network learns the weight of an error as a function of all features.

    Args:
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of the last layer; 0 starts at the mean squared error.
      max_log_weight: upper bound of the log-weight, so that an extreme feature cannot make the weight infinite.

    Returns:
      A LearnedLoss over features [N, F], F >= 2: the first column is the prediction, the second the target. All columns
      are inputs of the network.

    Raises:
      ValueError: an unknown activation, a width below 1 or fewer than two features.
    """
    hidden = check_widths(hidden)
    networks.activation_fn(activation)
    network = networks.MLP((*hidden, 1), activation, init_scheme="xavier", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = num_features(features, "N, F")
        if count < 2:
            raise ValueError(f"weighted_squared_error: expected features (prediction, target, ...), got {count} column")
        return network.init(key, jnp.zeros((1, count)))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_features(features, "N, F", first_kernel_rows(loss_params))
        log_weight = jnp.asarray(network.apply(loss_params, features))[:, 0]
        return (features[:, 0] - features[:, 1]) ** 2 * jnp.exp(jnp.minimum(log_weight, max_log_weight))

    arguments = {"activation": activation, "last_scale": last_scale, "max_log_weight": max_log_weight}
    spec = make_spec("weighted_squared_error", hidden=list(hidden), **arguments)
    return mean_of(per_example, init, spec)._replace(columns=("prediction", "target", "..."))


def per_class(loss: LearnedLoss) -> LearnedLoss:
    """One loss shared by all classes: applied to the features of each class, summed over classes, averaged over samples.

    Args:
      loss: a LearnedLoss over [N, F] that has a per_example form.

    Returns:
      A LearnedLoss over features [N, C, F] that works for any number of classes C.

    Raises:
      TypeError: `loss` is no LearnedLoss.
      ValueError: it has no per_example form.
    """
    check_kind("loss", loss, LearnedLoss, "as ml3_jax.losses has them")
    if loss.per_example is None:
        raise ValueError("per_class: expected a learned loss with a per_example form, got one without; give it per_example=")
    inner = loss.per_example

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return loss.init(key, num_features(features, "N, C, F"))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        samples, classes, width = check_features(features, "N, C, F", None)
        return inner(loss_params, features.reshape(samples * classes, width)).reshape(samples, classes).sum(axis=1)

    spec = None if loss.spec is None else make_spec("per_class", loss=dict(loss.spec))
    return mean_of(per_example, init, spec, layout="classes")._replace(columns=loss.columns)
