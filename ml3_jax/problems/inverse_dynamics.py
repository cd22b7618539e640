"""Inverse dynamics: a model of an arm learns, from one pass over a stream of measurements, which torque gives which motion.

`make_problem` builds the Problem for one task, a load: `collect` hands out the stream's mini-batches in time order, `observe`
shows predicted and measured torque, and the task loss may know the true inertia matrix (Bechtle et al. 2020, section IV-D).
The optimizees are `inertia_network` and `torque_network`; n joints throughout.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax import networks
from ml3_jax.types import Context, Params, Problem

FEATURES = ("state", "updates", "measured", "predicted")
SOON = 10.0  # updates; what the learned loss sees of their number changes most up to here
FLOOR = 1e-3  # least eigenvalue of the predicted inertia matrix, in units of the scale


class Measured(struct.PyTreeNode):
    """T samples of a motion, and of what it took."""

    q: jax.Array  # [T, n] rad
    v: jax.Array  # [T, n] rad/s
    a: jax.Array  # [T, n] rad/s^2
    torque: jax.Array  # [T, n] N m
    bias: jax.Array  # [T, n] N m, the known forces h(q, v) at the measured state


class Runs(struct.PyTreeNode):
    """What is known of a load; with a leading axis [E], a library of recorded runs, from which sample_task draws a row."""

    stream: Measured  # [T, n] what the robot measures while it learns
    test: Measured  # [H, n] of other motions, without noise
    extra: jax.Array  # [H, n, n] kg m^2, the true inertia matrices at test.q
    about: Any = None  # what a report says of the load; no function of the problem reads it


class DynamicsTask(struct.PyTreeNode):
    """One load: the stream to learn from, the motions it is judged by, and this inner step's mini-batch."""

    stream: Measured  # [T, n]
    test: Measured  # [H, n]; task_loss and evaluate alone read it
    extra: jax.Array  # [H, n, n] kg m^2, the true inertia matrices at test.q; task_loss and evaluate alone read them
    about: Any = None  # what a report says of the load; no function of the problem reads it
    batch: Measured | None = None  # [N, n]


class Scales(NamedTuple):
    """Typical sizes (root mean squares) by joint, constants of an experiment: each [n]."""

    v: jax.Array  # rad/s
    a: jax.Array  # rad/s^2
    torque: jax.Array  # N m, of the torque beyond the known bias forces
    inertia: jax.Array  # kg m^2, of the inertia matrix's diagonal (its mean)


class Optimizee(NamedTuple):
    """A model of an arm; functions of one sample.

    Attributes:
      init: (key) -> params.
      torque: (params, q [n], v [n], a [n], bias [n]) -> torque [n] in N m.
      inertia: (params, q [n], v [n], a [n], bias [n]) -> inertia matrix [n, n] in kg m^2.
    """

    init: Callable[[jax.Array], Params]
    torque: Callable[..., jax.Array]
    inertia: Callable[..., jax.Array]


def inertia_network(scales: Scales, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> Optimizee:
    """A network of the posture gives the inertia matrix, symmetric and positive definite whatever its parameters are.

    M = D (L L^T + FLOOR I) D with D = diag(sqrt(scales.inertia)) and L lower triangular; a network of sin q and cos q gives
    L - I. The torque is M(q) a + h with the known bias forces h.

    Args:
      scales: the arm's.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
    """
    joints = scales.inertia.shape[0]
    rows, columns = jnp.tril_indices(joints)
    network = networks.MLP((*hidden, rows.size), activation, init_scheme="fan_in")
    root = jnp.sqrt(scales.inertia)

    def init(key: jax.Array) -> Params:
        return network.init(key, jnp.zeros(2 * joints))

    def inertia(params: Params, q: jax.Array, v: jax.Array, a: jax.Array, bias: jax.Array) -> jax.Array:
        del v, a, bias
        entries = jnp.asarray(network.apply(params, jnp.concatenate([jnp.sin(q), jnp.cos(q)])))
        factor = jnp.eye(joints).at[rows, columns].add(entries)
        return root[:, None] * (factor @ factor.T + FLOOR * jnp.eye(joints)) * root[None]

    def torque(params: Params, q: jax.Array, v: jax.Array, a: jax.Array, bias: jax.Array) -> jax.Array:
        return inertia(params, q, v, a, bias) @ a + bias

    return Optimizee(init, torque, inertia)


def torque_network(scales: Scales, hidden: Sequence[int] = (64, 64), activation: str = "tanh") -> Optimizee:
    """A network of the whole state gives the torque beyond the known bias forces, without any form that physics asks for.

    torque = h + scales.torque net(sin q, cos q, v, a); its inertia matrix is the Jacobian d torque / d a, exact, which nothing
    makes symmetric or positive.

    Args:
      scales: the arm's.
      hidden: widths of the hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
    """
    joints = scales.torque.shape[0]
    network = networks.MLP((*hidden, joints), activation, init_scheme="fan_in")

    def init(key: jax.Array) -> Params:
        return network.init(key, jnp.zeros(4 * joints))

    def torque(params: Params, q: jax.Array, v: jax.Array, a: jax.Array, bias: jax.Array) -> jax.Array:
        state = jnp.concatenate([jnp.sin(q), jnp.cos(q), v / scales.v, a / scales.a])
        return bias + scales.torque * jnp.asarray(network.apply(params, state))

    return Optimizee(init, torque, jax.jacfwd(torque, argnums=3))


def scales_of(runs: Runs) -> Scales:
    """The typical sizes in a library of runs, over its loads' motions without noise: each field [n].

    Args:
      runs: each leaf [E, ...].
    """
    test = runs.test

    def size(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(x**2, axis=(0, 1)))

    diagonal = jnp.mean(jnp.diagonal(runs.extra, axis1=2, axis2=3), axis=(0, 1))
    return Scales(size(test.v), size(test.a), size(test.torque - test.bias), diagonal)


def inertia_errors(predicted: jax.Array, true: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """Squared errors of inertia matrices over the squares of the typical diagonal: (in kg m^2, by joint), scalars.

    In kg m^2 the first joints' entries, 100 times the last ones', are all that counts, as in the torque's error in N m. By
    joint, entry ij is in units of sqrt(scales.inertia_i scales.inertia_j).

    Args:
      predicted, true: [n, n] kg m^2.
      scales: the arm's.
    """
    error, unit = predicted - true, jnp.sqrt(scales.inertia[:, None] * scales.inertia[None])
    return jnp.sum(error**2) / jnp.sum(scales.inertia**2), jnp.sum((error / unit) ** 2) / unit.shape[0]


def torque_errors(predicted: jax.Array, measured: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors of the torque over its typical mean square: (in N m, by joint), scalars.

    As with `inertia_errors`, the joints near the base are all that counts in N m; by joint, each is in units of its own
    scales.torque.

    Args:
      predicted, measured: [T, n] N m.
      scales: the arm's.
    """
    squares = (predicted - measured) ** 2
    return jnp.mean(squares) / jnp.mean(scales.torque**2), jnp.mean(squares / scales.torque[None] ** 2)


def make_problem(
    optimizee: Optimizee,
    scales: Scales,
    *,
    steps: int,
    batch_size: int,
    extra: bool = True,
    by_joint: float = 0.1,
    features: Sequence[str] = FEATURES,
    plain_scaled: bool = True,
    outer_samples: int = 32,
    joint_names: Sequence[str] = (),
) -> Problem:
    """The problem of learning an arm's inverse dynamics with a new load from one pass over a stream.

    Args:
      optimizee: the model that learns.
      scales: typical sizes, by which features, losses and the inertia error are scaled.
      steps: inner steps of a life; the pass is over after them, and no later step has data.
      batch_size: N, samples of an inner step, the next ones in time.
      extra: whether the task loss is the error of the inertia matrix against the true one at postures of other motions
        (`inertia_errors`); if not, it is the squared error of the torque at samples of the whole stream, as measured
        (`torque_errors`).
      by_joint: the share of the second of both errors in the task loss, where each joint counts alike, in [0, 1]; the rest is
        of the first, in kg m^2 or N m, where the joints near the base count.
      features: what the learned loss sees of each sample, some of `FEATURES`, in this order: "state" (sin q, cos q, v and a
        in units of scales), "updates" (k / (k + SOON) and k / steps after k of them), "measured" and "predicted" (torque
        beyond the bias forces, in units of scales.torque). The gradient goes through "predicted" alone.
      plain_scaled: whether the plain loss counts torque in units of scales.torque; if not, in N m.
      outer_samples: samples at which one task loss is taken, drawn anew, with replacement.
      joint_names: [n], for the metrics of single joints; (): none.

    Returns:
      A Problem whose context is a library of `Runs` [E, ...]. observe is [N, F]; plain_loss is the mean squared error of the
      mini-batch's torque. evaluate, on motions that are not in the stream: "torque_rmse" in N m over all joints, "inertia" and
      "inertia_by_joint" (the roots of both `inertia_errors` over those of the true matrix, all averaged over postures) and for
      each joint "torque_rmse_JOINT" in N m.

    Raises:
      ValueError: a size below 1, a share outside [0, 1], no feature or an unknown one; from its functions, tasks of the wrong
        shape or a stream that the mini-batches of a life do not fit in.
    """
    for name, size in (("steps", steps), ("batch_size", batch_size), ("outer_samples", outer_samples)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 0.0 <= by_joint <= 1.0:
        raise ValueError(f"by_joint: expected a share in [0, 1], got {by_joint}")
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise ValueError(f"features: expected some of {', '.join(FEATURES)}, got {tuple(features)}")
    joints = scales.torque.shape[0]
    if joint_names and len(joint_names) != joints:
        raise ValueError(f"joint_names: expected {joints} names or none, got {tuple(joint_names)}")

    predicted = _at_samples(optimizee.torque)
    predicted_inertia = _at_samples(optimizee.inertia)

    def torque_error(params: Params, samples: Measured) -> tuple[jax.Array, jax.Array]:
        """Both `torque_errors`."""
        return torque_errors(predicted(params, samples), samples.torque, scales)

    def sample_task(key: jax.Array, context: Context) -> DynamicsTask:
        if not isinstance(context, Runs):
            raise ValueError(f"context: expected a library of Runs to draw a task from, got {type(context).__name__}")
        row = jax.random.randint(key, (), 0, context.extra.shape[0])
        return task_of(jax.tree.map(lambda leaf: leaf[row], context))

    def init(key: jax.Array, task: DynamicsTask) -> Params:
        _check_task(task, joints, steps * batch_size)
        return optimizee.init(key)

    def collect(params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> DynamicsTask:
        del params, context, key
        _check_task(task, joints, steps * batch_size)

        def next_samples(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf, step * batch_size, batch_size)

        return task.replace(batch=jax.tree.map(next_samples, task.stream))

    def gathered(task: DynamicsTask) -> Measured:
        if task.batch is None:
            raise ValueError("the task holds no mini-batch: collect comes before observe and plain_loss")
        return task.batch

    def observe(params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        batch = gathered(task)
        made = {
            "state": jnp.concatenate(
                [jnp.sin(batch.q), jnp.cos(batch.q), batch.v / scales.v[None], batch.a / scales.a[None]], axis=-1
            ),
            "updates": jnp.tile(jnp.stack([step / (step + SOON), step / steps]), (batch_size, 1)),
            "measured": (batch.torque - batch.bias) / scales.torque[None],
            "predicted": (predicted(params, batch) - batch.bias) / scales.torque[None],
        }
        return jnp.concatenate([made[name] for name in features], axis=-1)

    def plain_loss(params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        batch = gathered(task)
        if plain_scaled:
            return torque_error(params, batch)[1]
        return jnp.mean((predicted(params, batch) - batch.torque) ** 2)

    def task_loss(params: Params, task: DynamicsTask, context: Context, key: jax.Array) -> jax.Array:
        del context
        # With replacement: drawing without would sort the whole stream at every inner step.
        rows = jax.random.randint(key, (outer_samples,), 0, (task.test if extra else task.stream).q.shape[0])
        if extra:
            matrices = predicted_inertia(params, jax.tree.map(lambda leaf: leaf[rows], task.test))
            errors = jax.vmap(inertia_errors, in_axes=(0, 0, None))(matrices, task.extra[rows], scales)
        else:
            errors = torque_error(params, jax.tree.map(lambda leaf: leaf[rows], task.stream))
        in_units, alike = (jnp.mean(error) for error in errors)
        return (1.0 - by_joint) * in_units + by_joint * alike

    def evaluate(params: Params, task: DynamicsTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context, key
        return _report(predicted(params, task.test), predicted_inertia(params, task.test), task, scales, joint_names)

    return Problem(
        sample_task=sample_task,
        init=init,
        observe=observe,
        task_loss=task_loss,
        evaluate=evaluate,
        plain_loss=plain_loss,
        collect=collect,
        samples_per_step=batch_size,
    )


def _at_samples(of_one: Callable[..., jax.Array]) -> Callable[[Params, Measured], jax.Array]:
    """A function (params, q, v, a, bias) of one sample, as one of (params, T samples), with results [T, ...]."""
    of_all = jax.vmap(of_one, in_axes=(None, 0, 0, 0, 0))
    return lambda params, samples: of_all(params, samples.q, samples.v, samples.a, samples.bias)


def _report(
    torques: jax.Array, matrices: jax.Array, task: DynamicsTask, scales: Scales, joint_names: Sequence[str]
) -> dict[str, jax.Array]:
    """The metrics of predicted torques [H, n] and inertia matrices [H, n, n] at the task's test motions."""
    squares = (torques - task.test.torque) ** 2
    errors = jax.vmap(inertia_errors, in_axes=(0, 0, None))
    wrong, whole = errors(matrices, task.extra, scales), errors(jnp.zeros_like(matrices), task.extra, scales)
    inertia, by_joint = (jnp.sqrt(jnp.mean(w) / jnp.mean(t)) for w, t in zip(wrong, whole, strict=True))
    of_joints = zip(joint_names, jnp.sqrt(jnp.mean(squares, axis=0)), strict=True) if joint_names else ()
    return {
        "torque_rmse": jnp.sqrt(jnp.mean(squares)),
        "inertia": inertia,
        "inertia_by_joint": by_joint,
        **{f"torque_rmse_{name}": value for name, value in of_joints},
    }


def task_of(runs: Runs) -> DynamicsTask:
    """The task of one load's runs; with a leading axis, as many tasks."""
    return DynamicsTask(runs.stream, runs.test, runs.extra, runs.about)


def _check_task(task: DynamicsTask, joints: int, samples: int) -> None:
    """Raises ValueError unless the task's arrays fit each other, the arm and a life."""
    held_out = task.test.q.shape[0] if task.test.q.ndim else 0
    for name, measured, count in (("stream", task.stream, None), ("test", task.test, held_out)):
        rows = measured.q.shape[0] if count is None else count
        for leaf in (measured.q, measured.v, measured.a, measured.torque, measured.bias):
            if leaf.shape != (rows, joints):
                raise ValueError(
                    f"task.{name}: expected arrays of shape ({rows}, {joints}), one column a joint, got {leaf.shape}"
                )
    if task.extra.shape != (held_out, joints, joints):
        raise ValueError(f"task.extra: expected inertia matrices ({held_out}, {joints}, {joints}), got {task.extra.shape}")
    have = task.stream.q.shape[0]
    if have != samples:
        raise ValueError(
            f"task.stream: expected {samples} samples, one pass of the mini-batches of a life, got {have}; choose steps and "
            "batch_size whose product is the stream's length"
        )
