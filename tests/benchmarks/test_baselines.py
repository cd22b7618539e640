"""A baseline is tuned on the tuning draw: for each reported step, and for reaching a gain fast."""

import jax
import numpy as np
import pytest

from benchmarks import baselines
from launch.evaluation import evaluate, step_size_search
from tests.launch.line import LineConfig

M, K = 3, 4
TESTED, TUNING = (evaluate.Draw(name, jax.random.split(jax.random.key(0), M), None) for name in ("tested", "tuning"))


class Setting:
    """The fields of a scenario that the baselines read."""

    metric, maximize, pretrain, maml = "return", True, None, None


def descent(returns, num_steps=K, scheduled=lambda size, schedule: -9.0):
    """step size -> [K + 1] becomes a descent with these returns. On the tested draw the returns are half as high.

    With a schedule all returns after the start are those of `scheduled`.
    """

    def fn(size, draw, ends_only=False, schedule="constant"):
        assert not ends_only
        values = returns(size) if schedule == "constant" else scheduled(size, schedule) * (np.arange(K + 1) > 0)
        return {"return": np.tile(values[: num_steps + 1], (M, 1)) * (0.5 if draw is TESTED else 1.0)}

    return fn


@pytest.fixture
def made(monkeypatch):
    """SGD is best at 0.1 after one step and at 0.01 after four; Adam never gains."""

    def of_size(size):
        if size == 0.1:
            return np.array([0.0, 8.0, 8.0, 8.0, 8.0])
        if size == 0.01:
            return np.array([0.0, 1.0, 2.0, 5.0, 10.0])
        return np.zeros(K + 1)

    def plain(scenario, optimizer, num_steps, decay_steps):
        assert num_steps in (1, K)
        returns = of_size if (optimizer, decay_steps) == ("sgd", 0) else lambda size: -size * np.arange(K + 1.0)
        return descent(returns, num_steps)

    monkeypatch.setattr(baselines, "plain", plain)
    return baselines.tuned(Setting, LineConfig(inner_decay_steps=7), (TESTED, TUNING), (1, 4), jax.random.key(0))


def test_each_step_gets_its_own_best_step_size(made):
    sgd = made["plain_tuned_sgd"]
    assert sgd.sizes == [0.1, 0.01]
    assert [traces["return"][0, step] for traces, step in zip(sgd.traces, (1, 4), strict=True)] == [4.0, 5.0]
    # A smaller step size is always better here, so the search ends at its lower bound.
    assert made["plain_tuned_adam"].sizes == [step_size_search.step_size(step_size_search.LOWEST)] * 2


def test_the_fastest_step_size_is_chosen_on_the_tuning_draw_and_reported_on_the_tested_draw(made):
    sgd = made["plain_tuned_sgd"]
    # On the tuning draw 0.1 reaches 80 % of a gain of 10 after one step, and 0.01 after four steps.
    np.testing.assert_array_equal(sgd.fastest(10.0, TESTED, metric="return", maximize=True)[0], [0.0, 4.0, 4.0, 4.0, 4.0])
    np.testing.assert_array_equal(sgd.fastest(12.0, TESTED, metric="return", maximize=True)[0], [0.0, 0.5, 1.0, 2.5, 5.0])
    assert sgd.fastest(20.0, TESTED, metric="return", maximize=True) is None
    assert made["plain_tuned_adam"].fastest(1.0, TESTED, metric="return", maximize=True) is None


def test_the_adam_baseline_may_use_the_optimizer_and_the_decay_of_the_learned_loss(monkeypatch):
    made = set()

    def plain(scenario, optimizer, num_steps, decay_steps):
        made.add((optimizer, decay_steps))
        # Each is best at 0.1; "mup_adam" with decay ends highest.
        height = {("mup_adam", 7): 9.0, ("sgd", 7): 3.0}.get((optimizer, decay_steps), 1.0)
        return descent(lambda size: np.linspace(0.0, height if size == 0.1 else 0.0, K + 1))

    monkeypatch.setattr(baselines, "plain", plain)
    config = LineConfig(inner_optimizer="mup_adam", inner_decay_steps=7)
    found = baselines.tuned(Setting, config, (TESTED, TUNING), (4,), jax.random.key(0))
    assert sorted(made) == [(name, decay) for name in ("adam", "mup_adam", "sgd") for decay in (0, 7)]
    assert found["plain_tuned_adam"].traces[0]["return"][0, -1] == 4.5
    assert found["plain_tuned_sgd"].traces[0]["return"][0, -1] == 1.5


def test_a_schedule_is_tried_over_the_reported_steps_around_the_best_constant_step_size(monkeypatch):
    tried = []

    def plain(scenario, optimizer, num_steps, decay_steps):
        assert decay_steps == 0

        def scheduled(size, schedule):
            tried.append((optimizer, num_steps, schedule, size))
            # Four steps gain by a cosine at a larger step size; one step gains nothing by a schedule.
            return 20.0 if (optimizer, num_steps, schedule, size) == ("sgd", 4, "cosine", 0.316) else 0.0

        return descent(lambda size: np.array([0.0, 8.0, 8.0, 8.0, 8.0]) * (size == 0.1), num_steps, scheduled)

    monkeypatch.setattr(baselines, "plain", plain)
    config = LineConfig(inner_decay_steps=0)
    found = baselines.tuned(Setting, config, (TESTED, TUNING), (1, 4), jax.random.key(0))["plain_tuned_sgd"]
    assert found.schedules == ["constant", "cosine"]
    assert found.sizes == [0.1, 0.316]
    assert [traces["return"].shape[1] for traces in found.traces] == [K + 1, K + 1]
    assert {steps for optimizer, steps, _, _ in tried} == {1, 4}
    assert {size for _, steps, _, size in tried if steps == 1} == {0.0316, 0.1, 0.316}  # next to the best constant one
    assert {size for _, steps, schedule, size in tried if (steps, schedule) == (4, "cosine")} == {0.0316, 0.1, 0.316, 1.0}
    fastest = found.fastest(24.0, TESTED, metric="return", maximize=True)
    assert fastest is not None
    np.testing.assert_array_equal(fastest[0], [0.0, 10.0, 10.0, 10.0, 10.0])
