"""Optimisers by name, for configs; the learning rate may be traced, so that one compilation serves a search over it."""

from typing import Any

import optax
from jax import Array

INNER = ("sgd", "momentum", "adam")
META = ("adam", "sgd", "momentum", "rmsprop")
MOMENTUM = 0.9
# optax.adam's default eps_root = 0 puts sqrt'(0), which is infinite, into the meta-gradient: every entry of it is NaN.
INNER_EPS_ROOT = 1e-8
# What is left of a learning rate when its decay ends.
DECAY_END = 0.01


def inner(name: str, learning_rate: float | Array, *, decay_steps: int = 0) -> optax.GradientTransformation:
    """An optimiser for the inner loop, safe to differentiate through.

    Args:
      name: one of `INNER`.
      learning_rate: the step size alpha (at the start, where it decays), a number or a traced scalar.
      decay_steps: inner steps over which the step size falls along a cosine to `DECAY_END` of its start; 0: constant.

    Raises:
      ValueError: the name is not one of `INNER`.
    """
    rate = _decaying(learning_rate, decay_steps)
    if name == "sgd":
        return optax.sgd(rate)
    if name == "momentum":
        return optax.sgd(rate, momentum=MOMENTUM)
    if name == "adam":
        return optax.adam(rate, eps_root=INNER_EPS_ROOT)
    raise ValueError(f"unknown inner optimizer {name!r}: expected one of {', '.join(INNER)}")


def meta(name: str, learning_rate: float, *, clip: float = 0.0, decay_steps: int = 0) -> optax.GradientTransformation:
    """An optimiser for the outer loop.

    Args:
      name: one of `META`.
      learning_rate: the meta step size eta (at the start, where it decays).
      clip: the largest global norm of the meta-gradient; 0: unlimited.
      decay_steps: meta-steps over which the step size falls along a cosine to `DECAY_END` of its start; 0: constant.
        It has a length of its own, so that a run that is continued keeps its schedule.

    Raises:
      ValueError: the name is not one of `META`.
    """
    rate = _decaying(learning_rate, decay_steps)
    if name == "adam":
        optimizer = optax.adam(rate)
    elif name == "sgd":
        optimizer = optax.sgd(rate)
    elif name == "momentum":
        optimizer = optax.sgd(rate, momentum=MOMENTUM)
    elif name == "rmsprop":
        optimizer = optax.rmsprop(rate)
    else:
        raise ValueError(f"unknown meta optimizer {name!r}: expected one of {', '.join(META)}")
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer


def _decaying(learning_rate: Any, decay_steps: int) -> Any:
    """What optax takes as a learning rate: a schedule, or the number where it stays constant."""
    return optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=DECAY_END) if decay_steps else learning_rate
