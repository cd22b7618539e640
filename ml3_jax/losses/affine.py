"""A learned loss with one weight for the affine part of a batch's errors and one for the rest."""

import jax
import jax.numpy as jnp

from ml3_jax.losses.forms import check_parts, make_spec, num_features
from ml3_jax.types import LearnedLoss, LossParams, PyTree


def affine_split_rmse(fade: bool = True, schedule_degree: int = 0) -> LearnedLoss:
    """The root of two weighted mean squares: of the affine part of the error and of its rest.

    The error r = prediction - target of the batch is split into its least-squares fit by an affine function of the
    inputs and the residual: M = sqrt(w_a mean(fit^2) + w_r mean(rest^2)). The root makes the size of the gradient
    independent of the scale of the targets: a step size for small targets does not diverge on large ones. Gradient
    descent is fast on the affine part, and its curvature limits the step size; w_a < w_r slows it in favour of the rest.
    log w_i = 2 phi_i + s(progress). All of phi starts at zero; M is then the root mean square times the fixed part of s.

    Args:
      fade: whether M falls linearly with the fraction of training done, to almost zero at its end (the fixed part of s).
      schedule_degree: degree of a learned polynomial in the fraction of training, common to both weights; 0: none.

    Returns:
      A LearnedLoss over features [N, F], F >= 4: prediction, target, one or more columns of inputs, and progress, the
      fraction of training done (equal in all rows). It is a function of the full batch, without a per_example form.

    Raises:
      ValueError: a negative degree, or fewer than four features.
    """
    if schedule_degree < 0:
        raise ValueError(f"schedule_degree: expected at least 0, got {schedule_degree}")

    def check(features: int | PyTree) -> None:
        count = num_features(features, "N, F")
        if count < 4:
            raise ValueError(
                f"affine_split_rmse: expected features (prediction, target, input, ..., progress), got {count} columns"
            )

    def init(key: jax.Array, features: int | PyTree) -> LossParams:
        del key  # nothing is drawn: the untrained loss is the same in every run
        check(features)
        return {"log_weight": jnp.zeros(2), **({"schedule": jnp.zeros(schedule_degree)} if schedule_degree else {})}

    def apply(loss_params: LossParams, features: jax.Array) -> jax.Array:
        check(features)
        check_parts(loss_params, "log_weight", *(["schedule"] if schedule_degree else []))
        error, inputs, progress = features[:, 0] - features[:, 1], features[:, 2:-1], features[0, -1]
        fit = _affine_fit(inputs, error)
        time = 2.0 * progress - 1.0
        schedule = sum((loss_params["schedule"][d] * _chebyshev(time, d + 1) for d in range(schedule_degree)), 0.0)
        fixed = 2.0 * jnp.log(jnp.maximum(1.0 - progress, 0.0) + 1e-3) if fade else 0.0
        weights = jnp.exp(jnp.clip(2.0 * (loss_params["log_weight"] + schedule) + fixed, -14.0, 8.0))
        squares = jnp.stack([jnp.mean(fit**2), jnp.mean((error - fit) ** 2)])
        return jnp.sqrt(weights @ squares + 1e-8)

    spec = make_spec("affine_split_rmse", fade=fade, schedule_degree=schedule_degree)
    return LearnedLoss(init, apply, spec, columns=("prediction", "target", "...", "progress"))


def _affine_fit(inputs: jax.Array, error: jax.Array) -> jax.Array:
    """The least-squares fit of error [N] by an affine function of inputs [N, D], at the inputs: [N]."""
    centred = inputs - jnp.mean(inputs, axis=0, keepdims=True)
    # 1e-12 under the root: a constant input has deviation zero, where the root has no derivative.
    standard = centred / jnp.sqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-12)
    basis = jnp.concatenate([jnp.ones_like(inputs[:, :1]), standard], axis=1)
    gram = basis.T @ basis / basis.shape[0]
    # The ridge keeps the matrix regular for constant or equal inputs; otherwise it is below the rounding of float32.
    coefficients = jnp.linalg.solve(gram + 1e-6 * jnp.eye(gram.shape[0]), basis.T @ error / basis.shape[0])
    return basis @ coefficients


def _chebyshev(x: jax.Array, degree: int) -> jax.Array:
    """The Chebyshev polynomial of the first kind at x."""
    before, value = jnp.ones_like(x), x
    for _ in range(degree - 1):
        before, value = value, 2.0 * x * value - before
    return value
