"""Parallel threads for work that keeps one core busy and releases the GIL. An error or an interrupt stops all of them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launch.runtime import devices

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(function: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, most: int) -> list[Result]:
    """Applies function(item, stop) to each item in at most `most` threads, one per core; results keep the order of items.

    Raises:
      The first error, in the order of the items, or KeyboardInterrupt. `stop` is then set: a long function soon returns or
      raises.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(min(most, devices.cores())) as pool:
        futures = [pool.submit(function, item, stop) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
