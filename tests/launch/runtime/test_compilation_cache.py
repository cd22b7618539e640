"""The persistent compilation cache: its folder, how to turn it off, and runs without it."""

import contextlib
import importlib.util
from collections.abc import Iterator

import jax
import pytest

from launch.runtime import compilation_cache

SET = jax.config.update  # before it is replaced


@contextlib.contextmanager
def jax_platforms(names: str) -> Iterator[None]:
    """A value of JAX_PLATFORMS, without its effects."""
    before = getattr(jax.config, compilation_cache.PLATFORMS)
    SET("jax_platforms", names)
    try:
        yield
    finally:
        SET("jax_platforms", before)


@pytest.fixture(autouse=True)
def changed(monkeypatch):
    """Records updates of JAX's settings instead of making them."""
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return settings


def test_the_cache_lies_below_the_users_cache_folder(tmp_path, monkeypatch, changed):
    monkeypatch.delenv(compilation_cache.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.enable() == tmp_path / "ml3_jax" / "xla"
    assert changed["jax_compilation_cache_dir"] == str(tmp_path / "ml3_jax" / "xla")
    assert changed["jax_persistent_cache_enable_xla_caches"] == "none"


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("", (), "none"),
        ("", ("jax_cuda13_plugin",), compilation_cache.AUTOTUNING),
        ("cpu", ("jax_cuda13_plugin",), "none"),
        ("cuda,cpu", ("jax_cuda12_plugin",), compilation_cache.AUTOTUNING),
    ],
)
def test_a_gpu_keeps_its_choice_of_kernels_too(tmp_path, monkeypatch, changed, platforms, plugins, expected):
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in plugins else None)
    with jax_platforms(platforms):
        compilation_cache.enable()
    assert changed["jax_persistent_cache_enable_xla_caches"] == expected


def test_the_switch_moves_the_cache_and_turns_it_off(tmp_path, monkeypatch, changed):
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "mine"))
    assert compilation_cache.enable() == tmp_path / "mine"
    changed.clear()
    monkeypatch.setenv(compilation_cache.SWITCH, "0")
    assert compilation_cache.enable() is None
    assert changed == {}


def test_the_environment_variable_of_jax_has_priority(monkeypatch, changed):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert compilation_cache.enable() is None
    assert changed == {}


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, changed):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "file" / "below"))
    assert compilation_cache.enable() is None
    assert changed == {}
