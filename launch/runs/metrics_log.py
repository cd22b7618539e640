"""What meta-training logs: metrics.csv and TensorBoard, one row for each `log_every` meta-steps.

A row holds the mean of each metric over the meta-steps since the row before (of `skipped` the sum) and the seconds spent
so far. It is made of the values of each meta-step, so that a resumed run writes the bytes of an uninterrupted one.
"""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from tensorboardX import SummaryWriter

from launch.errors import UsageError
from launch.runs import run_folder
from launch.runtime import files

TIME_COLUMNS = ("seconds",)  # all that differs between two runs of the same command
SUMMED = ("skipped",)


class Log:
    """Appends rows to metrics.csv and TensorBoard; opening it cuts off what lies beyond the step that is resumed."""

    def __init__(self, folder: pathlib.Path, names: Sequence[str], step: int):
        """Opens the log.

        Args:
          folder: the run folder.
          names: the metrics of one meta-step.
          step: the meta-step that training goes on from; rows beyond it are dropped.
        """
        self._path = folder / run_folder.METRICS
        self._columns = ["step", *names, *TIME_COLUMNS]
        kept = [row for row in check(self._path, names) if int(row["step"]) <= step]
        self._seconds = float(kept[-1]["seconds"]) if kept else 0.0
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        files.write_text(self._path, text.getvalue())
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._board = SummaryWriter(str(folder / run_folder.TENSORBOARD), purge_step=step + 1 if step else None)

    @property
    def seconds(self) -> float:
        """Seconds that the run had taken at its last row."""
        return self._seconds

    def write(self, step: int, window: Mapping[str, np.ndarray], seconds: float) -> None:
        """Appends a row.

        Args:
          step: the meta-step that the window ends with.
          window: for each metric its values since the last row, [log_every].
          seconds: what the run has taken so far.
        """
        row = {name: _summary(name, values) for name, values in window.items()}
        self._seconds = seconds
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(
            {"step": step, **row, "seconds": f"{seconds:.3f}"}
        )
        self._file.flush()
        for name, value in {**row, "seconds": seconds}.items():
            self._board.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Makes what was written outlive the process."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._board.close()


def check(path: pathlib.Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv with these metrics; none where there is no file.

    A last line without an end, as a killed process leaves it, does not count.

    Raises:
      UsageError: the file is not one that this run wrote.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): move it away to go on without its rows") from error
    columns = ["step", *names, *TIME_COLUMNS]
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(io.StringIO(whole)))
    if whole and whole.split("\n", 1)[0].split(",") != columns:
        raise UsageError(
            f"{path} is not this run's: expected the columns {','.join(columns)}, got {whole.splitlines()[0][:80]}; "
            "move it away to go on without its rows"
        )
    if not all(
        set(row) == set(columns) and row["step"].isdigit() and all(_is_number(value) for value in row.values()) for row in rows
    ):
        raise UsageError(
            f"{path} is damaged: expected {len(columns)} values in each row; move it away to go on without its rows"
        )
    return rows


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of a run folder's metrics.csv, each [rows]; empty where nothing was logged.

    Raises:
      UsageError: as `check`, of the columns that the file has.
    """
    path = folder / run_folder.METRICS
    try:
        header = path.read_text(encoding="utf-8").split("\n", 1)[0].split(",")
    except (OSError, UnicodeDecodeError):
        header = []  # no file, or one that `check` cannot read either
    rows = check(path, header[1 : -len(TIME_COLUMNS)])
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]} if rows else {}


def _summary(name: str, values: np.ndarray) -> float | int:
    values = np.asarray(values, dtype=np.float64)
    return int(values.sum()) if name in SUMMED else float(values.mean())


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
