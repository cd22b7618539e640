"""Several processes with one CPU device each compute what one process computes, and read each other's checkpoints."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run(count: int, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """What `count` processes compute."""
    command = [sys.executable, "-m", "tests.ml3_jax.in_processes"]
    arguments = [str(count), str(free_port()), str(folder)]
    # A process of jax.distributed survives SIGTERM: the limit of a test needs SIGKILL, which subprocess sends.
    running = [
        subprocess.Popen(
            [*command, str(number), *arguments], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(said)
    with np.load(folder / f"{count}.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return run(1, folder)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_compute_what_one_does(count: int, folder: pathlib.Path, alone: dict[str, np.ndarray]):
    together = run(count, folder)
    assert together.keys() == alone.keys()
    assert len(together) > 50
    for name, value in together.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
