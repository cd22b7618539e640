"""A transformer and the sequences that it learns, for `large_optimizee`. Axes: B sequences, T tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ml3_jax.problems import supervised

TOKENS = 32


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    width: int = 320
    layers: int = 8

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B * T, TOKENS]
        block = nn.remat(Block, prevent_cse=False)
        layers: Any = nn.scan(block, {"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = layers()(nn.Embed(TOKENS, self.width)(tokens), None)
        return nn.Dense(TOKENS)(nn.LayerNorm()(x)).reshape(-1, TOKENS)


def sample_task(key: jax.Array, context: Any = None) -> supervised.SupervisedTask:
    """8 + 8 sequences: a token is followed by its image under a new permutation, or in one of five cases by any token."""
    image_key, any_key, kept_key = jax.random.split(key, 3)
    image = jax.random.permutation(image_key, TOKENS)
    others, kept = jax.random.randint(any_key, (33, 16), 0, TOKENS), jax.random.bernoulli(kept_key, 0.8, (33, 16))

    def follow(token: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.where(drawn[0], image[token], drawn[1]), token

    _, tokens = jax.lax.scan(follow, others[0], (kept, others))
    return supervised.SupervisedTask(
        *(supervised.Examples(half[:-1].T, half[1:].T.reshape(-1)) for half in jnp.split(tokens, 2, axis=1))
    )
