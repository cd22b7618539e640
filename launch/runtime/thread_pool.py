"""Work that keeps one core busy and releases the interpreter, in threads side by side; an interrupt ends all of it soon."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launch.runtime import devices

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(function: Callable[[Item, threading.Event], Result], items: Iterable[Item], *, most: int) -> list[Result]:
    """The function of each item, at most one a core and `most` at once; results in the order of the items.

    Args:
      function: (item, stop) -> result. Where it takes long it looks at stop now and then: once that is set nobody waits for
        its result any more.
      items: what it is applied to.
      most: how many at once.

    Raises:
      Whatever a function raised first, in the order of the items, or KeyboardInterrupt; the others are told to stop.
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
