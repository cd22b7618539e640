"""metrics.csv, TensorBoard and the progress report."""

import importlib
import io
import struct
from typing import Any

import numpy as np
import pytest

from launch.runs import history, metrics_log
from launch.errors import UsageError
from launch.runs.progress import Progress

EVENT: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event  # generated when imported
NAMES = ("task_loss", "skipped")


def window(*values: float) -> dict[str, np.ndarray]:
    return {"task_loss": np.array(values, np.float32), "skipped": np.ones(len(values), np.int32)}


def write(folder, step, *rows):
    log = metrics_log.Log(folder, NAMES, step)
    for row_step, values, seconds in rows:
        log.write(row_step, window(*values), seconds)
    log.close()


def events(folder):
    """(tag, step, value) of each scalar; a record is a length, its checksum, the data and their checksum."""
    found = []
    for path in sorted((folder / "tb").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = EVENT.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_rows_hold_means_and_sums_and_tensorboard_the_same(tmp_path):
    write(tmp_path, 0, (2, (1.0, 2.0), 0.5), (4, (3.0, 4.0), 1.25))
    assert (tmp_path / "metrics.csv").read_text() == "step,task_loss,skipped,seconds\n2,1.5,2,0.500\n4,3.5,2,1.250\n"
    expected = [("task_loss", 2, 1.5), ("skipped", 2, 2.0), ("seconds", 2, 0.5)]
    assert [event for event in events(tmp_path) if event[1] == 2] == expected
    assert ("task_loss", 4, 3.5) in events(tmp_path)


def test_going_on_cuts_rows_beyond_the_step_and_half_written_ones(tmp_path):
    write(tmp_path, 0, (2, (1.0, 2.0), 0.5), (4, (3.0, 4.0), 1.25))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,0.1")
    log = metrics_log.Log(tmp_path, NAMES, 3)
    assert log.seconds == 0.5
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,task_loss,skipped,seconds\n2,1.5,2,0.500\n"


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        "step,task_loss,skipped,seconds\n2,1.5\n",
        "step,task_loss,skipped,seconds\nx,1,2,3\n",
        "step,task_loss,skipped,seconds\n2,low,2,3\n",
        b"step,task_loss,skipped,seconds\n2,\xff,2,3\n",
    ],
)
def test_a_metrics_file_that_is_not_the_runs_is_refused_and_kept(text, tmp_path):
    path, content = tmp_path / "metrics.csv", text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(UsageError, match="move it away"):
        metrics_log.Log(tmp_path, NAMES, 3)
    with pytest.raises(UsageError, match="move it away"):
        metrics_log.read(tmp_path)
    assert path.read_bytes() == content


def test_what_was_not_logged_yet_reads_as_nothing(tmp_path):
    assert metrics_log.read(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("")
    assert metrics_log.read(tmp_path) == {}


def test_a_history_of_nothing_is_not_written(tmp_path):
    recorded = history.History(tmp_path, 5, lambda phi: phi)
    recorded.write()
    assert history.read(tmp_path) is None
    recorded.add(10, np.ones(2))
    recorded.write()
    found = history.read(tmp_path)
    assert found is not None
    assert found["steps"].tolist() == [10]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_few_plain_lines():
    lines, pipe = io.StringIO(), io.StringIO()
    progress = Progress(1000, lines=lines, terminal=pipe)
    for step in range(1, 1001):
        progress.update(step, 0.25)
    progress.close()
    said = lines.getvalue().splitlines()
    assert 10 <= len(said) <= 12
    assert said[-1].startswith("meta-step 1000/1000  task loss 0.25")
    assert said[-1].endswith("steps/s  0 s left")
    assert "\r" not in lines.getvalue()
    assert pipe.getvalue() == ""


def test_a_terminal_gets_a_bar_with_rate_time_left_and_task_loss():
    lines, terminal = io.StringIO(), Terminal()
    progress = Progress(100, lines=lines, terminal=terminal)
    for step in (50, 100):
        progress.update(step, 0.125)
    progress.say("a remark")
    progress.close()
    bar = terminal.getvalue()
    assert "\r" in bar
    assert "100/100" in bar
    assert "task loss 0.125" in bar
    assert "step/s" in bar
    assert lines.getvalue() == "a remark\n"
