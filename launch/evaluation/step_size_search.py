"""The search over step sizes: half-decades, widened until the best one lies inside. All results are kept."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from launch.runtime import thread_pool

# Half-decades: exponent e stands for the step size 10 ** (e / 2).
FIRST, LAST = -8, 0  # 1e-4 to 1, the first range
FIRST_RANGE = range(FIRST, LAST + 1)
LOWEST, HIGHEST = -16, 8  # 1e-8 to 1e4, the widest range
NEIGHBOURS = 3  # step sizes that `around` tries at least
WORKERS = 4  # most descents in parallel, as each needs memory

# step size -> (metric before any step [M], metric after the last step [M]), not finite where diverged
JudgeFn = Callable[[float], tuple[np.ndarray, np.ndarray]]


class Sweep(NamedTuple):
    """The result of a loss at each of R step sizes, on the tuning draw."""

    step_sizes: list[float]  # [R], increasing
    final: list[float | None]  # [R] metric after the last step, mean over finite tasks; None if there are none
    diverged: list[float]  # [R] share of tasks
    improved: list[float]  # [R] share of tasks that end better than they start
    start: float | None  # metric before any step, mean over tasks; None if not finite


class Search:
    """Evaluates step sizes of one loss, each once."""

    def __init__(self, judge: JudgeFn, *, maximize: bool = False):
        """maximize: whether a larger metric is better."""
        self._judge = judge
        self._sign = -1.0 if maximize else 1.0
        self._results: dict[int, tuple[float | None, float, float, float | None]] = {}  # fields as in Sweep

    def badness(self, exponent: int) -> tuple[float, float]:
        """The minimised pair: the share of diverged tasks, then the mean metric of the others (negative to maximize)."""
        final, diverged, _, _ = self._at(exponent)
        return diverged, math.inf if final is None else self._sign * final

    def best(self, exponents: Iterable[int]) -> int:
        """The best of these exponents."""
        return min(exponents, key=self.badness)

    def sweep(self, exponents: Sequence[int]) -> Sweep:
        """The results at these exponents."""
        final, diverged, improved, starts = map(list, zip(*map(self._at, exponents), strict=True))
        return Sweep(list(map(step_size, exponents)), final, diverged, improved, starts[0])

    def _at(self, exponent: int) -> tuple[float | None, float, float, float | None]:
        if exponent not in self._results:
            start, final = self._judge(step_size(exponent))
            finite = np.isfinite(final)
            mean = float(final[finite].mean()) if finite.any() else None
            before = float(start.mean()) if np.isfinite(start).all() else None
            better = finite & (self._sign * final < self._sign * start)
            self._results[exponent] = mean, float(1 - finite.mean()), float(better.mean()), before
        return self._results[exponent]


def step_size(exponent: int) -> float:
    """The step size of a half-decade, to three digits: 0.01, 0.0316, 0.1."""
    return float(f"{10 ** (exponent / 2):.3g}")


def judge_all(searches: Iterable[Search], exponents: Iterable[int]) -> None:
    """Evaluates all exponents of all searches in parallel threads: a descent keeps one core busy and releases the GIL."""
    distinct = {id(search): search for search in searches}.values()
    exponents = list(exponents)
    pairs = [(search, exponent) for search in distinct for exponent in exponents]
    thread_pool.run(lambda pair, _: pair[0].badness(pair[1]), pairs, most=WORKERS)


def common_range(searches: Iterable[Search]) -> list[int]:
    """The smallest range of exponents from `FIRST` to `LAST` on in which each search has its best one strictly inside.

    All losses share the range, so that all are tuned over the same step sizes. It never exceeds `LOWEST` to `HIGHEST`.
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


def around(search: Search, exponent: int) -> int:
    """The best exponent next to a first guess: its neighbours are tried until the best one lies inside, or at a limit."""
    low, high = exponent - 1, exponent + 1
    while True:
        # The one nearest to the guess among equals: a flat search must not widen.
        best = min(range(low, high + 1), key=lambda e: (search.badness(e), abs(e - exponent)))
        if best == low > LOWEST:
            low -= 1
        elif best == high < HIGHEST:
            high += 1
        else:
            return best
