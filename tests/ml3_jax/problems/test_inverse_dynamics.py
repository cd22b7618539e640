"""Inverse dynamics: positive definite by construction, torque in closed form, one pass in time order, hidden data."""

import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax.problems import inverse_dynamics
from tests.ml3_jax import toys

JOINTS, STEPS, BATCH = 2, 3, 4
SCALES, LIBRARY = toys.ARM, toys.ARM_RUNS
STEP = jnp.asarray(1, jnp.int32)
RIGID = inverse_dynamics.inertia_network(SCALES, (6,))
PLAIN = inverse_dynamics.torque_network(SCALES, (6,))
EITHER = pytest.mark.parametrize("optimizee", [RIGID, PLAIN], ids=["inertia_network", "torque_network"])


@functools.cache
def problem(
    optimizee: inverse_dynamics.Optimizee = RIGID, *, extra: bool = True, by_joint: float = 0.1, **options: Any
) -> ml3_jax.Problem:
    sizes = {"inner_steps": STEPS, "batch_size": BATCH, **options}
    task_loss = inverse_dynamics.TaskLoss(extra=extra, by_joint=by_joint, outer_samples=8)
    return inverse_dynamics.make_problem(optimizee, SCALES, task_loss=task_loss, **sizes)


@functools.cache
def drawn(made: ml3_jax.Problem) -> tuple[Any, Any, Any]:
    """An optimizee, a task, and the task with the data of inner step 1."""

    @jax.jit
    def draw(key: jax.Array) -> tuple[Any, Any, Any]:
        task = made.sample_task(key, LIBRARY)
        params = made.init(jax.random.key(1), task)
        assert made.collect is not None
        return params, task, made.collect(params, task, LIBRARY, key, STEP)

    return draw(toys.KEY)


def states_of(samples: inverse_dynamics.Measured) -> list[jax.Array]:
    return [samples.q, samples.v, samples.a, samples.bias]


@functools.cache
def mapped(function: Any) -> Any:
    """A function of one sample as a compiled function of (params, q, v, a, bias) of T samples."""
    return jax.jit(jax.vmap(function, (None, 0, 0, 0, 0)))


def garbled(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tree)


def test_the_inertia_is_symmetric_and_positive_definite_for_all_parameters():
    postures = jax.random.normal(toys.KEY, (50, JOINTS))
    rest, start = jnp.zeros((50, JOINTS)), RIGID.init(jax.random.key(2))
    for size in (0.0, 1.0, 10.0):
        params = jax.tree.map(lambda leaf, size=size: size * leaf, start)
        matrices = np.asarray(mapped(RIGID.inertia)(params, postures, rest, rest, rest), np.float64)
        np.testing.assert_allclose(matrices, matrices.swapaxes(1, 2), rtol=1e-6)
        assert np.linalg.eigvalsh(matrices).min() > 0


def test_the_inertia_of_a_network_of_zeros_is_the_scale():
    params = jax.tree.map(jnp.zeros_like, RIGID.init(toys.KEY))
    rest = jnp.zeros(JOINTS)
    matrix = RIGID.inertia(params, rest, rest, rest, rest)
    # D (I I^T + FLOOR I) D with D^2 = diag(4, 0.25).
    np.testing.assert_allclose(matrix, (1 + inverse_dynamics.FLOOR) * np.diag([4.0, 0.25]), rtol=1e-5)
    torque = RIGID.torque(params, rest, rest, jnp.array([2.0, -4.0]), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(torque, (1 + inverse_dynamics.FLOOR) * np.array([8.0, -1.0]) + 1.0, rtol=1e-5, atol=1e-6)


@EITHER
def test_the_inertia_is_the_torque_of_a_unit_acceleration(optimizee: inverse_dynamics.Optimizee):
    params = optimizee.init(jax.random.key(3))
    q, v, a, bias = jax.random.normal(toys.KEY, (4, JOINTS))
    jacobian = jax.jit(jax.jacrev(optimizee.torque, argnums=3))(params, q, v, a, bias)
    np.testing.assert_allclose(jax.jit(optimizee.inertia)(params, q, v, a, bias), jacobian, rtol=1e-5, atol=1e-6)


def test_known_forces_add_to_the_torque_unchanged():
    q, v, a, bias = jax.random.normal(toys.KEY, (4, JOINTS))
    for optimizee in (RIGID, PLAIN):
        params = optimizee.init(jax.random.key(3))
        difference = optimizee.torque(params, q, v, a, bias + 2.0) - optimizee.torque(params, q, v, a, bias)
        np.testing.assert_allclose(difference, 2.0, rtol=1e-5)


def test_mini_batches_are_the_stream_in_time_order_each_sample_once():
    made = problem()
    params, task, _ = drawn(made)
    assert made.collect is not None
    collect = jax.jit(made.collect)
    batches = [collect(params, task, LIBRARY, toys.KEY, jnp.asarray(k)).batch for k in range(STEPS)]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    toys.assert_same(together, task.stream)
    assert made.samples_per_step == BATCH


def test_a_task_is_a_row_of_the_library():
    tasks = jax.jit(jax.vmap(problem().sample_task, (0, None)))(jax.random.split(toys.KEY, 20), LIBRARY)
    rows = [int(np.argmax(np.all(x == np.asarray(LIBRARY.extra), axis=(1, 2, 3)))) for x in np.asarray(tasks.extra)]
    toys.assert_same(tasks, inverse_dynamics.task_of(jax.tree.map(lambda leaf: leaf[np.asarray(rows)], LIBRARY)))
    assert set(rows) == {0, 1, 2}


@EITHER
def test_features_are_state_updates_measured_and_predicted(optimizee: inverse_dynamics.Optimizee):
    made = problem(optimizee)
    params, _, data = drawn(made)
    features = np.asarray(jax.jit(made.observe)(params, data, LIBRARY, toys.KEY, STEP))
    batch = data.batch
    unit = np.asarray(SCALES.torque)
    assert features.shape == (BATCH, 4 * JOINTS + 2 + 2 * JOINTS)
    np.testing.assert_allclose(features[:, :2], np.sin(batch.q), rtol=1e-6)
    np.testing.assert_allclose(features[:, 4:6], np.asarray(batch.v) / np.asarray(SCALES.v), rtol=1e-6)
    np.testing.assert_allclose(features[:, 8:10], np.tile([1 / (1 + inverse_dynamics.SOON), 1 / STEPS], (BATCH, 1)), rtol=1e-6)
    np.testing.assert_allclose(features[:, 10:12], np.asarray(batch.torque - batch.bias) / unit, rtol=1e-5)
    predicted = mapped(optimizee.torque)(params, *states_of(batch))
    np.testing.assert_allclose(features[:, 12:], np.asarray(predicted - batch.bias) / unit, rtol=1e-5, atol=1e-6)


def test_the_plain_loss_is_the_mean_squared_error_in_either_unit():
    for scaled, unit in ((True, np.asarray(SCALES.torque)), (False, 1.0)):
        made = problem(plain_scaled=scaled)
        params, _, data = drawn(made)
        assert made.plain_loss is not None
        predicted = mapped(RIGID.torque)(params, *states_of(data.batch))
        expected = np.mean(((np.asarray(predicted) - np.asarray(data.batch.torque)) / unit) ** 2)
        np.testing.assert_allclose(jax.jit(made.plain_loss)(params, data, LIBRARY, toys.KEY, STEP), expected, rtol=1e-5)


@pytest.mark.parametrize("extra", [True, False])
def test_the_true_inertia_and_the_test_motions_reach_the_task_loss_alone(extra: bool):
    made = problem(extra=extra)
    params, task, _ = drawn(made)

    @jax.jit
    def look(task: inverse_dynamics.DynamicsTask) -> tuple[Any, jax.Array]:
        assert made.collect is not None
        assert made.plain_loss is not None
        data = made.collect(params, task, LIBRARY, toys.KEY, STEP)
        args = (params, data, LIBRARY, toys.KEY, STEP)
        blind = (made.init(toys.KEY, task), data.batch, made.observe(*args), made.plain_loss(*args))
        return blind, made.task_loss(params, task, LIBRARY, toys.KEY)

    seen, loss = look(task.replace(about=0.0))
    unseen, spoilt = look(task.replace(test=garbled(task.test), extra=garbled(task.extra), about=jnp.nan))
    toys.assert_same(seen, unseen)
    assert np.isfinite(loss)
    assert bool(jnp.isnan(spoilt)) == extra  # without extra, the task loss sees the stream alone


def test_the_task_loss_weighs_errors_in_units_and_by_joint():
    shares = np.asarray([0.0, 0.1, 1.0])
    params, task, _ = drawn(problem())
    right = mapped(RIGID.inertia)(params, *states_of(task.test))
    torque = mapped(RIGID.torque)(params, *states_of(task.stream))
    # Inertia matrices are wrong by diag(2, 0.5) kg m^2, and torques by 3 and 4 N m at every sample of the stream.
    wrong = task.replace(
        extra=right + jnp.array([[[2.0, 0.0], [0.0, 0.5]]]),
        stream=task.stream.replace(torque=torque + jnp.array([[3.0, 4.0]])),
    )

    @jax.jit
    def losses(task: inverse_dynamics.DynamicsTask) -> list[list[jax.Array]]:
        problems = [[problem(extra=extra, by_joint=share) for share in shares.tolist()] for extra in (True, False)]
        return [[made.task_loss(params, task, LIBRARY, toys.KEY) for made in row] for row in problems]

    of_inertia, of_torque = losses(wrong)
    # kg m^2: (2^2 + 0.5^2) / (4^2 + 0.25^2); by joint: ((2 / 4)^2 + (0.5 / 0.25)^2) / 2.
    np.testing.assert_allclose(of_inertia, (1 - shares) * 4.25 / 16.0625 + shares * 4.25 / 2, rtol=1e-4)
    first, second = np.asarray(SCALES.torque)
    expected = (1 - shares) * 25 / (first**2 + second**2) + shares * ((3 / first) ** 2 + (4 / second) ** 2) / 2
    np.testing.assert_allclose(of_torque, expected, rtol=1e-4)


def test_evaluations_are_zero_for_the_truth_and_relative_errors_otherwise():
    made = problem(joint_names=("shoulder", "elbow"))
    params, task, _ = drawn(made)
    test = task.test
    true = task.replace(
        test=test.replace(torque=mapped(RIGID.torque)(params, *states_of(test))),
        extra=mapped(RIGID.inertia)(params, *states_of(test)),
    )
    evaluate = jax.jit(made.evaluate)
    report = evaluate(params, true, LIBRARY, toys.KEY)
    assert set(report) == {"torque_rmse", "inertia", "inertia_by_joint", "torque_rmse_shoulder", "torque_rmse_elbow"}
    assert all(float(value) < 1e-5 for value in report.values())
    assert jax.jit(made.task_loss)(params, true, LIBRARY, toys.KEY) < 1e-10
    off = true.replace(test=true.test.replace(torque=true.test.torque + jnp.array([[3.0, 4.0]])), extra=2 * true.extra)
    report = evaluate(params, off, LIBRARY, toys.KEY)
    np.testing.assert_allclose(report["torque_rmse_shoulder"], 3.0, rtol=1e-5)
    np.testing.assert_allclose(report["torque_rmse_elbow"], 4.0, rtol=1e-5)
    np.testing.assert_allclose(report["torque_rmse"], np.sqrt((9 + 16) / 2), rtol=1e-5)
    for name in ("inertia", "inertia_by_joint"):
        np.testing.assert_allclose(report[name], 0.5, rtol=1e-5)  # |M - 2 M| / |2 M|


@pytest.mark.parametrize(("optimizee", "extra"), [(RIGID, True), (PLAIN, False)], ids=["inertia_network", "torque_network"])
def test_a_meta_step_moves_every_leaf_of_the_loss(optimizee: inverse_dynamics.Optimizee, extra: bool):
    loss = ml3_jax.losses.guided_squared_error(JOINTS, (3,))
    settings: dict[str, Any] = {"num_tasks": 1, "inner_steps": STEPS, "unroll": 1}
    learner = toys.learner(problem(optimizee, extra=extra), loss, inner_optimizer=optax.sgd(1e-3), **settings)
    state = learner.init(toys.KEY, LIBRARY)
    after, metrics = learner.step(state)
    assert metrics.meta_grad_norm > 0
    chex.assert_tree_all_finite(after.loss_params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.loss_params, after.loss_params))


def test_the_scales_are_root_mean_squares_of_the_motions_without_noise():
    scales = inverse_dynamics.scales_of(LIBRARY)
    np.testing.assert_allclose(scales.a, np.sqrt(np.mean(np.asarray(LIBRARY.test.a) ** 2, axis=(0, 1))), rtol=1e-5)
    torque = np.asarray(LIBRARY.test.torque - LIBRARY.test.bias)
    np.testing.assert_allclose(scales.torque, np.sqrt(np.mean(torque**2, axis=(0, 1))), rtol=1e-5)
    diagonal = np.diagonal(np.asarray(LIBRARY.extra), axis1=2, axis2=3)
    np.testing.assert_allclose(scales.inertia, diagonal.mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_steps": 0}, "inner_steps: expected a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"by_joint": 1.5}, "by_joint: expected a share in \\[0, 1\\], got 1.5"),
        ({"features": ("state", "torque")}, "features: expected some of state, updates, measured, predicted"),
        ({"features": ()}, "features: expected some of"),
        ({"joint_names": ("shoulder",)}, "joint_names: expected 2 names or none, got \\('shoulder',\\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        problem(**options)


def test_the_keywords_of_version_0_2_warn_and_make_the_same_problem():
    made = problem(extra=False, by_joint=0.5)
    params, task, _ = drawn(made)
    with pytest.warns(
        DeprecationWarning, match=r"steps=\) is called inner_steps=|extra=, by_joint=.*\) is called task_loss=TaskLoss"
    ):
        old = cast(Any, inverse_dynamics.make_problem)(
            RIGID, SCALES, steps=STEPS, batch_size=BATCH, extra=False, by_joint=0.5, outer_samples=8
        )
    args = (params, task, LIBRARY, toys.KEY)
    toys.assert_same(jax.jit(old.task_loss)(*args), jax.jit(made.task_loss)(*args))


def test_tasks_that_do_not_fit_are_refused_with_what_would():
    made = problem(batch_size=5)
    task = made.sample_task(toys.KEY, LIBRARY)
    with pytest.raises(ValueError, match=r"task\.stream: expected 15 samples, the mini-batches of one inner loop, got 12"):
        made.init(toys.KEY, task)
    made = problem()
    with pytest.raises(ValueError, match="context: expected a library of Runs to draw a task from, got NoneType"):
        made.sample_task(toys.KEY, None)
    with pytest.raises(
        ValueError, match=r"task\.stream: expected arrays of shape \(12, 2\), one column a joint, got \(12, 3\)"
    ):
        made.init(toys.KEY, task.replace(stream=task.stream.replace(a=jnp.zeros((12, 3)))))
    with pytest.raises(ValueError, match=r"task\.extra: expected inertia matrices \(5, 2, 2\), got \(5, 2\)"):
        made.init(toys.KEY, task.replace(extra=jnp.zeros((5, 2))))
    with pytest.raises(ValueError, match="task: expected a mini-batch, got none: call collect before observe"):
        made.observe(made.init(toys.KEY, task), task, LIBRARY, toys.KEY, STEP)
