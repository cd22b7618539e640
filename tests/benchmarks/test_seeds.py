"""The table over meta-training seeds: it measures the losses of the run folders, and its counts are numbers of tasks."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks import seeds
from launch.errors import UsageError

TINY = {"meta_steps": 2, "num_tasks": 1, "inner_steps": 1, "meta_decay_steps": 2, "log_every": 1}
ROW = seeds.Row("sine", TINY, {"": (1, 2)})


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    """The row, and one experiment with one set of scenarios for all tests, so that each program is compiled once."""
    build, definition = seeds.experiments.build, seeds.experiments.find
    built: dict[str, Any] = {}
    made: dict[Any, Any] = {}

    def build_once(name: str, overrides: dict[str, Any]) -> Any:
        key = f"{name} {sorted(overrides.items())}"
        built[key] = built.get(key) or build(name, overrides)
        return built[key]

    @functools.cache
    def definition_once(name: str) -> Any:
        found = definition(name)

        def scenarios(experiment: Any) -> Any:
            made[experiment.config] = made.get(experiment.config) or found.scenarios(experiment)
            return made[experiment.config]

        return dataclasses.replace(found, scenarios=scenarios)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(seeds.ROWS, "tiny", ROW)
        patch.setattr(seeds.experiments, "build", build_once)
        patch.setattr(seeds.experiments, "find", definition_once)
        yield


class Measured(NamedTuple):
    """A measured row with its run folders."""

    content: dict[str, Any]
    folder: pathlib.Path


@pytest.fixture(scope="module")
def measured(_compiled_once, tmp_path_factory) -> Measured:
    folder = tmp_path_factory.mktemp("runs")
    return Measured(seeds.measure("tiny", range(2), 3, folder), folder)


@pytest.fixture
def runs(measured, tmp_path) -> pathlib.Path:
    """A copy of the run folders."""
    return shutil.copytree(measured.folder, tmp_path / "runs")


def test_a_finished_run_folder_is_measured_without_training(measured, runs, monkeypatch):
    assert (runs / "tiny" / "seed_1" / "config.json").is_file()

    def refuse(*args):
        raise AssertionError("a finished folder was trained")

    monkeypatch.setattr(seeds.meta_train.trainer.Trainer, "_advance", refuse)
    again = seeds.measure("tiny", range(2), 3, runs)
    assert again["seconds"] == measured.content["seconds"]
    assert again["scenarios"] == measured.content["scenarios"]


def test_learned_curves_differ_between_seeds(measured):
    learned = np.array(measured.content["scenarios"][""]["curves"]["mse"]["learned"])
    assert learned.shape == (2, 3, 2)  # seeds, tasks, reported steps
    assert not np.allclose(learned[0], learned[1])


def test_with_a_decaying_step_size_a_baseline_is_the_better_of_constant_and_decay(monkeypatch):
    made = []

    def make_descent(scenario, learned_loss, optimizer, steps, decay_steps=0):
        if learned_loss is not None:
            assert decay_steps == 2
        else:
            made.append((optimizer, decay_steps))
        # SGD with a constant step size and Adam with a decaying one end at 0; all others end at 1.
        best = learned_loss is None and (optimizer, decay_steps) in (("sgd", 0), ("adam", 2))
        return lambda size, draw, *args: {"mse": np.full((len(draw.keys), steps + 1), 0.0 if best else 1.0)}

    monkeypatch.setitem(seeds.ROWS, "tiny", ROW._replace(overrides={**TINY, "inner_decay_steps": 2}))
    monkeypatch.setattr(seeds.evaluate, "make_descent", make_descent)
    curves = seeds.measure("tiny", range(1), 2)["scenarios"][""]["curves"]["mse"]
    assert set(made) == {("sgd", 0), ("sgd", 2), ("adam", 0), ("adam", 2)}
    assert np.all(np.array(curves["plain_tuned_sgd"]) == 0.0)
    assert np.all(np.array(curves["plain_tuned_adam"]) == 0.0)
    assert np.all(np.array(curves["plain_same_lr"]) == 1.0)


def test_a_run_with_more_meta_steps_than_the_row_is_refused(runs, monkeypatch):
    monkeypatch.setitem(seeds.ROWS, "tiny", ROW._replace(overrides={**TINY, "meta_steps": 1}))
    with pytest.raises(ValueError, match="expected a run of 1 meta-steps, found one of 2"):
        seeds.measure("tiny", range(1), 3, runs)


def test_the_summary_counts_the_tasks_on_which_the_learned_loss_is_closer():
    curves = {
        "learned": [[[1.0], [1.0], [1.0], [None]], [[0.1], [0.1], [3.0], [9.0]]],
        "untrained": [[[2.0], [0.5], [None], [None]]],
    }
    part = {
        "title": "places",
        "steps": [20],
        "step_sizes": {"learned": [0.1], "untrained": [0.1]},
        "curves": {"distance": {name: np.array(values, dtype=float).tolist() for name, values in curves.items()}},
        "env_steps_to_gain": [],
        "ppo": None,
    }
    lines = seeds.summary({"row": "tiny", "seconds": [1.0, 1.0], "scenarios": {"": part}}).splitlines()
    at = lines.index("tasks on which the learned loss is closer, by seed")
    assert lines[at + 1] == "- than untrained: 2 4 of 4"


def test_seeds_in_one_program_equal_single_seeds_and_resume(measured, tmp_path, monkeypatch):
    vmapped = seeds.measure("tiny", range(2), 3, tmp_path, vmapped=True)
    assert vmapped["seconds"][0] == vmapped["seconds"][1]
    for name, curve in measured.content["scenarios"][""]["curves"]["mse"].items():
        np.testing.assert_allclose(vmapped["scenarios"][""]["curves"]["mse"][name], curve, rtol=1e-4)
    shutil.rmtree(tmp_path / "tiny" / "seed_1")
    again = seeds.measure("tiny", range(2), 3, tmp_path, vmapped=True)
    for name, curve in vmapped["scenarios"][""]["curves"]["mse"].items():
        np.testing.assert_allclose(again["scenarios"][""]["curves"]["mse"][name], curve, rtol=1e-4)
    monkeypatch.setitem(seeds.ROWS, "tiny", ROW._replace(overrides={**TINY, "meta_steps": 1}))
    with pytest.raises(ValueError, match="expected a run of 1 meta-steps, found one of 2"):
        seeds.measure("tiny", range(2), 3, tmp_path, vmapped=True)
    monkeypatch.setitem(seeds.ROWS, "tiny", ROW._replace(overrides={**TINY, "meta_lr": 0.5}))
    with pytest.raises(UsageError, match=r"config field 'meta_lr' is .* there, 0.5 here"):
        seeds.measure("tiny", range(2), 3, tmp_path, vmapped=True)
