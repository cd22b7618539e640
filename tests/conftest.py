"""Shared by all tests: float32 numbers, products in full precision, and programs that compile fast."""

import os
import tempfile
from collections.abc import Iterator

import jax
import pytest

# XLA's emitters for fused loops take almost half of the tests' CPU time: they compile slowly. XLA aborts on an unknown flag:
# jaxlib 0.10 has this one, jaxlib 0.12 does not.
FAST_COMPILATION = "--xla_cpu_use_fusion_emitters=false"
CACHE = "ML3_JAX_TESTS_CACHE"  # a folder for compiled programs that all processes of one test run share, and no other run
HAS_FLAG = jax.__version_info__ < (0, 11)

jax.config.update("jax_enable_x64", False)
# A GPU rounds the factors of float32 products to TF32 by default: comparisons to 2e-5 would fail. A CPU does not.
jax.config.update("jax_default_matmul_precision", "highest")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # of the processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start inherit the flag. Slow and long tests are compiled as for a user, if they are run alone."""
    if "not slow" not in config.option.markexpr:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if HAS_FLAG and FAST_COMPILATION not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FAST_COMPILATION}".strip()
    if CACHE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="ml3_jax_tests_")
        config.add_cleanup(folder.cleanup)
        os.environ[CACHE] = os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@pytest.hookimpl(tryfirst=True)  # before fixtures, which compile too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most programs of the tests are small and run once: optimising them takes longer than compiling them without.

    Slow and long tests train, or run a launch from end to end, so their programs are optimised.
    """
    trains = item.get_closest_marker("slow") or item.get_closest_marker("long")
    jax.config.update("jax_disable_most_optimizations", trains is None)


@pytest.fixture
def optimized() -> None:
    """Optimises the programs of a test that trains for many steps. The next test starts without."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in float64, for comparisons with finite differences."""
    with jax.enable_x64(True):
        yield
