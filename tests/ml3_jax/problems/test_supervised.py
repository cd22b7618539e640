"""Supervised problems: inputs of the learned loss, splits, mini-batches, and bad input.

One table holds every problem that the tests of the library use: `extra` and the held-out split reach the task loss and the
evaluation alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import ml3_jax
from ml3_jax import networks
from ml3_jax.problems import supervised
from tests.ml3_jax import toys

STEP = jnp.asarray(2, jnp.int32)
SINE_MODEL = networks.MLP((8, 1), activation="tanh")
BLOB_MODEL = networks.MLP((8, 3), activation="tanh")


def sine(**options: Any) -> ml3_jax.Problem:
    return supervised.make_problem(SINE_MODEL, toys.sample_sine, **options)


def blobs(**options: Any) -> ml3_jax.Problem:
    given = {"features": ("logit", "label"), "layout": "classes", **options}
    return supervised.make_problem(BLOB_MODEL, toys.sample_blobs, supervised.cross_entropy, **given)


@functools.cache
def drawn(problem: ml3_jax.Problem) -> tuple[Any, Any]:
    """A task and an optimizee."""
    task = jax.jit(problem.sample_task)(toys.KEY, None)
    return task, jax.jit(problem.init)(jax.random.key(1), task)


def garbled(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)


class Case(NamedTuple):
    """One row of the conformance table."""

    problem: ml3_jax.Problem
    hide: Callable[[Any], Any]  # the task with NaN in the data for task_loss and evaluate alone
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
    "sine_batches": Case(sine(batch_size=5, inner_steps=2, features=("residual", "input", "progress")), hide_held_out, 3),
    "shaped": Case(toys.frequency(), lambda task: task.replace(extra=garbled(task.extra)), 3),
    "arm": Case(toys.arm(), hide_held_out, 14),
    "blobs": Case(blobs(), hide_held_out, 2),
    "blobs_columns": Case(blobs(layout="columns", features=("prediction", "target")), hide_held_out, 6),
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)


def loss_for(problem: ml3_jax.Problem, features: jax.Array) -> ml3_jax.LearnedLoss:
    loss = ml3_jax.losses.mlp((4,), "tanh")
    return ml3_jax.losses.per_class(loss) if features.ndim == 3 else loss


@functools.cache
def looks(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of all functions of a problem on a task and on its hidden copy, compiled once; `adapt` takes 2 steps."""
    problem, hide, _ = PROBLEMS[name]
    task, params = drawn(problem)
    features = jax.eval_shape(problem.observe, params, task, None, toys.KEY, STEP)
    loss = loss_for(problem, features)
    loss_params = loss.init(toys.KEY, features)

    @jax.jit
    def look(task: Any) -> dict[str, Any]:
        args = (None, toys.KEY, STEP)
        return {
            "init": problem.init(toys.KEY, task),
            "observe": problem.observe(params, task, *args),
            "plain_loss": None if problem.plain_loss is None else problem.plain_loss(params, task, *args),
            "collect": None if problem.collect is None else hide(problem.collect(params, task, *args)),
            "adapt": ml3_jax.adapt(problem, loss, loss_params, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=2).params,
            "task_loss": problem.task_loss(params, task, None, toys.KEY),
            "evaluate": problem.evaluate(params, task, None, toys.KEY),
        }

    return look(task), look(hide(task))


@EVERY
def test_extra_and_held_out_data_reach_the_task_loss_and_the_evaluation_alone(name: str):
    seen, blind = looks(name)
    for function in ("init", "observe", "plain_loss", "collect", "adapt"):
        toys.assert_same(seen[function], blind[function])
    assert seen["task_loss"] != blind["task_loss"]  # the hidden data do count there


@EVERY
def test_every_problem_has_scalar_losses_and_named_metrics(name: str):
    seen, _ = looks(name)
    assert seen["observe"].shape[-1] == PROBLEMS[name].features
    chex.assert_rank(seen["task_loss"], 0)
    assert seen["evaluate"]
    for metric, value in seen["evaluate"].items():
        assert isinstance(metric, str)
        chex.assert_rank(value, 0)
        chex.assert_tree_all_finite(value)


@pytest.mark.parametrize("name", ["sine_batches", "shaped"])
def test_problems_meta_train(name: str):
    problem = PROBLEMS[name].problem
    meta = toys.learner(problem, num_tasks=2, inner_steps=1)
    state, metrics = meta.step(meta.init(toys.KEY))
    assert metrics.meta_grad_norm > 0
    chex.assert_tree_all_finite(state.loss_params)


def test_each_column_is_the_feature_of_its_name():
    names = ("prediction", "target", "input", "residual", "progress")
    problem = sine(features=names, inner_steps=8)
    task, params = drawn(problem)
    features = np.asarray(jax.jit(problem.observe)(params, task, None, toys.KEY, STEP))
    predictions = np.asarray(SINE_MODEL.apply(params, task.train.inputs))
    x, y = np.asarray(task.train.inputs), np.asarray(task.train.targets)
    # At step 2, 2 of 8 inner steps are taken.
    expected = np.concatenate([predictions, y, x, predictions - y, np.full((12, 1), 0.25)], axis=-1)
    np.testing.assert_allclose(features, expected, rtol=1e-6, atol=1e-7)


def test_each_class_feature_is_the_one_of_its_name():
    names = ("logit", "log_probability", "probability", "label", "progress")
    problem = blobs(features=names, inner_steps=4)
    task, params = drawn(problem)
    features = np.asarray(jax.jit(problem.observe)(params, task, None, toys.KEY, STEP))
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


def test_each_loss_reads_its_split():
    problems = [sine(outer_data="test"), sine(outer_data="train"), sine(outer_transform=jnp.log)]
    task, params = drawn(problems[0])

    @jax.jit
    def losses(task: supervised.SupervisedTask) -> list[jax.Array]:
        assert problems[1].plain_loss is not None
        outer = [problem.task_loss(params, task, None, toys.KEY) for problem in problems]
        evaluated = problems[1].evaluate(params, task, None, toys.KEY)["loss"]
        return [*outer, evaluated, problems[1].plain_loss(params, task, None, toys.KEY, STEP)]

    train, test = (
        np.mean((np.asarray(SINE_MODEL.apply(params, split.inputs)) - np.asarray(split.targets)) ** 2)
        for split in (task.train, task.test)
    )
    np.testing.assert_allclose(losses(task), [test, train, np.log(test), test, train], rtol=1e-5)


def test_evaluate_reports_the_named_metrics():
    problem = blobs(metrics={"accuracy": supervised.accuracy, "cross_entropy": supervised.cross_entropy})
    task, params = drawn(problem)
    report = jax.jit(problem.evaluate)(params, task, None, toys.KEY)
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
    batches, collect = [], jax.jit(problem.collect)
    for key in jax.random.split(toys.KEY, 3):
        batch = collect(params, task, None, key, STEP)
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

    @jax.jit
    def held_out(loss_params: Any) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            task = problem.sample_task(key, None)
            return ml3_jax.adapt(problem, loss, loss_params, task, None, key, optimizer=inner, steps=8).trace["loss"][-1]

        return jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(99), 64)))

    assert held_out(state.loss_params) < 0.5 * held_out(start.loss_params)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"layout": "rows"}, "layout: expected one of 'columns', 'classes', got 'rows'"),
    ({"outer_data": "validation"}, "outer_data: expected one of 'test', 'train', got 'validation'"),
    ({"inner_steps": 0}, "inner_steps: expected a whole number of at least 1, got 0"),
    ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
    ({"features": ("predictions",)}, "features: expected a function or one of .*prediction.*, got 'predictions'"),
    ({"features": ("logit",)}, "features: expected a function or one of .*target, got 'logit'"),
    ({"features": ()}, "features: expected at least one, got none"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        sine(**options)


def test_the_keyword_horizon_of_version_0_2_is_inner_steps_and_warns():
    with pytest.warns(DeprecationWarning, match=r"horizon=\) is called inner_steps="):
        problem = sine(horizon=8, features=("progress",))
    task, params = drawn(problem)
    np.testing.assert_allclose(problem.observe(params, task, None, toys.KEY, STEP), np.full((12, 1), 0.25))


def test_a_batch_larger_than_the_split_is_refused_with_both_numbers():
    problem = sine(batch_size=13)
    with pytest.raises(ValueError, match="batch_size: expected at most the 12 samples of the training split, got 13"):
        jax.eval_shape(toys.learner(problem).init, toys.KEY)


def test_predictions_of_another_shape_than_the_targets_are_refused():
    problem = supervised.make_problem(networks.MLP((4, 2)), toys.sample_sine)
    task, params = drawn(problem)
    with pytest.raises(ValueError, match=r"returned predictions \(12, 2\) for targets \(12, 1\) float32: expected the same"):
        jax.eval_shape(problem.task_loss, params, task, None, toys.KEY)


def line(targets: Any = lambda x: 3.0 * x + 2.0, samples: int = 8, held_out: int | None = None) -> Any:
    """A sampler of tasks with inputs [N, 1]; `targets` maps inputs to targets."""

    def sample_task(key: jax.Array, context: Any) -> supervised.SupervisedTask:
        def examples(count: int) -> supervised.Examples:
            x = jax.random.normal(key, (count, 1))
            return supervised.Examples(x, targets(x))

        return supervised.SupervisedTask(examples(samples), examples(samples if held_out is None else held_out))

    return sample_task


class NnxNet(nnx.Module):
    """A hidden layer; `layer` makes a layer with state, or None."""

    def __init__(self, rngs: nnx.Rngs, layer: Any = None):
        self.hidden, self.out = nnx.Linear(1, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.layer = None if layer is None else layer(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


MODELS: dict[str, Any] = {
    "linen": networks.MLP((4, 1), "tanh"),
    "nnx": lambda key: NnxNet(nnx.Rngs(key)),
    "equinox": lambda key: equinox.nn.MLP(1, 1, 4, 1, key=key),
    "functions": (lambda key, x: {"w": jax.random.normal(key, (1, 1))}, lambda params, x: x @ params["w"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_library_is_drawn_anew_meta_trained_and_adapted(name: str):
    problem = supervised.make_problem(MODELS[name], line())
    task = problem.sample_task(toys.KEY, None)
    first, second = (toys.flat(problem.init(key, task)) for key in jax.random.split(toys.KEY))
    assert np.any(first != second)
    adapted = ml3_jax.baseline(problem, task, None, toys.KEY, optimizer=optax.sgd(0.05), steps=30)
    assert adapted.trace["loss"][-1] < 0.5 * adapted.trace["loss"][0]
    meta = toys.learner(problem, ml3_jax.losses.mlp((4,), "tanh"))
    _, metrics = meta.step(meta.init(toys.KEY))
    assert metrics.meta_grad_norm > 0


@pytest.mark.parametrize("module", [NnxNet(nnx.Rngs(0)), equinox.nn.Linear(1, 1, key=toys.KEY)])
def test_all_optimizees_start_from_the_parameters_of_a_drawn_module_and_a_warning_says_so(module: Any):
    with pytest.warns(UserWarning, match="every optimizee starts from the parameters of this .*: pass a function from a key"):
        problem = supervised.make_problem(module, line())
    task = problem.sample_task(toys.KEY, None)
    params, other = (problem.init(key, task) for key in jax.random.split(toys.KEY))
    toys.assert_same(params, other)
    predictions = module(task.train.inputs) if isinstance(module, nnx.Module) else jax.vmap(module)(task.train.inputs)
    loss = jnp.mean((predictions - task.train.targets) ** 2)
    np.testing.assert_allclose(problem.task_loss(params, task, None, toys.KEY), loss, rtol=1e-5)


class LinenNorm(nn.Module):
    """Batch normalisation with running averages."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.BatchNorm(use_running_average=True)(x))


STATEFUL: dict[str, tuple[Any, str]] = {
    "linen": (LinenNorm(), "LinenNorm has the collections batch_stats besides params"),
    "pair": ((LinenNorm().init, LinenNorm().apply), r"\(init, apply\) has the collections batch_stats besides params"),
    "nnx norm": (
        lambda key: NnxNet(nnx.Rngs(key), lambda rngs: nnx.BatchNorm(4, rngs=rngs)),
        "type BatchStat besides",
    ),
    "nnx dropout": (lambda key: NnxNet(nnx.Rngs(key), lambda rngs: nnx.Dropout(0.5, rngs=rngs)), "RngCount, RngKey besides"),
    "equinox": (lambda key: equinox.nn.BatchNorm(1, "batch", mode="batch"), "BatchNorm has an equinox.nn.State"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_with_state_is_refused(name: str):
    model, words = STATEFUL[name]
    task = line()(toys.KEY, None)
    with pytest.raises(ValueError, match=f"{words}.*the inner loop trains parameters alone"):
        supervised.make_problem(model, line()).init(toys.KEY, task)


@pytest.mark.parametrize(("model", "came"), [("relu", "str"), (lambda key: 3, "int"), ((jnp.sin,), "tuple")])
def test_what_is_no_model_is_refused(model: Any, came: str):
    with pytest.raises(ValueError, match=f"model: expected .*{came}$"):
        supervised.make_problem(model, line())


def test_targets_without_the_axis_of_outputs_are_those_with_it():
    losses = []
    for targets in (lambda x: 3.0 * x, lambda x: 3.0 * x[:, 0]):
        problem = supervised.make_problem(networks.MLP((4, 1)), line(targets))
        task, params = drawn(problem)
        losses.append([problem.task_loss(params, task, None, toys.KEY), problem.observe(params, task, None, toys.KEY, STEP)])
    toys.assert_same(*losses)


@pytest.mark.parametrize("loss_fn", [supervised.cross_entropy, optax.softmax_cross_entropy_with_integer_labels])
def test_whole_numbers_are_labels_that_features_see_one_hot(loss_fn: Any):
    def label(x: jax.Array) -> jax.Array:
        return (x[:, 0] > 0).astype(jnp.int32) + 1

    options: dict[str, Any] = {"features": ("logit", "label"), "layout": "classes", "metrics": {"right": supervised.accuracy}}
    by_number = supervised.make_problem(networks.MLP((3,)), line(label), loss_fn, **options)
    one_hot = supervised.make_problem(
        networks.MLP((3,)), line(lambda x: jax.nn.one_hot(label(x), 3)), supervised.cross_entropy, **options
    )
    made = []
    for problem in (by_number, one_hot):
        task, params = drawn(problem)
        arguments = (params, task, None, toys.KEY)
        made.append((problem.task_loss(*arguments), problem.observe(*arguments, STEP), problem.evaluate(*arguments)))
    toys.assert_close(*made)


def test_a_loss_that_takes_no_labels_is_refused_whatever_the_number_of_samples():
    options: dict[str, Any] = {"features": ("logit", "label"), "layout": "classes"}
    for samples in (3, 8):  # with 3 samples and 3 classes, one-hot formulas broadcast
        sample_task = line(lambda x: (x[:, 0] > 0).astype(jnp.int32), samples)
        problem = supervised.make_problem(networks.MLP((3,)), sample_task, optax.softmax_cross_entropy, **options)
        task, params = drawn(problem)
        with pytest.raises(ValueError, match=r"softmax_cross_entropy: expected a loss that takes labels \[N\]"):
            problem.task_loss(params, task, None, toys.KEY)


@pytest.mark.parametrize(("sizes", "split"), [((0, 8), "train"), ((8, 0), "test")])
def test_a_split_without_samples_is_refused(sizes: tuple[int, int], split: str):
    problem = supervised.make_problem(networks.MLP((1,)), line(samples=sizes[0], held_out=sizes[1]))
    with pytest.raises(ValueError, match=rf"at least one sample in the {split} split, got inputs of shape \(0, 1\)"):
        toys.learner(problem).init(toys.KEY)


def test_progress_is_the_fraction_of_the_inner_steps_of_the_loop_that_runs():
    features = ("prediction", "target", "progress")
    told, untold = (supervised.make_problem(networks.MLP((1,)), line(), features=features, inner_steps=n) for n in (3, None))
    loss = toys.smooth_loss()
    loss_params = loss.init(toys.KEY, 3)
    states, adapted = [], []
    for problem in (told, untold._replace(plain_loss=told.plain_loss)):  # a replaced field stays
        meta = toys.learner(problem, inner_steps=3, unroll=1)
        states.append(meta.run(meta.init(toys.KEY), 2))
        task = problem.sample_task(toys.KEY, None)
        options: dict[str, Any] = {"optimizer": optax.sgd(0.1), "steps": 3}
        adapted.append(ml3_jax.adapt(problem, loss, loss_params, task, None, toys.KEY, **options))
    toys.assert_same(*states)
    toys.assert_same(*adapted)
    assert untold.for_inner_steps(3) == untold.for_inner_steps(3)  # equal problems share a compilation
    task, params = drawn(told)
    with pytest.raises(ValueError, match=r"'progress' is .*: pass make_problem\(..., inner_steps=\)"):
        untold.observe(params, task, None, toys.KEY, STEP)


def test_a_convolutional_model_is_a_model():
    class Small(nn.Module):
        """One convolution and a mean over the image."""

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.mean(nn.Conv(3, (3, 3))(x), axis=(1, 2))

    def sample_task(key: jax.Array, context: Any) -> supervised.SupervisedTask:
        images = jax.random.normal(key, (6, 4, 4, 1))
        examples = supervised.Examples(images, jax.nn.one_hot(jnp.arange(6) % 3, 3))
        return supervised.SupervisedTask(train=examples, test=examples)

    problem = supervised.make_problem(
        Small(), sample_task, supervised.cross_entropy, features=("logit", "label"), layout="classes"
    )
    meta = toys.learner(problem, ml3_jax.losses.per_class(ml3_jax.losses.mlp((4,))), num_tasks=2, inner_steps=1)
    _, metrics = meta.step(meta.init(toys.KEY))
    assert metrics.meta_grad_norm > 0
