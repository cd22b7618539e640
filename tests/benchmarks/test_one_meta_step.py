"""The comparison of two dumps finds every kind of difference."""

import numpy as np
import pytest

from benchmarks import one_meta_step
from launch import experiments

OLD = {"sine/task_loss": np.float32(2.0), "sine/grad": np.array([3.0, 4.0])}


def test_relative_errors_are_those_of_the_task_loss_and_of_the_gradient_norm():
    (row,) = one_meta_step.compare(OLD, {"sine/task_loss": np.float32(2.5), "sine/grad": np.array([3.0, 4.5])})
    assert row == ("sine", pytest.approx(0.25), pytest.approx(0.1))
    assert row.within(0.25)
    assert not row.within(0.2)


def test_equal_dumps_agree():
    assert one_meta_step.compare(OLD, OLD) == [("sine", 0.0, 0.0)]


@pytest.mark.parametrize(
    "new",
    [
        {},
        {"sine/task_loss": OLD["sine/task_loss"], "sine/grad": np.ones(3)},
        {**OLD, "sine/grad": np.array([3.0, np.nan])},
        {**OLD, "other/grad": np.ones(2), "other/task_loss": np.ones(())},
    ],
    ids=["missing", "other shape", "not finite", "new experiment"],
)
def test_what_cannot_be_compared_never_agrees(new):
    assert not all(row.within(1e9) for row in one_meta_step.compare(OLD, new))


def test_every_experiment_has_a_row():
    assert set(one_meta_step.OVERRIDES) == set(experiments.names()) - {"line"}
