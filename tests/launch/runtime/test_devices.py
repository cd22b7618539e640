"""A CPU device a core, asked for in processes of their own: a process's devices cannot change."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from launch.runs import run_folder

COUNT = "from launch.runtime import devices; devices.one_per_core(); import jax; print(jax.local_device_count())"


def counted(script: str, **environment: str) -> int:
    """What the script prints last, in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    given = {**clean, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=given, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_there_are_as_many_devices_as_cores_that_the_process_has():
    assert counted(COUNT) == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    assert counted(f"import os; os.sched_getaffinity = lambda _: {{5}}; {COUNT}") == 1


@pytest.mark.parametrize(
    "environment", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}], ids=str
)
def test_what_the_environment_asks_for_counts(environment: dict[str, str]):
    assert counted(COUNT, **environment) == 3


def test_devices_that_are_there_stay():
    assert counted(f"import jax; jax.devices(); {COUNT}") == 1


def test_no_backend_is_started():
    # `--list` and an unknown flag have no need of a GPU.
    chosen = "jax.config.update('jax_num_cpu_devices', 4)"
    script = f"from launch.runtime import devices; devices.one_per_core(); import jax; {chosen}"
    assert counted(f"{script}; print(jax.local_device_count())") == 4


def test_importing_the_entry_points_asks_for_no_device():
    # Or the number of devices would be settled before anybody could say how many.
    script = f"import launch.meta_train, launch.meta_test, benchmarks.seeds, benchmarks.meta_step; {COUNT}"
    assert counted(f"import os; os.sched_getaffinity = lambda _: {{0, 1, 2}}; {script}") == 3


def test_a_run_on_two_devices_gives_the_figures_of_one(finished: pathlib.Path, tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    script = f"""
        import jax
        from launch import experiments, meta_test, meta_train
        experiments.MODULES["line"] = "tests.launch.line"
        # In two calls: the second goes on from a checkpoint.
        for steps in ("--meta_steps=10", "--meta_steps=20"):
            assert meta_train.main(["meta_train", "--experiment=line", "--workdir={folder}", steps]) == 0
        assert meta_test.main(["meta_test", "--workdir={folder}"]) == 0
        print(jax.local_device_count())
    """
    assert counted(textwrap.dedent(script), JAX_NUM_CPU_DEVICES="2") == 2
    one, two = (json.loads((path / run_folder.RESULTS).read_text()) for path in (finished, folder))
    assert one["curves"].keys() == two["curves"].keys()
    for name, curve in one["curves"].items():
        np.testing.assert_allclose(np.array(two["curves"][name], float), np.array(curve, float), rtol=1e-3, atol=1e-6)
