"""A learned loss of several outputs: a squared error with a metric and targets that depend on the other features."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.arguments import check_count
from ml3_jax.losses.forms import check_features, check_parts, check_widths, first_kernel_rows, make_spec, mean_of, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree

LARGEST_FEATURE = 5.0  # inputs of the network are clipped to +- this


def guided_squared_error(
    outputs: int,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    last_scale: float = 0.1,
    shift_scale: float = 3.0,
) -> LearnedLoss:
    """mean_n 2 (sqrt(1 + x_n) - 1), x_n = |L_n (prediction_n - target_n - shift_n)|^2 / P: learned metric and targets.

    L = (I + lower triangle) diag(gains) and the shift are functions of the features before the prediction (state, target, ...).
    The lower triangle and the shift are outputs of a network; the gains are common to all samples. The loss is convex in the
    predictions for any network: about x_n for small x_n, a distance for large ones. The metric rotates the gradient of a batch
    and weights outputs and samples. If the features contain the number of updates, it is also a step-size schedule. The shift
    adds information that a single sample lacks, since it has the target along one motion alone. The root bounds the gradient:
    without it, meta-training pushes the steps to the edge of stability and sometimes diverges.

    Args:
      outputs: P. The last columns of the features are P targets, then P predictions.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of the last layer; 0 starts without shift, L = I.
      shift_scale: the shift at a network output of 1, in units of the target.

    Returns:
      A LearnedLoss over features [N, F], F >= 2 P.

    Raises:
      ValueError: outputs or a width below 1, an unknown activation, a shift_scale that is not positive, or fewer than 2 P
        features.
    """
    hidden = check_widths(hidden)
    check_count("outputs", outputs)
    networks.activation_fn(activation)
    if not shift_scale > 0.0:
        raise ValueError(f"shift_scale: expected a positive number, got {shift_scale}")
    rows, columns = jnp.tril_indices(outputs)
    network = networks.MLP((*hidden, rows.size + outputs), activation, init_scheme="lecun", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = num_features(features, "N, F")
        if count < 2 * outputs:
            raise ValueError(
                f"guided_squared_error: expected features (..., {outputs} targets, {outputs} predictions), got {count} columns"
            )
        return {"network": network.init(key, jnp.zeros((1, count - outputs))), "log_gain": jnp.zeros(outputs)}

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check_parts(loss_params, "network", "log_gain")
        samples, _ = check_features(features, "N, F", first_kernel_rows(loss_params["network"]) + outputs)
        seen, prediction = features[:, :-outputs], features[:, -outputs:]
        # Clipped: a spike in a measurement could raise the loss of its sample by orders of magnitude.
        made = jnp.asarray(network.apply(loss_params["network"], jnp.clip(seen, -LARGEST_FEATURE, LARGEST_FEATURE)))
        lower, shift = made[:, : rows.size], made[:, rows.size :]
        metric = jnp.tile(jnp.eye(outputs), (samples, 1, 1)).at[:, rows, columns].add(lower)
        error = jnp.exp(loss_params["log_gain"])[None] * (prediction - seen[:, -outputs:] - shift_scale * shift)
        squares = jnp.mean(jnp.einsum("npq,nq->np", metric, error) ** 2, axis=-1)
        # 2 (sqrt(1 + x) - 1), without cancellation near 0.
        return 2.0 * squares / (jnp.sqrt(1.0 + squares) + 1.0)

    arguments: dict[str, Any] = {"activation": activation, "last_scale": last_scale, "shift_scale": shift_scale}
    spec = make_spec("guided_squared_error", outputs=outputs, hidden=list(hidden), **arguments)
    return mean_of(per_example, init, spec)._replace(columns=("...", "target", "prediction"))
