"""Shared by all tests: numbers are float32 unless a test asks for the `x64` fixture."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_enable_x64", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in float64, for what is compared with finite differences."""
    with jax.enable_x64(True):
        yield
