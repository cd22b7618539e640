"""The progress report of meta-training: a bar on a terminal, a few plain lines in a pipe."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINES = 10  # plain lines in a run, about


class Progress:
    """Reports the meta-steps done, their rate, the time left and the current task loss."""

    def __init__(self, total: int, start: int = 0, *, lines: TextIO | None = None, terminal: TextIO | None = None):
        """Starts the report at meta-step `start` of `total`.

        Plain lines go to `lines` (None: standard output), a bar to `terminal` (None: standard error) if it is a terminal.
        """
        self.total, self._start, self._next = total, start, start
        self._lines = sys.stdout if lines is None else lines
        stream = sys.stderr if terminal is None else terminal
        self._first: tuple[int, float] | None = None  # step and time of the first report; the time before is compilation
        hidden = stream is None or not stream.isatty()  # a detached process has no standard error
        self._bar = tqdm(
            total=total, initial=start, file=stream, unit="step", desc="meta-training", dynamic_ncols=True, disable=hidden
        )

    def update(self, step: int, task_loss: float) -> None:
        """Reports the number of meta-steps done and the task loss."""
        self._bar.set_postfix_str(f"task loss {task_loss:.4g}", refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and (step >= self._next or step == self.total):
            self._next = step + max(1, (self.total - self._start) // LINES)
            self.say(f"meta-step {step}/{self.total}  task loss {task_loss:.4g}{self._pace(step)}")
        if self._first is None:
            self._first = step, time.monotonic()

    def _pace(self, step: int) -> str:
        """Rate and time left, in words; empty at the first report."""
        if self._first is None:
            return ""
        rate = (step - self._first[0]) / max(time.monotonic() - self._first[1], 1e-9)
        return f"  {rate:.1f} steps/s  {(self.total - step) / max(rate, 1e-9):.0f} s left"

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.clear()
        print(text, file=self._lines, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
