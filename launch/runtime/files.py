"""Files and folders that are replaced as a whole: a reader never sees half of one, and a failed write changes nothing."""

import contextlib
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any


def _umask() -> int:
    """The process's umask, which can only be read by setting it: under a lock, as several threads write files."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask


_UMASK = threading.Lock()


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, with its suffix, that takes its place when the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path where nothing is yet; what is made there takes the place of the folder `path` when the block ends well."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        made = pathlib.Path(temporary) / "new"
        yield made
        if path.is_dir():
            path.rename(pathlib.Path(temporary) / "old")
        made.rename(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file's text as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file as a whole; refuses NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
