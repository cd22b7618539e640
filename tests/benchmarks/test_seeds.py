"""The table over meta-training seeds: what is kept in run folders is what is measured, and its counts are of tasks."""

import shutil

import numpy as np
import pytest

from benchmarks import seeds

TINY = {"meta_steps": 2, "num_tasks": 1, "inner_steps": 1, "meta_decay_steps": 2, "log_every": 1}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(seeds.ROWS, "tiny", seeds.Row("sine", TINY, {"": (1, 2)}))


def test_run_folders_hold_what_is_measured_and_are_gone_on_with(tiny, tmp_path, monkeypatch):
    first = seeds.measure("tiny", 2, 3, tmp_path)
    assert (tmp_path / "tiny" / "seed_1" / "config.json").is_file()

    def none(*args):
        raise AssertionError("a folder that is at its end was trained on")

    monkeypatch.setattr(seeds.meta_train.training.Trainer, "_advance", none)
    again = seeds.measure("tiny", 2, 3, tmp_path)
    assert again["seconds"] == first["seconds"]
    assert again["settings"] == first["settings"]
    learned = np.array(first["settings"][""]["curves"]["mse"]["learned"])
    assert learned.shape == (2, 3, 2)  # seeds, tasks, steps that are reported
    assert not np.allclose(learned[0], learned[1])


def test_where_the_step_size_decays_a_baseline_takes_the_better_of_a_constant_and_a_decaying_one(tiny, monkeypatch):
    made, make = [], seeds.evaluation.make_descent

    def recorded(setting, learned_loss, optimizer, steps, decay_steps=0):
        descent = make(setting, learned_loss, optimizer, steps, decay_steps)
        if learned_loss is not None:
            assert decay_steps == 2
            return descent
        made.append((optimizer, decay_steps))
        # A constant step size of SGD and a decaying one of Adam end at 0.
        wins = (optimizer, decay_steps) in (("sgd", 0), ("adam", 2))
        return lambda *args: {name: curve * (0.0 if wins else 1.0) for name, curve in descent(*args).items()}

    monkeypatch.setitem(seeds.ROWS, "tiny", seeds.Row("sine", {**TINY, "inner_decay_steps": 2}, {"": (1, 2)}))
    monkeypatch.setattr(seeds.evaluation, "make_descent", recorded)
    curves = seeds.measure("tiny", 1, 2)["settings"][""]["curves"]["mse"]
    assert set(made) == {("sgd", 0), ("sgd", 2), ("adam", 0), ("adam", 2)}
    assert np.all(np.array(curves["plain_tuned_sgd"]) == 0.0)
    assert np.all(np.array(curves["plain_tuned_adam"]) == 0.0)
    assert np.all(np.array(curves["plain_same_lr"]) > 0.0)


def test_a_run_that_went_further_than_the_row_is_not_measured(tiny, tmp_path):
    folder = tmp_path / "tiny" / "seed_0"
    definition = seeds.experiments.definition("sine")
    longer = seeds.experiments.build("sine", {**TINY, "meta_steps": 3}).config
    seeds.meta_train.train(definition, longer, 0, folder)
    with pytest.raises(ValueError, match="expected a run of 2 meta-steps, found one of 3"):
        seeds.measure("tiny", 1, 3, tmp_path)


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
    lines = seeds.summary({"row": "tiny", "seconds": [1.0, 1.0], "settings": {"": part}}).splitlines()
    at = lines.index("tasks on which the learned loss is closer, by seed")
    assert lines[at + 1] == "- than untrained: 2 4 of 4"


def test_seeds_that_are_meta_trained_together_are_the_same_as_one_by_one_and_gone_on_with(tiny, tmp_path, monkeypatch, capsys):
    one_by_one = seeds.measure("tiny", 2, 3)
    monkeypatch.setattr(seeds.together, "SAVE_AFTER", 0.0)
    at_once = seeds.measure("tiny", 2, 3, tmp_path, at_once=True)
    assert at_once["seconds"][0] == at_once["seconds"][1]
    for name, curve in one_by_one["settings"][""]["curves"]["mse"].items():
        np.testing.assert_allclose(at_once["settings"][""]["curves"]["mse"][name], curve, rtol=1e-4)
    shutil.rmtree(tmp_path / "tiny" / "together" / "2")
    capsys.readouterr()
    again = seeds.measure("tiny", 2, 3, tmp_path, at_once=True)
    assert "going on from meta-step 1" in capsys.readouterr().out
    assert again["settings"] == at_once["settings"]
    monkeypatch.setitem(seeds.ROWS, "tiny", seeds.ROWS["tiny"]._replace(overrides={**TINY, "meta_steps": 1}))
    with pytest.raises(ValueError, match="expected states of at most 1 meta-steps, found 2"):
        seeds.measure("tiny", 2, 3, tmp_path, at_once=True)
    monkeypatch.setitem(seeds.ROWS, "tiny", seeds.ROWS["tiny"]._replace(overrides={**TINY, "meta_lr": 0.5}))
    with pytest.raises(ValueError, match=r"expected states of config .*'meta_lr': 0.5.*, found"):
        seeds.measure("tiny", 2, 3, tmp_path, at_once=True)
