"""The search over step sizes: half-decades, widened until the best lies inside; all that was tried is kept."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from launch.runtime import thread_pool

# Half-decades: exponent e stands for the step size 10 ** (e / 2).
FIRST, LAST = -8, 0  # 1e-4 to 1, where every search starts
LOWEST, HIGHEST = -16, 8  # 1e-8 to 1e4, where it gives up
WORKERS = 4  # descents side by side at most, as each needs its memory

# step size -> (metric before any step [M], metric after the last step [M]), not finite where diverged
JudgeFn = Callable[[float], tuple[np.ndarray, np.ndarray]]


class Sweep(NamedTuple):
    """What a loss does at each step size, over the draws that step sizes are tuned on; R step sizes."""

    step_sizes: list[float]  # [R], increasing
    final: list[float | None]  # [R] metric after the last step, mean over the tasks that stayed finite; None where none did
    diverged: list[float]  # [R] share of tasks
    improved: list[float]  # [R] share of tasks that ended better than they started
    start: float | None  # metric before any step, mean over tasks, the same at every step size; None where not finite


class _Result(NamedTuple):
    """What one step size gave; fields as those of `Sweep`."""

    final: float | None
    diverged: float
    improved: float
    start: float | None


class Search:
    """Judges step sizes of one loss, each once."""

    def __init__(self, judge: JudgeFn, *, maximize: bool = False):
        """maximize: whether a larger metric is better."""
        self._judge = judge
        self._sign = -1.0 if maximize else 1.0
        self._results: dict[int, _Result] = {}

    def badness(self, exponent: int) -> tuple[float, float]:
        """What is minimised: first the share of tasks that diverged, then the mean (its negative) over the others."""
        result = self._at(exponent)
        return result.diverged, math.inf if result.final is None else self._sign * result.final

    def best(self, exponents: Iterable[int]) -> int:
        """The least bad of these."""
        return min(exponents, key=self.badness)

    def sweep(self, exponents: Sequence[int]) -> Sweep:
        """What the loss does at each of these."""
        rows = [self._at(exponent) for exponent in exponents]
        return Sweep(
            step_sizes=[step_size(exponent) for exponent in exponents],
            final=[row.final for row in rows],
            diverged=[row.diverged for row in rows],
            improved=[row.improved for row in rows],
            start=rows[0].start,
        )

    def _at(self, exponent: int) -> _Result:
        if exponent not in self._results:
            start, final = self._judge(step_size(exponent))
            finite = np.isfinite(final)
            mean = float(final[finite].mean()) if finite.any() else None
            before = float(start.mean()) if np.isfinite(start).all() else None
            better = finite & (self._sign * final < self._sign * start)
            self._results[exponent] = _Result(mean, float(1 - finite.mean()), float(better.mean()), before)
        return self._results[exponent]


def step_size(exponent: int) -> float:
    """The step size of a half-decade, to three digits: 0.01, 0.0316, 0.1."""
    return float(f"{10 ** (exponent / 2):.3g}")


def judge_all(searches: Iterable[Search], exponents: Iterable[int]) -> None:
    """Makes each search judge each of these, several of them side by side.

    What they run are long rows of small operations, which keep one core busy and release the interpreter.
    """
    distinct = {id(search): search for search in searches}.values()
    exponents = list(exponents)
    pairs = [(search, exponent) for search in distinct for exponent in exponents]
    thread_pool.run(lambda pair, _: pair[0].badness(pair[1]), pairs, most=WORKERS)


def common_range(searches: Iterable[Search]) -> list[int]:
    """Exponents, without gaps, inside which each loss has its best step size of all of them.

    The range is one for all losses, so that none is tuned over less than another and their sweeps can be compared. It
    ends at `LOWEST` and `HIGHEST`, inside or not.
    """
    searches = list(searches)
    low, high = FIRST, LAST
    while True:
        judge_all(searches, range(low, high + 1))
        bests = {search.best(range(low, high + 1)) for search in searches}
        if low in bests and low > LOWEST:
            low -= 1
        elif high in bests and high < HIGHEST:
            high += 1
        else:
            return list(range(low, high + 1))
