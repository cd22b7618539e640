"""Supervised problems: what the learned loss sees, which split is read by whom, mini-batches, and bad input.

Every problem that the tests of the library use stands in one table: what only the task loss may see reaches nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import ml3_jax
from ml3_jax import networks, supervised
from tests.ml3_jax import toys

STEP = jnp.asarray(2, jnp.int32)
SINE_MODEL = networks.MLP((8, 1), activation="tanh")
BLOB_MODEL = networks.MLP((8, 3), activation="tanh")


def sine(**options: Any) -> ml3_jax.Problem:
    return supervised.make_problem(SINE_MODEL, toys.sample_sine, **options)


def blobs(**options: Any) -> ml3_jax.Problem:
    settings = {"features": ("logit", "label"), "layout": "classes", **options}
    return supervised.make_problem(BLOB_MODEL, toys.sample_blobs, supervised.cross_entropy, **settings)


def drawn(problem: ml3_jax.Problem) -> tuple[Any, Any]:
    """A task and an optimizee."""
    task = problem.sample_task(toys.KEY, None)
    return task, problem.init(jax.random.key(1), task)


def garbled(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)


class Case(NamedTuple):
    """One row of the conformance table."""

    problem: ml3_jax.Problem
    hide: Callable[[Any], Any]  # the task with what only task_loss and evaluate may see turned to NaN
    features: int


def hide_extra(task: Any) -> Any:
    return task._replace(extra=garbled(task.extra))


def hide_held_out(task: supervised.SupervisedTask) -> supervised.SupervisedTask:
    return task.replace(test=garbled(task.test), extra=garbled(task.extra))


PROBLEMS = {
    "quadratic": Case(toys.quadratic(), hide_extra, 2),
    "points": Case(toys.points(), hide_extra, 3),
    "stream": Case(toys.stream(), hide_extra, 2),
    "sine": Case(sine(), hide_held_out, 2),
    "sine_batches": Case(sine(batch_size=5, features=("residual", "input", "progress")), hide_held_out, 3),
    "shaped": Case(toys.frequency(), lambda task: task.replace(extra=garbled(task.extra)), 3),
    "arm": Case(toys.arm(), hide_held_out, 14),
    "blobs": Case(blobs(), hide_held_out, 2),
    "blobs_columns": Case(blobs(layout="columns", features=("prediction", "target")), hide_held_out, 6),
}
EVERY = pytest.mark.parametrize("case", PROBLEMS.values(), ids=list(PROBLEMS))


def loss_for(problem: ml3_jax.Problem, features: jax.Array) -> ml3_jax.LearnedLoss:
    loss = ml3_jax.losses.mlp((4,), "tanh")
    return ml3_jax.losses.per_class(loss) if features.ndim == 3 else loss


@EVERY
def test_what_only_the_task_loss_may_see_reaches_nothing_else(case: Case):
    problem = case.problem
    task, params = drawn(problem)
    blind = case.hide(task)
    toys.assert_same(problem.init(toys.KEY, task), problem.init(toys.KEY, blind))
    args = (None, toys.KEY, STEP)
    features = problem.observe(params, task, *args)
    toys.assert_same(features, problem.observe(params, blind, *args))
    if problem.plain_loss is not None:
        toys.assert_same(problem.plain_loss(params, task, *args), problem.plain_loss(params, blind, *args))
    if problem.collect is not None:
        toys.assert_same(case.hide(problem.collect(params, task, *args)), problem.collect(params, blind, *args))
    loss = loss_for(problem, features)
    loss_params = loss.init(toys.KEY, features)
    optimizer = optax.sgd(0.1)
    seen, unseen = (
        ml3_jax.adapt(problem, loss, loss_params, t, None, toys.KEY, optimizer=optimizer, steps=2) for t in (task, blind)
    )
    toys.assert_same(seen.params, unseen.params)
    # and it is there to be seen: the task loss does change
    assert problem.task_loss(params, task, None, toys.KEY) != problem.task_loss(params, blind, None, toys.KEY)


@EVERY
def test_problems_have_scalar_losses_and_named_metrics(case: Case):
    problem = case.problem
    task, params = drawn(problem)
    features = problem.observe(params, task, None, toys.KEY, STEP)
    assert features.shape[-1] == case.features
    assert problem.task_loss(params, task, None, toys.KEY).shape == ()
    report = problem.evaluate(params, task, None, toys.KEY)
    assert report
    for name, value in report.items():
        assert isinstance(name, str)
        assert np.shape(value) == ()
        assert np.isfinite(value)


@EVERY
def test_problems_meta_train(case: Case):
    problem = case.problem
    task, params = drawn(problem)
    loss = loss_for(problem, problem.observe(params, task, None, toys.KEY, STEP))
    meta = toys.learner(problem, loss, inner_steps=4, unroll=2, meta_optimizer=optax.adam(1e-2))
    state, metrics = meta.run(meta.init(toys.KEY), 2)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
    assert np.all(np.isfinite(toys.flat(state.loss_params)))


def test_columns_are_what_their_names_say():
    names = ("prediction", "target", "input", "residual", "progress")
    problem = sine(features=names, horizon=8)
    task, params = drawn(problem)
    features = np.asarray(problem.observe(params, task, None, toys.KEY, STEP))
    predictions = np.asarray(SINE_MODEL.apply(params, task.train.inputs))
    x, y = np.asarray(task.train.inputs), np.asarray(task.train.targets)
    # the third of 8 inner steps: 2 of 8 are taken
    expected = np.concatenate([predictions, y, x, predictions - y, np.full((12, 1), 0.25)], axis=-1)
    np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-7)


def test_class_features_are_what_their_names_say():
    names = ("logit", "log_probability", "probability", "label", "progress")
    problem = blobs(features=names, horizon=4)
    task, params = drawn(problem)
    features = np.asarray(problem.observe(params, task, None, toys.KEY, STEP))
    logits = np.asarray(BLOB_MODEL.apply(params, task.train.inputs))
    odds = np.exp(logits)
    probability = odds / odds.sum(axis=-1, keepdims=True)
    expected = [logits, np.log(probability), probability, np.asarray(task.train.targets), np.full((12, 3), 0.5)]
    np.testing.assert_allclose(features, np.stack(expected, axis=-1), rtol=1e-5, atol=1e-6)


def test_a_feature_may_be_a_function():
    problem = sine(features=("prediction", lambda view: view.inputs * view.targets))
    task, params = drawn(problem)
    features = problem.observe(params, task, None, toys.KEY, STEP)
    toys.assert_same(features[:, 1:], task.train.inputs * task.train.targets)


def test_classical_losses_by_hand():
    predictions, targets = jnp.asarray([[1.0, 2.0], [0.0, 0.0]]), jnp.asarray([[0.0, 4.0], [0.0, 1.0]])
    np.testing.assert_allclose(supervised.squared_error(predictions, targets), [1 + 4, 1], rtol=1e-6)
    logits, labels = jnp.asarray([[0.0, 0.0], [0.0, np.log(3.0)]]), jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    # probabilities (1/2, 1/2) and (1/4, 3/4)
    np.testing.assert_allclose(supervised.cross_entropy(logits, labels), [np.log(2), np.log(4 / 3)], rtol=1e-6)
    np.testing.assert_array_equal(supervised.accuracy(logits, labels), [1.0, 1.0])
    np.testing.assert_array_equal(supervised.accuracy(logits, labels[::-1]), [0.0, 0.0])


@pytest.mark.parametrize("outer_data", ["test", "train"])
def test_the_task_loss_reads_the_split_that_is_named(outer_data: str):
    problem = sine(outer_data=outer_data)
    task, params = drawn(problem)
    split = task.test if outer_data == "test" else task.train
    expected = jnp.mean((SINE_MODEL.apply(params, split.inputs) - split.targets) ** 2)
    np.testing.assert_allclose(problem.task_loss(params, task, None, toys.KEY), expected, rtol=1e-6)
    held_out = jnp.mean((SINE_MODEL.apply(params, task.test.inputs) - task.test.targets) ** 2)
    np.testing.assert_allclose(problem.evaluate(params, task, None, toys.KEY)["loss"], held_out, rtol=1e-6)
    assert problem.plain_loss is not None
    on_train = jnp.mean((SINE_MODEL.apply(params, task.train.inputs) - task.train.targets) ** 2)
    np.testing.assert_allclose(problem.plain_loss(params, task, None, toys.KEY, STEP), on_train, rtol=1e-6)


def test_evaluate_reports_the_metrics_that_are_named():
    problem = blobs(metrics={"accuracy": supervised.accuracy, "cross_entropy": supervised.cross_entropy})
    task, params = drawn(problem)
    report = problem.evaluate(params, task, None, toys.KEY)
    assert set(report) == {"accuracy", "cross_entropy"}
    logits = np.asarray(BLOB_MODEL.apply(params, task.test.inputs))
    right = np.argmax(logits, axis=-1) == np.argmax(np.asarray(task.test.targets), axis=-1)
    np.testing.assert_allclose(report["accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(report["cross_entropy"], problem.task_loss(params, task, None, toys.KEY), rtol=1e-6)


def test_a_mini_batch_is_drawn_from_the_training_split_without_replacement():
    problem = sine(batch_size=5)
    assert problem.samples_per_step == 5
    assert problem.collect is not None
    task, params = drawn(problem)
    pairs = {tuple(row) for row in np.concatenate([task.train.inputs, task.train.targets], axis=-1).tolist()}
    batches = []
    for key in jax.random.split(toys.KEY, 3):
        batch = problem.collect(params, task, None, key, STEP)
        rows = [tuple(row) for row in np.concatenate([batch.train.inputs, batch.train.targets], axis=-1).tolist()]
        assert len(set(rows)) == 5
        assert set(rows) <= pairs
        toys.assert_same(batch.test, task.test)
        batches.append(frozenset(rows))
    assert len(set(batches)) == 3


def test_a_pair_of_functions_is_a_model():
    def linear(params: jax.Array, inputs: jax.Array) -> jax.Array:
        return inputs @ params

    problem = supervised.make_problem((lambda key, inputs: jnp.ones((1, 1)), linear), toys.sample_sine)
    task, params = drawn(problem)
    np.testing.assert_allclose(
        problem.task_loss(params, task, None, toys.KEY),
        jnp.mean((task.test.inputs - task.test.targets) ** 2),
        rtol=1e-6,
    )


def test_meta_training_on_sines_beats_the_untrained_loss_by_half():
    problem = sine()
    loss = ml3_jax.losses.mlp((16, 16), "softplus")
    inner = optax.sgd(0.1)
    meta = toys.learner(problem, loss, inner_optimizer=inner, meta_optimizer=optax.adam(1e-2), num_tasks=8, inner_steps=8)
    start = meta.init(toys.KEY)
    state, _ = meta.run(start, 200)

    def held_out(loss_params) -> float:
        def one(key: jax.Array) -> jax.Array:
            task = problem.sample_task(key, None)
            out = ml3_jax.adapt(problem, loss, loss_params, task, None, key, optimizer=inner, steps=8)
            return out.trace["loss"][-1]

        return float(jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(99), 64))))

    assert held_out(state.loss_params) < 0.5 * held_out(start.loss_params)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"layout": "rows"}, "layout: expected 'columns' or 'classes', got 'rows'"),
    ({"outer_data": "validation"}, "outer_data: expected 'test' or 'train', got 'validation'"),
    ({"horizon": 0}, "horizon and batch_size: expected at least 1, got 0 and None"),
    ({"batch_size": 0}, "horizon and batch_size: expected at least 1, got 1 and 0"),
    ({"features": ("predictions",)}, "features: expected a function or one of .*prediction.*, got 'predictions'"),
    ({"features": ("logit",)}, "features: expected a function or one of .*target, got 'logit'"),
    ({"features": ()}, "features: expected at least one, got none"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        sine(**options)


def test_a_batch_larger_than_the_split_is_refused_with_both_numbers():
    problem = sine(batch_size=13)
    with pytest.raises(ValueError, match="batch_size: expected at most the 12 samples of the training split, got 13"):
        toys.learner(problem).init(toys.KEY)


def test_predictions_of_another_shape_than_the_targets_are_refused():
    problem = supervised.make_problem(networks.MLP((4, 2)), toys.sample_sine)
    task, params = drawn(problem)
    with pytest.raises(ValueError, match=r"returned predictions \(12, 2\) for targets \(12, 1\): they must match"):
        problem.task_loss(params, task, None, toys.KEY)


def test_a_convolutional_model_is_a_model():
    class Small(nn.Module):
        """One convolution and a mean over the image."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.mean(nn.Conv(3, (3, 3))(x), axis=(1, 2))

    def sample_task(key: jax.Array, context: Any) -> supervised.SupervisedTask:
        images = jax.random.normal(key, (6, 5, 5, 1))
        examples = supervised.Examples(images, jax.nn.one_hot(jnp.arange(6) % 3, 3))
        return supervised.SupervisedTask(train=examples, test=examples)

    problem = supervised.make_problem(
        Small(), sample_task, supervised.cross_entropy, features=("logit", "label"), layout="classes"
    )
    meta = toys.learner(problem, ml3_jax.losses.per_class(ml3_jax.losses.mlp((4,))), num_tasks=2)
    _, metrics = meta.step(meta.init(toys.KEY))
    assert metrics.meta_grad_norm > 0
