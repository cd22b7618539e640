"""A learned loss that gives cross-entropy's gradient gains which depend on the batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.losses.forms import check_features, check_widths, make_spec, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree


def gained_cross_entropy(hidden: Sequence[int] = (16, 16)) -> LearnedLoss:
    """Cross-entropy whose gradient has learned gains: M = mean_n sum_c g_nc z_nc, z the logits, g detached.

    Cross-entropy's gradient at the logits is r = w (softmax(z) - label), here with learned weights w of the samples. Its
    batch mean (the classes' bias) and the rest get gains of their own: g = g_1 (r - mean r) + g_2 mean r. The gains see
    the batch (log of its mean cross-entropy, spread of its logits, size of the bias) and the fraction of training; the
    weights see how hard a sample is beside the batch. Both gains fall with the root of the mean cross-entropy, so that an
    untrained loss already keeps its pace as the cross-entropy fades.

    Only the gradient of M means something, not its value. Cut: d(g)/d(logits). In the inner gradient that makes g the
    gradient at the logits, as meant; in the meta-gradient it leaves out how a step changes the next step's gains, which
    keeps long unrolls bounded at the price of a bias.

    Args:
      hidden: widths of the hidden layers of its three networks (tanh).

    Returns:
      A LearnedLoss over features [N, C, 3]: logit, label, and progress, the fraction of training done. It looks at the
      batch as a whole and has no per_example form.

    Raises:
      ValueError: a width below 1; from apply, features of another shape.
    """
    hidden = tuple(hidden)
    check_widths(hidden)
    network = networks.MLP((*hidden, 1), "tanh", init_scheme="lecun", last_scale=0.1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        if num_features(features, "N, C, F") != 3:
            raise ValueError("gained_cross_entropy: expected features (logit, label, progress), got another number of them")
        keys = jax.random.split(key, 3)
        networks_of = {"rest": 4, "bias": 4, "weight": 3}
        nets = {name: network.init(k, jnp.zeros((1, n))) for k, (name, n) in zip(keys, networks_of.items(), strict=True)}
        return {**nets, "log_gain": jnp.zeros(()), "log_bias_gain": jnp.asarray(-2.5)}

    def net(params: LossParams, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(network.apply(params, inputs))[..., 0]

    def coefficients(loss_params: LossParams, features: jax.Array) -> jax.Array:
        """g [N, C]."""
        logits, labels, progress = features[..., 0], features[..., 1], jnp.clip(features[0, 0, 2], 0.0, 1.0)
        losses = jnp.maximum(-jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1), 0.0)
        mean_loss = jnp.mean(losses) + 1e-4
        level = jnp.log(mean_loss)
        hardness = jnp.log(losses + 1e-3) - level
        about = jnp.stack([hardness, jnp.full_like(hardness, level), jnp.full_like(hardness, progress)], axis=-1)
        # softplus(log(e - 1)) is 1: an untrained weight leaves every sample as it is.
        weights = jax.nn.softplus(net(loss_params["weight"], about) + jnp.log(jnp.e - 1.0))
        residual = weights[:, None] * (jax.nn.softmax(logits) - labels)
        bias = jnp.mean(residual, axis=0, keepdims=True)
        centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
        spread = jnp.log(2.0 * jnp.sqrt(jnp.mean(jnp.var(centred, axis=0))) + 1e-3)
        batch = jnp.stack([level, progress, spread, jnp.log(jnp.max(jnp.abs(bias)) + 1e-2)])
        gain = jnp.exp(net(loss_params["rest"], batch) + loss_params["log_gain"]) / jnp.sqrt(mean_loss)
        bias_gain = gain * jnp.exp(net(loss_params["bias"], batch) + loss_params["log_bias_gain"])
        return gain * (residual - bias) + bias_gain * bias

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        samples, _, _ = check_features(features, "N, C, F", 3)
        # Cuts d(g)/d(logits), see above: g is the gradient at the logits itself.
        gains = coefficients(loss_params, jax.lax.stop_gradient(features))
        return jnp.sum(gains * features[..., 0]) / samples

    return LearnedLoss(init, apply, make_spec("gained_cross_entropy", hidden=list(hidden)), layout="classes")
