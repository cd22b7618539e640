"""Optimizers by name, for configs. The learning rate may be traced: a search over it compiles once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

INNER = ("sgd", "momentum", "adam", "mup_adam")
META = ("adam", "sgd", "momentum", "rmsprop")
MOMENTUM = 0.9
INNER_EPS_ROOT = 1e-8  # with 0, optax's default, the infinite slope of sqrt at 0 makes the meta-gradient NaN
DECAY_END = 0.01  # share of a learning rate at the end of its decay
BASE_WIDTH = 64  # inputs of a layer up to which "mup_adam" equals Adam


class Schedule(NamedTuple):
    """How a step size changes over the steps of a descent. All fields may be traced: a search compiles once."""

    warmup: float | Array = 0.0  # share of the steps over which the step size rises from 0
    end: float | Array = 1.0  # share of the step size that is left at the end; it falls along a cosine


CONSTANT = "constant"
SCHEDULES = {
    CONSTANT: Schedule(),
    "cosine": Schedule(end=DECAY_END),
    "warmup_10": Schedule(0.1, DECAY_END),
    "warmup_30": Schedule(0.3, DECAY_END),
}


def scheduled(learning_rate: float | Array, schedule: Schedule, steps: int) -> Callable[[Any], Array]:
    """The step size at each of `steps` steps, for optax: warm-up along a line, then decay along a cosine."""

    def rate(count: Any) -> Array:
        rise = schedule.warmup * steps
        done = jnp.clip((count - rise) / jnp.maximum(steps - rise, 1.0), 0.0, 1.0)
        fall = schedule.end + (1.0 - schedule.end) * 0.5 * (1.0 + jnp.cos(math.pi * done))
        return learning_rate * jnp.where(count < rise, (count + 1.0) / jnp.maximum(rise, 1.0), fall)

    return rate


def inner(name: str, learning_rate: Any, *, decay_steps: int = 0) -> optax.GradientTransformation:
    """An optimizer for the inner loop, safe to differentiate through.

    Args:
      name: one of `INNER`. "mup_adam" is Adam with the step of a layer divided by inputs / `BASE_WIDTH`, if that is above 1.
        A step of Adam moves all weights equally, so that the output of a wide layer would move further (the rule of
        Yang et al. 2021, Tensor Programs V, arXiv:2203.03466, for hidden and last layers).
      learning_rate: the initial step size alpha, a number or a traced scalar, or without decay_steps a schedule of optax.
      decay_steps: inner steps over which the step size falls along a cosine to `DECAY_END` of its start; 0: constant.

    Raises:
      ValueError: the name is not one of `INNER`.
    """
    rate = _decaying(learning_rate, decay_steps)
    if name == "sgd":
        return optax.sgd(rate)
    if name == "momentum":
        return _momentum(rate)
    if name == "adam":
        return optax.adam(rate, eps_root=INNER_EPS_ROOT)
    if name == "mup_adam":
        by_width = optax.stateless(lambda updates, params: jax.tree.map(_by_width, updates))
        return optax.chain(optax.scale_by_adam(eps_root=INNER_EPS_ROOT), by_width, optax.scale_by_learning_rate(rate))
    raise ValueError(f"unknown inner optimizer {name!r}: expected one of {', '.join(INNER)}")


def meta(name: str, learning_rate: float, *, clip: float = 0.0, decay_steps: int = 0) -> optax.GradientTransformation:
    """An optimizer for the outer loop.

    Args:
      name: one of `META`.
      learning_rate: the initial meta step size eta.
      clip: the largest global norm of the meta-gradient; 0: unlimited.
      decay_steps: meta-steps over which the step size falls along a cosine to `DECAY_END` of its start; 0: constant. It is
        independent of the length of the run, so that a resumed run with more meta-steps keeps its schedule.

    Raises:
      ValueError: the name is not one of `META`.
    """
    rate = _decaying(learning_rate, decay_steps)
    makers = {"adam": optax.adam, "sgd": optax.sgd, "momentum": _momentum, "rmsprop": optax.rmsprop}
    if name not in makers:
        raise ValueError(f"unknown meta optimizer {name!r}: expected one of {', '.join(META)}")
    optimizer = makers[name](rate)
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer


def _momentum(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _decaying(learning_rate: Any, decay_steps: int) -> Any:
    """The learning rate for optax: a schedule, or the number if it is constant."""
    return optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=DECAY_END) if decay_steps else learning_rate


def _by_width(update: Array) -> Array:
    """The update of a kernel [..., outputs], scaled down if it has many inputs; any other update unchanged."""
    inputs = math.prod(update.shape[:-1]) if update.ndim > 1 else 1
    return update * min(1.0, BASE_WIDTH / inputs)
