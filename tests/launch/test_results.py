"""The arithmetic of meta_test.json and of the table that is printed."""

import numpy as np
import pytest

from launch import evaluation, experiments, results, tuning
from tests.launch import line

SWEEP = tuning.Sweep([0.1], [1.0], [0.0], [1.0], 2.0)


def section(curves, *, samples=None, env_steps=None, maximize=False, success=None):
    setting = line.settings(experiments.build("line"))[""]
    setting = setting._replace(
        problem=setting.problem._replace(samples_per_step=samples), maximize=maximize, success=success, other_metrics=()
    )
    curves = {name: np.asarray(curve, dtype=np.float64) for name, curve in curves.items()}
    outcome = evaluation.Outcome(
        {name: {"distance": curve} for name, curve in curves.items()},
        dict.fromkeys(curves, 0.1),
        dict.fromkeys(curves, SWEEP),
        list(range(len(next(iter(curves.values()))))),
    )
    return results.section(setting, outcome, seconds=1.0, env_steps=env_steps)


def same(learned, baseline):
    return {"learned": [learned], "task_loss_tuned_sgd": [baseline], "task_loss_tuned_adam": [[9.0] * len(baseline)]}


def test_means_leave_out_what_is_not_finite():
    part = section({"learned": [[1.0, 2.0, np.inf], [3.0, np.nan, np.nan]]})
    assert part["curves"]["learned"] == [[1.0, 2.0, None], [3.0, None, None]]
    np.testing.assert_array_equal(results.mean_curve(part["curves"]["learned"]), [2.0, 2.0, np.nan])


def test_a_diverged_task_is_no_success():
    part = section({"learned": [[1.0, 0.1], [1.0, np.nan]]}, success=lambda distance: ~(distance > 0.5))
    assert part["success"] == {"learned": [0.0, 0.5]}


def test_break_even_counts_the_samples_that_a_new_task_saves():
    # The learned loss is at step 1 where the best tuned baseline ends at step 3: it saves 2 steps of 10 samples a task.
    curves = same([4.0, 1.0, 0.9, 0.9], [4.0, 3.0, 2.0, 1.0])
    assert section(curves, samples=10, env_steps=1001)["cost"]["break_even_tasks"] == 51  # 1001 / 20 = 50.05
    assert section(curves, samples=10, env_steps=1000)["cost"] == {"seconds": 1.0, "env_steps": 1000, "break_even_tasks": 50}


@pytest.mark.parametrize(
    ("learned", "samples", "env_steps"),
    [([4.0, 3.0, 2.0, 1.5], 10, 1000), ([4.0, 3.0, 2.0, 1.0], 10, 1000), ([4.0, 1.0, 1.0, 1.0], None, None)],
    ids=["never as good", "only as good at the end", "nothing sampled"],
)
def test_what_is_never_earned_back_has_no_break_even(learned, samples, env_steps):
    part = section(same(learned, [4.0, 3.0, 2.0, 1.0]), samples=samples, env_steps=env_steps)
    assert part["cost"]["break_even_tasks"] is None


def test_break_even_of_a_metric_to_maximize():
    curves = {name: -np.asarray(curve) for name, curve in same([4.0, 1.0, 0.9, 0.9], [4.0, 3.0, 2.0, 1.0]).items()}
    assert section(curves, samples=10, env_steps=1000, maximize=True)["cost"]["break_even_tasks"] == 50


def test_the_table_compares_paired_on_the_tasks_where_both_are_finite():
    part = section(
        {
            "learned": [[9.0, 1.0], [9.0, 2.0], [9.0, 3.0], [9.0, 50.0]],
            "task_loss_tuned_sgd": [[9.0, 2.0], [9.0, 4.0], [9.0, 6.0], [9.0, np.nan]],
        }
    )
    header, _, learned, sgd = results.table("lines", part).splitlines()
    assert header == "lines: distance (m) after 1 steps, 4 tasks"
    # learned: mean 14, std sqrt((13^2 + 12^2 + 11^2 + 36^2) / 4) = 20.8; each is half of the baseline's, so the error is 0.
    assert learned.split() == ["learned", "0.1", "14", "20.8", "0%", "-"]
    assert sgd.split() == ["task_loss_tuned_sgd", "0.1", "4", "1.63", "25%", "-", "0.500", "+-", "0.000"]


def test_metrics_that_may_be_negative_are_compared_by_difference():
    part = section({"learned": [[0.0, -1.0], [0.0, 3.0]], "untrained": [[0.0, -2.0], [0.0, 0.0]]})
    _, columns, _, untrained = results.table("returns", part).splitlines()
    assert columns.endswith("learned - it")
    # Differences 1 and 3: mean 2, standard deviation 1, standard error 1 / sqrt(2).
    assert untrained.split()[-3:] == ["2.000", "+-", "0.707"]
