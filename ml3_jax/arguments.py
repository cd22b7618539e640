"""Checks of arguments. Each message says what was expected, what came, and what to do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 2**31 - 1  # JAX counts in 32 bits


def check_count(name: str, value: Any) -> int:
    """Returns `value` as an int.

    Raises:
      ValueError: it is not a whole number from 1 to `LARGEST`; the message has `name`.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST}, got {value}")
    return int(value)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`; the message names the argument."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_feature_names(names: Sequence[str], known: tuple[str, ...]) -> None:
    """Raises ValueError unless there are names of features, and all of them are known."""
    if isinstance(names, str) or not names or any(name not in known for name in names):
        given = repr(names) if isinstance(names, str) else tuple(names)
        raise ValueError(f"features: expected some of {', '.join(known)}, got {given}")


def check_callable(name: str, value: Any, optional: bool = False) -> None:
    """Raises TypeError unless `value` is a function (or None, if it is optional)."""
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name}: expected a function{' or None' * optional}, got {_said(value)}")


def check_kind(name: str, value: Any, kind: type, source: str) -> None:
    """Raises TypeError unless `value` is of a class; `source` says where to get such a value."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, {source}, got {_said(value)}")


def check_optimizer(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an optimizer as optax has them: functions init and update."""
    if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return
    advice = "call it first" if callable(value) else "for example optax.adam(1e-3)"
    if callable(getattr(value, "make", None)):  # an ml3_jax.optimizers.LearnedOptimizer
        advice = "give its make(optimizer_params)"
    raise TypeError(f"{name}: expected an optax optimizer, got {_said(value)}: {advice}")


def check_key(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is one key, typed or raw."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return
        raise TypeError(f"{name}: expected one key, got keys of shape {shape}: use jax.vmap over the keys")
    if dtype != np.uint32 or len(shape or ()) != 1:  # a raw key, as of jax.random.PRNGKey
        raise TypeError(f"{name}: expected a key such as jax.random.key(0), got {_said(value)}")


def _said(value: Any) -> str:
    """A value in an error: arrays by dtype and shape, functions by name."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    text = repr(value)
    if value is None or isinstance(value, str):
        return text
    return f"{type(value).__name__} {text}" if len(text) <= 60 else f"a {type(value).__name__}"
