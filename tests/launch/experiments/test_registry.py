"""Every experiment of the registry: its config, its problem, its meta-test scenarios."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import experiments
from launch.errors import UsageError
from launch.experiment import Experiment

NAMES = [
    "digits",
    "few_shot_sine",
    "shaped_sine",
    "sine",
    "mountain_car",
    "point_mass_mbrl",
    "reacher_mbrl",
    "ant_mfrl",
    "reacher_mfrl",
    "reacher_expert",
    "inverse_dynamics",
]
NOTHING_HIDDEN = ["point_mass_mbrl", "reacher_mbrl", "reacher_mfrl", "ant_mfrl"]  # all that they know is there at meta-test
SMALLER = {  # what takes seconds to compute before training; the claims of this module do not depend on how much of it there is
    "reacher_expert": {"expert_goals": 2, "expert_starts": 1},
    "inverse_dynamics": {"loads": 4, "inner_steps": 20, "test_motions": 2},
}
REGISTERED = experiments.modules  # without the tests' own experiment, which a fixture adds
EVERY = pytest.mark.parametrize("name", NAMES)
CONTRACT = {"inner_optimizer", "inner_lr", "inner_steps", "unroll", "meta_optimizer", "meta_lr", "num_tasks", "gradient"}


def test_the_registry_is_what_is_tested_here():
    assert [name for name in experiments.names() if name != "line"] == NAMES  # "line" is the tests' own


@pytest.mark.parametrize(
    "text",
    [
        'DEFINITION = Definition("mine", "")',
        'DEFINITION = Definition(summary="", name="mine")',
        'DEFINITION: Definition = common.definition("mine")',
    ],
)
def test_a_name_is_read_from_any_way_to_write_a_definition(text: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "helpers.py").write_text("OTHER = 1\n")
    (tmp_path / "family" / "one.py").write_text(f"import nowhere\n\n{text}\n")
    assert REGISTERED() == {"mine": "launch.experiments.family.one"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DEFINITION = Definition(NAME)", "line 1: expected DEFINITION = Definition.* with the name as text"),
        ("DEFINITION = Definition()", "with the name as text"),
        ("DEFINITION = made", "with the name as text.*got DEFINITION = made"),
        ("def (", "one.py, line 1: .*: correct the file"),
    ],
)
def test_a_file_whose_name_cannot_be_read_is_refused_by_path(
    text: str, words: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    (tmp_path / "one.py").write_text(text)
    with pytest.raises(UsageError, match=words):
        REGISTERED()


def test_two_experiments_of_one_name_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text('DEFINITION = Definition("mine", "")')
    with pytest.raises(UsageError, match=r"two modules define the experiment 'mine': launch\.experiments\.one and .*two"):
        REGISTERED()


@functools.cache
def built(name: str) -> Experiment:
    """The experiment under its defaults, but for `SMALLER`; made once for all tests of this module."""
    return experiments.build(name, SMALLER.get(name, {}))


@EVERY
def test_a_config_has_the_fields_of_the_contract_all_resolved(name: str):
    config = built(name).config
    assert all(getattr(config, field) is not None for field in CONTRACT)


def _blind(task):
    """The task without what only the task loss and the evaluation may see."""
    hidden = {field: getattr(task, field) for field in ("extra", "test") if getattr(task, field, None) is not None}
    return task.replace(**jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), hidden)), hidden


@EVERY
def test_what_only_the_task_loss_may_see_is_seen_by_nothing_else(name: str):
    experiment = built(name)
    problem, context, key = experiment.problem, experiment.context, jax.random.key(3)
    task = problem.sample_task(key, context)
    blind, hidden = _blind(task)
    assert bool(hidden) == (name not in NOTHING_HIDDEN)
    step = jnp.zeros((), jnp.int32)

    @jax.jit
    def looked(task):
        params = problem.init(key, task)
        data = task if problem.collect is None else problem.collect(params, task, context, key, step)
        assert problem.plain_loss is not None
        return params, problem.observe(params, data, context, key, step), problem.plain_loss(params, data, context, key, step)

    for seen, unseen in zip(jax.tree.leaves(looked(task)), jax.tree.leaves(looked(blind)), strict=True):
        np.testing.assert_array_equal(seen, unseen)


@EVERY
def test_scenarios_draw_other_tasks_for_another_key_and_evaluate_their_metric(name: str):
    experiment = built(name)
    for scenario in experiments.find(name).scenarios(experiment).values():
        keys = jax.random.split(jax.random.key(5))
        first, second = (scenario.draw_tasks(key, 2) for key in keys)
        task, other = (jax.tree.map(lambda leaf: leaf[0], tasks) for tasks in (first, second))
        params = scenario.problem.init(keys[0], task)
        drawn = (first, params), (second, scenario.problem.init(keys[1], other))
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, drawn), strict=True))
        values = jax.jit(scenario.problem.evaluate)(params, task, scenario.context, keys[1])
        assert np.isfinite(values[scenario.metric])


def test_sine_presets_follow_protocol_and_inner_optimizer():
    published = experiments.build("sine", {"protocol": "published"}).config
    assert (published.inner_lr, published.inner_steps, published.meta_lr) == (1e-3, 1, 1e-3)
    assert (published.meta_steps, published.num_tasks, published.loss, published.hidden) == (500, 1, "mlp", (50, 50))
    assert (published.meta_init, experiments.build("sine").config.meta_init) == ("xavier", "fan_in")
    adam = experiments.build("sine", {"train_tasks": "wide", "inner_optimizer": "adam"}).config
    assert (adam.inner_steps, adam.unroll, adam.schedule_degree) == (100, 20, 2)
    assert experiments.build("sine", {"inner_steps": 7}).config.unroll == 7
    assert experiments.build("sine", {"inner_lr": 0.02}).config.inner_lr == 0.02


def test_a_sine_optimizee_has_biases_wherever_it_is_tested_and_none_where_the_released_code_meta_trains_it():
    experiment = experiments.build("sine", {"protocol": "published"})
    tested = [scenario.problem for scenario in experiments.find("sine").scenarios(experiment).values()]
    for problem, drawn in [(experiment.problem, False)] + [(problem, True) for problem in tested]:
        task = problem.sample_task(jax.random.key(0), None)
        params = problem.init(jax.random.key(1), task)["params"]
        assert all(np.any(layer["bias"]) == drawn for layer in params.values())


def test_sine_tasks_are_the_waves_that_the_config_names():
    wide = experiments.build("sine", {"train_tasks": "wide"}).problem.sample_task(jax.random.key(1), None)
    height, shift = np.asarray(wide.extra)
    assert 0.2 <= height <= 5.0
    np.testing.assert_allclose(wide.test.targets, height * np.sin(np.asarray(wide.test.inputs) - shift), rtol=1e-4, atol=1e-5)
    narrow = experiments.build("sine").problem.sample_task(jax.random.key(1), None)
    assert np.max(np.abs(narrow.train.inputs)) <= 2.0
    np.testing.assert_allclose(narrow.train.targets, -np.sin(np.asarray(narrow.train.inputs)), atol=1e-5)
    assert np.all(np.asarray(narrow.train.inputs) != np.asarray(narrow.test.inputs))


def test_sine_biases_are_drawn():
    task = experiments.build("sine").problem.sample_task(jax.random.key(1), None)
    layers = experiments.build("sine").problem.init(jax.random.key(2), task)["params"]
    assert [layers[f"Dense_{i}"]["bias"].shape for i in range(3)] == [(100,), (10,), (1,)]
    assert all(np.all(np.asarray(layers[f"Dense_{i}"]["bias"]) != 0) for i in range(3))
    assert 0.05 < np.max(np.abs(layers["Dense_1"]["bias"])) <= 0.1  # 1 / sqrt(100)


def test_digits_keep_classes_and_splits_apart():
    experiment = experiments.build("digits")
    task = experiment.problem.sample_task(jax.random.key(4), experiment.context)
    assert task.train.inputs.shape == (800, 784)
    assert task.test.inputs.shape == (200, 784)
    train = {row.tobytes() for row in np.asarray(task.train.inputs)}
    assert not train & {row.tobytes() for row in np.asarray(task.test.inputs)}
    np.testing.assert_array_equal(np.asarray(task.test.targets).sum(axis=0), [100, 100])
    scenario = experiments.find("digits").scenarios(experiment)[""]
    assert scenario.describe is not None
    pairs = scenario.describe(scenario.draw_tasks(jax.random.key(0), 10))
    assert sorted({digit for pair in pairs for digit in pair}) == [5, 6, 7, 8, 9]
    assert len({tuple(pair) for pair in pairs}) == 10


def test_shaped_sine_without_extra_trains_on_the_squared_error():
    params, key = jnp.asarray(0.3), jax.random.key(0)
    values = {}
    for extra in (True, False):
        problem = experiments.build("shaped_sine", {"extra": extra}).problem
        task = problem.sample_task(key, None)
        values[extra] = float(problem.task_loss(params, task, None, key))
    np.testing.assert_allclose(values[False], np.mean((np.sin(0.3 * task.inputs) - task.targets) ** 2), rtol=1e-5)
    np.testing.assert_allclose(values[True], np.log((0.3 - task.extra) ** 2 + 1e-3), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("sine", {"protokol": "published"}, "did you mean 'protocol'"),
        ("sine", {"protocol": "publishd"}, "published"),
        ("sine", {"unroll": 7}, "must divide inner_steps = 50"),
        ("digits", {"batch_size": 900}, "at most 800"),
        ("shaped_sine", {"input_range": -1.0}, "above 0"),
    ],
)
def test_a_wrong_field_is_refused_with_what_would_be_right(name: str, overrides: dict, words: str):
    with pytest.raises(UsageError, match=words):
        experiments.build(name, overrides)


PAPERS = [name for name in NAMES if name != "few_shot_sine"]  # the paper's ten experiments


@functools.cache
def papers(name: str) -> Experiment:
    """The experiment with the paper's form of the loss."""
    small = {"num_tasks": 2, "rollouts": 2} if name in ("reacher_mfrl", "ant_mfrl", "reacher_expert") else {"num_tasks": 2}
    few = {"inner_steps": 2, "unroll": 2}
    return experiments.build(name, {**SMALLER.get(name, {}), **small, **few, "loss": "paper"})


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_form_takes_the_features_of_every_scenario(name: str):
    experiment = papers(name)
    definition = experiments.find(name).for_config(experiment.config)
    key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
    assert experiment.learned_loss.spec["name"] == "plain_plus"

    def loss_at_the_start(problem, task, context):
        params = problem.init(key, task)
        data = task if problem.collect is None else problem.collect(params, task, context, key, step)
        features = problem.observe(params, data, context, key, step)
        loss_params = experiment.learned_loss.init(key, features)
        return loss_params, experiment.learned_loss.apply(loss_params, features)

    task = jax.eval_shape(lambda: experiment.problem.sample_task(key, experiment.context))
    wanted, value = jax.eval_shape(functools.partial(loss_at_the_start, experiment.problem), task, experiment.context)
    assert value.shape == ()
    for scenario in definition.scenarios(experiment).values():
        one = jax.tree.map(lambda leaf: leaf[0], scenario.draw_tasks(key, 1))
        for problem in (scenario.problem, scenario.with_steps(2).problem):
            found, _ = jax.eval_shape(functools.partial(loss_at_the_start, problem), one, scenario.context)
            assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("reacher_mbrl", "mountain_car", "reacher_mfrl") else pytest.mark.long
        )
        for name in PAPERS
    ],
)
def test_the_papers_form_is_alive_from_the_first_meta_step(name: str):
    experiment = papers(name)
    state, metrics = experiment.meta.step(experiment.meta.init(jax.random.key(0), experiment.context))
    assert metrics.dead == metrics.skipped == 0
    assert metrics.meta_grad_norm > 0
    assert np.isfinite(state.loss_params["log_gain"])


def test_only_a_config_with_the_papers_form_changes_a_definition():
    definition = experiments.find("shaped_sine")
    assert definition.for_config(built("shaped_sine").config) is definition
    changed = definition.for_config(papers("shaped_sine").config)
    assert (changed.figures, changed.history, changed.name) == (None, None, "shaped_sine")
    assert changed.for_config(papers("shaped_sine").config) is changed
