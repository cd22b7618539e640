"""Files and folders are replaced atomically."""

import pytest

from launch.runtime import files
from tests.launch.conftest import snapshot


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})

    class StoppedError(Exception):
        pass

    def half_write():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise StoppedError

    with pytest.raises(StoppedError):
        half_write()
    assert snapshot(tmp_path) == {"x.json": b'{\n "a": 1\n}\n'}


def test_a_folder_is_replaced_with_all_its_files(tmp_path):
    for text in ("old", "new"):
        with files.replacing_folder(tmp_path / "loss") as new:
            new.mkdir()
            (new / text).write_text(text)
    assert snapshot(tmp_path) == {"loss": b"folder", "loss/new": b"new"}
