"""The parts of `benchmarks.all` on sizes that compile fast: rows, files, limits, and the tables. No test reads a clock."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import all as every
from benchmarks import precision, scaling, startup, tables, throughput, vmapped_speed

ROOT = pathlib.Path(__file__).parents[2]


def test_bfloat16_inside_the_inner_loop_changes_the_meta_gradient_by_less_than_a_hundredth():
    rows = {row["variant"]: row for row in precision.measure(3, 2, rounds=1)}
    assert list(rows) == list(precision.VARIANTS)
    assert rows["float32"]["error"] == 0.0
    assert 0.0 < rows["bfloat16"]["error"] <= 0.01  # docs/guide.md states both
    assert rows["bfloat16"]["cosine"] >= 0.9999


def test_rows_of_tasks_and_of_seeds():
    assert scaling.of_tasks(2, rounds=1)["mb"] > 0
    rows = scaling.of_seeds([2], rounds=1)
    assert [row["seeds"] for row in rows] == [1, 2]
    assert 0.2 < rows[0]["times_one"] < 5.0
    assert rows[1]["mb"] > rows[0]["mb"]


def test_rows_of_an_experiment_alone_and_with_seeds_under_one_vmap():
    small = {"num_tasks": 2, "log_every": 2, "save_every": 2}
    row = throughput.measure("shaped_sine", 1, small)
    assert (row["experiment"], row["tasks"]) == ("shaped_sine", 2)
    assert row["meta_steps_a_second"] > 0
    row = vmapped_speed.measure("shaped_sine", small, seeds=2, meta_steps=1, blocks=1)
    assert (row["seeds"], row["skipped"]) == (2, 0)


def test_a_part_that_takes_too_long_is_stopped_and_one_that_fails_is_named(tmp_path):
    stopped = every.run("startup", "--jobs main", tmp_path, 0.5, os.environ)
    assert stopped.ended == "stopped after 0 s"
    failed = every.run("startup", "--jobs nosuch", tmp_path, 60.0, os.environ)
    assert failed.ended == "failed with exit code 1"
    assert not list(tmp_path.iterdir())
    assert "| startup | stopped after 0 s | " in every.summary(tmp_path, [stopped])
    assert [outcome.ended for outcome in every.run_all(["startup"], tmp_path, quick=True, gpu=True, seconds=1.0)] == [
        "left out: no time"
    ]


def test_parts_for_a_gpu_fit_its_time():
    without = {name for name, part in every.PARTS.items() if part.gpu is None}
    assert without == {"estimators", "large_optimizees", "processes"}
    assert all(part.gpu_seconds > 0 for name, part in every.PARTS.items() if name not in without)
    important = ["precision", "gradient_modes", "scaling_tasks", "vmapped_speed"]
    assert list(every.PARTS)[:4] == important
    assert sum(every.PARTS[name].gpu_seconds for name in important) <= every.GPU_SECONDS < 8 * 60


def test_every_part_has_a_table():
    assert set(every.PARTS) - {"meta_step", "vmapped_speed"} <= set(tables.TABLES)


@pytest.mark.slow
def test_gpu_sh_runs_every_part_at_small_sizes_on_a_cpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    script = [str(ROOT / "benchmarks" / "gpu.sh"), "--quick", str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| precision | done | " in done.stdout
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        assert path.stem == "meta_step" or {"device", "jax", "command", "rows"} <= set(content)
    refused = subprocess.run([*script, "--fast"], env=environment, capture_output=True, text=True)
    assert (refused.returncode, "usage: " in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_second_launch_in_another_folder_compiles_nothing_anew_and_saves_70_percent():
    row = startup.measure(startup.JOBS["quick"], rounds=1)
    assert row["cold"]["programs"] > 10
    assert row["warm"]["programs"] == 0
    assert row["saved"] >= 0.7
