"""Learned losses for stochastic policies that work as update rules: they read a batch of trajectories and its rewards.

Each is the policy gradient with a learned gain, which starts at 1, plus learned terms of the policy's outputs, which start
small. They can work on tasks where only rewards tell of the goal. `summary_pull` holds a policy that depends on the batch;
`summary_gradient` and `temporal` hold none.

Columns of a sample, in this order: `own` columns that describe the state, any others (next state, reward, time, ...), the
advantage, and `actions` columns each of the sampled action, the mean and the standard deviation of the policy.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ml3_jax import networks
from ml3_jax.arguments import check_count
from ml3_jax.losses.forms import check_features, check_parts, check_widths, first_kernel_rows, make_spec, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree

LEAST_STD = 1e-3  # smaller standard deviations are raised to this: the likelihood of a deterministic policy has no bound
GAIN_AT_ZERO = math.log(math.e - 1.0)  # softplus of this is 1
COLUMNS = ("state", "...", "advantage", "action", "mean", "standard deviation")


class _Batch(NamedTuple):
    """The columns of B trajectories of T samples."""

    own: jax.Array  # [B, T, S]
    data: jax.Array  # [B, T, F - 2 A], all columns but those of the policy: what happened
    advantage: jax.Array  # [B, T]
    action: jax.Array  # [B, T, A]
    mean: jax.Array  # [B, T, A]
    std: jax.Array  # [B, T, A]


def summary_pull(
    actions: int,
    own: int,
    hidden: Sequence[int] = (64, 64),
    summary: int = 16,
    activation: str = "tanh",
    last_scale: float = 0.1,
    target_scale: float = 3.0,
    min_weight: float = 1e-2,
) -> LearnedLoss:
    """mean_n [ sum_d w_nd (mean_nd - target_nd)^2 - gain_n A_n log pi(a_n) ], targets from the state and a batch summary.

    A summary z of the whole batch (`_summary`) says where rewards were had. A network of the state and of z gives targets,
    weights w > 0 and gains > 0. The pull is towards a policy that depends on z: without rewards it knows nothing of the task.

    Args:
      actions: A.
      own: S, leading columns that describe the state.
      hidden: widths of the hidden layers; the encoder of samples has the first of them alone.
      summary: numbers in each pool of the summary.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of the last layer.
      target_scale: the target at a network output of 1, in units of the action.
      min_weight: the least weight; positive.

    Returns:
      A LearnedLoss over features [B, T, F] (see the module for the columns).

    Raises:
      ValueError: a size below 1, an unknown activation, a scale or weight that is not positive; from init and apply, too few
        columns or features of another rank.
    """
    for name, value in (("target_scale", target_scale), ("min_weight", min_weight)):
        if not value > 0.0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    sizes = _Sizes("summary_pull", actions, own, check_widths(hidden), activation, last_scale)
    encoder, network = sizes.encoder(summary), sizes.network(2 * actions + 1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = sizes.columns(features)
        keys = jax.random.split(key)
        encoded = count - 2 * actions
        return {
            "encoder": encoder.init(keys[0], jnp.zeros((1, encoded))),
            "network": network.init(keys[1], jnp.zeros((1, own + 3 * summary))),
        }

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        batch = sizes.split(loss_params, features)
        seen = jnp.concatenate([batch.own, _summary(encoder, loss_params["encoder"], batch)], axis=-1)
        target, weight, gain = jnp.split(
            jnp.asarray(network.apply(loss_params["network"], seen)), (actions, 2 * actions), axis=-1
        )
        weights = jax.nn.softplus(weight) + min_weight
        pull = jnp.mean(jnp.sum(weights * (batch.mean - target_scale * target) ** 2, axis=-1))
        return pull + _policy_gradient(batch, gain[..., 0])

    arguments = {**sizes.arguments, "summary": summary, "target_scale": target_scale, "min_weight": min_weight}
    return LearnedLoss(init, apply, make_spec("summary_pull", **arguments), columns=COLUMNS)


def summary_gradient(
    actions: int,
    own: int,
    hidden: Sequence[int] = (64, 64),
    summary: int = 16,
    activation: str = "tanh",
    last_scale: float = 0.1,
) -> LearnedLoss:
    """The policy gradient plus a learned gradient of each sample's mean and log standard deviation; no target anywhere.

    A network of the sample (state, advantage, action, mean, standard deviation) and of the batch summary (`_summary`) gives
    the derivatives of the loss with respect to the policy's outputs. They may depend on these outputs; this dependence is cut,
    in the inner and in the meta-gradient, so that the loss is a function like any other.

    Args:
      actions, own, hidden, summary, activation, last_scale: as `summary_pull`.

    Returns:
      A LearnedLoss over features [B, T, F] (see the module for the columns).

    Raises:
      ValueError: as `summary_pull`.
    """
    sizes = _Sizes("summary_gradient", actions, own, check_widths(hidden), activation, last_scale)
    encoder, network = sizes.encoder(summary), sizes.network(2 * actions + 1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = sizes.columns(features)
        keys = jax.random.split(key)
        return {
            "encoder": encoder.init(keys[0], jnp.zeros((1, count - 2 * actions))),
            "network": network.init(keys[1], jnp.zeros((1, own + 3 * actions + 1 + 3 * summary))),
        }

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        batch = sizes.split(loss_params, features)
        seen = [batch.own, *_sample(batch), _summary(encoder, loss_params["encoder"], batch)]
        return _learned_gradient(batch, network.apply(loss_params["network"], jnp.concatenate(seen, axis=-1)))

    spec = make_spec("summary_gradient", **sizes.arguments, summary=summary)
    return LearnedLoss(init, apply, spec, columns=COLUMNS)


def temporal(
    actions: int,
    own: int,
    hidden: Sequence[int] = (64, 64),
    channels: int = 8,
    discounts: Sequence[float] = (0.5, 0.8, 0.95, 0.99),
    activation: str = "tanh",
    last_scale: float = 0.1,
) -> LearnedLoss:
    """As `summary_gradient`, with what follows each sample in its own trajectory in place of the batch summary.

    A network encodes each sample; the codes are summed backwards over time, once for each of several learned discounts:
    h_t = sum_{s >= t} discount^(s - t) (1 - discount) code_s. It is a learned form of returns-to-go. Losses that read
    trajectories in time are from Houthooft et al. 2018 (evolved policy gradients, arXiv:1802.04821: convolutions) and Oh et al.
    2020 (learned policy gradient, arXiv:2007.08794: a recurrent network backwards in time).

    Args:
      actions, own, hidden, activation, last_scale: as `summary_pull`.
      channels: numbers in the code of a sample.
      discounts: initial values in (0, 1), at least one.

    Returns:
      A LearnedLoss over features [B, T, F] (see the module for the columns).

    Raises:
      ValueError: as `summary_pull`, or a discount outside (0, 1).
    """
    check_count("channels", channels)
    if not discounts or not all(0.0 < discount < 1.0 for discount in discounts):
        raise ValueError(f"discounts: expected numbers between 0 and 1, at least one, got {tuple(discounts)}")
    sizes = _Sizes("temporal", actions, own, check_widths(hidden), activation, last_scale)
    width = channels * len(discounts)
    encoder, network = sizes.coder(channels), sizes.network(2 * actions + 1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = sizes.columns(features)
        keys, rates = jax.random.split(key), jnp.asarray(discounts)
        return {
            "encoder": encoder.init(keys[0], jnp.zeros((1, count - 2 * actions))),
            "logit_discount": jnp.log(rates) - jnp.log1p(-rates),
            "network": network.init(keys[1], jnp.zeros((1, own + 3 * actions + 1 + width))),
        }

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        batch = sizes.split(loss_params, features)
        codes = jnp.asarray(encoder.apply(loss_params["encoder"], batch.data))
        later = _backwards(codes, jax.nn.sigmoid(loss_params["logit_discount"]))
        seen = [batch.own, *_sample(batch), later]
        return _learned_gradient(batch, network.apply(loss_params["network"], jnp.concatenate(seen, axis=-1)))

    spec = make_spec("temporal", **sizes.arguments, channels=channels, discounts=list(discounts))
    return LearnedLoss(init, apply, spec, columns=COLUMNS)


class _Sizes:
    """The sizes that the rules share, checked, and the functions that follow from them alone."""

    def __init__(self, name: str, actions: int, own: int, hidden: tuple[int, ...], activation: str, last_scale: float):
        check_count("actions", actions)
        check_count("own", own)
        networks.activation_fn(activation)
        self._name, self._actions, self._own, self._hidden = name, actions, own, hidden
        self._activation, self._last_scale = activation, last_scale
        self.arguments: dict[str, Any] = {"actions": actions, "own": own, "hidden": list(hidden)}
        self.arguments |= {"activation": activation, "last_scale": last_scale}

    def network(self, outputs: int) -> networks.MLP:
        widths = (*self._hidden, outputs)
        return networks.MLP(widths, self._activation, init_scheme="lecun", last_scale=self._last_scale)

    def coder(self, outputs: int) -> networks.MLP:
        return networks.MLP((*self._hidden[:1], outputs), self._activation, init_scheme="lecun")

    def encoder(self, summary: int) -> networks.MLP:
        check_count("summary", summary)
        return self.coder(2 * summary)

    def columns(self, features: int | PyTree) -> int:
        """F, at least the state, the advantage, and action, mean and standard deviation."""
        count, least = num_features(features, "B, T, F"), self._own + 1 + 3 * self._actions
        if count < least:
            raise ValueError(
                f"{self._name}: expected features (state of {self._own} columns, ..., advantage, {self._actions} columns each "
                f"of action, mean and standard deviation), at least {least}, got {count} columns in all"
            )
        return count

    def split(self, loss_params: LossParams, features: jax.Array) -> _Batch:
        check_parts(loss_params, "encoder", "network")
        check_features(features, "B, T, F", first_kernel_rows(loss_params["encoder"]) + 2 * self._actions)
        width = features.shape[-1]
        data, mean, std = jnp.split(features, (width - 2 * self._actions, width - self._actions), axis=-1)
        action, advantage = data[..., -self._actions :], data[..., -self._actions - 1]
        return _Batch(data[..., : self._own], data, advantage, action, mean, jnp.maximum(std, LEAST_STD))


def _sample(batch: _Batch) -> tuple[jax.Array, ...]:
    # Cuts the derivative of a learned gradient by the outputs that it is the gradient of: it has no meaning in the descent.
    return batch.advantage[..., None], batch.action, *jax.lax.stop_gradient((batch.mean, batch.std))


def _summary(encoder: networks.MLP, encoder_params: LossParams, batch: _Batch) -> jax.Array:
    """[B, T, 3 Z], equal for all samples: three pools of codes of the samples.

    The mean, the mean weighted by the advantage, and the mean weighted by learned weights (softmax over all samples).
    """
    codes, scores = jnp.split(jnp.asarray(encoder.apply(encoder_params, batch.data)), 2, axis=-1)
    codes, scores = (x.reshape(-1, x.shape[-1]) for x in (jnp.tanh(codes), scores))
    pools = [
        jnp.mean(codes, axis=0),
        jnp.mean(batch.advantage.reshape(-1, 1) * codes, axis=0),
        jnp.sum(jax.nn.softmax(scores, axis=0) * codes, axis=0),
    ]
    pooled = jnp.concatenate(pools)
    return jnp.broadcast_to(pooled, (*batch.advantage.shape, pooled.shape[0]))


def _backwards(codes: jax.Array, discounts: jax.Array) -> jax.Array:
    """Discounted sums from each sample on: [B, T, C], [H] -> [B, T, H C]."""
    times = jnp.arange(codes.shape[1])
    ahead = (times[None, :] - times[:, None])[None]  # [1, T, T], s - t
    rates = discounts[:, None, None]
    weights = jnp.where(ahead >= 0, rates ** jnp.maximum(ahead, 0), 0.0) * (1.0 - rates)
    sums = jnp.einsum("hts,bsc->bthc", weights, codes)
    return sums.reshape(*codes.shape[:2], discounts.shape[0] * codes.shape[2])


def _policy_gradient(batch: _Batch, gain: jax.Array) -> jax.Array:
    """The policy-gradient loss with gains [B, T], which are 1 at an output of 0."""
    squares = ((batch.action - batch.mean) / batch.std) ** 2
    log_prob = -0.5 * jnp.sum(squares + 2.0 * jnp.log(batch.std) + math.log(2.0 * math.pi), axis=-1)
    return -jnp.mean(jax.nn.softplus(gain + GAIN_AT_ZERO) * batch.advantage * log_prob)


def _learned_gradient(batch: _Batch, outputs: Any) -> jax.Array:
    """The loss with these outputs [B, T, 2 A + 1]: gradients of mean and log standard deviation, and the gain."""
    count = batch.mean.shape[-1]
    of_mean, of_log_std, gain = jnp.split(jnp.asarray(outputs), (count, 2 * count), axis=-1)
    learned = jnp.sum(of_mean * batch.mean + of_log_std * jnp.log(batch.std), axis=-1)
    return jnp.mean(learned) + _policy_gradient(batch, gain[..., 0])
