"""For the tests of the library: an operation that broadcasts arrays of different ranks is an error, and XLA is in a hurry."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion() -> Iterator[None]:
    """The library's own arithmetic says which axes it broadcasts."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """These programs are tiny and run once: to optimise them takes twice as long as to compile them as they are."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
