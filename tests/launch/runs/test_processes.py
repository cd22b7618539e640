"""meta_train in several processes: one run folder, one writer, and an end that loses nothing."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import time

import jax
import numpy as np
import pytest
from absl import flags

from launch import experiments
from launch.errors import TrainingError, UsageError
from launch.runs import metrics_log, processes, run_folder, single_run, trainer
from launch.runs.folder_lock import FolderLock
from launch.runtime import devices
from tests.launch.runs.processes import Run, rows

LIMIT = 60.0  # s from the end of one process to the end of all others


def start(count: int, folder: pathlib.Path, *arguments: str, **options) -> list[Run]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    common = [f"--coordinator_address={address}", f"--num_processes={count}", "--config.num_tasks=4", *arguments]
    return [Run(folder, f"--process_id={number}", *common, **options) for number in range(count)]


def ended(runs: list[Run]) -> list[tuple[int, str]]:
    """Exit codes and words. Only SIGKILL ends a process of jax.distributed for sure."""
    try:
        return [run.end() for run in runs]
    finally:
        for run in runs:
            run.process.kill()


def config(folder: pathlib.Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_two_processes_train_a_run_that_one_resumes_and_the_other_way_round(tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    (code, said), (other_code, other_said) = ended(start(2, folder, steps=100))
    assert (code, other_code) == (0, 0), said + other_said
    assert "meta-step 100/100" in said
    assert "meta-step" not in other_said
    assert {"config.json", "metrics.csv", "tb", "checkpoints", "learned_loss", "history.npz"} <= {
        p.name for p in folder.iterdir()
    }
    assert Run(alone, "--config.num_tasks=4", steps=100).end()[0] == 0
    first, same = (metrics_log.read(path)["task_loss"][0] for path in (folder, alone))
    np.testing.assert_allclose(first, same, rtol=1e-5)  # a row is 5 meta-steps; later digits depend on the devices
    assert config(folder) == {**config(alone), "devices": "2 cpu in 2 processes"}
    code, said = Run(folder, "--config.num_tasks=4", steps=150).end()
    assert code == 0, said
    assert "is at meta-step 100: going on to 150" in said
    assert "this run was started with 2 cpu in 2 processes (now " in said
    results = ended(start(2, folder, steps=200))
    assert [code for code, _ in results] == [0, 0], results
    assert "is at meta-step 150: going on to 200" in results[0][1]
    assert rows(folder) == 40


def cut_short(count: int, victim: int, number: int, folder: pathlib.Path) -> list[tuple[int, str]]:
    """What the processes of a long run say after one of them gets a signal, and that the run goes on in one process."""
    runs = start(count, folder, steps=100_000)
    runs[victim].wait_for(lambda: rows(folder) >= 25)
    runs[victim].process.send_signal(number)
    began = time.monotonic()
    results = ended(runs)
    assert time.monotonic() - began < LIMIT
    done = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    code, said = Run(folder, "--config.num_tasks=4", steps=done + 50).end()
    assert code == 0, said
    assert f"is at meta-step {done}: going on to {done + 50}" in said
    steps = metrics_log.read(folder)["step"].tolist()
    assert steps == list(range(5, done + 51, 5))
    return results


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    results = cut_short(2, 1, signal.SIGTERM, tmp_path / "run")
    assert [code for code, _ in results] == [143, 143], results
    assert "stopped by SIGTERM; the same command goes on from meta-step" in results[0][1]


@pytest.mark.parametrize(
    ("count", "victim"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.long),
        pytest.param(4, 3, marks=pytest.mark.long),
        pytest.param(4, 0, marks=pytest.mark.long),
    ],
)
def test_after_the_death_of_one_process_all_others_stop_with_a_message(count, victim, tmp_path):
    results = cut_short(count, victim, signal.SIGKILL, tmp_path / "run")
    for number, (code, said) in enumerate(results):
        assert code != 0
        # JAX itself may be the first to notice, in the process or at the coordinator.
        words = ("another process of this run has ended or cannot be reached", "JAX distributed service detected fatal errors")
        assert number == victim or any(text in said for text in words), said


@pytest.mark.slow
def test_several_seeds_in_two_processes_and_a_folder_in_use(tmp_path):
    folder = tmp_path / "runs"
    results = ended(start(2, folder, "--seeds=0,1", steps=50))
    assert [code for code, _ in results] == [0, 0], results
    assert {path.name: rows(path) for path in folder.iterdir()} == {"seed_0": 10, "seed_1": 10}
    with processes_lock(folder / "seed_1"):
        results = ended(start(2, folder, "--seeds=0,1", steps=100))
    assert [code for code, _ in results] == [2, 2], results
    assert "is in use by process" in results[0][1]
    assert {path.name: rows(path) for path in folder.iterdir()} == {"seed_0": 10, "seed_1": 10}


def processes_lock(folder: pathlib.Path):
    lock = FolderLock(folder, run_folder.LOCK)
    lock.acquire()
    return lock


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "4"}, 1),  # a shell of a job, without srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, 1),
    ],
)
def test_a_launcher_says_the_number_of_processes(environment, count):
    assert processes.in_environment(environment) == count


@pytest.mark.parametrize(
    ("arguments", "environment", "count"),
    [
        ([], {}, 1),
        (["--coordinator_address=localhost:1", "--num_processes=4"], {}, 4),
        (["--coordinator_address=127.0.0.1:1", "--num_processes=2"], {}, 2),
        (["--coordinator_address=node17:1", "--num_processes=4"], {}, 1),
        ([], {"SLURM_NTASKS": "7", "SLURM_PROCID": "1", "SLURM_TASKS_PER_NODE": "4(x2),3"}, 4),
        ([], {"SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_NTASKS_PER_NODE": "2"}, 2),
        ([], {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
    ],
)
def test_processes_of_one_machine_share_its_cores(arguments, environment, count):
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["meta_train", *arguments])
    assert processes.on_this_machine(values, environment) == count


def test_a_single_process_asks_no_other_one():
    assert processes.first()
    assert not processes.several()
    assert processes.on_first(lambda: 3) == 3
    assert processes.of_all(5) == [5]
    assert processes.leave()
    with pytest.raises(RuntimeError, match="Gloo"), processes.noticing_lost_ones(lambda: ""):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed")


def test_a_lost_process_is_no_fault_of_the_config(tmp_path, monkeypatch):
    def lost(state, count):
        raise ValueError("UNKNOWN: Gloo AllGather failed: connection closed by peer")

    experiment = experiments.build("line")
    broken = experiment._replace(meta=experiment.meta._replace(run=lost))
    record = run_folder.make_record("line", 0, experiment.config)
    start = single_run.make_start(experiment, 0)
    run = single_run.Run(tmp_path / "run", record, start, FolderLock(tmp_path / "run", run_folder.LOCK))
    monkeypatch.setattr(processes, "several", lambda: True)
    with pytest.raises(processes.LostProcessError, match=r"another process .* goes on from meta-step 0") as raised:
        trainer.Trainer(broken, [run]).run(20)
    assert "with this config" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass
class Wire:
    """Stands for the channel from the first process to the others."""

    content: np.ndarray | None = None

    def broadcast(self, value: np.ndarray) -> np.ndarray:
        self.content = value if self.content is None else self.content
        return self.content


@pytest.mark.parametrize("error", [UsageError("a folder in use"), TrainingError("x" * 9000), OSError("a full disk"), None])
def test_an_error_of_the_first_process_is_raised_in_all(error, monkeypatch):
    wire, calls = Wire(), []

    def work():
        calls.append(1)
        if error is not None:
            raise error
        return "done"

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", wire.broadcast)
    for first in (True, False):
        monkeypatch.setattr(processes, "first", lambda first=first: first)
        if error is None:
            assert processes.on_first(work) == ("done" if first else None)
        else:
            with pytest.raises(type(error), match=str(error)[:20]):
                processes.on_first(work)
    assert calls == [1]


def test_cores_are_shared_out_among_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(devices.jax.config, "update", lambda name, value: asked.append((name, value)))
    for count, threads in ((1, None), (4, "2"), (16, "1")):
        for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC"):
            monkeypatch.setenv(name, "0")  # so that the end of the test takes back what the code sets
            monkeypatch.delenv(name)
        devices.one_per_core(count)
        assert os.environ.get("NPROC") == threads
    assert asked == [("jax_num_cpu_devices", count) for count in (8, 2, 1)]
