"""Learned losses, each a factory that returns a `LearnedLoss`, and the registry that builds a saved one again.

They map the features of a problem's observe to a scalar. `as_loss_fn` turns a trained loss into a loss function like optax's.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ml3_jax import aliases
from ml3_jax.arguments import check_kind
from ml3_jax.losses.actions import action_target, fitted_action_target
from ml3_jax.losses.affine import affine_split_rmse
from ml3_jax.losses.gains import learned_gain_cross_entropy
from ml3_jax.losses.plain_plus import WithPlain, observe_plain_loss, plain_plus
from ml3_jax.losses.policy_gradients import guided_policy_gradient
from ml3_jax.losses.sample_wise import mlp, per_class, weighted_squared_error
from ml3_jax.losses.squared_errors import guided_squared_error
from ml3_jax.losses.update_rules import summary_gradient, summary_pull, temporal
from ml3_jax.types import LearnedLoss, LossParams

__all__ = [
    "REGISTRY",
    "WithPlain",
    "action_target",
    "affine_split_rmse",
    "as_loss_fn",
    "fitted_action_target",
    "from_spec",
    "guided_policy_gradient",
    "guided_squared_error",
    "learned_gain_cross_entropy",
    "mlp",
    "observe_plain_loss",
    "per_class",
    "plain_plus",
    "summary_gradient",
    "summary_pull",
    "temporal",
    "weighted_squared_error",
]

REGISTRY: dict[str, Callable[..., LearnedLoss]] = {
    "action_target": action_target,
    "fitted_action_target": fitted_action_target,
    "learned_gain_cross_entropy": learned_gain_cross_entropy,
    "guided_policy_gradient": guided_policy_gradient,
    "guided_squared_error": guided_squared_error,
    "mlp": mlp,
    "per_class": per_class,
    "plain_plus": plain_plus,
    "summary_gradient": summary_gradient,
    "summary_pull": summary_pull,
    "temporal": temporal,
    "affine_split_rmse": affine_split_rmse,
    "weighted_squared_error": weighted_squared_error,
}


def from_spec(spec: Mapping[str, Any]) -> LearnedLoss:
    """Builds the learned loss that a spec describes.

    Args:
      spec: {"name": registered name, "arguments": its arguments as JSON has them}, as `LearnedLoss.spec`.

    Raises:
      ValueError: the spec does not describe a registered loss.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("arguments", {}), Mapping):
        raise ValueError(f'learned loss: expected a spec {{"name": ..., "arguments": {{...}}}}, got {spec!r}')
    name = aliases.current_loss_name(spec.get("name"))
    if not isinstance(name, str) or name not in REGISTRY:
        raise ValueError(f"learned loss: expected one of {', '.join(sorted(REGISTRY))}, got {name!r}")
    arguments = dict(spec.get("arguments", {}))
    if isinstance(arguments.get("loss"), Mapping):  # a loss that contains another one
        arguments["loss"] = from_spec(arguments["loss"])
    try:
        return REGISTRY[name](**arguments)
    except TypeError as error:
        raise ValueError(f"learned loss {name}: its arguments do not fit: {error}") from error


def as_loss_fn(learned_loss: LearnedLoss, loss_params: LossParams) -> Callable[..., jax.Array]:
    """Turns a meta-trained loss into a loss function like optax's: f(predictions, targets, *inputs) -> per-example loss.

    Args:
      learned_loss: a loss over [N, F] or [N, C, F].
      loss_params: its parameters.

    Returns:
      f(predictions, targets, *inputs) -> [...], the loss of each example. For "columns" losses, predictions and targets are
      [..., P], or both [...] with one number an example; each of inputs broadcasts to [..., I]. For "classes" losses all are
      [..., C]; targets may be labels [...] as whole numbers. They get the order of `LearnedLoss.columns`, inputs the places of
      the other columns. A loss without `columns` gets predictions, targets, inputs: this must be the order of the features in
      meta-training. Without a per_example form, every example gets the loss of the batch, so that the mean is the meta-trained
      loss.

    Raises:
      TypeError: learned_loss is none.
      ValueError: the loss takes other columns than predictions and targets; from f, predictions and targets that differ in
        shape.
    """
    check_kind("learned_loss", learned_loss, LearnedLoss, "as ml3_jax.losses has them")
    if learned_loss.layout == "plain":
        raise ValueError(
            "as_loss_fn: this learned loss takes the plain loss beside its features: apply it to the features of its problem, "
            "learned_loss.apply(loss_params, features)"
        )
    order = learned_loss.columns or ("prediction", "target", "...")
    if not {"prediction", "target"} <= set(order):
        raise ValueError(
            f"as_loss_fn: this learned loss takes the columns ({', '.join(order)}) and has no prediction and target: "
            "apply it to the features of its problem, learned_loss.apply(loss_params, features)"
        )
    classes = learned_loss.layout == "classes"

    def loss_fn(predictions: jax.Array, targets: jax.Array, *inputs: jax.Array) -> jax.Array:
        predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
        if classes and targets.shape == predictions.shape[:-1] and jnp.issubdtype(targets.dtype, jnp.integer):
            targets = jax.nn.one_hot(targets, predictions.shape[-1], dtype=predictions.dtype)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions and targets must have one shape, got {predictions.shape} and {targets.shape}: "
                "add the missing axis (targets[:, None]) or one-hot encode labels"
            )
        if not classes and predictions.ndim <= 1:
            predictions, targets = predictions[..., None], targets[..., None]
            inputs = tuple(jnp.asarray(x)[:, None] if jnp.ndim(x) == 1 else jnp.asarray(x) for x in inputs)
        batch, width = predictions.shape[:-1], predictions.shape[-1]
        columns = _in_order(order, predictions, targets, [_broadcast(x, batch, width if classes else None) for x in inputs])
        if classes:
            features = jnp.stack(columns, axis=-1).reshape(math.prod(batch), width, len(columns))
        else:
            features = jnp.concatenate(columns, axis=-1)
            features = features.reshape(math.prod(batch), features.shape[-1])
        if learned_loss.per_example is None:
            return jnp.broadcast_to(learned_loss.apply(loss_params, features), batch)
        return learned_loss.per_example(loss_params, features).reshape(batch)

    return loss_fn


def _in_order(order: Sequence[str], prediction: jax.Array, target: jax.Array, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The columns in an order of names; inputs take the places of all names but prediction and target, "..." any number."""
    others = len(inputs) - sum(name not in ("prediction", "target", "...") for name in order)
    if others < 0 or (others > 0 and "..." not in order):
        raise ValueError(
            f"this learned loss takes the columns ({', '.join(order)}), got {len(inputs)} inputs besides prediction and target"
        )
    rest, columns = iter(inputs), []
    for name in order:
        if name == "...":
            columns += itertools.islice(rest, others)
        else:
            columns.append(prediction if name == "prediction" else target if name == "target" else next(rest))
    return columns


def _broadcast(value: jax.Array, batch: tuple[int, ...], classes: int | None) -> jax.Array:
    value = jnp.asarray(value)
    width = classes if classes is not None else (value.shape[-1] if value.ndim else 1)
    return jnp.broadcast_to(value, (*batch, width))


__getattr__ = aliases.module_getattr(__name__)
