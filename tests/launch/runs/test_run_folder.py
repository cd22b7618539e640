"""The run folder: which run it holds, which files may be written, and names of older versions."""

import dataclasses
import json

import pytest

from launch import meta_train
from launch.errors import UsageError
from launch.runs import run_folder
from launch.runs.folder_lock import FolderLock
from tests.launch.conftest import ARGS, snapshot

RECORD = run_folder.Record("line", 0, 20, {**run_folder.ADDED_FIELDS, "inner_lr": 0.1, "max_skipped": 5, "num_tasks": 4}, {})


def test_another_config_is_refused_naming_each_field_with_both_values(run, capsys):
    before = snapshot(run)
    flags = ["--seed=1", "--config.inner_lr=0.5", "--config.hidden=(4,)", "--meta_steps=40"]
    assert meta_train.main([*ARGS, f"--workdir={run}", *flags]) == 2
    said = capsys.readouterr().err
    for part in ("seed is 0 there, 1 here", "'inner_lr' is 0.1 there, 0.5 here", "'hidden' is [8] there, [4] here"):
        assert part in said
    assert "meta_steps" not in said
    assert snapshot(run) == before


def test_another_experiment_or_a_field_of_another_version_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a run of experiment 'line', not of 'sine'"):
        run_folder.check_same(tmp_path, RECORD, dataclasses.replace(RECORD, experiment="sine"))
    with pytest.raises(UsageError, match="'num_tasks' is 4 there, missing here"):
        run_folder.check_same(tmp_path, RECORD, dataclasses.replace(RECORD, config={"inner_lr": 0.1}))


DAMAGED = [
    ("{", "is damaged: expected JSON"),
    ("[1]", "was not written by meta_train"),
    ('{"name": "a JavaScript package"}', "was not written by meta_train"),
    (json.dumps({"format": run_folder.FORMAT, "experiment": "line", "seed": "0"}), 'expected "seed" to be a whole number'),
    ("\udcff", "cannot be read"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED, ids=[case[1] for case in DAMAGED])
def test_a_config_json_that_is_damaged_or_not_ours_is_left_alone(text, message, run, capsys):
    (run / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = snapshot(run)
    assert meta_train.main([*ARGS, f"--workdir={run}", "--meta_steps=40"]) == 2
    assert message in capsys.readouterr().err
    assert snapshot(run) == before


def test_files_that_would_be_overwritten_are_named_and_left_alone(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("mine")
    (tmp_path / "holiday.png").write_text("mine too")
    before = snapshot(tmp_path)
    assert meta_train.main([*ARGS, f"--workdir={tmp_path}"]) == 2
    assert "holds holiday.png, metrics.csv, which this run would overwrite" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_other_files_in_the_folder_are_accepted_and_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run_folder.check_claimable(tmp_path, RECORD) == RECORD
    run_folder.claim(tmp_path, RECORD)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert run_folder.read_record(tmp_path) == RECORD
    longer = dataclasses.replace(RECORD, meta_steps=99, versions={"jax": "1"})
    assert run_folder.check_claimable(tmp_path, longer) == dataclasses.replace(RECORD, meta_steps=99)  # versions of the start


def test_a_record_of_an_older_version_has_current_names_added_fields_and_no_removed_ones(tmp_path):
    old = {"share_samples": True, "rest_baseline": False, "loss": "split_error", "physics": "mjx", "hidden": [4]}
    run_folder.claim(tmp_path, dataclasses.replace(RECORD, experiment="ant_mfrl", config=old))
    record = run_folder.read_record(tmp_path)
    assert record is not None
    assert record.config == {
        "reuse_rollouts": True,
        "rest_return_baseline": False,
        "loss": "affine_split_rmse",
        "hidden": [4],
        "max_skipped": 100,
        "precision": "default",
        "compute_dtype": "float32",
        "goal": "visible",
        "last_scale": 0.1,
        "context_steps": 1500,
        "context_batches": 6,
    }


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="no permission to write in"):
        run_folder.check_writable(tmp_path / "a" / "b")


def test_a_folder_of_another_program_is_refused_and_gets_no_lock(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"format": "other"}')
    before = snapshot(tmp_path)
    assert meta_train.main([*ARGS, f"--workdir={tmp_path}"]) == 2
    assert "was not written by meta_train" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_run_that_another_process_started_meanwhile_is_not_overwritten(tmp_path):
    with FolderLock(tmp_path, run_folder.LOCK) as first:
        run_folder.claim(tmp_path, RECORD, first)
        with (
            FolderLock(tmp_path, run_folder.LOCK) as second,
            pytest.raises(UsageError, match=r"is in use by process \d+ on host"),
        ):
            run_folder.claim(tmp_path, RECORD, second)
    with (
        FolderLock(tmp_path, run_folder.LOCK) as late,
        pytest.raises(UsageError, match=r"another run was started in .* meanwhile"),
    ):
        run_folder.claim(tmp_path, RECORD, late)
