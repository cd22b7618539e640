"""The table over meta-training seeds: what is kept in run folders is what is measured, and its counts are of tasks."""

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
        "step_size": {"learned": 0.1, "untrained": 0.1},
        "curves": {"distance": {name: np.array(values, dtype=float).tolist() for name, values in curves.items()}},
        "env_steps_to_gain": [],
        "ppo": None,
    }
    lines = seeds.summary({"row": "tiny", "seconds": [1.0, 1.0], "settings": {"": part}}).splitlines()
    at = lines.index("tasks on which the learned loss is closer, by seed")
    assert lines[at + 1] == "- than untrained: 2 4 of 4"
