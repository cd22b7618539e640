"""Meta-training survives real faults: processes that are killed, stopped or started twice, and a disk that is full.

One trial of each is slow, the others are long: chance decides at which moment a fault hits.
"""

import contextlib
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from launch.runs import metrics_log
from tests.launch.runs.processes import STEPS, Run, numbers, rows

pytestmark = pytest.mark.usefixtures("compiled_once")
TRIALS = [pytest.param(trial, marks=pytest.mark.long if trial else pytest.mark.slow) for trial in range(5)]
EACH_TRIAL = pytest.mark.parametrize("trial", TRIALS)
# Permissions do not stop root, unless it gives up this right.
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = Run(folder).end()
    assert code == 0, said
    return numbers(folder)


@EACH_TRIAL
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_the_same_command_ends_as_if_there_had_been_none(
    trial: int, number: signal.Signals, tmp_path: pathlib.Path, uninterrupted: dict[str, Any]
):
    folder = tmp_path / "run"
    run, chance = Run(folder), random.Random(trial)
    after = chance.randrange(1, 100)
    run.wait_for(lambda: rows(folder) >= after)
    began = time.monotonic()
    code, said = run.end(number)
    assert time.monotonic() - began < 10
    assert code == 128 + number
    assert f"{number.name}: stopping after this work is saved; a second signal stops at once" in said
    step = 5 * rows(folder)
    assert f"the same command goes on from meta-step {step}" in said
    assert (folder / "checkpoints" / str(step)).is_dir()
    code, said = Run(folder).end()
    assert code == 0, said
    assert f"is at meta-step {step}: going on to {STEPS}" in said
    assert numbers(folder) == uninterrupted


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    # One block, which takes longer than the test waits.
    run = Run(folder, "--config.log_every=10000000", "--config.save_every=10000000", steps=10_000_000)
    run.wait_for(lambda: _listens(run.process.pid))
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    code, said = run.end(signal.SIGTERM)
    assert code == 143
    assert "stopped at once by SIGTERM; the same command goes on from meta-step 0" in said
    assert not folder.exists()


def _listens(process: int) -> bool:
    """Whether a process handles SIGTERM."""
    status = (pathlib.Path("/proc") / str(process) / "status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    first = Run(folder, steps=100_000)
    first.wait_for(lambda: rows(folder) >= 2)
    code, said = Run(folder, steps=100_000).end()
    assert code == 2
    assert f"{folder} is in use by process {first.process.pid} on host {socket.gethostname()}: wait for it" in said
    assert "Traceback" not in said
    first.end(signal.SIGKILL)
    code, said = Run(folder, steps=5 * rows(folder) + 50).end()
    assert code == 0, said


# {experiment: (meta-steps, most rows of metrics.csv before the next kill, flags)}. A row is 5 meta-steps; for each of them the
# model of reacher_mbrl is fitted anew.
KILLED = {
    "sine": (3000, 12, ["--config.inner_steps=4", "--config.save_every=50"]),
    "reacher_mfrl": (3000, 12, ["--config.save_every=50"]),
    "reacher_mbrl": (400, 3, ["--config.refresh_every=5", "--config.save_every=10"]),
}


@pytest.mark.parametrize(
    ("experiment", "kills"),
    [
        pytest.param("sine", 2, marks=pytest.mark.slow),
        *(pytest.param(experiment, 20, marks=pytest.mark.long) for experiment in KILLED),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(experiment: str, kills: int, tmp_path: pathlib.Path):
    steps, most, flags = KILLED[experiment]
    flags, chance = ["--config.num_tasks=2", "--config.log_every=5", *flags], random.Random(kills)

    def start(folder: pathlib.Path) -> Run:
        return Run(folder, *flags, experiment=experiment, steps=steps, small=False)

    whole, folder = tmp_path / "whole", tmp_path / "run"
    code, said = start(whole).end()
    assert code == 0, said
    saves = folder / "checkpoints"
    for kill in range(kills):
        run, after = start(folder), rows(folder) + chance.randint(1, most)
        run.wait_for(lambda after=after: rows(folder) >= after)
        if kill % 2:  # during a save: Orbax writes to a temporary folder first
            run.wait_for(lambda: saves.is_dir() and any("tmp" in path.name for path in saves.iterdir()))
        time.sleep(0.02 * chance.random())
        assert run.process.poll() is None
        run.end(signal.SIGKILL)
    code, said = start(folder).end()
    assert code == 0, said
    assert numbers(folder) == numbers(whole)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_is_no_misuse_and_the_same_command_goes_on(
    tmp_path: pathlib.Path, uninterrupted: dict[str, Any]
):
    folder = tmp_path / "run"
    run = Run(folder, wrapper=WITHOUT_RIGHTS)
    run.wait_for(lambda: rows(folder) >= 2)
    (folder / "checkpoints").chmod(0o500)
    code, said = run.end()
    (folder / "checkpoints").chmod(0o700)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(r"the checkpoint of meta-step \d+ could not be written: .*Permission denied", line)
    assert str(folder) in line
    assert "Traceback" not in said
    before = rows(folder)
    folder.chmod(0o500)
    code, said = Run(folder, wrapper=WITHOUT_RIGHTS).end()
    folder.chmod(0o700)
    assert code == 2  # before a meta-step is spent
    assert f"--workdir {folder} cannot be written: no permission to write in {folder}" in said
    assert rows(folder) == before
    code, said = Run(folder).end()
    assert code == 0, said
    assert numbers(folder) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full disk", "file too large"])
def test_a_full_disk_is_no_misuse_and_with_room_the_same_command_goes_on(
    fault: str, tmp_path: pathlib.Path, uninterrupted: dict[str, Any]
):
    folder = tmp_path / "disk" / "run"
    folder.parent.mkdir()
    with contextlib.ExitStack() as mounts:
        limit = None
        if fault == "file too large" or not _mount(folder.parent, "size=320k"):  # only root may mount
            limit, words = 4000, "File too large|No space left on device"
        else:
            mounts.callback(subprocess.run, ["umount", folder.parent], check=True)
            words = "No space left on device"
        code, said = Run(folder, wrapper=[] if limit is None else ["prlimit", f"--fsize={limit}"]).end()
        assert code == 1, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert re.search(words, line)
        assert str(folder) in line or "checkpoint of meta-step" in line
        assert "Traceback" not in said
        if (folder / "metrics.csv").exists():
            assert (folder / "metrics.csv").read_bytes().endswith(b"\n")
        if limit is None:
            assert _mount(folder.parent, "remount,size=64m")
        code, said = Run(folder).end()
        assert code == 0, said
        assert numbers(folder) == uninterrupted


def _mount(folder: pathlib.Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_rows_of_a_metrics_log_are_whole_or_absent(tmp_path: pathlib.Path):
    log = metrics_log.Log(tmp_path, ("loss",), 0)
    log.write(5, {"loss": np.ones(5)}, 1.0)
    before = (tmp_path / "metrics.csv").read_bytes()
    limit = _limited_file_size(len(before) + 4)
    try:
        with pytest.raises(OSError, match=r"metrics\.csv"):
            log.write(10, {"loss": np.ones(5)}, 2.0)
    finally:
        limit()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    log.write(10, {"loss": np.ones(5)}, 2.0)
    assert metrics_log.read(tmp_path)["step"].tolist() == [5, 10]
    log.close()


def test_a_board_that_cannot_be_written_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    log = metrics_log.Log(tmp_path, ("loss",), 0)

    def full() -> None:
        raise OSError(28, "No space left on device")  # as tensorboardX raises it, without a file

    with monkeypatch.context() as patch:
        patch.setattr(log._board, "flush", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*tb'"):
            log.flush()
    log.close()


def _limited_file_size(size: int) -> Callable[[], None]:
    """Lets no file of this process grow beyond a size; returns the function that ends it."""
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)

    return end
