"""Supervised problems: any model, any sampler of tasks and a classical loss become a `Problem`.

The learned loss sees the named columns (prediction, target, input, progress, ...) of each sample of the training split. The
task loss and the evaluation are the classical loss on the held-out split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from ml3_jax import aliases
from ml3_jax.types import Context, Params, Problem


class Examples(struct.PyTreeNode):
    """Inputs and targets of N samples."""

    inputs: jax.Array  # [N, ...]
    targets: jax.Array  # [N, P] regression, or [N, C] one-hot


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
    progress: jax.Array  # [] inner steps taken over `inner_steps`; it may exceed 1


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
    """Softmax cross-entropy of each sample in nats: [N, C], one-hot [N, C] -> [N]."""
    return optax.softmax_cross_entropy(logits, labels)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 if the largest logit is the label's, else 0: [N, C], one-hot [N, C] -> [N]."""
    return (jnp.argmax(logits, axis=-1) == jnp.argmax(labels, axis=-1)).astype(logits.dtype)


Model = nn.Module | tuple[Callable[[jax.Array, jax.Array], Params], Callable[[Params, jax.Array], jax.Array]]


def model_functions(model: Model) -> tuple[Callable[..., Params], Callable[..., jax.Array]]:
    """(init, apply) of a flax module, or the pair itself; init(key, inputs), apply(params, inputs) -> predictions."""
    if isinstance(model, nn.Module):

        def apply_module(params: Params, inputs: jax.Array) -> jax.Array:
            return jnp.asarray(model.apply(params, inputs))

        return model.init, apply_module
    return model


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
    inner_steps: int = 1,
    batch_size: int | None = None,
) -> Problem:
    """A problem from a model, a sampler of tasks and a classical loss.

    Args:
      model: a flax module without state, or a pair init(key, inputs) -> params and apply(params, inputs) -> predictions
        [N, P] (regression) or logits [N, C].
      sample_task: (key, context) -> SupervisedTask of one task.
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
      inner_steps: of one inner loop; progress is the fraction of them.
      batch_size: samples an inner step draws from the training split, without replacement; None takes all of them.

    Returns:
      A Problem over SupervisedTask.

    Raises:
      ValueError: an unknown feature, layout or split, a size below 1, or a batch larger than the split.
    """
    if layout not in ("columns", "classes"):
        raise ValueError(f"layout: expected 'columns' or 'classes', got {layout!r}")
    if outer_data not in ("test", "train"):
        raise ValueError(f"outer_data: expected 'test' or 'train', got {outer_data!r}")
    if inner_steps < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"inner_steps and batch_size: expected at least 1, got {inner_steps} and {batch_size}")
    feature_fns = _resolve_features(features, COLUMNS if layout == "columns" else CLASSES)
    metrics = {"loss": loss_fn} if metrics is None else dict(metrics)
    init_model, apply_model = model_functions(model)

    def init(key: jax.Array, task: SupervisedTask) -> Params:
        return init_model(key, task.train.inputs)

    def observe(params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        view = View(apply_model(params, task.train.inputs), task.train.targets, task.train.inputs, step / inner_steps)
        columns = [feature(view) for feature in feature_fns]
        return jnp.stack(columns, axis=-1) if layout == "classes" else jnp.concatenate(columns, axis=-1)

    def plain_loss(params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        return _mean(loss_fn, apply_model(params, task.train.inputs), task.train.targets)

    def task_loss(params: Params, task: SupervisedTask, context: Context, key: jax.Array) -> jax.Array:
        del context, key
        split = task.test if outer_data == "test" else task.train
        value = _mean(loss_fn, apply_model(params, split.inputs), split.targets)
        return value if outer_transform is None else outer_transform(value)

    def evaluate(params: Params, task: SupervisedTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context, key
        predictions = apply_model(params, task.test.inputs)
        return {name: _mean(metric, predictions, task.test.targets) for name, metric in metrics.items()}

    def collect(params: Params, task: SupervisedTask, context: Context, key: jax.Array, step: jax.Array) -> SupervisedTask:
        del params, context, step
        available = task.train.inputs.shape[0]
        if batch_size is None or batch_size > available:
            raise ValueError(f"batch_size: expected at most the {available} samples of the training split, got {batch_size}")
        chosen = jax.random.choice(key, available, (batch_size,), replace=False)
        return task.replace(train=jax.tree.map(lambda x: x[chosen], task.train))

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


def _mean(loss_fn: Callable[..., jax.Array], predictions: jax.Array, targets: jax.Array) -> jax.Array:
    if predictions.shape != targets.shape:
        raise ValueError(
            f"the model returned predictions {predictions.shape} for targets {targets.shape}: the shapes must match"
        )
    return jnp.mean(loss_fn(predictions, targets))


def _resolve_features(features: Sequence[str | FeatureFn], known: Mapping[str, FeatureFn]) -> list[FeatureFn]:
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
