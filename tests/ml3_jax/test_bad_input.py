"""Wrong arguments of public functions: an error that says what was expected, what came and what to do, at once."""

# pyright: reportArgumentType=false
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import checkpoint, estimators, losses
from ml3_jax.problems import shaped, supervised
from tests.ml3_jax import toys

KEY = toys.KEY
PROBLEM, LOSS = toys.points(), losses.mlp(hidden=(3,))
TASK = PROBLEM.sample_task(KEY, None)


@pytest.fixture(scope="module")
def phi() -> Any:
    return LOSS.init(KEY, 3)


def learner(**changes: Any) -> ml3_jax.MetaLearner:
    given: dict[str, Any] = {
        "problem": PROBLEM,
        "learned_loss": LOSS,
        "inner_optimizer": optax.sgd(0.1),
        "meta_optimizer": optax.adam(1e-3),
        "num_tasks": 2,
        "inner_steps": 4,
    }
    return ml3_jax.make_meta_learner(**{**given, **changes})


def adapted(phi: Any, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "problem": PROBLEM,
        "learned_loss": LOSS,
        "loss_params": phi,
        "task": TASK,
        "context": None,
        "key": KEY,
        "optimizer": optax.sgd(0.1),
        "steps": 2,
    }
    return ml3_jax.adapt(**{**given, **changes})


def supervised_problem(**changes: Any) -> ml3_jax.Problem:
    given: dict[str, Any] = {"model": nn.Dense(1), "sample_task": toys.sample_sine}
    return supervised.make_problem(**{**given, **changes})


COUNT = "expected a whole number of at least 1, got"
LEARNER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"problem": None}, TypeError, "problem: expected a Problem, as ml3_jax.problems makes them, got None"),
    ({"problem": LOSS}, TypeError, "problem: expected a Problem, as ml3_jax.problems makes them, got a LearnedLoss"),
    ({"problem": PROBLEM._replace(observe=3)}, TypeError, r"problem\.observe: expected a function, got int 3"),
    ({"problem": PROBLEM._replace(collect="x")}, TypeError, r"problem\.collect: expected a function or None, got 'x'"),
    ({"learned_loss": None}, ValueError, r"expected something to learn, got None .* learn_init=True, or an inner_optimizer"),
    ({"learned_loss": None, "learn_init": True, "compute_dtype": "bfloat16"}, ValueError, "compute_dtype has no effect with"),
    ({"learned_loss": None, "learn_init": True, "auxiliary_loss": max}, ValueError, "auxiliary_loss has no effect with"),
    (
        {"learn_init": {"w": 1.0}},
        TypeError,
        "learn_init: expected True or False, got a dict: .* replace init_params of the state",
    ),
    ({"learned_loss": optax.l2_loss}, TypeError, "learned_loss: expected a LearnedLoss, .* got the function l2_loss"),
    ({"learned_loss": losses.mlp}, TypeError, "learned_loss: expected a LearnedLoss, .* got the function mlp"),
    ({"inner_optimizer": 0.1}, TypeError, r"inner_optimizer: expected an optax optimizer, got float 0\.1: for example optax"),
    ({"inner_optimizer": optax.sgd}, TypeError, "inner_optimizer: expected an optax optimizer, got the function sgd: call it"),
    ({"meta_optimizer": optax.adam}, TypeError, "meta_optimizer: expected an optax optimizer, got the function adam: call it"),
    ({"meta_optimizer": None}, TypeError, "meta_optimizer: expected an optax optimizer, got None"),
    ({"auxiliary_loss": 3.0}, TypeError, r"auxiliary_loss: expected a function or None, got float 3\.0"),
    *(
        ({"num_tasks": value}, ValueError, f"num_tasks: {COUNT}")
        for value in (0, -1, 2.5, True, "3", None, float("nan"), np.float32(2), jnp.arange(2))
    ),
    ({"num_tasks": 2**31}, ValueError, "num_tasks: expected at most 2147483647, got 2147483648"),
    ({"inner_steps": 10**30}, ValueError, "inner_steps: expected at most 2147483647"),
    ({"inner_steps": 1.0}, ValueError, f"inner_steps: {COUNT} 1.0"),
    ({"unroll": 3}, ValueError, r"unroll=3 and inner_steps=4: choose one of \[1, 2, 4\]"),
    ({"unroll": 8}, ValueError, "unroll=8 and inner_steps=4"),
    ({"refresh_every": 2}, ValueError, "the problem has no refresh function: leave it out"),
    ({"tasks_at_once": 0}, ValueError, f"tasks_at_once: {COUNT} 0"),
    ({"tasks_at_once": 10**6}, ValueError, "tasks_at_once: expected at most num_tasks=.*, got 1000000: leave it out"),
    ({"gradient": "Mixed"}, ValueError, "gradient: expected one of 'mixed', 'nested', 'remat', 'reverse', got 'Mixed'"),
    ({"estimator": 3}, ValueError, "estimator: expected one of backprop, es, pes or a function, got 3"),
    ({"objective": "first"}, ValueError, "objective: expected one of 'last', 'mean', got 'first'"),
    ({"collect_gradient": "score"}, ValueError, 'or choose "cut"'),
    ({"non_finite_tasks": "drop"}, ValueError, "non_finite_tasks: expected one of 'skip_update', 'leave_out', got 'drop'"),
    ({"inner_step": 3}, TypeError, "unexpected keyword argument 'inner_step'"),
]


@pytest.mark.parametrize(("changes", "error", "words"), LEARNER)
def test_a_meta_learner_refuses(changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        learner(**changes)


STATE: list[tuple[Callable[[ml3_jax.MetaLearner], Any], type[Exception], str]] = [
    (lambda meta: meta.init(0), TypeError, r"key: expected a key such as jax\.random\.key\(0\), got int32 \[\]"),
    (lambda meta: meta.init(None), TypeError, r"key: expected a key such as jax\.random\.key\(0\), got None"),
    (lambda meta: meta.init(jax.random.split(KEY, 2)), TypeError, r"got keys of shape \(2,\): use jax\.vmap over the keys"),
    (lambda meta: meta.step(None), TypeError, "state: expected a MetaState, from init or an earlier step, got None"),
    (lambda meta: meta.step({"w": 1}), TypeError, "state: expected a MetaState, from init or an earlier step, got dict"),
    (lambda meta: meta.run(meta.init(KEY), 0), ValueError, f"num_steps: {COUNT} 0"),
    (lambda meta: meta.run(meta.init(KEY), "2"), ValueError, f"num_steps: {COUNT} '2'"),
    (
        lambda meta: meta.run_seeds(meta.init(KEY), 2),
        ValueError,
        r"states: expected a leading axis of seeds .* step of shape \(\)",
    ),
    (lambda meta: meta.run_seeds(None, 2), TypeError, "states: expected a MetaState, states from init under jax.vmap"),
    (lambda meta: meta.refresh(meta.init(KEY)), ValueError, "this problem has no refresh function"),
]


@pytest.mark.parametrize(("call", "error", "words"), STATE)
def test_functions_of_a_meta_learner_refuse(call: Callable[..., Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        call(learner())


ADAPT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"problem": None}, TypeError, "problem: expected a Problem"),
    ({"learned_loss": None}, TypeError, "learned_loss: expected a LearnedLoss"),
    ({"optimizer": 0.1}, TypeError, "optimizer: expected an optax optimizer"),
    ({"key": 0}, TypeError, "key: expected a key"),
    ({"steps": 0}, ValueError, f"steps: {COUNT} 0"),
    ({"steps": 1.5}, ValueError, f"steps: {COUNT} 1.5"),
    ({"evaluate_every": 0}, ValueError, f"evaluate_every: {COUNT} 0"),
    ({"loss_params": None}, ValueError, "loss_params: expected the parameters that this learned loss's init returns"),
    ({"loss_params": {"w": jnp.ones(3)}}, ValueError, "loss_params: expected the parameters that this learned loss's init"),
    ({"params": {"in": jnp.ones(3, int)}}, ValueError, r"params\['in'\]: expected real floating-point parameters, got int32"),
]


@pytest.mark.parametrize(("changes", "error", "words"), ADAPT)
def test_adapt_refuses(phi: Any, changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        adapted(phi, **changes)
    if not changes.keys() & {"learned_loss", "loss_params"}:
        given = {"problem": PROBLEM, "task": TASK, "context": None, "key": KEY, "optimizer": optax.sgd(0.1), "steps": 2}
        with pytest.raises(error, match=words):
            ml3_jax.baseline(**{**given, **changes})


def test_features_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"initialised for 5 features a sample, but observe returned shape \(8, 3\)"):
        adapted(LOSS.init(KEY, 5))


LOSSES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: losses.mlp(hidden=5), ValueError, r"hidden: expected a sequence of widths, such as \(50, 50\), got 5"),
    (lambda: losses.mlp(hidden="ab"), ValueError, r"hidden: expected a sequence of widths, such as \(50, 50\), got 'ab'"),
    (lambda: losses.mlp(hidden=(0,)), ValueError, r"hidden: expected widths of at least 1, got \(0,\)"),
    (lambda: losses.mlp(hidden=(2.5,)), ValueError, r"hidden: expected widths of at least 1, got \(2\.5,\)"),
    (lambda: losses.mlp(activation="rlu"), ValueError, "activation: expected one of .*relu.*, got 'rlu'"),
    (lambda: LOSS.init(KEY, 0), ValueError, "features: expected a positive number of features, got 0"),
    (lambda: LOSS.apply(LOSS.init(KEY, 3), jnp.ones(3)), ValueError, r"takes features of shape \[N, F\]"),
    (lambda: LOSS.apply(LOSS.init(KEY, 3), [1.0, 2.0]), ValueError, r"takes one array \[N, F\]"),
    (lambda: losses.action_target(0), ValueError, f"actions: {COUNT} 0"),
    (lambda: losses.fitted_action_target(-1), ValueError, f"actions: {COUNT} -1"),
    (lambda: losses.guided_policy_gradient(1.5), ValueError, f"actions: {COUNT} 1.5"),
    (lambda: losses.guided_squared_error(0), ValueError, f"outputs: {COUNT} 0"),
    (lambda: losses.affine_split_rmse(schedule_degree=-1), ValueError, "schedule_degree: expected at least 0, got -1"),
    (lambda: losses.per_class(None), TypeError, "loss: expected a LearnedLoss"),
    (lambda: losses.from_spec(None), ValueError, "expected a spec .*, got None"),
    (lambda: losses.from_spec({}), ValueError, "expected one of .*, got None"),
    (lambda: losses.from_spec({"name": ["mlp"]}), ValueError, r"expected one of .*, got \['mlp'\]"),
    (lambda: losses.from_spec({"name": "mlp", "arguments": None}), ValueError, "expected a spec"),
    (lambda: losses.from_spec({"name": "mlp", "arguments": {"hiden": [3]}}), ValueError, "its arguments do not fit: .*hiden"),
    (lambda: losses.as_loss_fn(None, {}), TypeError, "learned_loss: expected a LearnedLoss"),
    (lambda: estimators.evolution_strategy(sigma=float("nan")), ValueError, "sigma: expected a positive number, got nan"),
    (lambda: estimators.evolution_strategy(pairs=0.5), ValueError, f"pairs: {COUNT} 0.5"),
    (lambda: estimators.persistent_evolution_strategy(sigma=0.0), ValueError, "sigma: expected a positive number, got 0.0"),
    (lambda: estimators.persistent_evolution_strategy(pairs=0), ValueError, f"pairs: {COUNT} 0"),
    (lambda: shaped.make_problem(3, *[lambda key: 1.0] * 3), TypeError, "predict: expected a function, got int 3"),
]


@pytest.mark.parametrize(("call", "error", "words"), LOSSES)
def test_losses_estimators_and_problems_refuse(call: Callable[[], Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        call()


SUPERVISED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": None}, ValueError, "model: expected a flax.linen module, .* got NoneType"),
    ({"sample_task": None}, TypeError, "sample_task: expected a function, got None"),
    ({"loss_fn": "mse"}, TypeError, "loss_fn: expected a function, got 'mse'"),
    ({"features": "prediction"}, ValueError, r"features: expected a sequence, such as \('prediction',\), got 'prediction'"),
    ({"features": ("predictoin",)}, ValueError, "features: expected a function or one of .*, got 'predictoin'"),
    ({"features": ()}, ValueError, "features: expected at least one, got none"),
    ({"layout": "rows"}, ValueError, "layout: expected one of 'columns', 'classes', got 'rows'"),
    ({"outer_data": "val"}, ValueError, "outer_data: expected one of 'test', 'train', got 'val'"),
    ({"batch_size": 2.5}, ValueError, f"batch_size: {COUNT} 2.5"),
    ({"inner_steps": 0}, ValueError, f"inner_steps: {COUNT} 0"),
    ({"metrics": ["mse"]}, TypeError, "metrics: expected {name: function}, got list"),
    ({"metrics": {"mse": None}}, TypeError, r"metrics\['mse'\]: expected a function, got None"),
    ({"outer_transform": 3}, TypeError, "outer_transform: expected a function or None, got int 3"),
]


@pytest.mark.parametrize(("changes", "error", "words"), SUPERVISED)
def test_a_supervised_problem_refuses(changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        supervised_problem(**changes)


SAVED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"path": "{file}"}, FileExistsError, "expected a path that does not exist"),
    ({"path": "{file}/below"}, OSError, "file"),
    ({"path": ""}, ValueError, "path: expected the path of a folder in UTF-8, got ''"),
    ({"path": "a\0b"}, ValueError, "path: expected the path of a folder in UTF-8"),
    ({"path": os.fsdecode(b"a\xffb")}, ValueError, "path: expected the path of a folder in UTF-8"),
    ({"path": "{new}" + "x" * 300}, OSError, "name too long"),
    ({"path": None}, TypeError, "NoneType"),
    ({"learned_loss": None}, TypeError, "learned_loss: expected a LearnedLoss"),
    ({"metadata": [1]}, TypeError, "metadata: expected a dictionary, got list"),
    ({"metadata": {"a": object()}}, ValueError, "expected text, numbers, lists and dictionaries, as JSON has them"),
    ({"loss_params": None}, ValueError, "loss_params: expected at least one array, got none"),
    ({"loss_params": {"a": "text"}}, TypeError, "not a valid JAX array type"),
]


@pytest.mark.parametrize(("changes", "error", "words"), SAVED)
def test_save_refuses_and_writes_nothing(
    tmp_path: pathlib.Path, phi: Any, changes: dict[str, Any], error: type[Exception], words: str
):
    (tmp_path / "file").write_text("mine")
    given: dict[str, Any] = {"path": "{new}", "learned_loss": LOSS, "loss_params": phi, "metadata": None, **changes}
    if given["path"] is not None:
        given["path"] = given["path"].format(new=tmp_path / "new", file=tmp_path / "file")
    with pytest.raises(error, match=words):
        ml3_jax.save(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["naïve 文件", "a b", "quote'\"", "dots..", "-dash", "new\nline"])
def test_any_name_of_a_folder_is_taken(tmp_path: pathlib.Path, phi: Any, name: str):
    ml3_jax.save(tmp_path / name, LOSS, phi)
    toys.assert_same(ml3_jax.restore(tmp_path / name)[1], phi)


def test_checkpoints_refuse(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match="file: expected a folder, found a file"):
        checkpoint.Checkpoints(tmp_path / "file")
    for keep in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"keep: {COUNT}"):
            checkpoint.Checkpoints(tmp_path / "folder", keep=keep)
    checkpoints = checkpoint.Checkpoints(tmp_path / "folder")
    for step in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match=f"step: {COUNT}"):
            checkpoints.save(step, {"w": jnp.ones(2)})
    assert checkpoints.steps() == []
    checkpoints.close()
