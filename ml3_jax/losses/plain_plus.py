"""The plain loss plus a learned one: a start from which meta-training can only gain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ml3_jax.arguments import check_kind
from ml3_jax.losses.forms import check_parts, make_spec
from ml3_jax.types import Context, LearnedLoss, LossParams, Params, Problem, PyTree, Task


class WithPlain(struct.PyTreeNode):
    """The features of `plain_plus`."""

    features: PyTree  # of the learned loss
    plain: jax.Array  # [] the plain loss on the same data


def plain_plus(loss: LearnedLoss) -> LearnedLoss:
    """gain plain + loss(features): the plain loss with a learned gain > 0, which starts at 1, and a learned loss beside it.

    A network of the features alone must first find what the plain loss knows. A small one beside it bends the descent from
    the first meta-step on (`mlp(last_scale=0.1, positive=False)` is the paper's network in this form).

    Args:
      loss: any learned loss.

    Returns:
      A LearnedLoss over `WithPlain`, the features of a problem of `observe_plain_loss`.

    Raises:
      TypeError: `loss` is no LearnedLoss; from init and apply, features without the plain loss.
    """
    check_kind("loss", loss, LearnedLoss, "as ml3_jax.losses has them")

    def init(key: jax.Array, features: Any) -> LossParams:
        if not isinstance(features, int | np.integer):
            _check(features)
            features = features.features
        return {"log_gain": jnp.zeros(()), "loss": loss.init(key, features)}

    def apply(loss_params: LossParams, features: Any) -> jax.Array:
        _check(features)
        check_parts(loss_params, "log_gain", "loss")
        return jnp.exp(loss_params["log_gain"]) * features.plain + loss.apply(loss_params["loss"], features.features)

    spec = None if loss.spec is None else make_spec("plain_plus", loss=dict(loss.spec))
    return LearnedLoss(init, apply, spec, layout="plain", columns=loss.columns)


def observe_plain_loss(problem: Problem) -> Problem:
    """The problem with `WithPlain` for features: what its observe returns, and its plain loss on the same data.

    Raises:
      TypeError: `problem` is no Problem.
      ValueError: it has no plain_loss. Its task_loss is no substitute: it may read what only meta-training knows.
    """
    check_kind("problem", problem, Problem, "as ml3_jax.problems makes them")
    if problem.plain_loss is None:
        raise ValueError("observe_plain_loss: expected a problem with plain_loss, got one without: give it plain_loss=")
    return problem._replace(observe=_ObservePlain(problem.observe, problem.plain_loss))


class _ObservePlain:
    """An observe function that adds the plain loss. Equal for equal parts, so that equal problems share a compilation."""

    def __init__(self, observe: Callable[..., PyTree], plain_loss: Callable[..., jax.Array]):
        self._parts = observe, plain_loss
        with_steps = getattr(observe, "with_inner_steps", None)
        if with_steps is not None:  # see Problem.for_inner_steps
            self.with_inner_steps = lambda steps: _ObservePlain(with_steps(steps), plain_loss)

    def __call__(self, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> WithPlain:
        observe, plain_loss = self._parts
        return WithPlain(observe(params, task, context, key, step), plain_loss(params, task, context, key, step))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ObservePlain) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)


def _check(features: Any) -> None:
    if not isinstance(features, WithPlain):
        raise TypeError(
            f"plain_plus takes the features of ml3_jax.losses.observe_plain_loss(problem), got {type(features).__name__}: "
            "wrap the problem with it"
        )
