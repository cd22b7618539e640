"""Parallel threads for work that keeps one core busy and releases the GIL. An error or an interrupt stops all of them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

from launch.runtime import devices, precision

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(function: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, most: int) -> list[Result]:
    """Applies function(item, stop) to each item in at most `most` threads, one per core; results keep the order of items.

    The caller's precision of matrix products holds in them.

    Raises:
      The first error, in the order of the items, or KeyboardInterrupt. `stop` is then set: a long function soon returns or
      raises.
    """
    stop = threading.Event()
    products = precision.current()  # a setting of this thread alone

    def apply(item: Item) -> Result:
        with jax.default_matmul_precision(products):
            return function(item, stop)

    with ThreadPoolExecutor(min(most, devices.cores())) as pool:
        futures = [pool.submit(apply, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
