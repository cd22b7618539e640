"""The progress report of a long work: a bar on a terminal, a few plain lines in a pipe."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINES = 10  # plain lines in a run, about


class Progress:
    """Reports the steps done, their rate, the time left and a few words."""

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        work: str = "meta-training",
        step: str = "meta-step",
        lines: TextIO | None = None,
        terminal: TextIO | None = None,
    ):
        """Starts the report at step `start` of `total`.

        `work` and `step` name what is done. Plain lines go to `lines` (None: standard output), a bar to `terminal` (None:
        standard error) if it is a terminal.
        """
        self.total, self._start, self._next, self._step = total, start, start, step
        self._lines = sys.stdout if lines is None else lines
        stream = sys.stderr if terminal is None else terminal
        self._first: tuple[int, float] | None = None  # step and time of the first report; the time before is compilation
        hidden = stream is None or not stream.isatty()  # a detached process has no standard error
        self._bar = tqdm(total=total, initial=start, file=stream, unit="step", desc=work, dynamic_ncols=True, disable=hidden)

    def update(self, step: int, words: str = "") -> None:
        """Reports the number of steps done and words about the last one."""
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._bar.disable and (step >= self._next or step == self.total):
            self._next = step + max(1, (self.total - self._start) // LINES)
            self.say(f"{self._step} {step}/{self.total}{'  ' * bool(words)}{words}{self._pace(step)}")
        if self._first is None:
            self._first = step, time.monotonic()

    def _pace(self, step: int) -> str:
        """Rate and time left, in words; empty at the first report."""
        if self._first is None:
            return ""
        rate = (step - self._first[0]) / max(time.monotonic() - self._first[1], 1e-9)
        return f"  {rate:.1f} {self._step}s/s  {(self.total - step) / max(rate, 1e-9):.0f} s left"

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.clear()
        print(text, file=self._lines, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
