"""Cross-entropy with learned gains of its gradient; they depend on the batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.losses.forms import check_features, check_parts, check_widths, make_spec, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree


def learned_gain_cross_entropy(hidden: Sequence[int] = (16, 16)) -> LearnedLoss:
    """Cross-entropy with learned gains of its gradient: M = mean_n sum_c g_nc z_nc, z the logits, g detached.

    The gradient of cross-entropy at the logits is r = w (softmax(z) - label), here with learned sample weights w. Its
    batch mean (the bias of the classes) and the rest have separate gains: g = g_1 (r - mean r) + g_2 mean r. Inputs of the
    gains: log of the mean cross-entropy, spread of the logits, size of the bias, fraction of training. Inputs of the
    weights: the difficulty of a sample relative to the batch. Both gains are divided by the root of the mean
    cross-entropy, so that the steps of an untrained loss do not shrink as fast as the cross-entropy.

    The gradient of M matters, not its value. Cut: d(g)/d(logits). In the inner gradient this makes g the gradient at the
    logits. In the meta-gradient it ignores the effect of a step on the next gains: long unrolls stay bounded, with a bias.

    Args:
      hidden: widths of the hidden layers of its three networks (tanh).

    Returns:
      A LearnedLoss over features [N, C, 3]: logit, label, and progress, the fraction of training done. It is a
      function of the full batch, without a per_example form.

    Raises:
      ValueError: a width below 1; from apply, features of another shape.
    """
    hidden = check_widths(hidden)
    network = networks.MLP((*hidden, 1), "tanh", init_scheme="lecun", last_scale=0.1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        if num_features(features, "N, C, F") != 3:
            raise ValueError(
                "learned_gain_cross_entropy: expected features (logit, label, progress), got another number of them"
            )
        keys = jax.random.split(key, 3)
        networks_of = {"rest": 4, "bias": 4, "weight": 3}
        nets = {name: network.init(k, jnp.zeros((1, n))) for k, (name, n) in zip(keys, networks_of.items(), strict=True)}
        return {**nets, "log_gain": jnp.zeros(()), "log_bias_gain": jnp.asarray(-2.5)}

    def net(params: LossParams, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(network.apply(params, inputs))[..., 0]

    def coefficients(loss_params: LossParams, features: jax.Array) -> jax.Array:
        """g [N, C]."""
        check_parts(loss_params, "weight", "rest", "bias", "log_gain", "log_bias_gain")
        logits, labels, progress = features[..., 0], features[..., 1], jnp.clip(features[0, 0, 2], 0.0, 1.0)
        losses = jnp.maximum(-jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1), 0.0)
        mean_loss = jnp.mean(losses) + 1e-4
        level = jnp.log(mean_loss)
        hardness = jnp.log(losses + 1e-3) - level
        about = jnp.stack([hardness, jnp.full_like(hardness, level), jnp.full_like(hardness, progress)], axis=-1)
        # softplus(log(e - 1)) is 1: the untrained weight of every sample is about 1.
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
        # Cuts d(g)/d(logits), as in the docstring: g is the gradient at the logits.
        gains = coefficients(loss_params, jax.lax.stop_gradient(features))
        return jnp.sum(gains * features[..., 0]) / samples

    spec, columns = make_spec("learned_gain_cross_entropy", hidden=list(hidden)), ("prediction", "target", "progress")
    return LearnedLoss(init, apply, spec, layout="classes", columns=columns)
