"""Tasks on one device, and the tests of `on_two_devices` in a process with two."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from ml3_jax import sharding
from tests.ml3_jax import toys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.mark.slow
def test_on_two_devices():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        str(HERE / "on_two_devices.py"),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_on_one_device_state_and_functions_are_unchanged(monkeypatch: pytest.MonkeyPatch):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    assert sharding.mesh_for(8) is None
    state = toys.learner(toys.quadratic(), toys.scaled_square(), num_tasks=4).init(toys.KEY)
    assert sharding.place(state, 4) == (state, None)

    def of_tasks(xs: Any) -> Any:
        return xs

    assert sharding.shard(of_tasks, None) is of_tasks
    assert sharding.mean_over_devices(of_tasks, None) is of_tasks


def test_in_one_of_several_processes_the_caller_chooses_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [0, 1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert sharding.mesh_for(8) is None


def test_a_caller_s_default_device_or_mesh_leaves_no_mesh_to_choose(monkeypatch: pytest.MonkeyPatch):
    found = object()
    monkeypatch.setattr(sharding, "_mesh", lambda num_tasks, devices: found)
    assert sharding.mesh_for(4) is found
    with jax.default_device(jax.devices()[0]):
        assert sharding.mesh_for(4) is None
    with jax.set_mesh(jax.make_mesh((1,), ("mine",))):
        assert sharding.mesh_for(4) is None
