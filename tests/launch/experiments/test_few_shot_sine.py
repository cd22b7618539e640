"""few_shot_sine: its tasks, its choices of what is learned, and a run folder with every part."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import ml3_jax
from launch import experiments, meta_test, meta_train
from launch.evaluation import evaluate, pretraining
from launch.experiments import saved
from launch.experiments.supervised import few_shot_sine
from ml3_jax import optimizers

TINY = ("--config.num_tasks=2", "--meta_steps=4", "--config.log_every=2", "--config.save_every=2", "--config.control_steps=2")


def test_tasks_are_those_of_the_paper():
    tasks = jax.vmap(lambda key: few_shot_sine.sample_sine(key, 5, 7))(jax.random.split(jax.random.key(0), 500))
    amplitude, phase = np.asarray(tasks.extra).T
    assert 0.1 <= amplitude.min() < 0.3 < 4.8 < amplitude.max() <= 5.0
    assert 0.0 <= phase.min() < 0.1 < 3.0 < phase.max() <= np.pi
    assert (tasks.train.inputs.shape, tasks.test.inputs.shape) == ((500, 5, 1), (500, 7, 1))
    assert np.abs(tasks.train.inputs).max() <= 5.0
    expected = amplitude[:, None] * np.sin(np.asarray(tasks.test.inputs)[..., 0] - phase[:, None])
    np.testing.assert_allclose(tasks.test.targets[..., 0], expected, atol=1e-4)


@pytest.mark.parametrize("learn", few_shot_sine.LEARN)
def test_the_config_says_what_is_learned(learn: str):
    experiment = experiments.build("few_shot_sine", {"learn": learn})
    state = jax.eval_shape(experiment.meta.init, jax.random.key(0))
    learned = {"loss": state.loss_params, "init": state.init_params, "step_sizes": state.optimizer_params}
    assert tuple(name for name, part in learned.items() if part is not None) == few_shot_sine.LEARN[learn]
    if state.optimizer_params is not None and state.init_params is not None:
        of_each = state.optimizer_params["log_step_size"]
        assert jax.tree.map(np.shape, of_each) == jax.tree.map(np.shape, state.init_params)


@pytest.fixture(scope="module", params=["all", "meta_sgd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run folder after four meta-steps and meta-test on three tasks."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    common = ("--experiment=few_shot_sine", f"--workdir={path}", f"--config.learn={request.param}", *TINY)
    assert meta_train.main(["meta_train", *common]) == 0
    assert meta_test.main(["meta_test", f"--workdir={path}", "--tasks=3", "--steps=2"]) == 0
    return path


def test_a_run_folder_keeps_all_learned_parts(folder: pathlib.Path):
    run = saved.load(folder)
    with_loss = run.experiment.learned_loss is not None
    loss, parts = ml3_jax.restore_parts(folder / ("learned_loss" if with_loss else "learned_parts"))
    assert (loss is not None) == with_loss
    for kept, trained, initial in zip(*map(jax.tree.leaves, (parts, run.learned, run.initial)), strict=True):
        np.testing.assert_array_equal(kept, trained)
        assert np.any(kept != initial) or not np.any(kept)  # a bias before a dead unit may stay at zero


def test_the_learned_curve_starts_from_the_learned_initialisation_with_the_learned_step_sizes(folder: pathlib.Path):
    content = json.loads((folder / "meta_test.json").read_text())
    assert {"learned", "untrained", "plain_same_lr", "pretrained_tuned", "maml"} <= set(content["curves"])
    run = saved.load(folder)
    scenario = few_shot_sine.scenarios(run.experiment)[""]
    draw, _ = evaluate.draws(scenario, jax.random.split(jax.random.fold_in(jax.random.key(meta_test.SEED), 1), 3)[0], 3)
    task = jax.tree.map(lambda leaf: leaf[1], draw.tasks)
    made = optimizers.learned_sgd(0.01, "parameter").make(run.learned.optimizer_params)
    how = {"optimizer": made, "steps": 2, "params": run.learned.init_params}
    if run.experiment.learned_loss is None:
        trace = ml3_jax.baseline(scenario.problem, task, None, draw.keys[1], **how).trace
    else:
        loss = run.experiment.learned_loss
        trace = ml3_jax.adapt(scenario.problem, loss, run.learned.loss_params, task, None, draw.keys[1], **how).trace
    np.testing.assert_allclose(content["curves"]["learned"][1], trace["mse"], rtol=1e-4)


def test_a_step_size_scales_learned_ones():
    experiment = experiments.build("few_shot_sine", {"learn": "step_sizes", "step_sizes_per": "all"})
    state = experiment.meta.init(jax.random.key(0))
    scenario = few_shot_sine.scenarios(experiment)[""]
    draw, _ = evaluate.draws(scenario, jax.random.key(1), 3)
    found = evaluate.make_learned(experiment, scenario, 2)(ml3_jax.MetaParams(None, None, state.optimizer_params))(0.02, draw)
    expected = evaluate.make_descent(scenario, None, "sgd", 2)(0.02, draw, None, None)
    np.testing.assert_allclose(found["mse"], expected["mse"], rtol=1e-5)


@pytest.mark.slow
def test_maml_adapts_better_in_one_step_than_an_optimizee_trained_on_all_tasks():
    problem = few_shot_sine.problem_with(10, 10)
    common: dict[str, Any] = {"num_tasks": 25, "steps": 3000}
    starts = {
        "maml": pretraining.maml(problem, None, jax.random.key(0), inner_lr=0.01, **common),
        "pretrained": pretraining.pretrain(problem, None, jax.random.key(0), **common),
    }
    experiment = experiments.build("few_shot_sine", {"shots": 10})
    scenario = few_shot_sine.scenarios(experiment)[""]
    draw, _ = evaluate.draws(scenario, jax.random.key(1), 100)
    descent = evaluate.make_descent(scenario, None, "sgd", 1)

    def after_one_step(params):
        curve = evaluate.from_params(lambda size, draw, *options: descent(size, draw, None, None, *options), params)
        return curve(0.01, draw)["mse"][:, 1].mean()

    found = {name: after_one_step(params) for name, params in starts.items()}
    assert found["maml"] < 0.6 * found["pretrained"], found
