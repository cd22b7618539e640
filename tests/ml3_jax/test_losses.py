"""Every learned loss of the registry through one suite, and `as_loss_fn`."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import losses
from ml3_jax.inner_gradient import make_inner_gradient
from ml3_jax.losses import update_rules
from tests.ml3_jax import toys


class Case(NamedTuple):
    """One row of the conformance table."""

    name: str  # in the registry
    loss: ml3_jax.LearnedLoss
    shape: tuple[int, ...]  # of features it takes; the last axis is F
    wrong_rank: tuple[int, ...]
    wrap: Callable[[Any], Any] = lambda features: features  # array -> the features it takes

    @property
    def of_batch(self) -> bool:
        """Whether the loss is a function of the full batch, without a per_example form."""
        return self.loss.per_example is None


def with_plain(features: Any) -> losses.WithPlain:
    """The features of `plain_plus`; the plain loss is a mean over samples as the others are."""
    plain: Any = jnp.mean(features[..., 0] ** 2) if isinstance(features, jax.Array) else jax.ShapeDtypeStruct((), jnp.float32)
    return losses.WithPlain(features, plain)


CASES = {
    "mlp": Case("mlp", losses.mlp(), (6, 3), (6,)),
    "mlp_signed_bias": Case("mlp", losses.mlp((4,), "tanh", positive=False, bias=True), (6, 3), (2, 6, 3)),
    "weighted": Case("weighted_squared_error", losses.weighted_squared_error((5, 5)), (6, 3), (6,)),
    "per_class": Case("per_class", losses.per_class(losses.mlp((5,), "elu")), (6, 4, 2), (6, 2)),
    "action_target": Case("action_target", losses.action_target(2, (5,)), (6, 5), (6,)),
    "action_target_symmetric": Case("action_target", losses.action_target(1, (5,), symmetric=True), (6, 3), (6,)),
    "fitted_action": Case("fitted_action_target", losses.fitted_action_target(2, (5,), ridge=1e-2), (6, 5), (6,)),
    "affine_split": Case("affine_split_rmse", losses.affine_split_rmse(), (6, 4), (6,)),
    "affine_scheduled": Case("affine_split_rmse", losses.affine_split_rmse(fade=False, schedule_degree=2), (6, 5), (2, 6, 5)),
    "guided": Case("guided_policy_gradient", losses.guided_policy_gradient(1, (5,)), (6, 6), (6,)),
    "plain_plus": Case("plain_plus", losses.plain_plus(losses.mlp((5,), "tanh", last_scale=0.5)), (6, 3), (6,), with_plain),
    "summary_pull": Case("summary_pull", losses.summary_pull(1, 2, (5,), 3), (2, 3, 7), (6, 7)),
    "summary_gradient": Case("summary_gradient", losses.summary_gradient(1, 2, (5,), 3), (2, 3, 7), (6, 7)),
    "temporal": Case("temporal", losses.temporal(1, 2, (5,), 3), (2, 3, 7), (6, 7)),
    "guided_squares": Case("guided_squared_error", losses.guided_squared_error(2, (5,)), (6, 7), (6,)),
    "guided_squares_alone": Case("guided_squared_error", losses.guided_squared_error(1, (5,), "elu"), (6, 2), (2, 6, 2)),
    "learned_gain": Case("learned_gain_cross_entropy", losses.learned_gain_cross_entropy((5,)), (6, 4, 3), (6, 3)),
}
RULES = ("summary_pull", "summary_gradient", "temporal")
ALL = pytest.mark.parametrize("name", CASES)
EDGES = (0.0, 1e-30, 1e6, -1e6)


class Results(NamedTuple):
    """Everything that the suite reads of one loss."""

    starts: list[Any]  # loss parameters, from a number, an array and a shape of features
    first: Any  # [1 + edges] value and gradients, of random features and of features at the edges
    second: Any  # [1 + edges] gradient of the gradient with respect to features, as meta-training takes it
    moved: jax.Array  # [] the value after a change of one sample
    per_example: jax.Array | None  # [N]
    per_example_moved: jax.Array | None  # [N], after a change of one sample
    as_loss_fn: jax.Array | None  # [N], None without prediction and target
    again: tuple[Any, jax.Array]  # parameters and value of the loss from the spec's JSON


@functools.cache
def results(name: str) -> Results:
    """Runs one loss on random features, from one compilation."""
    case = CASES[name]
    loss, shape = case.loss, case.shape
    again = losses.from_spec(json.loads(json.dumps(loss.spec)))

    def apply(phi: Any, x: jax.Array) -> jax.Array:
        return loss.apply(phi, case.wrap(x))

    slope = jax.grad(apply, argnums=1)

    @jax.jit
    def compute() -> Results:
        features = jax.random.normal(toys.KEY, shape)
        examples = (shape[-1], case.wrap(features), case.wrap(jax.ShapeDtypeStruct(shape, features.dtype)))
        starts = [loss.init(toys.KEY, example) for example in examples]
        phi = starts[0]

        def derivatives(x: jax.Array) -> Any:
            second = jax.grad(lambda phi, x: jnp.sum(jnp.sin(slope(phi, x))), argnums=(0, 1))
            return jax.value_and_grad(apply, argnums=(0, 1))(phi, x), second(phi, x)

        edges = jnp.stack([jnp.full(shape, edge).at[..., 1].mul(-1.0) for edge in EDGES])
        first, second = jax.lax.map(derivatives, jnp.concatenate([features[None], edges]))
        columns = arguments_of_loss_fn(loss, features)
        return Results(
            starts,
            first,
            second,
            apply(phi, features.at[1, ..., 0].add(1.0)),
            None if loss.per_example is None else loss.per_example(phi, features),
            None if loss.per_example is None else loss.per_example(phi, features.at[1].add(1.0)),
            None if columns is None else ml3_jax.as_loss_fn(loss, phi)(*columns),
            (again.init(toys.KEY, case.wrap(features)), again.apply(phi, case.wrap(features))),
        )

    return compute()


def arguments_of_loss_fn(loss: ml3_jax.LearnedLoss, features: jax.Array) -> list[jax.Array] | None:
    """Prediction, target and inputs from the features of a loss; None if it takes no prediction and target."""
    order = loss.columns or ("prediction", "target", "...")
    if "prediction" not in order or loss.layout == "plain":
        return None
    if order[0] == "prediction":
        return [features[..., i] if features.ndim == 3 else features[:, i : i + 1] for i in range(features.shape[-1])]
    width = (loss.spec or {})["arguments"]["outputs"]
    others, target, prediction = jnp.split(features, (features.shape[-1] - 2 * width, features.shape[-1] - width), axis=-1)
    return [prediction, target, others] if others.size else [prediction, target]


def params_of(case: Case) -> Any:
    """The shapes of the loss parameters."""
    return jax.eval_shape(lambda: case.loss.init(toys.KEY, case.shape[-1]))


def test_every_registered_loss_is_in_the_table():
    assert {case.name for case in CASES.values()} == set(losses.REGISTRY)


@ALL
def test_init_from_a_number_an_array_and_a_shape_agree(name: str):
    from_number, *others = results(name).starts
    for other in others:
        toys.assert_same(other, from_number)


@ALL
def test_apply_is_a_scalar_that_depends_on_features_and_on_every_leaf(name: str):
    value, (d_phi, d_features) = toys.item(results(name).first, 0)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert np.isfinite(value)
    assert np.any(toys.flat(d_features) != 0)
    for path, leaf in jax.tree.leaves_with_path(d_phi):
        assert np.any(np.asarray(leaf) != 0), path


@ALL
def test_first_and_second_derivatives_are_finite_at_the_edges(name: str):
    chex.assert_tree_all_finite((results(name).first, results(name).second))


@ALL
def test_per_example_averages_to_apply_and_keeps_examples_apart(name: str):
    case, made = CASES[name], results(name)
    value = made.first[0][0]
    if case.of_batch:
        # The loss is a function of all samples at once: a change of one sample changes it.
        assert made.moved != value
        return
    assert made.per_example is not None
    assert made.per_example.shape == case.shape[:1]
    np.testing.assert_allclose(jnp.mean(made.per_example), value, rtol=1e-6)
    assert made.per_example_moved is not None
    changed = ~np.isclose(made.per_example, made.per_example_moved, rtol=1e-6)  # two programs agree to rounding
    assert changed.tolist() == [i == 1 for i in range(case.shape[0])]


@ALL
def test_a_spec_survives_json(name: str):
    loss, made = CASES[name].loss, results(name)
    again = losses.from_spec(json.loads(json.dumps(loss.spec)))
    assert (again.spec, again.layout) == (loss.spec, loss.layout)
    toys.assert_same(made.again[0], made.starts[0])
    np.testing.assert_allclose(made.again[1], made.first[0][0], rtol=1e-6)


@ALL
def test_as_loss_fn_averages_to_apply(name: str):
    case, made = CASES[name], results(name)
    if made.as_loss_fn is None:
        with pytest.raises(ValueError, match=r"takes the columns \(.*action.*\) and has no pred|takes the plain loss beside"):
            ml3_jax.as_loss_fn(case.loss, None)
        return
    assert made.as_loss_fn.shape == case.shape[:1]
    np.testing.assert_allclose(jnp.mean(made.as_loss_fn), made.first[0][0], rtol=1e-6)
    if made.per_example is not None:
        toys.assert_close(made.as_loss_fn, made.per_example)


@ALL
def test_another_number_of_features_is_refused_with_both_numbers(name: str):
    case = CASES[name]
    wide = jnp.zeros((*case.shape[:-1], case.shape[-1] + 1))
    if case.name == "affine_split_rmse":  # its parameters fit any number of inputs
        assert jax.eval_shape(case.loss.apply, params_of(case), wide).shape == ()
        return
    expected = rf"{case.shape[-1]} features a sample, but observe returned shape .*, which has {case.shape[-1] + 1}"
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(case.loss.apply, params_of(case), case.wrap(wide))


@ALL
def test_the_wrong_rank_is_refused_with_the_axes_and_the_shape(name: str):
    case = CASES[name]
    axes = "N, F" if len(case.shape) == 2 else "B, T, F" if case.name in RULES else "N, C, F"
    shape = str(case.wrong_rank).replace("(", r"\(").replace(")", r"\)")
    message = rf"features of shape \[{axes}\] \(rank {len(case.shape)}\), but observe returned shape {shape}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(case.loss.apply, params_of(case), case.wrap(jnp.zeros(case.wrong_rank)))
    with pytest.raises(ValueError, match=message):
        case.loss.init(toys.KEY, case.wrap(jnp.zeros(case.wrong_rank)))


@ALL
def test_a_structure_instead_of_an_array_is_refused_with_its_shapes(name: str):
    case = CASES[name]
    with pytest.raises(ValueError, match=r"takes one array .* but observe returned \{'error': \(6, 2\)\}"):
        jax.eval_shape(case.loss.apply, params_of(case), case.wrap({"error": jnp.zeros((6, 2))}))


@ALL
@pytest.mark.parametrize("other", [{}, None, {"network": 1}])
def test_the_parameters_of_another_loss_are_refused(name: str, other: Any):
    case = CASES[name]
    with pytest.raises(ValueError, match="loss_params: expected the parameters that this learned loss's init returns, got "):
        case.loss.apply(other, case.wrap(jnp.zeros(case.shape)))


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_an_update_rule_of_no_samples_is_the_mean_of_nothing(shape: tuple[int, ...]):
    for name in RULES:
        loss = getattr(losses, name)(1, 2, (5,))
        assert np.isnan(loss.apply(loss.init(toys.KEY, 7), jnp.zeros(shape))), name


@ALL
@pytest.mark.parametrize("count", [0, -2])
def test_a_number_of_features_below_one_is_refused(name: str, count: int):
    with pytest.raises(ValueError, match=f"expected a positive number of features, got {count}"):
        CASES[name].loss.init(toys.KEY, count)


def test_a_positive_loss_is_positive_and_another_takes_both_signs():
    features = 10.0 * jax.random.normal(toys.KEY, (200, 3))
    for positive in (True, False):
        loss = losses.mlp((8,), positive=positive)
        assert loss.per_example is not None
        values = loss.per_example(loss.init(toys.KEY, 3), features)
        assert bool(jnp.all(values >= 0)) == positive


def test_the_default_loss_is_a_softplus_of_a_relu_network_without_bias():
    loss = losses.mlp()
    loss_params = loss.init(toys.KEY, 2)
    layers = [loss_params["params"][f"Dense_{i}"] for i in range(3)]
    assert [set(layer) for layer in layers] == [{"kernel"}] * 3
    assert [layer["kernel"].shape for layer in layers] == [(2, 50), (50, 50), (50, 1)]
    features = np.asarray(jax.random.normal(toys.KEY, (6, 2)))
    hidden = features
    for layer in layers[:-1]:
        hidden = np.maximum(hidden @ np.asarray(layer["kernel"]), 0.0)
    output = (hidden @ np.asarray(layers[-1]["kernel"]))[:, 0]
    np.testing.assert_allclose(loss.apply(loss_params, features), np.mean(np.log1p(np.exp(output))), rtol=1e-5)


def test_weighted_squared_error_is_an_error_times_a_positive_weight():
    features = jax.random.normal(toys.KEY, (6, 3))
    errors = np.asarray((features[:, 0] - features[:, 1]) ** 2)
    plain = losses.weighted_squared_error((5,), last_scale=0.0)
    np.testing.assert_allclose(plain.apply(plain.init(toys.KEY, 3), features), errors.mean(), rtol=1e-6)
    loss = losses.weighted_squared_error((5,), last_scale=1.0, max_log_weight=0.5)
    assert loss.per_example is not None
    weights = np.asarray(loss.per_example(loss.init(toys.KEY, 3), 20.0 * features)) / (400.0 * errors)
    assert np.all(weights > 0)
    np.testing.assert_allclose(weights.max(), np.exp(0.5), rtol=1e-5)  # clipped
    right = features.at[:, 0].set(features[:, 1])
    value, slope = jax.jit(jax.value_and_grad(loss.apply, argnums=1))(loss.init(toys.KEY, 3), right)
    assert value == 0.0
    assert np.all(np.asarray(slope) == 0.0)


def test_weighted_squared_error_of_one_column_is_refused():
    with pytest.raises(ValueError, match=r"expected features \(prediction, target, ...\), got 1 column"):
        losses.weighted_squared_error().init(toys.KEY, 1)


def test_per_class_is_the_sum_over_classes_for_any_number_of_them():
    inner = losses.mlp((5,), "elu")
    loss = losses.per_class(inner)
    loss_params = loss.init(toys.KEY, jnp.zeros((6, 4, 2)))
    for classes in (1, 4, 7):
        features = jax.random.normal(toys.KEY, (6, classes, 2))
        by_class = [inner.apply(loss_params, features[:, c]) for c in range(classes)]
        np.testing.assert_allclose(loss.apply(loss_params, features), sum(by_class), rtol=1e-5)
        shuffled = features[:, ::-1]
        np.testing.assert_allclose(loss.apply(loss_params, shuffled), loss.apply(loss_params, features), rtol=1e-5)


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_as_loss_fn_takes_any_batch_and_broadcasts_inputs(batch: tuple[int, ...]):
    loss = losses.mlp((4,), "tanh")
    loss_params = loss.init(toys.KEY, 5)  # prediction 1, target 1, input 2, progress 1
    predictions = jax.random.normal(toys.KEY, (*batch, 1))
    inputs = jnp.broadcast_to(jnp.asarray([1.0, -1.0]), (*batch, 2))
    values = ml3_jax.as_loss_fn(loss, loss_params)(predictions, 2.0 * predictions, inputs, jnp.asarray(0.5))
    assert values.shape == batch
    rows = jnp.concatenate([predictions, 2.0 * predictions, inputs, jnp.full((*batch, 1), 0.5)], axis=-1)
    assert loss.per_example is not None
    np.testing.assert_allclose(values, loss.per_example(loss_params, rows.reshape(-1, 5)).reshape(batch), rtol=1e-6)


def test_as_loss_fn_takes_one_number_an_example():
    loss = losses.mlp((4,), "tanh")
    loss_params = loss.init(toys.KEY, 3)
    loss_fn = ml3_jax.as_loss_fn(loss, loss_params)
    predictions, targets, inputs = jax.random.normal(toys.KEY, (3, 6))
    toys.assert_same(loss_fn(predictions, targets, inputs), loss_fn(predictions[:, None], targets[:, None], inputs[:, None]))


def test_as_loss_fn_takes_a_single_number():
    loss = losses.mlp((4,), "tanh")
    loss_fn = ml3_jax.as_loss_fn(loss, loss.init(toys.KEY, 2))
    prediction, target = jax.random.normal(toys.KEY, (2,))
    alone = loss_fn(prediction, target)
    assert alone.shape == ()
    np.testing.assert_allclose(alone, loss_fn(prediction[None], target[None])[0], rtol=1e-6)


def test_as_loss_fn_broadcasts_inputs_over_classes():
    loss = losses.per_class(losses.mlp((4,), "tanh"))
    loss_params = loss.init(toys.KEY, 3)
    logits = jax.random.normal(toys.KEY, (6, 4))
    labels = jax.nn.one_hot(jnp.arange(6) % 4, 4)
    values = ml3_jax.as_loss_fn(loss, loss_params)(logits, labels, jnp.asarray(0.5))
    features = jnp.stack([logits, labels, jnp.full((6, 4), 0.5)], axis=-1)
    assert loss.per_example is not None
    np.testing.assert_allclose(values, loss.per_example(loss_params, features), rtol=1e-6)


def test_as_loss_fn_without_per_example_gives_every_example_the_loss_of_the_batch():
    deviation = ml3_jax.LearnedLoss(
        init=lambda key, features: jnp.ones(()),
        apply=lambda phi, features: phi * jnp.std(features[:, 0] - features[:, 1]),
    )
    predictions = jnp.asarray([1.0, 2.0, 6.0])
    values = ml3_jax.as_loss_fn(deviation, jnp.ones(()))(predictions, jnp.zeros(3))
    # mean 3, squared deviations 4, 1, 9: standard deviation sqrt(14 / 3)
    np.testing.assert_allclose(values, np.full(3, np.sqrt(14 / 3)), rtol=1e-6)


def test_as_loss_fn_descends_in_a_plain_optax_loop_as_adapt_does():
    points, _, task, start, _ = toys.start()
    loss, optimizer = losses.mlp((4,), "tanh"), optax.sgd(0.1)
    problem = points._replace(
        observe=lambda params, task, context, key, step: jnp.stack([toys.network(params, task.x), task.y], axis=-1)
    )
    loss_params = loss.init(toys.KEY, 2)

    @jax.jit
    def plain_loop(params):
        loss_fn, opt_state = ml3_jax.as_loss_fn(loss, loss_params), optimizer.init(params)
        for _ in range(3):
            grads = jax.grad(lambda p: jnp.mean(loss_fn(toys.network(p, task.x), task.y)))(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params

    out = ml3_jax.adapt(problem, loss, loss_params, task, None, toys.KEY, optimizer=optimizer, steps=3, params=start)
    toys.assert_close(plain_loop(start), out.params)


def test_as_loss_fn_takes_whole_numbers_as_labels():
    loss = losses.per_class(losses.mlp((4,), "tanh"))
    loss_fn = ml3_jax.as_loss_fn(loss, loss.init(toys.KEY, 2))
    logits, labels = jax.random.normal(toys.KEY, (6, 4)), jnp.arange(6) % 4
    toys.assert_same(loss_fn(logits, labels), loss_fn(logits, jax.nn.one_hot(labels, 4)))


@pytest.mark.parametrize("shape", [(0,), (0, 1), (3, 0, 1), (2, 3, 1), (1,)])
def test_as_loss_fn_takes_batches_of_any_shape_under_vmap_too(shape: tuple[int, ...]):
    loss = losses.mlp((4,), "tanh")
    loss_fn = ml3_jax.as_loss_fn(loss, loss.init(toys.KEY, 2))
    predictions, targets = jax.random.normal(toys.KEY, (2, *shape))
    assert loss_fn(predictions, targets).shape == optax.squared_error(predictions, targets).shape[: max(1, len(shape) - 1)]
    if 0 not in shape:
        toys.assert_close(jax.vmap(loss_fn)(predictions, targets), loss_fn(predictions, targets))


def test_as_loss_fn_refuses_another_number_of_inputs_than_the_loss_has_columns():
    loss = losses.affine_split_rmse()
    with pytest.raises(ValueError, match=r"takes the columns \(prediction, target, \.\.\., progress\), got 0 inputs besides"):
        ml3_jax.as_loss_fn(loss, loss.init(toys.KEY, 4))(jnp.zeros(3), jnp.zeros(3))


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mlp", (50, 50)),
        ("weighted_squared_error", (20, 20, 20)),
        ("learned_gain_cross_entropy", (16, 16)),
        ("action_target", (64, 64)),
        ("fitted_action_target", (32, 32)),
        ("guided_policy_gradient", (64, 64)),
        ("guided_squared_error", (64, 64)),
    ],
)
def test_networks_have_the_documented_width_unless_another_is_given(name: str, widths: tuple[int, ...]):
    parameters = inspect.signature(losses.REGISTRY[name]).parameters
    assert parameters["hidden"].default == widths


@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (2, 3)])
def test_a_guided_squared_error_needs_a_target_for_each_prediction(outputs: int, columns: int):
    loss = losses.guided_squared_error(outputs)
    words = rf"expected features \(\.\.\., {outputs} targets, {outputs} predictions\), got {columns} columns"
    with pytest.raises(ValueError, match=words):
        loss.init(toys.KEY, columns)
    loss.init(toys.KEY, 2 * outputs)


def test_a_spec_of_numpy_numbers_is_json():
    four: Any = np.int64(4)
    two: Any = np.int32(2)
    half: Any = np.float32(0.5)
    assert json.loads(json.dumps(losses.mlp(hidden=(four,)).spec)) == losses.mlp(hidden=(4,)).spec
    assert losses.guided_squared_error(two, last_scale=half).spec == (losses.guided_squared_error(2, last_scale=0.5).spec)


def test_as_loss_fn_refuses_predictions_and_targets_of_other_shapes():
    loss = losses.mlp((4,))
    loss_fn = ml3_jax.as_loss_fn(loss, loss.init(toys.KEY, 2))
    with pytest.raises(ValueError, match=r"one shape, got \(6, 1\) and \(6,\): add the missing axis"):
        loss_fn(jnp.zeros((6, 1)), jnp.zeros(6))


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"hidden": (4, 0)}, r"hidden: expected widths of at least 1, got \(4, 0\)"),
    ({"hidden": (-3,)}, r"hidden: expected widths of at least 1, got \(-3,\)"),
    ({"hidden": (4.5,)}, r"hidden: expected widths of at least 1, got \(4.5,\)"),
    ({"activation": "rellu"}, "activation: expected one of elu, .*, tanh, got 'rellu'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_of_mlp_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        losses.mlp(**arguments)


def test_per_class_of_a_loss_without_per_example_is_refused():
    with pytest.raises(ValueError, match="expected a learned loss with a per_example form, got one without"):
        losses.per_class(toys.scaled_square())


def test_an_unknown_spec_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError,
        match=r"expected one of action_target, .*, learned_gain_cross_entropy, .*, weighted_squared_error, got 'mlpp'",
    ):
        losses.from_spec({"name": "mlpp", "arguments": {}})


def test_a_spec_with_an_argument_that_the_loss_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"mlp.*width"):
        losses.from_spec({"name": "mlp", "arguments": {"width": 3}})


def test_per_class_of_a_loss_without_spec_has_none():
    own = toys.scaled_square()._replace(per_example=lambda phi, features: phi * features[:, 0])
    assert losses.per_class(own).spec is None


def _wave_features(progress: float, affine: float, rest: float) -> jax.Array:
    """Features of a batch; its error has an affine part and a part orthogonal to all affine functions of the input."""
    x = jnp.linspace(-1.0, 1.0, 8)
    error = affine * (1.0 + x) + rest * jnp.array([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    return jnp.stack([error, 0 * x, x, jnp.full_like(x, progress)], axis=-1)


def test_affine_split_rmse_untrained_is_the_root_mean_square_times_the_rest_of_training():
    loss = losses.affine_split_rmse()
    loss_params = loss.init(toys.KEY, 4)
    for progress in (0.0, 0.5, 0.75):
        features = _wave_features(progress, 0.7, 0.4)
        expected = np.sqrt(np.mean(np.asarray(features[:, 0]) ** 2)) * (1.001 - progress)
        np.testing.assert_allclose(loss.apply(loss_params, features), expected, rtol=1e-4)


def test_affine_split_rmse_weighs_the_affine_part_apart_from_the_rest():
    loss = losses.affine_split_rmse()
    loss_params = loss.init(toys.KEY, 4) | {"log_weight": jnp.array([np.log(3.0), -5.0])}
    affine, rest = (loss.apply(loss_params, _wave_features(0.0, *parts)) for parts in ((1.0, 0.0), (0.0, 1.0)))
    # log w = 2 phi: the affine part's root weight is 3, the rest's exp(-5).
    np.testing.assert_allclose(affine, 1.001 * 3.0 * np.sqrt(np.mean((1.0 + np.linspace(-1, 1, 8)) ** 2)), rtol=1e-3)
    np.testing.assert_allclose(rest, 1.001 * np.exp(-5.0), rtol=1e-2)


def test_a_learned_schedule_is_a_chebyshev_polynomial_in_progress():
    loss = losses.affine_split_rmse(fade=False, schedule_degree=3)
    loss_params = {"log_weight": jnp.zeros(2), "schedule": jnp.array([0.1, 0.2, -0.3])}
    for progress in (0.0, 0.35, 1.0):
        x = 2.0 * progress - 1.0
        schedule = 0.1 * x + 0.2 * (2 * x**2 - 1) - 0.3 * (4 * x**3 - 3 * x)
        features = _wave_features(progress, 0.7, 0.4)
        expected = np.sqrt(np.mean(np.asarray(features[:, 0]) ** 2)) * np.exp(schedule)
        np.testing.assert_allclose(loss.apply(loss_params, features), expected, rtol=1e-4)


def test_learned_gain_cross_entropy_pushes_every_logit_by_its_gain_and_classes_sum_to_zero():
    loss = losses.learned_gain_cross_entropy((5,))
    logits = jax.random.normal(toys.KEY, (10, 3))
    labels = jax.nn.one_hot(jnp.arange(10) % 3, 3)
    features = jnp.stack([logits, labels, jnp.full_like(logits, 0.25)], axis=-1)
    slope = jax.jit(lambda x: jax.grad(loss.apply, argnums=1)(loss.init(toys.KEY, 3), x))(features)
    np.testing.assert_allclose(np.sum(slope[..., 0], axis=1), 0.0, atol=1e-6)
    np.testing.assert_array_equal(slope[..., 1:], 0.0)
    right = np.asarray(slope[..., 0])[np.asarray(labels) == 1]
    assert np.all(right < 0.05)
    assert right.mean() < 0


def test_learned_gain_cross_entropy_without_three_features_is_refused():
    with pytest.raises(ValueError, match="logit, label, progress"):
        losses.learned_gain_cross_entropy().init(toys.KEY, 2)


def test_affine_split_rmse_without_inputs_and_progress_is_refused():
    with pytest.raises(ValueError, match="got 2 columns"):
        losses.affine_split_rmse().init(toys.KEY, 2)


def test_action_target_is_a_parabola_around_its_target():
    loss = losses.action_target(1, (4,), target_scale=2.0)
    loss_params = loss.init(toys.KEY, 3)
    state = jnp.array([[0.3, -0.7]])

    @jax.jit
    def value(action: jax.Array) -> jax.Array:
        return loss.apply(loss_params, jnp.concatenate([state, action[None, None]], axis=1))

    def of(action: float) -> float:
        return float(value(jnp.float32(action)))

    # A parabola through three points has its minimum, zero, at the target; its curvature is the weight.
    weight = (of(1.0) - 2.0 * of(0.0) + of(-1.0)) / 2.0
    target = (of(-1.0) - of(1.0)) / (4.0 * weight)
    assert weight > 1e-2
    np.testing.assert_allclose(of(0.0), weight * target**2, rtol=1e-4)
    np.testing.assert_allclose(of(target), 0.0, atol=1e-6)


def test_action_target_keeps_a_gradient_when_its_network_saturates():
    loss = losses.action_target(1, (4,))
    dead = jax.tree.map(lambda leaf: jnp.full_like(leaf, -100.0), loss.init(toys.KEY, 3))
    gradient = jax.jit(jax.grad(lambda a: loss.apply(dead, jnp.array([[0.5, 0.5, a]]))))(1.0)
    assert abs(gradient) > 1e-2


def test_a_symmetric_action_target_mirrors_its_targets():
    loss = losses.action_target(1, (6,), symmetric=True, last_scale=1.0)
    loss_params = loss.init(toys.KEY, 3)
    features = jax.random.normal(toys.KEY, (5, 3))
    toys.assert_close(loss.apply(loss_params, features), loss.apply(loss_params, -features))
    lopsided = losses.action_target(1, (6,), last_scale=1.0)
    ones = jax.tree.map(jnp.ones_like, lopsided.init(toys.KEY, 3))
    assert abs(lopsided.apply(ones, features) - lopsided.apply(ones, -features)) > 1e-2
    with pytest.raises(ValueError, match="expected an odd activation, one of identity, tanh, got 'relu'"):
        losses.action_target(1, activation="relu", symmetric=True)


def test_a_fitted_action_target_is_the_squared_distance_of_a_linear_policy_from_its_target():
    # No hidden layer: the target is linear, 3 * kernel; the action is k . s, so that c = k - 3 * kernel and M = |c|^2 with
    # gains of 1, however wide the states are along each axis.
    loss = losses.fitted_action_target(1, (), ridge=1e-9)
    loss_params = loss.init(toys.KEY, 3)
    kernel = loss_params["target"]["params"]["Dense_0"]["kernel"][:, 0]
    states = jax.random.normal(toys.KEY, (40, 2)) * jnp.array([[1.0, 0.05]])
    k = jnp.array([0.7, -0.4])
    features = jnp.concatenate([states, states @ k[:, None]], axis=1)
    np.testing.assert_allclose(loss.apply(loss_params, features), jnp.sum((k - 3.0 * kernel) ** 2), rtol=1e-3)


def test_action_target_needs_a_feature_besides_the_action():
    with pytest.raises(ValueError, match=r"2 columns of action.* got 2 columns in all"):
        losses.action_target(2).init(toys.KEY, 2)
    for make in (losses.action_target, losses.fitted_action_target):
        with pytest.raises(ValueError, match="target_scale: expected a positive number, got 0"):
            make(2, target_scale=0.0)
    with pytest.raises(ValueError, match="ridge: expected a positive number, got -1"):
        losses.fitted_action_target(2, ridge=-1.0)


def test_a_guided_policy_gradient_by_hand():
    # Without a hidden layer and at zero weights the network gives its biases: target, weight and gain of every sample.
    loss = losses.guided_policy_gradient(1, (), target_scale=2.0, min_weight=0.5)
    phi = jax.tree.map(jnp.zeros_like, loss.init(toys.KEY, 6))
    phi["params"]["Dense_0"]["bias"] = jnp.array([0.25, 0.0, 1.0])
    # columns: two of the state, advantage, action, mean, standard deviation
    seen = jnp.array([[9.0, -9.0, 3.0, 0.8, 0.2, 2.0]])
    pull = (np.log(2.0) + 0.5) * (0.2 - 2.0 * 0.25) ** 2
    log_prob = -0.5 * ((0.8 - 0.2) / 2.0) ** 2 - np.log(2.0) - 0.5 * np.log(2.0 * np.pi)
    np.testing.assert_allclose(loss.apply(phi, seen), pull - np.log(1.0 + np.e) * 3.0 * log_prob, rtol=1e-5)


def test_a_guided_policy_gradient_pulls_to_its_target():
    loss = losses.guided_policy_gradient(2, (5,))
    assert loss.target is not None
    features = jax.random.normal(toys.KEY, (6, 3 + 1 + 6))
    phi = loss.init(toys.KEY, features)
    target = loss.target(phi, features[:, :3])
    assert target.shape == (6, 2)
    there = features.at[:, 3].set(0.0).at[:, 6:8].set(target)  # advantage 0, mean at the target
    slope = jax.jit(jax.grad(loss.apply, argnums=1))
    np.testing.assert_allclose(slope(phi, there)[:, 6:8], 0.0, atol=1e-6)
    assert np.all(np.abs(slope(phi, there.at[:, 6:8].add(0.1))[:, 6:8]) > 0)
    np.testing.assert_allclose(loss.target(phi, features[0, :3]), target[0], rtol=1e-5)


def test_a_guided_policy_gradient_refuses_too_few_features_and_a_weight_of_zero():
    with pytest.raises(ValueError, match="2 columns each of action, mean and"):
        losses.guided_policy_gradient(2).init(toys.KEY, 7)
    with pytest.raises(ValueError, match="min_weight: expected a positive number, got 0"):
        losses.guided_policy_gradient(2, min_weight=0.0)


def zero_output(loss_params: Any) -> Any:
    """Loss parameters whose network gives zeros."""
    return {**loss_params, "network": jax.tree.map(jnp.zeros_like, loss_params["network"])}


@pytest.mark.parametrize("name", RULES)
def test_an_update_rule_without_its_network_is_the_policy_gradient(name: str):
    loss = getattr(losses, name)(2, 3, (5,))
    features = jax.random.normal(toys.KEY, (4, 6, 12)).at[..., -2:].set(0.5)
    phi = zero_output(loss.init(toys.KEY, features))

    def policy_gradient(features: jax.Array) -> jax.Array:
        advantage, action, mean, std = features[..., -7], features[..., -6:-4], features[..., -4:-2], features[..., -2:]
        log_prob = jnp.sum(jax.scipy.stats.norm.logpdf(action, mean, std), axis=-1)
        weights = jax.nn.softplus(0.0) + 1e-2 if name == "summary_pull" else 0.0  # the pull to a target of zero
        return -jnp.mean(advantage * log_prob) + weights * jnp.mean(jnp.sum(mean**2, axis=-1))

    expected, slope = (jax.grad(fn)(features)[..., -4:] for fn in (policy_gradient, lambda x: loss.apply(phi, x)))
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["summary_pull", "summary_gradient"])
def test_a_summary_carries_the_rewards_of_one_sample_to_all_others_whatever_their_order(name: str):
    loss = getattr(losses, name)(1, 2, (5,), 3, last_scale=1.0)
    features = jax.random.normal(toys.KEY, (2, 3, 7))
    phi = loss.init(toys.KEY, features)
    slope = jax.jit(lambda x: jax.grad(lambda y: loss.apply(phi, y))(x)[..., -2])  # of the means
    order = jnp.array([4, 2, 0, 5, 3, 1])
    mixed = features.reshape(6, 7)[order].reshape(2, 3, 7)
    np.testing.assert_allclose(slope(mixed).ravel(), slope(features).ravel()[order], rtol=1e-5, atol=1e-7)
    moved = slope(features.at[0, 0, 2].add(1.0)) - slope(features)
    assert np.all(np.abs(np.asarray(moved)) > 1e-6)


def test_a_temporal_rule_reads_what_follows_in_the_same_trajectory():
    loss = losses.temporal(1, 2, (5,), 3, last_scale=1.0)
    features = jax.random.normal(toys.KEY, (2, 4, 7))
    phi = loss.init(toys.KEY, features)
    slope = jax.jit(lambda x: jax.grad(lambda y: loss.apply(phi, y))(x)[..., -2])
    moved = np.asarray(slope(features.at[0, 2, 2].add(1.0)) - slope(features))
    assert np.all(np.abs(moved[0, :3]) > 1e-6)
    assert np.all(moved[0, 3:] == 0)
    assert np.all(moved[1] == 0)


def test_a_temporal_rule_sums_codes_backwards_with_its_discounts():
    codes = jnp.arange(1.0, 7.0).reshape(1, 3, 2)
    found = update_rules._backwards(codes, jnp.array([0.5]))
    expected = 0.5 * np.array([[1 + 0.5 * 3 + 0.25 * 5, 2 + 0.5 * 4 + 0.25 * 6], [3 + 0.5 * 5, 4 + 0.5 * 6], [5, 6]])
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.summary_pull(0, 2), "actions: expected"),
        (lambda: losses.summary_pull(1, 0), "own: expected"),
        (lambda: losses.summary_pull(1, 2, summary=0), "summary: expected"),
        (lambda: losses.summary_pull(1, 2, min_weight=0.0), "min_weight: expected a positive number, got 0.0"),
        (lambda: losses.summary_gradient(1, 2, activation="nought"), "activation: expected one of"),
        (lambda: losses.temporal(1, 2, discounts=(1.0,)), "discounts: expected numbers between 0 and 1"),
        (lambda: losses.temporal(1, 2, discounts=()), "at least one, got"),
        (lambda: losses.temporal(1, 2).init(toys.KEY, 5), "temporal: expected features .* at least 6, got 5 columns"),
    ],
)
def test_bad_arguments_of_update_rules_are_refused(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_plain_plus_starts_at_the_plain_loss_and_learns_its_gain():
    loss = losses.plain_plus(losses.mlp((5,), "tanh", positive=False, last_scale=0.0))
    features = losses.WithPlain(jnp.ones((6, 3)), jnp.asarray(2.5))
    phi = loss.init(toys.KEY, features)
    assert loss.apply(phi, features) == 2.5
    assert jax.grad(loss.apply)(phi, features)["log_gain"] == 2.5
    toys.assert_same(loss.init(toys.KEY, np.int64(3)), loss.init(toys.KEY, 3))  # a number of NumPy's, as a shape may give it
    with pytest.raises(TypeError, match="wrap the problem with it"):
        loss.apply(phi, features.features)
    with pytest.raises(ValueError, match=r"as_loss_fn: .*plain loss"):
        ml3_jax.as_loss_fn(loss, phi)


@pytest.mark.slow  # compiled as for a user: other flags avoid the fault
@pytest.mark.parametrize("name", RULES)
def test_meta_gradients_of_an_update_rule_agree_in_all_modes(name: str):
    # With several batch axes in a network, XLA's CPU compiler gets the sum over tasks wrong (jaxlib 0.10.2).
    loss = getattr(losses, name)(2, 7)
    tasks = jax.random.normal(toys.KEY, (4, 4, 50, 22))  # tasks, rollouts, time, columns without the policy's
    phi = loss.init(toys.KEY, 26)
    theta = 0.3 * jax.random.normal(toys.KEY, (4, 7, 2))

    def inner_loss(phi, theta, task, context, key, step):
        mean = jnp.tanh(jnp.einsum("bts,sa->bta", task[..., :7], theta))
        return loss.apply(phi, jnp.concatenate([task, mean, jnp.full_like(mean, 0.5)], axis=-1))

    def slope(gradient: str):
        inner = make_inner_gradient(inner_loss, gradient)

        def objective(phi, theta):
            slopes = jax.vmap(lambda w, task: inner(phi, w, task, None, toys.KEY, jnp.int32(0)))(theta, tasks)
            return jnp.mean(jnp.sum(jnp.sin(slopes), axis=(1, 2)))

        return jax.jit(jax.grad(objective, argnums=(0, 1)))(phi, theta)

    toys.assert_close(slope("mixed"), slope("reverse"), rtol=1e-3, atol=1e-5)


PROBLEM = toys.stream()


def test_observe_plain_loss_adds_the_plain_loss_on_the_same_data():
    problem = losses.observe_plain_loss(PROBLEM)
    assert problem.observe == losses.observe_plain_loss(PROBLEM).observe
    assert PROBLEM.plain_loss is not None
    task = PROBLEM.sample_task(toys.KEY, None)
    arguments = PROBLEM.init(toys.KEY, task), task, None, toys.KEY, jnp.zeros((), jnp.int32)
    seen = problem.observe(*arguments)
    toys.assert_same(seen.features, PROBLEM.observe(*arguments))
    toys.assert_same(seen.plain, PROBLEM.plain_loss(*arguments))
    with pytest.raises(ValueError, match="expected a problem with plain_loss"):
        losses.observe_plain_loss(PROBLEM._replace(plain_loss=None))
