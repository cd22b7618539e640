"""The lock of a run folder: one process at a time works in it.

It is a `flock` on a file in the folder. The operating system releases it when the process ends, also by `kill -9` or a crash.
On NFS it holds between hosts (Linux 2.6.12 and later). A file system without locks gets a warning instead.
"""

import fcntl
import json
import os
import pathlib
import socket
import sys
from types import TracebackType

from launch.errors import UsageError


class FolderLock:
    """Held from `acquire` to the end of its `with` block."""

    def __init__(self, folder: pathlib.Path, name: str):
        """The lock `name` of a folder, which must exist when it is acquired. Nothing is written before."""
        self._path = folder / name
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def acquire(self) -> None:
        """Takes the lock; a held lock is kept.

        Raises:
          UsageError: another process has it; the message has its process id and its host.
        """
        if self.held:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(file)
            os.close(file)
            raise UsageError(
                f"{self._path.parent} is in use by {holder}: wait for it, stop it, or choose another --workdir"
            ) from error
        except OSError as error:
            print(
                f"note: {self._path.parent} cannot be locked ({error.strerror}): do not start a second run in it",
                file=sys.stderr,
            )
        self._file = file
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def release(self) -> None:
        """Gives the lock back. The file stays: another process may wait with it open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


def _holder(file: int) -> str:
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return f"process {said['process']} on host {said['host']}"
    except (ValueError, TypeError, KeyError):  # it has not written its name yet
        return "another process"
