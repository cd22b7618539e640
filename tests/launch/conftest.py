"""Registers the experiment of the tests and trains it once for all tests that need a finished run folder."""

import os
import pathlib
import shutil

import pytest

from launch import experiments, meta_test, meta_train
from launch.runs import run_folder
from launch.runtime import compilation_cache

ARGS = ["meta_train", "--experiment=line"]


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every empty folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder" for path in folder.rglob("*")}


@pytest.fixture(scope="session", autouse=True)
def _line_experiment(tmp_path_factory: pytest.TempPathFactory):
    """The experiment "line", and a compilation cache for this session."""
    patch = pytest.MonkeyPatch()
    registered = experiments.modules
    patch.setattr(experiments, "modules", lambda: {**registered(), "line": "tests.launch.line"})
    patch.setenv(compilation_cache.SWITCH, str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run folder at meta-step 20 after meta-test. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert meta_train.main([*ARGS, f"--workdir={folder}"]) == 0
    assert meta_test.main(["meta_test", f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run folder without the files of meta-test."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in (run_folder.RESULTS, "meta_test.png", "step_sizes.png", "other_metrics.png", "variants.png", "figures.txt"):
        os.remove(folder / name)
    return folder
