"""The precision of float32 matrix products by name, and the functions that run under it.

A GPU rounds the factors of such products to TF32 unless told otherwise; a CPU does not.
"""

import contextlib
import functools
from typing import Any

import jax

DEFAULT = "default"  # JAX's own setting stands, for example JAX_DEFAULT_MATMUL_PRECISION
NAMES = (DEFAULT, "tensorfloat32", "float32")
SETTING = "jax_default_matmul_precision"


def products(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context for programs that are compiled or run in it, in this thread and in those of `thread_pool.run`."""
    return contextlib.nullcontext() if name == DEFAULT else jax.default_matmul_precision(name)


def current() -> str | None:
    """JAX's setting in this thread; None where nobody set it."""
    return getattr(jax.config, SETTING)


def under(name: str, function: Any) -> Any:
    """The function with its products in this precision, and the caller's setting untouched."""
    if name == DEFAULT:
        return function

    @functools.wraps(function)
    def with_products(*args: Any, **kwargs: Any) -> Any:
        with products(name):
            return function(*args, **kwargs)

    return with_products
