"""How far a run has come: a bar on a terminal, a few plain lines in a pipe."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINES = 10  # plain lines in a whole run


class Progress:
    """Reports meta-steps done, their rate, the time left and the current task loss."""

    def __init__(self, total: int, start: int = 0, *, lines: TextIO | None = None, terminal: TextIO | None = None):
        """Starts the report.

        Args:
          total: the meta-step at which the run ends.
          start: the meta-step at which it starts.
          lines: where plain lines go; None: standard output.
          terminal: where a bar goes, if that is a terminal; None: standard error.
        """
        self.total, self._start, self._next = total, start, start
        self._lines = sys.stdout if lines is None else lines
        stream = sys.stderr if terminal is None else terminal
        self._first: tuple[int, float] | None = None  # step and time of the first report: what came before was compilation
        self._bar = None
        if stream is not None and stream.isatty():  # a detached process has no standard error
            self._bar = tqdm(total=total, initial=start, file=stream, unit="step", desc="meta-training", dynamic_ncols=True)

    def update(self, step: int, task_loss: float) -> None:
        """Reports that `step` meta-steps are done and what the task loss is."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"task loss {task_loss:.4g}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._next or step == self.total:
            self._next = step + max(1, (self.total - self._start) // LINES)
            line = f"meta-step {step}/{self.total}  task loss {task_loss:.4g}{self._pace(step)}"
            print(line, file=self._lines, flush=True)
        if self._first is None:
            self._first = step, time.monotonic()

    def _pace(self, step: int) -> str:
        """Rate and time left, in words; nothing before there is a rate."""
        if self._first is None:
            return ""
        rate = (step - self._first[0]) / max(time.monotonic() - self._first[1], 1e-9)
        return f"  {rate:.1f} steps/s  {(self.total - step) / max(rate, 1e-9):.0f} s left"

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._lines, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
