"""Tasks on one device, and the tests of `on_two_devices` in a process with two."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("processes", "of_each", "num_tasks", "num_seeds", "shape"),
    [
        (2, 2, 8, None, (4,)),
        (2, 2, 6, None, (2,)),  # equally many devices of each process
        (2, 2, 5, None, None),
        (2, 2, 6, 2, (2, 2)),  # seeds first
        (2, 2, 5, 4, (4, 1)),
        (2, 2, 5, 2, (2, 1)),
        (1, 4, 6, 3, (3, 1)),
        (1, 4, 6, 1, (1, 3)),
        (3, 1, 4, 2, None),
    ],
)
def test_a_mesh_has_equally_many_devices_of_each_process(processes, of_each, num_tasks, num_seeds, shape):
    devices = tuple(Device(10 * process + index, process) for process in range(processes) for index in range(of_each))
    mesh = sharding._mesh(num_tasks, num_seeds, devices)
    assert (None if mesh is None else mesh.devices.shape[: mesh.devices.ndim]) == shape
    if mesh is not None:
        taken = [device.process_index for device in mesh.devices.ravel()]
        assert len({taken.count(process) for process in range(processes)}) == 1


def test_tasks_that_cannot_be_shared_out_among_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(0, 0), Device(1, 1)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    meta = toys.learner(toys.points(), num_tasks=3, inner_steps=1)
    with pytest.raises(ValueError, match="num_tasks = 3: cannot be shared out equally among 2 processes; choose a multiple"):
        meta.step(meta.init(toys.KEY))


def test_a_caller_s_default_device_or_mesh_leaves_no_mesh_to_choose(monkeypatch: pytest.MonkeyPatch):
    found = object()
    monkeypatch.setattr(sharding, "_mesh", lambda num_tasks, num_seeds, devices: found)
    assert sharding.mesh_for(4) is found
    with jax.default_device(jax.devices()[0]):
        assert sharding.mesh_for(4) is None
    with jax.set_mesh(jax.make_mesh((1,), ("mine",))):
        assert sharding.mesh_for(4) is None
