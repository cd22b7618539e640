"""Meta-training into a run folder: the written files, and resumed runs equal to uninterrupted ones."""

import csv
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ml3_jax
from launch import experiments, meta_test, meta_train
from launch.experiments import saved
from launch.runs import metrics_log, single_run, trainer
from launch.runs.history import read as read_history
from tests.launch import line
from tests.launch.conftest import ARGS, snapshot


def rows(folder: pathlib.Path) -> list[dict[str, str]]:
    """metrics.csv without its time columns."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in metrics_log.TIME_COLUMNS} for row in csv.DictReader(file)]


def train(folder: pathlib.Path, *flags: str) -> int:
    return meta_train.main([*ARGS, f"--workdir={folder}", *flags])


def final_state(folder: pathlib.Path) -> ml3_jax.MetaState:
    _, experiment, record = saved.rebuild(folder)
    restored = single_run.restore(folder, single_run.make_start(experiment, record.seed))
    assert restored is not None
    return restored[1]


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    assert rows(one) == rows(other)
    left, right = (jax.tree.leaves(final_state(folder).loss_params) for folder in (one, other))
    assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    histories = [read_history(folder) for folder in (one, other)]
    assert histories[0] is not None
    assert histories[1] is not None
    assert histories[0]["steps"].tolist() == histories[1]["steps"].tolist()
    assert np.array_equal(histories[0]["values"], histories[1]["values"])


def test_the_folder_holds_the_contract(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.json",
        "metrics.csv",
        "tb",
        "checkpoints",
        "meta_train.png",
        "meta_test.json",
        "learned_loss",
    }
    assert [row["step"] for row in rows(finished)] == ["5", "10", "15", "20"]
    columns = metrics_log.read(finished)
    assert set(columns) >= {"step", "task_loss", "meta_grad_norm", "skipped", "seconds"}
    assert np.all(np.diff(columns["seconds"]) > 0)
    history = read_history(finished)
    assert history is not None
    assert history["steps"].tolist() == [0, 5, 10, 15, 20]


def test_a_row_is_the_mean_over_its_meta_steps(finished):
    experiment = experiments.build("line")
    state = experiment.meta.init(jax.random.key(0), experiment.context)
    _, per_step = experiment.meta.run(state, 10)
    expected = np.asarray(per_step.task_loss, dtype=np.float64).reshape(2, 5).mean(axis=1)
    np.testing.assert_allclose(metrics_log.read(finished)["task_loss"][:2], expected, rtol=1e-5)


def test_the_saved_loss_is_the_loss_of_the_last_meta_step(finished):
    learned_loss, loss_params = ml3_jax.restore(finished / "learned_loss")
    features = jax.random.normal(jax.random.key(0), (5, 2))
    state = final_state(finished)
    expected = experiments.build("line").learned_loss.apply(state.loss_params, features)
    assert float(learned_loss.apply(loss_params, features)) == float(expected)
    assert int(state.step) == 20


def test_a_run_resumed_between_rows_equals_an_uninterrupted_one(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(folder, "--meta_steps=7") == 0
    assert [int(row["step"]) for row in rows(folder)] == [5]
    assert train(folder, "--meta_steps=20") == 0
    said = capsys.readouterr().out
    assert "is at meta-step 7: going on to 20" in said
    assert "is dead" not in said
    assert_same_run(folder, finished)
    assert json.loads((folder / "config.json").read_text())["meta_steps"] == 20


def test_a_run_with_a_damaged_newest_checkpoint_then_interrupted_resumes_each_time(run, finished, capsys, monkeypatch):
    for path in (run / "checkpoints" / "20").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    advance = trainer.Trainer._advance

    def interrupted(self, target):
        if self.step == 15:
            raise KeyboardInterrupt
        return advance(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_advance", interrupted)
        assert train(run) == 130
    said = capsys.readouterr()
    assert "the checkpoint of meta-step 20 in" in said.err
    assert "is at meta-step 10: going on to 20" in said.out
    assert "the same command goes on from meta-step 10" in said.err
    assert (run / "checkpoints_unread" / "20").is_dir()  # moved aside, not lost
    assert [row["step"] for row in rows(run)] == ["5", "10", "15"]
    with (run / "metrics.csv").open("a") as file:
        file.write("20,1.5,0.2")  # a row that a killed process did not finish
    assert train(run) == 0
    assert_same_run(run, finished)
    assert int(final_state(run).step) == 20


def test_checkpoints_that_are_all_damaged_are_refused(run, capsys):
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = snapshot(run)
    for entry in (lambda: train(run, "--meta_steps=40"), lambda: meta_test.main(["meta_test", f"--workdir={run}"])):
        assert entry() == 2
        said = capsys.readouterr().err
        assert said.startswith("error: no checkpoint in")
        assert said.count("\n") == 1
    assert snapshot(run) == before


def test_a_run_at_its_target_trains_no_further(run, capsys):
    before = snapshot(run)
    assert train(run, "--meta_steps=20") == 0
    assert "nothing to do" in capsys.readouterr().out
    after = snapshot(run)
    kept = ("metrics.csv", "config.json", "history.npz")
    assert [after[name] for name in kept] == [before[name] for name in kept]


@pytest.mark.slow  # compiled as for a user: the flags of the fast tests round differently in a loop of one step
def test_slow_meta_steps_run_in_shorter_loops_and_end_in_the_same_numbers(tmp_path, finished, monkeypatch):
    counts, advance = [], trainer.Trainer._advance

    def counted(self, target):
        latest = advance(self, target)
        counts.append(latest.task_loss.size)
        return latest

    monkeypatch.setattr(trainer, "BLOCK_SECONDS", 0.0)  # every meta-step is slow
    monkeypatch.setattr(trainer.Trainer, "_advance", counted)
    assert train(tmp_path / "run") == 0
    assert counts == [5, 5, *[1] * 10]  # the first loop compiles, the second one is timed
    assert_same_run(tmp_path / "run", finished)


def with_factor(monkeypatch, factor):
    """The tasks of `line` have their task loss times factor(task) from here on."""
    made = line.make_problem

    def breaking(config):
        problem = made(config)

        def task_loss(params, task, context, key):
            return problem.task_loss(params, task, context, key) * factor(task)

        return problem._replace(task_loss=task_loss)

    monkeypatch.setattr(line, "DEFINITION", dataclasses.replace(line.DEFINITION, make_problem=breaking))


def test_too_many_skipped_updates_in_a_row_stop_the_run_with_the_last_good_state_saved(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert train(folder, "--meta_steps=10", "--config.max_skipped=7") == 0
    good = final_state(folder)
    with_factor(monkeypatch, lambda task: jnp.nan)
    assert train(folder, "--meta_steps=40", "--config.max_skipped=7") == 1
    said = capsys.readouterr().err
    assert "error: 10 updates in a row were skipped because they were not finite (--config.max_skipped)" in said
    assert "is saved at meta-step 20. The next meta-step: task 0, inner step " in said
    assert "the task loss is not finite" in said
    assert "Traceback" not in said
    assert [row["skipped"] for row in rows(folder)] == ["0", "0", "5", "5"]
    jax.tree.map(np.testing.assert_array_equal, final_state(folder).loss_params, good.loss_params)
    monkeypatch.undo()


def test_debug_nans_stops_at_the_first_skipped_update_and_names_the_operation(tmp_path, capsys, monkeypatch):
    with_factor(monkeypatch, lambda task: jnp.sqrt(2.0 - task.extra[0]))
    config = meta_train.make_config(line.DEFINITION, {}, 60)
    experiment = line.DEFINITION.build(config)
    _, metrics = experiment.meta.run(single_run.make_start(experiment, 0), 60)
    first = int(np.flatnonzero(metrics.skipped)[0])
    assert first % 5  # inside of a loop of log_every
    folder = tmp_path / "run"
    assert train(folder, "--meta_steps=60", "--debug_nans") == 1
    said = capsys.readouterr().err
    assert f"error: the update of meta-step {first} is not finite: task " in said
    assert "the task loss is not finite. The first operation that is not finite: sqrt at " in said
    assert "test_trainer.py:" in said
    assert "Traceback" not in said
    assert train(folder, "--meta_steps=60") == 0  # without the switch the update is skipped


def test_debug_nans_names_the_operation_of_the_very_first_meta_step(tmp_path, capsys, monkeypatch):
    with_factor(monkeypatch, lambda task: jnp.log(-jnp.abs(task.extra[0])))
    assert train(tmp_path / "run", "--debug_nans") == 2
    said = capsys.readouterr().err
    assert "cannot be trained with this config: the task loss after the first inner steps is nan" in said
    assert "The first operation that is not finite: log at " in said
    assert not (tmp_path / "run").exists()


def test_skipped_updates_and_a_saturated_loss_are_reported(tmp_path, capsys, monkeypatch):
    advance = trainer.Trainer._advance

    def broken(self, target):
        latest = advance(self, target)
        skipped, norms = np.ones_like(latest.skipped), np.zeros_like(latest.meta_grad_norm)
        return latest.replace(skipped=skipped, meta_grad_norm=norms, dead=skipped)

    monkeypatch.setattr(trainer.Trainer, "_advance", broken)
    assert train(tmp_path / "run", "--meta_steps=60") == 0
    first = rows(tmp_path / "run")[0]
    assert (first["skipped"], first["dead"], first["left_out"]) == ("5", "5", "0")
    said = capsys.readouterr().out
    assert "60 updates were skipped because their meta-gradient was not finite" in said
    assert said.count("the learned loss is dead") == 1
    assert "meta-step 50: the learned loss is dead: its meta-gradient has been exactly zero for 50 meta-steps" in said
