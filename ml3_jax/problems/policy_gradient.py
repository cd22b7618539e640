"""Returns, advantages and policy gradients of sampled trajectories, as functions of arrays.

`ml3_jax.problems.model_free` makes its features, its plain loss and its task loss of them. Axes: B rollouts, T time.
"""

import math

import jax
import jax.numpy as jnp


def normal_log_prob(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-density of actions [..., A] under independent normal distributions, summed over A: [...]."""
    squares = ((action - mean) / jnp.exp(log_std)) ** 2
    return -0.5 * jnp.sum(squares + 2.0 * log_std + math.log(2.0 * math.pi), axis=-1)


def returns_to_go(rewards: jax.Array, discount: float) -> jax.Array:
    """The discounted sum of the rewards from each step on: [B, T] -> [B, T]."""

    def back(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = reward + discount * later
        return value, value

    _, values = jax.lax.scan(back, jnp.zeros(rewards.shape[0]), rewards.T, reverse=True)
    return values.T


def centred_returns(returns: jax.Array) -> jax.Array:
    """Returns-to-go minus the mean of the other trajectories at the same step: [B, T] -> [B, T].

    This baseline does not depend on a trajectory's own actions, so the policy gradient stays unbiased. A single trajectory
    keeps its returns.
    """
    rollouts = returns.shape[0]
    if rollouts == 1:
        return returns
    return (returns - jnp.mean(returns, axis=0, keepdims=True)) * (rollouts / (rollouts - 1))


def advantages(returns: jax.Array) -> jax.Array:
    """`centred_returns` over their root mean square: [B, T] -> [B, T]. A single trajectory keeps its returns.

    The scale is one number for all samples, so the direction of the policy gradient stays.
    """
    if returns.shape[0] == 1:
        return returns
    centred = centred_returns(returns)
    return centred / (jnp.sqrt(jnp.mean(centred**2)) + 1e-6)


def scaled_loss(log_probs: jax.Array, returns: jax.Array, rewards: jax.Array) -> jax.Array:
    """Minus the mean return; its gradient is minus the policy gradient, divided by T and by the scale of the advantages.

    Args:
      log_probs: [B, T] of the actions. The gradient goes through them alone.
      returns: [B, T] returns-to-go.
      rewards: [B, T].
    """
    surrogate = -jnp.mean(advantages(returns) * log_probs)
    return _minus_return(jnp.mean(jnp.sum(rewards, axis=1)), surrogate)


def unscaled_loss(log_probs: jax.Array, returns: jax.Array, rewards: jax.Array, discount: float) -> jax.Array:
    """Minus the mean discounted return; its gradient is minus the policy gradient, without bias. Arguments: `scaled_loss`."""
    weights = jnp.broadcast_to(discount ** jnp.arange(rewards.shape[1]), rewards.shape)
    credit = weights * centred_returns(returns)
    surrogate = -jnp.mean(jnp.sum(credit * log_probs, axis=1))
    return _minus_return(jnp.mean(jnp.sum(weights * rewards, axis=1)), surrogate)


def _minus_return(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    # Cuts nothing of the gradient: it removes the surrogate's value, which has no meaning, and keeps its gradient.
    return surrogate - jax.lax.stop_gradient(surrogate) - value
