"""The log of meta-training: metrics.csv and TensorBoard, one row per `log_every` meta-steps.

A row holds the mean of each metric since the previous row (the sum of `skipped`) and the seconds spent so far. It is
computed from the values of each meta-step, so that a resumed run writes the same bytes as an uninterrupted one.
"""

import contextlib
import csv
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tensorboardX import SummaryWriter

from launch.errors import UsageError
from launch.runs import run_folder
from launch.runtime import files

TIME_COLUMNS = ("seconds",)  # the only columns that differ between two runs of one command
SUMMED = ("skipped", "left_out", "dead")
ADDED = ("left_out", "dead")  # columns since 0.2; in the rows of an older run they are 0


class Log:
    """Appends rows to metrics.csv and TensorBoard. Opening it removes the rows after the resumed meta-step.

    `seconds` are the seconds spent at the last row.
    """

    def __init__(self, folder: pathlib.Path, names: Sequence[str], step: int):
        """Opens the log of a run folder at a meta-step; `names` are the metrics of one meta-step."""
        self._folder, self._path = folder, folder / run_folder.METRICS
        self._columns = ["step", *names, *TIME_COLUMNS]
        kept = [row for row in check(self._path, names) if int(row["step"]) <= step]
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0
        with files.replacing(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self._file = self._path.open("ab", buffering=0)
        self._board = SummaryWriter(str(folder / run_folder.TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, step: int, window: Mapping[str, np.ndarray], seconds: float) -> None:
        """Appends the row of a meta-step: `window` is {metric: its values since the last row, [log_every]}."""
        row = {name: _summary(name, values) for name, values in window.items()}
        self.seconds = seconds
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow({"step": step, **row, "seconds": f"{seconds:.3f}"})
        self._append(line.getvalue().encode())
        for name, value in {**row, "seconds": seconds}.items():
            with _naming(self._folder / run_folder.TENSORBOARD):
                self._board.add_scalar(name, float(value), step)

    def _append(self, line: bytes) -> None:
        """Appends all of a line, or raises OSError and appends nothing: a full disk takes half a line without an error."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def flush(self) -> None:
        """Hands all rows to the operating system."""
        with _naming(self._folder / run_folder.TENSORBOARD):
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        with _naming(self._folder / run_folder.TENSORBOARD):
            self._board.close()


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Names the path in the message of a write that failed, which tensorboardX does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check(path: pathlib.Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv with these metrics; empty if there is no file.

    A killed process may leave a last line without a line break; it does not count.

    Raises:
      UsageError: the file is damaged or has other columns.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): move it away to go on without its rows") from error
    columns = ["step", *names, *TIME_COLUMNS]
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [",".join(columns)]
    advice = "move it away to go on without its rows"
    written = header.split(",")
    older = written != columns and written == [name for name in columns if name not in ADDED]
    if written != columns and not older:
        raise UsageError(f"{path} is not this run's: expected the columns {','.join(columns)}, got {header[:80]}; {advice}")
    rows = [{**(dict.fromkeys(ADDED, "0") if older else {}), **row} for row in csv.DictReader(lines, written)]
    if not all(set(row) == set(columns) and row["step"].isdigit() and all(map(_is_number, row.values())) for row in rows):
        raise UsageError(f"{path} is damaged: expected {len(columns)} numbers in each row; {advice}")
    return rows


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{column: its values [rows]} of a run folder's metrics.csv; empty if nothing was logged.

    Raises:
      UsageError: the file is damaged.
    """
    path = folder / run_folder.METRICS
    try:
        header = path.read_text(encoding="utf-8").split("\n", 1)[0].split(",")
    except (OSError, UnicodeDecodeError):
        header = []  # `check` reports what is wrong, if there is a file
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
