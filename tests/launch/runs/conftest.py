"""A compilation cache for the processes that the tests of a module start."""

import pytest

from launch.runtime import compilation_cache


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Each program is compiled by the first process alone."""
    patch = pytest.MonkeyPatch()
    patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    patch.setenv(compilation_cache.SWITCH, str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
