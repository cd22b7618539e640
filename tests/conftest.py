"""Shared by all tests: numbers are float32 unless one asks for the `x64` fixture, and XLA is in a hurry unless one is slow."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_enable_x64", False)


@pytest.hookimpl(tryfirst=True)  # before fixtures, which compile too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Programs of most tests are small and run once: to optimise them takes twice as long as to compile them as they are.

    A slow test trains, or runs a launch from end to end: as a user does.
    """
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("slow") is None)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in float64, for what is compared with finite differences."""
    with jax.enable_x64(True):
        yield
