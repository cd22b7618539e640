"""The search over step sizes finds the best one inside its range and keeps all results."""

import threading
import time

import numpy as np
import pytest

from launch.evaluation import step_size_search
from launch.runtime import devices


def bowl(centre: float, diverges_above: float = np.inf):
    """A loss whose final metric is lowest at step size 10 ** centre, and 2 before any step; 4 tasks."""

    def judge(step_size):
        final = np.full(4, 1 + (np.log10(step_size) - centre) ** 2)
        if step_size > diverges_above:
            final[0] = np.nan
        return np.full(4, 2.0), final

    return judge


@pytest.mark.parametrize("centre", [-7, -4, -2.5, 0, 3])
def test_the_best_step_size_lies_strictly_inside_the_range(centre):
    search = step_size_search.Search(bowl(centre))
    exponents = step_size_search.common_range([search])
    best = search.best(exponents)
    assert step_size_search.step_size(best) == pytest.approx(10**centre, rel=1e-2)
    assert exponents[0] < best < exponents[-1]


@pytest.mark.parametrize(("centre", "limit"), [(-20, 1e-8), (20, 1e4)])
def test_the_search_ends_at_the_widest_range(centre, limit):
    search = step_size_search.Search(bowl(centre))
    assert step_size_search.step_size(search.best(step_size_search.common_range([search]))) == limit


def test_all_losses_are_tuned_over_the_widest_range_of_any():
    # Best at 0.01 as far as 1; the range that the other needs holds a better one, at 100.
    def two_bowls(step_size):
        start, final = bowl(-2)(step_size)
        return start, np.minimum(final, bowl(2)(step_size)[1] - 0.5)

    searches = [step_size_search.Search(two_bowls), step_size_search.Search(bowl(2))]
    exponents = step_size_search.common_range(searches)
    assert step_size_search.step_size(searches[0].best(step_size_search.common_range(searches[:1]))) == 0.01
    assert step_size_search.step_size(searches[0].best(exponents)) == 100
    assert exponents[-1] > 4


def test_a_step_size_with_a_diverged_task_is_worse_than_any_without():
    # The mean over finite tasks is best at 1, but one task of four diverges above 0.1.
    search = step_size_search.Search(bowl(0, diverges_above=0.1))
    assert step_size_search.step_size(search.best(step_size_search.common_range([search]))) == 0.1
    sweep = search.sweep([-2, 0])
    assert sweep.step_sizes == [0.1, 1.0]
    assert sweep.diverged == [0.0, 0.25]
    assert sweep.final == [2.0, 1.0]  # 1 + 1 ** 2; over the three that stayed finite 1 + 0
    assert sweep.improved == [0.0, 0.75]  # 2 is not below the start, 2
    assert sweep.start == 2.0


def test_a_metric_to_maximize_is_maximized():
    def judge(step_size):
        start, final = bowl(-2)(step_size)
        return -start, -final

    search = step_size_search.Search(judge, maximize=True)
    assert step_size_search.step_size(search.best(step_size_search.common_range([search]))) == 0.01
    sweep = search.sweep([-4])
    assert sweep.final == [-1.0]
    assert sweep.improved == [1.0]


def test_a_sweep_without_finite_values_has_none():
    search = step_size_search.Search(lambda step_size: (np.ones(3), np.full(3, np.inf)))
    sweep = search.sweep([0])
    assert (sweep.final, sweep.diverged, sweep.improved) == ([None], [1.0], [0.0])


def test_each_step_size_is_evaluated_once():
    calls = []

    def counted(step_size):
        calls.append(step_size)
        return bowl(-5)(step_size)

    search = step_size_search.Search(counted)
    exponents = step_size_search.common_range([search])
    assert search.sweep(exponents).step_sizes == sorted(calls)
    assert len(calls) == len(set(calls)) == len(exponents)


def test_losses_are_ordered_by_divergence_then_by_the_metric():
    never, low = step_size_search.Search(bowl(0)), step_size_search.Search(lambda size: (np.full(4, 2.0), np.full(4, 0.5)))
    diverging = step_size_search.Search(lambda size: (np.full(4, 2.0), np.array([0.1, 0.1, 0.1, np.nan])))
    hopeless = step_size_search.Search(lambda size: (np.full(4, 2.0), np.full(4, np.nan)))
    exponents = [-1, 0, 1]
    order = sorted((hopeless, never, diverging, low), key=lambda search: search.badness(search.best(exponents)))
    assert order == [low, never, diverging, hopeless]


def test_searches_run_in_parallel_and_evaluate_each_step_size_once(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    meet = threading.Barrier(2, timeout=10)  # breaks unless two step sizes are judged at the same time
    judged = []

    def judge(step_size):
        meet.wait()
        judged.append(step_size)
        return bowl(-2)(step_size)

    first, second = step_size_search.Search(judge), step_size_search.Search(judge)
    step_size_search.judge_all([first, second, first], [-4, -3])
    step_size_search.judge_all([first, second], [-4, -3])
    assert sorted(judged) == [0.01, 0.01, 0.0316, 0.0316]
    step_size_search.judge_all([first], [-2, -1])  # those of one search too
    assert sorted(judged[4:]) == [0.1, 0.316]


def test_a_failed_search_ends_the_others(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    begun, judged = threading.Event(), []

    def judge(step_size):
        if step_size == step_size_search.step_size(-8):
            assert begun.wait(timeout=10)
            raise KeyboardInterrupt
        begun.set()
        judged.append(step_size)
        time.sleep(0.1)
        return bowl(-2)(step_size)

    with pytest.raises(KeyboardInterrupt):
        step_size_search.judge_all([step_size_search.Search(judge), step_size_search.Search(bowl(0))], range(-8, 1))
    assert len(judged) < 8
