"""Inverse dynamics: a model of an arm learns the torque of a motion from one pass over a stream of measurements.

`make_problem` builds the Problem; a task is a load. `collect` gives the stream's mini-batches in time order, `observe` shows
predicted and measured torque, and the task loss may use the true inertia matrix (Bechtle et al. 2020, section IV-D). The
optimizees are `inertia_network` and `torque_network`. n is the number of joints.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ml3_jax import aliases, networks
from ml3_jax.arguments import check_count, check_feature_names
from ml3_jax.types import Context, Params, Problem

FEATURES = ("state", "updates", "measured", "predicted")
SOON = 10.0  # updates; the feature k / (k + SOON) changes most up to here
FLOOR = 1e-3  # least eigenvalue of the predicted inertia matrix, in units of the scale


class Measured(struct.PyTreeNode):
    """T samples of a motion and its torque."""

    q: jax.Array  # [T, n] rad
    v: jax.Array  # [T, n] rad/s
    a: jax.Array  # [T, n] rad/s^2
    torque: jax.Array  # [T, n] N m
    bias: jax.Array  # [T, n] N m, the known forces h(q, v) at the measured state


class Runs(struct.PyTreeNode):
    """The data of a load. With a leading axis [E], a library of recorded runs; sample_task draws one of its rows."""

    stream: Measured  # [T, n] the robot's measurements while it learns
    test: Measured  # [H, n] of other motions, without noise
    extra: jax.Array  # [H, n, n] kg m^2, the true inertia matrices at test.q
    about: Any = None  # a description of the load for reports; no function of the problem reads it


class DynamicsTask(struct.PyTreeNode):
    """One load: the stream to learn from, the test motions, and this inner step's mini-batch."""

    stream: Measured  # [T, n]
    test: Measured  # [H, n]; task_loss and evaluate alone read it
    extra: jax.Array  # [H, n, n] kg m^2, the true inertia matrices at test.q; task_loss and evaluate alone read them
    about: Any = None  # a description of the load for reports; no function of the problem reads it
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
    """A network of the posture gives the inertia matrix, symmetric and positive definite for all parameters.

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
    """A network of the state and acceleration gives the torque beyond the known bias forces, without a form from physics.

    torque = h + scales.torque net(sin q, cos q, v, a). Its inertia matrix is the exact Jacobian d torque / d a, in general not
    symmetric or positive.

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
    """The typical sizes in a library of runs, over the test motions of all loads: each field [n].

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

    In kg m^2, the entries of the first joints dominate: they are 100 times those of the last joints. By joint, entry ij is in
    units of sqrt(scales.inertia_i scales.inertia_j).

    Args:
      predicted: [n, n] kg m^2.
      true: [n, n] kg m^2.
      scales: the arm's.
    """
    error, unit = predicted - true, jnp.sqrt(scales.inertia[:, None] * scales.inertia[None])
    return jnp.sum(error**2) / jnp.sum(scales.inertia**2), jnp.sum((error / unit) ** 2) / unit.shape[0]


def torque_errors(predicted: jax.Array, measured: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors of the torque over its typical mean square: (in N m, by joint), scalars.

    As in `inertia_errors`, the joints near the base dominate in N m. By joint, each is in units of its own scales.torque.

    Args:
      predicted: [T, n] N m.
      measured: [T, n] N m.
      scales: the arm's.
    """
    squares = (predicted - measured) ** 2
    return jnp.mean(squares) / jnp.mean(scales.torque**2), jnp.mean(squares / scales.torque[None] ** 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskLoss:
    """The loss that meta-training minimises.

    Attributes:
      extra: True: the error of the inertia matrix against the true one at postures of the test motions (`inertia_errors`).
        False: the squared error of the torque at measured samples of the stream (`torque_errors`).
      by_joint: the weight of the second of both errors, with equal weight of the joints, in [0, 1]. The rest is of the first
        error, in kg m^2 or N m, where the joints near the base dominate.
      outer_samples: samples of one task loss, drawn with replacement.
    """

    extra: bool = True
    by_joint: float = 0.1
    outer_samples: int = 32


@aliases.accept_old_keywords("inverse_dynamics.make_problem", task_loss=TaskLoss)
def make_problem(
    optimizee: Optimizee,
    scales: Scales,
    *,
    inner_steps: int,
    batch_size: int,
    task_loss: TaskLoss = TaskLoss(),
    features: Sequence[str] = FEATURES,
    plain_scaled: bool = True,
    joint_names: Sequence[str] = (),
) -> Problem:
    """The problem of learning an arm's inverse dynamics with a new load from one pass over a stream.

    Args:
      optimizee: the model that learns.
      scales: typical sizes, the units of features, losses and the inertia error.
      inner_steps: of one inner loop; they use up the stream.
      batch_size: N, samples of an inner step, the next ones in time.
      task_loss: the loss that meta-training minimises.
      features: columns that the learned loss sees of each sample, some of `FEATURES`, in this order: "state" (sin q, cos q, v
        and a in units of scales), "updates" (k / (k + SOON) and k / inner_steps after k of them), "measured" and "predicted"
        (torque beyond the bias forces, in units of scales.torque). The gradient goes through "predicted" alone.
      plain_scaled: True: the plain loss has torque in units of scales.torque. False: in N m.
      joint_names: [n], for the metrics of single joints; (): none.

    Returns:
      A Problem with a library of `Runs` [E, ...] as its context. observe is [N, F]; plain_loss is the mean squared error of the
      mini-batch's torque. evaluate, on the test motions: "torque_rmse" in N m over all joints, "inertia" and "inertia_by_joint"
      (the roots of both `inertia_errors` over those of the true matrix, all averaged over postures) and for each joint
      "torque_rmse_JOINT" in N m.

    Raises:
      ValueError: a size below 1, a share outside [0, 1], no feature or an unknown one; from its functions, tasks of the wrong
        shape or a stream of another length than the mini-batches of one inner loop.
    """
    for name, size in (("inner_steps", inner_steps), ("batch_size", batch_size), ("outer_samples", task_loss.outer_samples)):
        check_count(name, size)
    if not 0.0 <= task_loss.by_joint <= 1.0:
        raise ValueError(f"by_joint: expected a share in [0, 1], got {task_loss.by_joint}")
    check_feature_names(features, FEATURES)
    joints = scales.torque.shape[0]
    if joint_names and len(joint_names) != joints:
        raise ValueError(f"joint_names: expected {joints} names or none, got {tuple(joint_names)}")
    parts = _InverseDynamics(
        optimizee, scales, inner_steps, batch_size, task_loss, tuple(features), plain_scaled, tuple(joint_names)
    )
    return Problem(
        sample_task=parts.sample_task,
        init=parts.init,
        observe=parts.observe,
        task_loss=parts.outer_loss,
        evaluate=parts.evaluate,
        plain_loss=parts.plain_loss,
        collect=parts.collect,
        samples_per_step=batch_size,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _InverseDynamics:
    """The functions of the Problem; fields: the arguments of `make_problem`."""

    optimizee: Optimizee
    scales: Scales
    inner_steps: int
    batch_size: int
    loss: TaskLoss
    features: tuple[str, ...]
    plain_scaled: bool
    joint_names: tuple[str, ...]

    def sample_task(self, key: jax.Array, context: Context) -> DynamicsTask:
        if not isinstance(context, Runs):
            raise ValueError(f"context: expected a library of Runs to draw a task from, got {type(context).__name__}")
        row = jax.random.randint(key, (), 0, context.extra.shape[0])
        return task_of(jax.tree.map(lambda leaf: leaf[row], context))

    def init(self, key: jax.Array, task: DynamicsTask) -> Params:
        self.check(task)
        return self.optimizee.init(key)

    def collect(self, params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> DynamicsTask:
        del params, context, key
        self.check(task)

        def next_samples(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf, step * self.batch_size, self.batch_size)

        return task.replace(batch=jax.tree.map(next_samples, task.stream))

    def observe(self, params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key
        batch, scales = _collected(task), self.scales
        progress = jnp.stack([step / (step + SOON), step / self.inner_steps])
        made = {
            "state": jnp.concatenate(
                [jnp.sin(batch.q), jnp.cos(batch.q), batch.v / scales.v[None], batch.a / scales.a[None]], axis=-1
            ),
            "updates": jnp.tile(progress, (self.batch_size, 1)),
            "measured": (batch.torque - batch.bias) / scales.torque[None],
            "predicted": (self.predicted(params, batch) - batch.bias) / scales.torque[None],
        }
        return jnp.concatenate([made[name] for name in self.features], axis=-1)

    def plain_loss(self, params: Params, task: DynamicsTask, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        del context, key, step
        batch = _collected(task)
        if self.plain_scaled:
            return self.errors_of_torque(params, batch)[1]
        return jnp.mean((self.predicted(params, batch) - batch.torque) ** 2)

    def outer_loss(self, params: Params, task: DynamicsTask, context: Context, key: jax.Array) -> jax.Array:
        del context
        extra, by_joint = self.loss.extra, self.loss.by_joint
        samples = task.test if extra else task.stream
        # With replacement: drawing without it would sort the stream at every inner step.
        rows = jax.random.randint(key, (self.loss.outer_samples,), 0, samples.q.shape[0])
        samples = jax.tree.map(lambda leaf: leaf[rows], samples)
        if extra:
            matrices = _at_samples(self.optimizee.inertia)(params, samples)
            errors = jax.vmap(inertia_errors, in_axes=(0, 0, None))(matrices, task.extra[rows], self.scales)
        else:
            errors = self.errors_of_torque(params, samples)
        in_units, alike = (jnp.mean(error) for error in errors)
        return (1.0 - by_joint) * in_units + by_joint * alike

    def evaluate(self, params: Params, task: DynamicsTask, context: Context, key: jax.Array) -> dict[str, jax.Array]:
        del context, key
        matrices = _at_samples(self.optimizee.inertia)(params, task.test)
        return _report(self.predicted(params, task.test), matrices, task, self.scales, self.joint_names)

    def predicted(self, params: Params, samples: Measured) -> jax.Array:
        """Torques [T, n] in N m."""
        return _at_samples(self.optimizee.torque)(params, samples)

    def errors_of_torque(self, params: Params, samples: Measured) -> tuple[jax.Array, jax.Array]:
        """Both `torque_errors`."""
        return torque_errors(self.predicted(params, samples), samples.torque, self.scales)

    def check(self, task: DynamicsTask) -> None:
        _check_task(task, self.scales.torque.shape[0], self.inner_steps * self.batch_size)


def _collected(task: DynamicsTask) -> Measured:
    if task.batch is None:
        raise ValueError("task: expected a mini-batch, got none: call collect before observe and plain_loss")
    return task.batch


def _at_samples(of_one: Callable[..., jax.Array]) -> Callable[[Params, Measured], jax.Array]:
    """Maps a function (params, q, v, a, bias) of one sample over T samples: (params, samples) -> [T, ...]."""
    of_all = jax.vmap(of_one, in_axes=(None, 0, 0, 0, 0))
    return lambda params, samples: of_all(params, samples.q, samples.v, samples.a, samples.bias)


def _report(
    torques: jax.Array, matrices: jax.Array, task: DynamicsTask, scales: Scales, joint_names: Sequence[str]
) -> dict[str, jax.Array]:
    """The metrics of predicted torques [H, n] and inertia matrices [H, n, n] at the task's test motions."""
    squares = (torques - task.test.torque) ** 2
    errors = jax.vmap(inertia_errors, in_axes=(0, 0, None))
    wrong, total = errors(matrices, task.extra, scales), errors(jnp.zeros_like(matrices), task.extra, scales)
    inertia, by_joint = (jnp.sqrt(jnp.mean(w) / jnp.mean(t)) for w, t in zip(wrong, total, strict=True))
    of_joints = zip(joint_names, jnp.sqrt(jnp.mean(squares, axis=0)), strict=True) if joint_names else ()
    return {
        "torque_rmse": jnp.sqrt(jnp.mean(squares)),
        "inertia": inertia,
        "inertia_by_joint": by_joint,
        **{f"torque_rmse_{name}": value for name, value in of_joints},
    }


def task_of(runs: Runs) -> DynamicsTask:
    """The task of one load's runs; a leading axis stays."""
    return DynamicsTask(runs.stream, runs.test, runs.extra, runs.about)


def _check_task(task: DynamicsTask, joints: int, samples: int) -> None:
    """Raises ValueError unless the task's arrays fit each other, the arm and the inner loop."""
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
            f"task.stream: expected {samples} samples, the mini-batches of one inner loop, got {have}: choose inner_steps and "
            "batch_size with the stream's length as their product"
        )
