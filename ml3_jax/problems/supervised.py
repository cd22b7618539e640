"""Supervised problems: any model, any sampler of tasks and a classical loss become a `Problem`.

The learned loss sees the named columns (prediction, target, input, progress, ...) of each sample of the training split. The
task loss and the evaluation are the classical loss on the held-out split.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ml3_jax import aliases
from ml3_jax.arguments import check_callable, check_choice, check_count
from ml3_jax.problems.models import Model, model_functions
from ml3_jax.types import Context, Params, Problem


class Examples(struct.PyTreeNode):
    """Inputs and targets of N samples."""

    inputs: jax.Array  # [N, ...]
    targets: jax.Array  # [N, P] or [N] regression; [N, C] one-hot or [N] whole numbers for classes


class SupervisedTask(struct.PyTreeNode):
    """One task: the samples to learn from and the held-out samples."""

    train: Examples
    test: Examples  # task_loss (unless outer_data="train") and evaluate alone read it
    extra: Any = None  # for task_loss alone


class View(NamedTuple):
    """The inputs of a feature of the learned loss, for the N samples of one inner step."""

    predictions: jax.Array  # [N, P] or [N, C]
    targets: jax.Array  # [N, P] or [N, C]
    inputs: jax.Array  # [N, ...]
    progress: jax.Array  # [] inner steps taken over `inner_steps`; it may exceed 1. NaN if `inner_steps` is unknown


FeatureFn = Callable[[View], jax.Array]  # -> [N, W] ("columns") or [N, C] ("classes")


def _progress(view: View) -> jax.Array:
    return jnp.broadcast_to(view.progress, (view.predictions.shape[0], 1))


COLUMNS: Mapping[str, FeatureFn] = {
    "prediction": lambda view: view.predictions,
    "target": lambda view: view.targets,
    "input": lambda view: view.inputs.reshape(view.inputs.shape[0], -1),
    "residual": lambda view: view.predictions - view.targets,
    "progress": _progress,
}
CLASSES: Mapping[str, FeatureFn] = {
    "logit": lambda view: view.predictions,
    "log_probability": lambda view: jax.nn.log_softmax(view.predictions),
    "probability": lambda view: jax.nn.softmax(view.predictions),
    "label": lambda view: view.targets,
    "progress": lambda view: jnp.broadcast_to(view.progress, view.predictions.shape),
}


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error of each sample, summed over outputs: [N, P], [N, P] -> [N]."""
    return jnp.sum((predictions - targets) ** 2, axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy of each sample in nats: [N, C], one-hot [N, C] or whole numbers [N] -> [N]."""
    if labels.ndim == logits.ndim - 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 if the largest logit is the label's, else 0: [N, C], one-hot [N, C] or whole numbers [N] -> [N]."""
    label = labels if labels.ndim == logits.ndim - 1 else jnp.argmax(labels, axis=-1)
    return (jnp.argmax(logits, axis=-1) == label).astype(logits.dtype)


@aliases.accept_old_keywords("supervised.make_problem")
def make_problem(
    model: Model,
    sample_task: Callable[[jax.Array, Context], SupervisedTask],
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array] = squared_error,
    *,
    features: Sequence[str | FeatureFn] = ("prediction", "target"),
    layout: str = "columns",
    metrics: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] | None = None,
    outer_data: str = "test",
    outer_transform: Callable[[jax.Array], jax.Array] | None = None,
    inner_steps: int | None = None,
    batch_size: int | None = None,
) -> Problem:
    """A problem from a model, a sampler of tasks and a classical loss.

    Args:
      model: of `ml3_jax.problems.models.model_functions`: a flax.linen, flax.nnx or equinox module without state, or a pair
        init(key, inputs) -> params and apply(params, inputs) -> predictions [N, P] (regression) or logits [N, C].
      sample_task: (key, context) -> SupervisedTask of one task. Targets [N] stand for [N, 1]. With layout "classes", whole
        numbers [N] are labels: features see them one-hot, loss_fn and metrics as they are.
      loss_fn: (predictions, targets) -> [N], the classical loss: the task loss, the plain loss, and, without `metrics`, the
        metric "loss" of evaluate.
      features: columns that the learned loss sees of each sample, in this order: names in `COLUMNS` or `CLASSES` by layout, or
        functions of a `View`.
      layout: "columns" concatenates features to [N, F]; "classes" stacks those of each class to [N, C, F].
      metrics: {name: (predictions, targets) -> [N]}; evaluate reports their means over the held-out split.
      outer_data: the split of the task loss, "test" (other samples than the inner steps') or "train" (the same samples, as in
        the paper's released code).
      outer_transform: scalar -> scalar, applied to the mean loss to make the task loss; None: the identity. A logarithm, for
        example, gives an improvement by a factor the same weight at every scale.
      inner_steps: of one inner loop; progress is the fraction of them. None: those of the loop that runs
        (`Problem.for_inner_steps`).
      batch_size: samples an inner step draws from the training split, without replacement; None takes all of them.

    Returns:
      A Problem over SupervisedTask.

    Raises:
      TypeError: something else where a function is expected.
      ValueError: a model with state, an unknown feature, layout or split, or a size below 1; from the problem's functions, a
        batch larger than the split, a split without samples, or predictions and targets that do not fit each other.
    """
    check_choice("layout", layout, ("columns", "classes"))
    check_choice("outer_data", outer_data, ("test", "train"))
    for name, size in (("inner_steps", inner_steps), ("batch_size", batch_size)):
        if size is not None:
            check_count(name, size)
    feature_fns = _resolve_features(features, COLUMNS if layout == "columns" else CLASSES)
    check_callable("sample_task", sample_task)
    check_callable("loss_fn", loss_fn)
    check_callable("outer_transform", outer_transform, optional=True)
    metrics = _checked_metrics({"loss": loss_fn} if metrics is None else metrics)
    init_model, apply_model = model_functions(model)

    def init(key: jax.Array, task: SupervisedTask) -> Params:
        for split in ("train", "test"):
            _check_samples(getattr(task, split).inputs, split)
        return init_model(key, task.train.inputs)

    def predicted(params: Params, task: SupervisedTask, split: str) -> tuple[jax.Array, jax.Array]:
        examples: Examples = getattr(task, split)
        _check_samples(examples.inputs, split)
        predictions = apply_model(params, examples.inputs)
        return predictions, _aligned(predictions, examples.targets, layout)

    def observe_at(progress: jax.Array, params: Params, task: SupervisedTask) -> jax.Array:
        predictions, targets = predicted(params, task, "train")
        if _are_labels(predictions, targets):
            targets = jax.nn.one_hot(targets, predictions.shape[-1], dtype=predictions.dtype)
        columns = [feature(View(predictions, targets, task.train.inputs, progress)) for feature in feature_fns]
        return jnp.stack(columns, axis=-1) if layout == "classes" else jnp.concatenate(columns, axis=-1)

    def plain_loss(params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return _mean(loss_fn, *predicted(params, task, "train"))

    def task_loss(params: Params, task: SupervisedTask, context: Context, key: jax.Array) -> jax.Array:
        del context, key
        value = _mean(loss_fn, *predicted(params, task, outer_data))
        return value if outer_transform is None else outer_transform(value)

    def evaluate(params: Params, task: SupervisedTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context, key
        seen = predicted(params, task, "test")
        return {name: _mean(metric, *seen) for name, metric in metrics.items()}

    def collect(params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> SupervisedTask:
        del params, context, step
        available = task.train.inputs.shape[0]
        if batch_size is None or batch_size > available:
            raise ValueError(f"batch_size: expected at most the {available} samples of the training split, got {batch_size}")
        chosen = jax.random.choice(key, available, (batch_size,), replace=False)
        return task.replace(train=jax.tree.map(lambda x: x[chosen], task.train))

    observe = _Observe(observe_at, inner_steps) if inner_steps else _ObserveAnySteps(observe_at, "progress" in features)
    return Problem(
        sample_task=sample_task,
        init=init,
        observe=observe,
        task_loss=task_loss,
        evaluate=evaluate,
        plain_loss=plain_loss,
        collect=None if batch_size is None else collect,
        samples_per_step=batch_size,
    )


@dataclasses.dataclass(frozen=True)  # not a NamedTuple: JAX keeps a weak reference to a function
class _Observe:
    """`Problem.observe` of a known number of inner steps. Equal ones share a compilation."""

    observe_at: Callable[[jax.Array, Params, SupervisedTask], jax.Array]  # the first argument is `View.progress`
    inner_steps: int

    def __call__(self, params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        return self.observe_at(step / self.inner_steps, params, task)


@dataclasses.dataclass(frozen=True)
class _ObserveAnySteps:
    """`Problem.observe` of an unknown number of inner steps. The loops know theirs, and call `with_inner_steps`."""

    observe_at: Callable[[jax.Array, Params, SupervisedTask], jax.Array]
    needs_progress: bool

    def with_inner_steps(self, steps: int) -> _Observe:
        return _Observe(self.observe_at, steps)

    def __call__(self, params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        if self.needs_progress:
            raise ValueError(
                "features: 'progress' is the fraction of the inner steps, which are unknown here: pass "
                "make_problem(..., inner_steps=), or call problem.for_inner_steps(n).observe"
            )
        return self.observe_at(jnp.nan * step, params, task)


def _check_samples(inputs: jax.Array, split: str) -> None:
    if jnp.shape(inputs)[0] == 0:
        raise ValueError(
            f"sample_task: expected at least one sample in the {split} split, got inputs of shape {jnp.shape(inputs)}: "
            "its mean loss would be NaN"
        )


def _are_labels(predictions: jax.Array, targets: jax.Array) -> bool:
    return targets.ndim == predictions.ndim - 1 and jnp.issubdtype(targets.dtype, jnp.integer)


def _aligned(predictions: jax.Array, targets: jax.Array, layout: str) -> jax.Array:
    """Targets of the shape of the predictions, or labels [N].

    Raises:
      ValueError: they fit in neither way. Without the check, [N, 1] and [N] would broadcast to [N, N].
    """
    targets = jnp.asarray(targets)
    if targets.shape == predictions.shape or (
        layout == "classes" and _are_labels(predictions, targets) and targets.shape == predictions.shape[:-1]
    ):
        return targets
    if layout == "columns" and (*targets.shape, 1) == predictions.shape:
        return targets[..., None]
    expected = "the same shape, or labels [N] as whole numbers" if layout == "classes" else "the same shape, or [N] for [N, 1]"
    raise ValueError(
        f"the model returned predictions {predictions.shape} for targets {targets.shape} {targets.dtype}: expected {expected}"
    )


def _mean(loss_fn: Callable[..., jax.Array], predictions: jax.Array, targets: jax.Array) -> jax.Array:
    if _are_labels(predictions, targets):
        _check_takes_labels(loss_fn, predictions, targets)
    return jnp.mean(loss_fn(predictions, targets))


def _check_takes_labels(loss_fn: Callable[..., jax.Array], predictions: jax.Array, labels: jax.Array) -> None:
    """Checks that a loss takes labels, on a number of samples that cannot broadcast with the number of classes."""
    samples = predictions.shape[-1] + 1
    shapes = [jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype) for x in (predictions, labels)]
    came: Any = None
    with contextlib.suppress(ValueError, TypeError):
        came = jax.eval_shape(loss_fn, *shapes).shape
    if came != (samples,):
        raise ValueError(
            f"{getattr(loss_fn, '__name__', loss_fn)}: expected a loss that takes labels [N] as whole numbers, for example "
            "optax.softmax_cross_entropy_with_integer_labels; choose one, or one-hot encode the targets"
        )


def _checked_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics: expected {{name: function}}, got {type(metrics).__name__}")
    for name, metric in metrics.items():
        check_callable(f"metrics[{name!r}]", metric)
    return dict(metrics)


def _resolve_features(features: Sequence[str | FeatureFn], known: Mapping[str, FeatureFn]) -> list[FeatureFn]:
    if isinstance(features, str):
        raise ValueError(f"features: expected a sequence, such as ({features!r},), got {features!r}")
    resolved = []
    for feature in features:
        if callable(feature):
            resolved.append(feature)
        elif feature in known:
            resolved.append(known[feature])
        else:
            raise ValueError(f"features: expected a function or one of {', '.join(sorted(known))}, got {feature!r}")
    if not resolved:
        raise ValueError("features: expected at least one, got none: the learned loss would see nothing")
    return resolved
