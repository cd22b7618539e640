"""Two runs of one command compute the same bytes, on any number of devices; a run may go on with another number."""

import pathlib

import numpy as np
import pytest

from tests.launch.runs.processes import STEPS, Run, numbers, rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]


def train(folder: pathlib.Path, devices: int, steps: int = STEPS) -> pathlib.Path:
    run = Run(folder, steps=steps, environment={"JAX_NUM_CPU_DEVICES": str(devices)})
    code, said = run.end()
    assert code == 0, said
    return folder


def test_one_command_computes_the_same_bytes_twice_and_devices_change_rounding_alone(tmp_path: pathlib.Path):
    found = {}
    for devices in (1, 2):
        first, second = (numbers(train(tmp_path / f"{devices}_{again}", devices)) for again in ("a", "b"))
        assert first == second
        found[devices] = first
    # A trajectory amplifies rounding; the first meta-steps have not yet.
    one, two = (np.array(found[devices]["task_loss"][:4]) for devices in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path: pathlib.Path, before: int, after: int):
    folder = train(tmp_path / "run", before, STEPS // 2)
    half = numbers(folder)
    train(folder, after)
    assert rows(folder) == STEPS // 5
    whole = numbers(folder)
    assert whole["task_loss"][: STEPS // 10] == half["task_loss"]
    expected = numbers(train(tmp_path / "whole", before))
    middle = slice(STEPS // 10, STEPS // 10 + 4)
    np.testing.assert_allclose(whole["task_loss"][middle], expected["task_loss"][middle], rtol=1e-3)
