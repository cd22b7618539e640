"""For the tests of the library: an operation that broadcasts arrays of different ranks is an error."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def no_rank_promotion() -> Iterator[None]:
    """The library's own arithmetic says which axes it broadcasts."""
    with jax.numpy_rank_promotion("raise"):
        yield
