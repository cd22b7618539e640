"""Optimisers by name, for configs; the learning rate may be traced, so that one compilation serves a search over it."""

import math
from typing import Any

import jax
import optax
from jax import Array

INNER = ("sgd", "momentum", "adam", "mup_adam")
META = ("adam", "sgd", "momentum", "rmsprop")
MOMENTUM = 0.9
# optax.adam's default eps_root = 0 puts sqrt'(0), which is infinite, into the meta-gradient: every entry of it is NaN.
INNER_EPS_ROOT = 1e-8
# What is left of a learning rate when its decay ends.
DECAY_END = 0.01
# Inputs of a layer up to which "mup_adam" is Adam.
BASE_WIDTH = 64


def inner(name: str, learning_rate: float | Array, *, decay_steps: int = 0) -> optax.GradientTransformation:
    """An optimiser for the inner loop, safe to differentiate through.

    Args:
      name: one of `INNER`. "mup_adam" is Adam whose step for a layer of more than `BASE_WIDTH` inputs is smaller by as much
        as there are more of them: each of Adam's steps moves every weight alike, so a layer's output would move further
        the wider it is (the rule of Yang et al. 2021, Tensor Programs V, arXiv:2203.03466, for hidden and last layers).
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
    if name == "mup_adam":
        by_width = optax.stateless(lambda updates, params: jax.tree.map(_by_width, updates))
        return optax.chain(optax.scale_by_adam(eps_root=INNER_EPS_ROOT), by_width, optax.scale_by_learning_rate(rate))
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


def _by_width(update: Array) -> Array:
    """The update of a kernel [..., outputs], smaller where it has many inputs; of anything else as it is."""
    inputs = math.prod(update.shape[:-1]) if update.ndim > 1 else 1
    return update * min(1.0, BASE_WIDTH / inputs)
