"""Several seeds in one program: each has the folder and the numbers of a run of its own."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from launch import meta_test, meta_train
from launch.runs import metrics_log, run_folder, trainer
from tests.launch.conftest import ARGS, snapshot
from tests.launch.runs.test_trainer import assert_same_run, rows

SEEDS = (0, 1, 7)


def train(folder: pathlib.Path, *flags: str, seeds: str = "0,1,7") -> int:
    return meta_train.main([*ARGS, f"--workdir={folder}", f"--seeds={seeds}", *flags])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three seeds at meta-step 20. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("together") / "runs"
    assert train(folder) == 0
    return folder


def test_each_seed_has_the_folder_and_the_numbers_of_a_run_of_its_own(together, tmp_path):
    assert {path.name for path in together.iterdir()} == {"seed_0", "seed_1", "seed_7"}
    own = tmp_path / "run"
    assert meta_train.main([*ARGS, f"--workdir={own}", "--seed=7"]) == 0
    assert {path.name for path in own.iterdir()} == {path.name for path in (together / "seed_7").iterdir()}
    assert (own / "config.json").read_text() == (together / "seed_7" / "config.json").read_text()
    for name in ("task_loss", "meta_grad_norm"):
        alone, among = (metrics_log.read(folder)[name] for folder in (own, together / "seed_7"))
        np.testing.assert_allclose(among, alone, rtol=1e-4)
    losses = [metrics_log.read(together / f"seed_{seed}")["task_loss"][-1] for seed in SEEDS]
    assert len(set(losses)) == 3


def test_seeds_that_are_resumed_equal_uninterrupted_ones(together, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert train(folder, "--meta_steps=7") == 0
    assert train(folder) == 0
    assert "seed_7 is at meta-step 7: going on to 20" in capsys.readouterr().out
    for seed in SEEDS:
        assert_same_run(folder / f"seed_{seed}", together / f"seed_{seed}")


def test_after_a_crash_between_two_checkpoints_all_seeds_equal_uninterrupted_ones(together, tmp_path):
    folder = tmp_path / "runs"
    assert train(folder, "--meta_steps=10") == 0
    for seed in (0, 1):  # two of them were saved at meta-step 20, the third one was not
        shutil.rmtree(folder / f"seed_{seed}")
        shutil.copytree(together / f"seed_{seed}", folder / f"seed_{seed}")
    before = snapshot(folder / "seed_1")
    assert train(folder) == 0
    after = snapshot(folder / "seed_1")
    for name in ("metrics.csv", "history.npz", "config.json"):
        assert after[name] == before[name]
    assert train(folder, "--meta_steps=30") == 0
    assert train(tmp_path / "longer", "--meta_steps=30") == 0
    for seed in SEEDS:
        assert_same_run(folder / f"seed_{seed}", tmp_path / "longer" / f"seed_{seed}")


def test_a_seed_that_starts_later_catches_up(together, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(together, folder)
    assert train(folder, "--meta_steps=30", seeds="0,1,7,9") == 0
    assert {seed: rows(folder / f"seed_{seed}")[-1]["step"] for seed in (*SEEDS, 9)} == dict.fromkeys((*SEEDS, 9), "30")
    assert rows(folder / "seed_7")[:4] == rows(together / "seed_7")


def test_an_interrupted_program_says_where_all_seeds_go_on(tmp_path, capsys, monkeypatch):
    advance = trainer.Trainer._advance

    def interrupted(self, target):
        if self.step == 15:
            raise KeyboardInterrupt
        return advance(self, target)

    monkeypatch.setattr(trainer.Trainer, "_advance", interrupted)
    assert train(tmp_path / "runs") == 130
    assert "the same command goes on from meta-step 10" in capsys.readouterr().err


def test_meta_test_takes_a_folder_of_seeds_and_several_folders(together, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(together, folder)
    options = ["--tasks=2", "--steps=2", "--variants=none"]
    assert meta_test.main(["meta_test", f"--workdir={folder}", *options]) == 0
    said = capsys.readouterr().out
    contents = [json.loads((folder / f"seed_{seed}" / run_folder.RESULTS).read_text()) for seed in SEEDS]
    finals = [np.array(content["curves"]["learned"])[:, -1].mean() for content in contents]
    assert len({content["curves"]["plain_same_lr"][0][-1] for content in contents}) == 1  # the same tasks
    row = next(line for line in said[said.index("3 runs: ") :].splitlines() if line.startswith("  learned"))
    assert row.split()[1:] == [f"{x:.4g}" for x in (np.mean(finals), max(finals), *finals)]
    assert not (folder / run_folder.RESULTS).exists()
    two = [f"--workdir={folder / 'seed_0'}", f"--workdir={folder / 'seed_7'}"]
    assert meta_test.main(["meta_test", *two, *options]) == 0
    assert "2 runs: " in capsys.readouterr().out


def test_a_seed_that_skips_too_many_updates_is_named_and_all_are_saved(tmp_path, capsys, monkeypatch):
    add = trainer.Run.add

    def failing(self, latest, *args):
        if self.name == "seed 1":
            latest = latest.replace(skipped=np.ones_like(latest.skipped))
        return add(self, latest, *args)

    monkeypatch.setattr(trainer.Run, "add", failing)
    assert train(tmp_path / "runs", "--config.max_skipped=5") == 1
    said = capsys.readouterr()
    assert "seed 1, meta-step 5: 5 of the last 5 updates skipped" in said.out
    assert "error: seed 1: 5 updates in a row were skipped" in said.err
    assert {path.parent.parent.name for path in (tmp_path / "runs").glob("seed_*/checkpoints/5")} == {
        "seed_0",
        "seed_1",
        "seed_7",
    }


def test_debug_nans_names_the_seed(tmp_path, capsys):
    assert train(tmp_path / "runs", "--debug_nans", "--config.broken=nan") == 2
    assert "seed 0, task 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_the_cost_of_all_seeds(tmp_path, capsys):
    assert train(tmp_path / "runs", "--dry_run") == 0
    assert "one meta-step of 3 seeds: " in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_takes_no_seeds_below_it(run, capsys):
    before = snapshot(run)
    assert train(run) == 2
    assert "is a run folder itself: choose another --workdir" in capsys.readouterr().err
    assert snapshot(run) == before
