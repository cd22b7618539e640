"""Learned losses, each a factory that returns a `LearnedLoss`, and the registry by which a saved one is built again.

They map what a problem's observe returns to a scalar; `as_loss_fn` turns a trained one into a loss of the kind optax has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml3_jax import networks
from ml3_jax.types import LearnedLoss, LossParams, PyTree


def _num_features(features: int | PyTree, axes: str) -> int:
    """F, from F itself or from an example of the features."""
    if isinstance(features, (int, np.integer)):
        if features < 1:
            raise ValueError(f"features: expected a positive number of features, got {features}")
        return int(features)
    return _check_features(features, axes, None)[-1]


def _check_features(features: PyTree, axes: str, expected: int | None) -> tuple[int, ...]:
    """The shape of features with the axes named in `axes` ("N, F"), or a ValueError that says what came."""
    rank = axes.count(",") + 1
    shape = getattr(features, "shape", None)
    if shape is None:
        raise ValueError(
            f"this learned loss takes one array [{axes}], but observe returned {jax.tree.map(jnp.shape, features)}: "
            "return an array, or bring a LearnedLoss that takes this structure"
        )
    if len(shape) != rank:
        raise ValueError(
            f"this learned loss takes features of shape [{axes}] (rank {rank}), but observe returned shape {tuple(shape)}: "
            "stack what it sees of each sample on a last axis, for example jnp.stack([prediction, target], axis=-1)"
        )
    if expected is not None and shape[-1] != expected:
        raise ValueError(
            f"this learned loss was initialised for {expected} features a sample, but observe returned shape "
            f"{tuple(shape)}, which has {shape[-1]}: use the problem that it was meta-trained on, or initialise it anew"
        )
    return tuple(shape)


def _first_kernel_rows(loss_params: LossParams) -> int:
    return loss_params["params"]["Dense_0"]["kernel"].shape[0]


def mlp(hidden: Sequence[int] = (50, 50), activation: str = "relu", positive: bool = True, bias: bool = False) -> LearnedLoss:
    """The paper's learned loss: the mean over samples of a network of the features (Bechtle et al. 2020, section III).

    Args:
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      positive: whether a softplus makes the output positive.
      bias: whether layers have biases (they start at zero).

    Returns:
      A LearnedLoss over features [N, F]; the weights start Xavier-uniform. The defaults are the released code's.

    Raises:
      ValueError: an unknown activation or a width below 1; from apply, features of another rank or number.
    """
    hidden = tuple(hidden)
    _check_widths(hidden)
    networks.activation_fn(activation)
    network = networks.MLP((*hidden, 1), activation, bias, init_scheme="xavier")

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return network.init(key, jnp.zeros((1, _num_features(features, "N, F"))))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        _check_features(features, "N, F", _first_kernel_rows(loss_params))
        output = jnp.asarray(network.apply(loss_params, features))[:, 0]
        return jax.nn.softplus(output) if positive else output

    return _mean_of(per_example, init, _spec("mlp", hidden=list(hidden), activation=activation, positive=positive, bias=bias))


def weighted_squared_error(
    hidden: Sequence[int] = (20, 20, 20), activation: str = "elu", last_scale: float = 0.3, max_log_weight: float = 20.0
) -> LearnedLoss:
    """The squared error times a learned positive weight: mean_n (prediction - target)^2 exp(net(features_n)).

    It starts near the mean squared error and keeps its minimum, zero where every prediction is right, whatever the
    network has become; what is learned is how much an error counts where.

    Args:
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      last_scale: factor on the initial weights of the last layer; 0 starts at the mean squared error itself.
      max_log_weight: where the log-weight is clipped, so that an extreme feature cannot make it infinite.

    Returns:
      A LearnedLoss over features [N, F], F >= 2: the first column is the prediction, the second the target, all of them
      go into the network.

    Raises:
      ValueError: an unknown activation, a width below 1 or fewer than two features.
    """
    hidden = tuple(hidden)
    _check_widths(hidden)
    networks.activation_fn(activation)
    network = networks.MLP((*hidden, 1), activation, init_scheme="xavier", last_scale=last_scale)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        count = _num_features(features, "N, F")
        if count < 2:
            raise ValueError(f"weighted_squared_error: expected features (prediction, target, ...), got {count} column")
        return network.init(key, jnp.zeros((1, count)))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        _check_features(features, "N, F", _first_kernel_rows(loss_params))
        log_weight = jnp.asarray(network.apply(loss_params, features))[:, 0]
        return (features[:, 0] - features[:, 1]) ** 2 * jnp.exp(jnp.minimum(log_weight, max_log_weight))

    arguments = {"activation": activation, "last_scale": last_scale, "max_log_weight": max_log_weight}
    return _mean_of(per_example, init, _spec("weighted_squared_error", hidden=list(hidden), **arguments))


def split_error(fade: bool = True, schedule_degree: int = 0) -> LearnedLoss:
    """The root of two weighted mean squares: of the error's affine part and of the rest of it.

    The error of the batch, r = prediction - target, is split into its least-squares fit by an affine function of the
    inputs and what that fit leaves. M = sqrt(w_a mean(fit^2) + w_r mean(rest^2)): the root makes the gradient's size
    independent of the targets' scale, so that a step size for small targets does not diverge on large ones; a w_a below
    w_r holds back the directions that gradient descent finds first, whose curvature limits the step size, in favour of
    the slow ones. log w_i = 2 phi_i + s(progress); all of phi starts at zero, where M is the root mean square with the
    schedule's fixed part.

    Args:
      fade: let M fade linearly with the fraction of training done, to nothing at its end (the fixed part of s).
      schedule_degree: degree of a learned polynomial in the fraction of training, common to both weights; 0: none.

    Returns:
      A LearnedLoss over features [N, F], F >= 4: prediction, target, one or more columns of inputs, and progress, the
      fraction of training done (the same in every row). It looks at the batch as a whole and has no per_example form.

    Raises:
      ValueError: a negative degree, or fewer than four features.
    """
    if schedule_degree < 0:
        raise ValueError(f"schedule_degree: expected at least 0, got {schedule_degree}")

    def check(features: int | PyTree) -> None:
        count = _num_features(features, "N, F")
        if count < 4:
            raise ValueError(f"split_error: expected features (prediction, target, input, ..., progress), got {count} columns")

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        del key  # nothing is drawn: the untrained loss is the same in every run
        check(features)
        return {"log_weight": jnp.zeros(2), **({"schedule": jnp.zeros(schedule_degree)} if schedule_degree else {})}

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check(features)
        error, inputs, progress = features[:, 0] - features[:, 1], features[:, 2:-1], features[0, -1]
        fit = _affine_fit(inputs, error)
        time = 2.0 * progress - 1.0
        schedule = sum((loss_params["schedule"][d] * _chebyshev(time, d + 1) for d in range(schedule_degree)), 0.0)
        fixed = 2.0 * jnp.log(jnp.maximum(1.0 - progress, 0.0) + 1e-3) if fade else 0.0
        weights = jnp.exp(jnp.clip(2.0 * (loss_params["log_weight"] + schedule) + fixed, -14.0, 8.0))
        squares = jnp.stack([jnp.mean(fit**2), jnp.mean((error - fit) ** 2)])
        return jnp.sqrt(weights @ squares + 1e-8)

    return LearnedLoss(init, apply, _spec("split_error", fade=fade, schedule_degree=schedule_degree))


def _affine_fit(inputs: jax.Array, error: jax.Array) -> jax.Array:
    """The least-squares fit of error [N] by an affine function of inputs [N, D], at the inputs: [N]."""
    centred = inputs - jnp.mean(inputs, axis=0, keepdims=True)
    # Under the root, so that a constant input, whose deviation is zero, has a derivative.
    standard = centred / jnp.sqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-12)
    basis = jnp.concatenate([jnp.ones_like(inputs[:, :1]), standard], axis=1)
    gram = basis.T @ basis / basis.shape[0]
    # The ridge is for inputs that are copies of each other, or constant; it is below float32's rounding otherwise.
    coefficients = jnp.linalg.solve(gram + 1e-6 * jnp.eye(gram.shape[0]), basis.T @ error / basis.shape[0])
    return basis @ coefficients


def _chebyshev(x: jax.Array, degree: int) -> jax.Array:
    """The Chebyshev polynomial of the first kind at x."""
    before, value = jnp.ones_like(x), x
    for _ in range(degree - 1):
        before, value = value, 2.0 * x * value - before
    return value


def gained_cross_entropy(hidden: Sequence[int] = (16, 16)) -> LearnedLoss:
    """Cross-entropy whose gradient has learned gains: M = mean_n sum_c g_nc z_nc, z the logits, g detached.

    Cross-entropy's gradient at the logits is r = w (softmax(z) - label), here with learned weights w of the samples. Its
    batch mean (the classes' bias) and the rest get gains of their own: g = g_1 (r - mean r) + g_2 mean r. The gains see
    the batch (log of its mean cross-entropy, spread of its logits, size of the bias) and the fraction of training; the
    weights see how hard a sample is beside the batch. Both gains fall with the root of the mean cross-entropy, so that an
    untrained loss already keeps its pace as the cross-entropy fades.

    Only the gradient of M means something, not its value. Cut: d(g)/d(logits). In the inner gradient that makes g the
    gradient at the logits, as meant; in the meta-gradient it leaves out how a step changes the next step's gains, which
    keeps long unrolls bounded at the price of a bias.

    Args:
      hidden: widths of the hidden layers of its three networks (tanh).

    Returns:
      A LearnedLoss over features [N, C, 3]: logit, label, and progress, the fraction of training done. It looks at the
      batch as a whole and has no per_example form.

    Raises:
      ValueError: a width below 1; from apply, features of another shape.
    """
    hidden = tuple(hidden)
    _check_widths(hidden)
    network = networks.MLP((*hidden, 1), "tanh", init_scheme="lecun", last_scale=0.1)

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        if _num_features(features, "N, C, F") != 3:
            raise ValueError("gained_cross_entropy: expected features (logit, label, progress), got another number of them")
        keys = jax.random.split(key, 3)
        networks_of = {"rest": 4, "bias": 4, "weight": 3}
        nets = {name: network.init(k, jnp.zeros((1, n))) for k, (name, n) in zip(keys, networks_of.items(), strict=True)}
        return {**nets, "log_gain": jnp.zeros(()), "log_bias_gain": jnp.asarray(-2.5)}

    def net(params: LossParams, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(network.apply(params, inputs))[..., 0]

    def coefficients(loss_params: LossParams, features: jax.Array) -> jax.Array:
        """g [N, C]."""
        logits, labels, progress = features[..., 0], features[..., 1], jnp.clip(features[0, 0, 2], 0.0, 1.0)
        losses = jnp.maximum(-jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1), 0.0)
        mean_loss = jnp.mean(losses) + 1e-4
        level = jnp.log(mean_loss)
        hardness = jnp.log(losses + 1e-3) - level
        about = jnp.stack([hardness, jnp.full_like(hardness, level), jnp.full_like(hardness, progress)], axis=-1)
        # softplus(log(e - 1)) is 1: an untrained weight leaves every sample as it is.
        weights = jax.nn.softplus(net(loss_params["weight"], about) + jnp.log(jnp.e - 1.0))
        residual = weights[:, None] * (jax.nn.softmax(logits) - labels)
        bias = jnp.mean(residual, axis=0, keepdims=True)
        centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
        spread = jnp.log(2.0 * jnp.sqrt(jnp.mean(jnp.var(centred, axis=0))) + 1e-3)
        batch = jnp.stack([level, progress, spread, jnp.log(jnp.max(jnp.abs(bias)) + 1e-2)])
        gain = jnp.exp(net(loss_params["rest"], batch) + loss_params["log_gain"]) / jnp.sqrt(mean_loss)
        bias_gain = gain * jnp.exp(net(loss_params["bias"], batch) + loss_params["log_bias_gain"])
        return gain * (residual - bias) + bias_gain * bias

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        samples, _, _ = _check_features(features, "N, C, F", 3)
        # Cuts d(g)/d(logits), see above: g is the gradient at the logits itself.
        gains = coefficients(loss_params, jax.lax.stop_gradient(features))
        return jnp.sum(gains * features[..., 0]) / samples

    return LearnedLoss(init, apply, _spec("gained_cross_entropy", hidden=list(hidden)), layout="classes")


def per_class(loss: LearnedLoss) -> LearnedLoss:
    """One loss shared by all classes: applied to each class's features, summed over classes, averaged over samples.

    Args:
      loss: a LearnedLoss over [N, F] that has a per_example form.

    Returns:
      A LearnedLoss over features [N, C, F] that works for any number of classes C.

    Raises:
      ValueError: `loss` has no per_example form.
    """
    if loss.per_example is None:
        raise ValueError("per_class: expected a learned loss with a per_example form, got one without; give it per_example=")
    inner = loss.per_example

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        return loss.init(key, _num_features(features, "N, C, F"))

    def per_example(loss_params: LossParams, features: jax.Array) -> jax.Array:
        samples, classes, width = _check_features(features, "N, C, F", None)
        return inner(loss_params, features.reshape(samples * classes, width)).reshape(samples, classes).sum(axis=1)

    spec = None if loss.spec is None else _spec("per_class", loss=dict(loss.spec))
    return _mean_of(per_example, init, spec, layout="classes")


def _mean_of(
    per_example: Callable[[LossParams, PyTree], jax.Array],
    init: Callable[[jax.Array, Any], LossParams],
    spec: Mapping[str, Any] | None,
    layout: str = "columns",
) -> LearnedLoss:
    def apply(loss_params: LossParams, features: PyTree) -> jax.Array:
        return jnp.mean(per_example(loss_params, features))

    return LearnedLoss(init, apply, spec, per_example, layout)


def _check_widths(hidden: Sequence[int]) -> None:
    if any(not isinstance(width, (int, np.integer)) or isinstance(width, bool) or width < 1 for width in hidden):
        raise ValueError(f"hidden: expected widths of at least 1, got {tuple(hidden)}")


def _spec(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


REGISTRY: dict[str, Callable[..., LearnedLoss]] = {
    "gained_cross_entropy": gained_cross_entropy,
    "mlp": mlp,
    "per_class": per_class,
    "split_error": split_error,
    "weighted_squared_error": weighted_squared_error,
}


def from_spec(spec: Mapping[str, Any]) -> LearnedLoss:
    """Builds the learned loss that a spec describes.

    Args:
      spec: {"name": registered name, "arguments": its arguments as JSON has them}, as `LearnedLoss.spec`.

    Raises:
      ValueError: the spec is not one of a registered loss.
    """
    name = spec.get("name")
    if name not in REGISTRY:
        raise ValueError(f"learned loss: expected one of {', '.join(sorted(REGISTRY))}, got {name!r}")
    arguments = dict(spec.get("arguments", {}))
    if isinstance(arguments.get("loss"), Mapping):  # a loss built on another one
        arguments["loss"] = from_spec(arguments["loss"])
    try:
        return REGISTRY[name](**arguments)
    except TypeError as error:
        raise ValueError(f"learned loss {name}: its arguments are not those that it takes: {error}") from error


def as_loss_fn(learned_loss: LearnedLoss, loss_params: LossParams) -> Callable[..., jax.Array]:
    """Turns a meta-trained loss into a loss function like optax's: f(predictions, targets, *inputs) -> per-example loss.

    Args:
      learned_loss: a loss over [N, F] or [N, C, F].
      loss_params: its parameters.

    Returns:
      f(predictions, targets, *inputs): for "columns" losses, predictions and targets are [..., P] (or both [...], one
      number an example) and each of inputs broadcasts to [..., I]; they are concatenated in this order, which must be the
      order of the features in meta-training. For "classes" losses all are [..., C]. Returns [...], the loss of each
      example. Where the loss has no per_example form (it looks at the batch as a whole), every example gets the batch's
      scalar, so that the mean is what meta-training descended.

    Raises:
      ValueError: predictions and targets differ in shape.
    """

    def loss_fn(predictions: jax.Array, targets: jax.Array, *inputs: jax.Array) -> jax.Array:
        predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions and targets must have one shape, got {predictions.shape} and {targets.shape}: "
                "add the missing axis (targets[:, None]) or one-hot encode labels"
            )
        if learned_loss.layout == "columns" and predictions.ndim <= 1:
            predictions, targets = predictions[..., None], targets[..., None]
            inputs = tuple(jnp.asarray(x)[:, None] if jnp.ndim(x) == 1 else jnp.asarray(x) for x in inputs)
        batch = predictions.shape[:-1]
        columns = [
            predictions,
            targets,
            *(_broadcast(x, batch, learned_loss.layout, predictions.shape[-1]) for x in inputs),
        ]
        if learned_loss.layout == "classes":
            features = jnp.stack(columns, axis=-1).reshape(math.prod(batch), predictions.shape[-1], len(columns))
        else:
            features = jnp.concatenate(columns, axis=-1).reshape(math.prod(batch), -1)
        if learned_loss.per_example is None:
            return jnp.broadcast_to(learned_loss.apply(loss_params, features), batch)
        return learned_loss.per_example(loss_params, features).reshape(batch)

    return loss_fn


def _broadcast(value: jax.Array, batch: tuple[int, ...], layout: str, classes: int) -> jax.Array:
    value = jnp.asarray(value)
    width = classes if layout == "classes" else (value.shape[-1] if value.ndim else 1)
    return jnp.broadcast_to(value, (*batch, width))
