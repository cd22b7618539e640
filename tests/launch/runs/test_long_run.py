"""20,000 meta-steps: memory and speed stay, old checkpoints go, and the logs stay small."""

import pathlib

import pytest

from tests.launch.runs.processes import Run, rows

STEPS, LOG_EVERY = 20_000, 100


def resident_memory(process: int) -> int:
    """KiB of a process."""
    status = (pathlib.Path("/proc") / str(process) / "status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def cpu_time(process: int) -> int:
    """Clock ticks of a process. Unlike seconds they hardly depend on other programs."""
    fields = (pathlib.Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.long
def test_a_long_run_stays_as_fast_and_as_small_as_it_began(tmp_path: pathlib.Path):
    folder = tmp_path / "run"
    flags = [f"--config.log_every={LOG_EVERY}", "--config.save_every=500"]
    run, memory, ticks = Run(folder, *flags, experiment="sine", steps=STEPS, small=False), {}, {}
    for fraction in (0.2, 0.45, 0.7, 0.95):
        run.wait_for(lambda done=fraction * STEPS / LOG_EVERY: rows(folder) >= done)
        memory[fraction], ticks[fraction] = resident_memory(run.process.pid), cpu_time(run.process.pid)
    code, said = run.end()
    assert code == 0, said
    assert memory[0.95] <= 1.05 * memory[0.2], memory
    assert ticks[0.95] - ticks[0.7] <= 1.1 * (ticks[0.45] - ticks[0.2]), ticks
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["19500", "20000"]
    assert sum(path.stat().st_size for path in (folder / "tb").iterdir()) < 2**20
    assert (folder / "metrics.csv").stat().st_size < 2**16
