"""Parallel threads for work that keeps one core busy and releases the GIL. An error or an interrupt stops all of them."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launch.runtime import devices

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(function: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, most: int) -> list[Result]:
    """Applies a function to each item, in at most `most` threads and one per core; results are in the order of the items.

    Args:
      function: (item, stop) -> result. A long function returns or raises soon after `stop` is set.
      items: its arguments.
      most: the most threads.

    Raises:
      The first error, in the order of the items, or KeyboardInterrupt. `stop` is then set for all other items.
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
