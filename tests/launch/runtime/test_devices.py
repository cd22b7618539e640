"""One CPU device per core. Real devices need a fresh process: the devices of a process cannot change."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from launch.runs import run_folder
from launch.runtime import devices


def run_script(script: str, **environment: str) -> list[int]:
    """The numbers on the last line that the script prints in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    # It compiles as fast as this process.
    given = {**clean, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=given, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


def test_entry_points_start_no_backend_and_get_a_device_per_core():
    found = run_script("""
        import os
        os.sched_getaffinity = lambda _: {0, 1, 2}
        import jax
        import launch.meta_train, launch.meta_test, benchmarks.seeds, benchmarks.meta_step
        from launch.runtime import devices
        devices.one_per_core()
        cores = jax.config.jax_num_cpu_devices
        jax.config.update("jax_num_cpu_devices", 2)  # raises after the start of a backend
        started = jax.local_device_count()
        devices.one_per_core()  # too late: it changes nothing
        print(cores, started, jax.local_device_count())
    """)
    assert found == [3, 2, 2]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"jax_num_cpu_devices": devices.cores()}),
        ({"JAX_NUM_CPU_DEVICES": "3"}, {}),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {}),
    ],
    ids=str,
)
def test_a_number_of_devices_in_the_environment_has_priority(environment, expected, monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    devices.one_per_core()
    assert updates == expected


def test_a_run_resumed_and_tested_on_two_devices_has_the_curves_of_one_device(
    run: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
):
    # Back to the checkpoint of meta-step 10, which one device wrote.
    (run / "checkpoints" / "20").rename(tmp_path / "20")
    count = run_script(
        f"""
        import jax
        from launch import experiments, meta_test, meta_train
        experiments.modules = lambda: {{"line": "tests.launch.line"}}
        assert meta_train.main(["meta_train", "--experiment=line", "--workdir={run}"]) == 0
        assert meta_test.main(["meta_test", "--workdir={run}", "--variants=none"]) == 0
        print()
        print(jax.local_device_count())
        """,
        JAX_NUM_CPU_DEVICES="2",
    )
    assert count == [2]
    one, two = (json.loads((path / run_folder.RESULTS).read_text()) for path in (finished, run))
    assert one["curves"].keys() == two["curves"].keys()
    for name, curve in one["curves"].items():
        np.testing.assert_allclose(np.array(two["curves"][name], float), np.array(curve, float), rtol=1e-3, atol=1e-6)
