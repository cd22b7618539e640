"""A decoder-only transformer as an optimizee of any size, and its problem: next tokens of a random Markov chain.

`large_optimizees` measures meta-steps on it. Axes: B sequences, T tokens, D width, H heads, V tokens in the vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ml3_jax
from ml3_jax.problems import supervised

VOCABULARY = 64
HEAD = 32  # width of a head


class Shape(NamedTuple):
    """The size of a transformer and of its data."""

    width: int  # D
    layers: int
    sequences: int = 4  # B, in each split of a task
    tokens: int = 32  # T


SHAPES = {"1 M": Shape(128, 5), "10 M": Shape(320, 8), "100 M": Shape(768, 14)}


def init(key: jax.Array, inputs: jax.Array, shape: Shape) -> dict[str, Any]:
    """Parameters for inputs [B, T] of tokens; those of all layers are stacked."""
    keys = jax.random.split(key, 6)
    width, layers = shape.width, shape.layers

    def stacked(key: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.normal(key, (layers, rows, columns)) / math.sqrt(rows)

    return {
        "tokens": jax.random.normal(keys[0], (VOCABULARY, width)),
        "places": jax.random.normal(keys[1], (inputs.shape[1], width)),
        "layers": {
            "attend": stacked(keys[2], width, 3 * width),
            "merge": stacked(keys[3], width, width) / math.sqrt(2 * layers),
            "widen": stacked(keys[4], width, 4 * width),
            "narrow": stacked(keys[5], 4 * width, width) / math.sqrt(2 * layers),
        },
    }


def apply(params: dict[str, Any], inputs: jax.Array) -> jax.Array:
    """Logits of the next token: [B, T] -> [B * T, V]. A scan over layers, each of them rematerialised."""
    x = params["tokens"][inputs] + params["places"]

    @jax.checkpoint
    def layer(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        parts = (_normalised(x) @ weights["attend"]).reshape(*x.shape[:2], 3, -1, HEAD)
        query, key, value = (parts[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ weights["merge"]
        return x + jax.nn.gelu(_normalised(x) @ weights["widen"]) @ weights["narrow"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = _normalised(x) @ params["tokens"].T / math.sqrt(x.shape[-1])
    return logits.reshape(-1, VOCABULARY)


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def make_problem(shape: Shape) -> ml3_jax.Problem:
    """Each task is a Markov chain of its own; a split has `shape.sequences` sequences of `shape.tokens` tokens."""

    def sample_task(key: jax.Array, context: Any) -> supervised.SupervisedTask:
        del context
        chain_key, train_key, test_key = jax.random.split(key, 3)
        log_odds = 2.0 * jax.random.normal(chain_key, (VOCABULARY, VOCABULARY))

        def draw(key: jax.Array) -> supervised.Examples:
            first_key, key = jax.random.split(key)
            first = jax.random.randint(first_key, (shape.sequences,), 0, VOCABULARY)

            def follow(token: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
                return jax.random.categorical(key, log_odds[token]), token

            last, tokens = jax.lax.scan(follow, first, jax.random.split(key, shape.tokens))
            targets = jnp.concatenate([tokens[1:], last[None]])
            return supervised.Examples(tokens.T, targets.T.reshape(-1))

        return supervised.SupervisedTask(draw(train_key), draw(test_key))

    model = (lambda key, inputs: init(key, inputs, shape), apply)
    return supervised.make_problem(
        model,
        sample_task,
        loss_fn=optax.softmax_cross_entropy_with_integer_labels,
        features=("logit", "log_probability", "label"),
        layout="classes",
    )


def learned_loss() -> ml3_jax.LearnedLoss:
    """A small network of logit, log-probability and label, shared by all tokens of the vocabulary."""
    return ml3_jax.losses.per_class(ml3_jax.losses.mlp(hidden=(16, 16), activation="tanh", positive=False, bias=True))
