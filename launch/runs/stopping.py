"""Requests to stop: SIGTERM (preemption) and SIGINT (Ctrl-C). The work in hand is finished and saved first.

Python runs signal handlers between two of its own instructions, and a compilation takes longer than a scheduler waits. So a
thread listens, and ends the process where the work does not come to an end.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 10.0  # s from a request to the end of the work in hand
_END = 0  # to the listening thread; no signal has this number


class Stopped(KeyboardInterrupt):
    """The work was stopped by a signal; the message says how to go on."""

    def __init__(self, number: int, words: str):
        super().__init__(words)
        self.number = number


def exit_code(number: int) -> int:
    """The exit code of a process that a signal stopped, as shells give it."""
    return 128 + number


class StopRequest:
    """Listens to `SIGNALS` inside `listening`.

    Attributes:
      number: the first signal, None without one.
    """

    def __init__(self, kept: Callable[[], str], *, at_once: bool = False):
        """`kept` says what a later run finds. With `at_once` a signal raises `Stopped` in the main thread."""
        self.number: int | None = None
        self._kept, self._at_once = kept, at_once
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handles the signals in this block. Only the main thread of a process may; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        listener = threading.Thread(target=self._listen, args=(read,), daemon=True)
        listener.start()
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.write(write, bytes([_END]))
            listener.join()
            self.finish_work()
            os.close(read)
            os.close(write)

    def finish_work(self) -> None:
        """The work in hand is done: from here on the process is not ended after `GRACE` seconds."""
        if self._timer is not None:
            self._timer.cancel()

    def stop_if_requested(self) -> None:
        """Raises `Stopped` after a signal."""
        if self.number is not None:
            raise Stopped(self.number, self._kept())

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self._at_once:
            raise Stopped(number, self._kept())

    def _listen(self, read: int) -> None:
        while (number := os.read(read, 1)[0]) != _END:
            if number not in SIGNALS:
                continue
            if self.number is not None:
                self._leave()
            # Before `number`: the main thread cancels the timer as soon as it sees a number.
            self._timer = threading.Timer(GRACE, self._leave)
            self._timer.daemon = True
            self._timer.start()
            self.number = number
            if not self._at_once:
                name = signal.Signals(number).name
                print(
                    f"\n{name}: stopping after this work is saved; a second signal stops at once", file=sys.stderr, flush=True
                )

    def _leave(self) -> None:
        assert self.number is not None
        print(f"\nstopped at once by {signal.Signals(self.number).name}; {self._kept()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(exit_code(self.number))  # the main thread may be inside a compilation
