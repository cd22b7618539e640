"""metrics.csv and TensorBoard."""

import importlib
import struct
from typing import Any

import numpy as np
import pytest

from launch.errors import UsageError
from launch.runs import metrics_log

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


def test_a_resumed_log_drops_rows_after_the_step_and_half_written_ones(tmp_path):
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
def test_a_metrics_file_of_another_run_or_damaged_is_refused_and_kept(text, tmp_path):
    path, content = tmp_path / "metrics.csv", text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(UsageError, match="move it away"):
        metrics_log.Log(tmp_path, NAMES, 3)
    with pytest.raises(UsageError, match="move it away"):
        metrics_log.read(tmp_path)
    assert path.read_bytes() == content


def test_an_empty_log_reads_as_no_columns(tmp_path):
    assert metrics_log.read(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("")
    assert metrics_log.read(tmp_path) == {}
