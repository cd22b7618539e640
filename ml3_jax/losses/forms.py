"""Functions that learned losses share: checks of features, and the mean over samples."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml3_jax.types import LearnedLoss, LossParams, PyTree


def num_features(features: int | PyTree, axes: str) -> int:
    """F, from F itself or from an example of the features."""
    if isinstance(features, (int, np.integer)):
        if features < 1:
            raise ValueError(f"features: expected a positive number of features, got {features}")
        return int(features)
    return check_features(features, axes, None)[-1]


def check_features(features: PyTree, axes: str, expected: int | None) -> tuple[int, ...]:
    """The shape of features with the axes named in `axes` ("N, F").

    Raises:
      ValueError: the features have another structure, rank or number; the message has the expected and the given shape.
    """
    rank = axes.count(",") + 1
    shape = getattr(features, "shape", None)
    if shape is None:
        raise ValueError(
            f"this learned loss takes one array [{axes}], but observe returned {jax.tree.map(jnp.shape, features)}: "
            "return an array, or use a LearnedLoss that takes this structure"
        )
    if len(shape) != rank:
        raise ValueError(
            f"this learned loss takes features of shape [{axes}] (rank {rank}), but observe returned shape {tuple(shape)}: "
            "stack the features of each sample on a last axis, for example jnp.stack([prediction, target], axis=-1)"
        )
    if expected is not None and shape[-1] != expected:
        raise ValueError(
            f"this learned loss was initialised for {expected} features a sample, but observe returned shape "
            f"{tuple(shape)}, which has {shape[-1]}: use the problem of its meta-training, or initialise it again"
        )
    return tuple(shape)


def first_kernel_rows(loss_params: LossParams) -> int:
    """The number of inputs of a network (`ml3_jax.networks.MLP`), from its parameters.

    Raises:
      ValueError: they are not those of such a network.
    """
    try:
        return loss_params["params"]["Dense_0"]["kernel"].shape[0]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise _of_another_loss(loss_params) from error


def check_parts(loss_params: LossParams, *names: str) -> None:
    """Checks that loss parameters are a dictionary with these parts.

    Raises:
      ValueError: they are those of another loss.
    """
    if not isinstance(loss_params, Mapping) or not set(names) <= set(loss_params):
        raise _of_another_loss(loss_params)


def _of_another_loss(loss_params: LossParams) -> ValueError:
    came = jax.tree.structure(loss_params)
    return ValueError(f"loss_params: expected the parameters that this learned loss's init returns, got {came}")


def check_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    """Returns the widths of layers.

    Raises:
      ValueError: it is no sequence of whole numbers of at least 1.
    """
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ValueError(f"hidden: expected a sequence of widths, such as (50, 50), got {hidden!r}")
    if any(not isinstance(width, (int, np.integer)) or isinstance(width, bool) or width < 1 for width in hidden):
        raise ValueError(f"hidden: expected widths of at least 1, got {tuple(hidden)}")
    return tuple(hidden)


def mean_of(
    per_example: Callable[[LossParams, PyTree], jax.Array],
    init: Callable[[jax.Array, Any], LossParams],
    spec: Mapping[str, Any] | None,
    layout: str = "columns",
) -> LearnedLoss:
    """The LearnedLoss that is the mean over samples of per_example."""

    def apply(loss_params: LossParams, features: PyTree) -> jax.Array:
        return jnp.mean(per_example(loss_params, features))

    return LearnedLoss(init, apply, spec, per_example, layout)


def make_spec(name: str, **arguments: Any) -> dict[str, Any]:
    """`LearnedLoss.spec` of a registered loss, as JSON has it: numbers of NumPy's and JAX's types become Python's."""
    return {"name": name, "arguments": as_json(arguments)}


def as_json(value: Any) -> Any:
    """A copy of a JSON value. Tuples become lists, arrays and their numbers become Python's.

    Raises:
      ValueError: part of it has no JSON form.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, (np.ndarray, np.generic, jax.Array)):
            return np.asarray(part).tolist()
        raise ValueError(
            f"expected text, numbers, lists and dictionaries, as JSON has them, got {part!r}, a {type(part).__name__}"
        )

    return json.loads(json.dumps(value, default=plain))
