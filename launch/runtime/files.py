"""Atomic replacement of files and folders: no reader sees a half-written one, and a failed write changes nothing."""

import contextlib
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

_UMASK = threading.Lock()  # the umask can only be read by setting it, and several threads write files


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, with its suffix, that replaces it when the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        with _UMASK:
            mask = os.umask(0)
            os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp gives permissions to the owner only
        temporary.replace(path)
    except OSError as error:  # a full disk, say: the message needs the file
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path for a new folder, which replaces the folder `path` when the block ends without an error."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        new = pathlib.Path(temporary) / "new"
        yield new
        if path.is_dir():
            path.rename(pathlib.Path(temporary) / "old")
        new.rename(path)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file; refuses NaN and infinities, which JSON does not have."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
