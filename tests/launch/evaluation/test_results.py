"""The arithmetic of meta_test.json and of the printed table."""

import numpy as np
import pytest

from launch import experiments
from launch.curves import TUNED
from launch.evaluation import evaluate, results, step_size_search
from launch.experiment import Reference
from tests.launch import line

SWEEP = step_size_search.Sweep([0.1], [1.0], [0.0], [1.0], 2.0)


def section(curves, *, samples=None, env_steps=None, maximize=False, success=None):
    scenario = line.scenarios(experiments.build("line"))[""]
    scenario = scenario._replace(
        problem=scenario.problem._replace(samples_per_step=samples), maximize=maximize, success=success, other_metrics=()
    )
    curves = {name: np.asarray(curve, dtype=np.float64) for name, curve in curves.items()}
    outcome = evaluate.Outcome(
        {name: {"distance": curve} for name, curve in curves.items()},
        dict.fromkeys(curves, 0.1),
        {"plain_tuned_sgd": evaluate.Tuned(0.1, "cosine", {"cosine": {"step_size": 0.1, "final": 2.0}})},
        dict.fromkeys(curves, SWEEP),
        list(range(len(next(iter(curves.values()))))),
        None,
    )
    return results.section(scenario, outcome, seconds=1.0, env_steps=env_steps)


def same(learned, baseline):
    return {"learned": [learned], "plain_tuned_sgd": [baseline], "plain_tuned_adam": [[9.0] * len(baseline)]}


def test_means_leave_out_values_that_are_not_finite_and_json_has_null():
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
    cost = section(curves, samples=10, env_steps=1000)["cost"]
    assert cost == {"seconds": 1.0, "env_steps": 1000, "break_even_tasks": 50, "break_even_tasks_ppo": None}


@pytest.mark.parametrize(
    ("learned", "samples", "env_steps"),
    [([4.0, 3.0, 2.0, 1.5], 10, 1000), ([4.0, 3.0, 2.0, 1.0], 10, 1000), ([4.0, 1.0, 1.0, 1.0], None, None)],
    ids=["never as good", "only as good at the end", "nothing sampled"],
)
def test_samples_that_are_never_saved_have_no_break_even(learned, samples, env_steps):
    part = section(same(learned, [4.0, 3.0, 2.0, 1.0]), samples=samples, env_steps=env_steps)
    assert part["cost"]["break_even_tasks"] is None


def test_a_baseline_that_reaches_its_end_early_leaves_less_to_save():
    # The best tuned baseline is where it ends after 1 step already, the learned loss after 2: nothing is saved.
    early = [4.0, 1.0, 1.2, 1.0]
    assert section(same([4.0, 3.0, 0.9, 0.9], early), samples=10, env_steps=1000)["cost"]["break_even_tasks"] is None
    late = [4.0, 3.0, 1.0, 1.0]  # after 2, the learned loss after 1
    assert section(same([4.0, 0.9, 0.9, 0.9], late), samples=10, env_steps=1000)["cost"]["break_even_tasks"] == 100


def test_break_even_of_a_metric_to_maximize():
    curves = {name: -np.asarray(curve) for name, curve in same([4.0, 1.0, 0.9, 0.9], [4.0, 3.0, 2.0, 1.0]).items()}
    assert section(curves, samples=10, env_steps=1000, maximize=True)["cost"]["break_even_tasks"] == 50


def test_the_table_compares_paired_on_the_tasks_where_both_are_finite():
    part = section(
        {
            "learned": [[9.0, 1.0], [9.0, 2.0], [9.0, 3.0], [9.0, 50.0]],
            "plain_tuned_sgd": [[9.0, 2.0], [9.0, 4.0], [9.0, 6.0], [9.0, np.nan]],
        }
    )
    header, _, learned, sgd = results.table("lines", part).splitlines()
    assert header == "lines: distance (m) after 1 steps, 4 tasks"
    # learned: mean 14, std sqrt((13^2 + 12^2 + 11^2 + 36^2) / 4) = 20.8; each is half of the baseline's, so the error is 0.
    assert learned.split() == ["learned", "0.1", "14", "20.8", "0%", "-"]
    assert sgd.split() == ["plain_tuned_sgd", "0.1", "4", "1.63", "25%", "-", "0.500", "+-", "0.000"]


def test_metrics_that_may_be_negative_are_compared_by_difference():
    part = section({"learned": [[0.0, -1.0], [0.0, 3.0]], "untrained": [[0.0, -2.0], [0.0, 0.0]]})
    _, columns, _, untrained = results.table("returns", part).splitlines()
    assert columns.endswith("learned - it")
    # Differences 1 and 3: mean 2, standard deviation 1, standard error 1 / sqrt(2).
    assert untrained.split()[-3:] == ["2.000", "+-", "0.707"]


def test_steps_to_gain_are_the_first_with_four_fifths_of_the_best_gain():
    curves = {"learned": [[0.0, 6.0, 9.0]], "plain_tuned_sgd": [[0.0, 1.0, 2.0]], "ppo": [[0.0, 4.0, 8.5, 10.0]]}
    curves = {name: np.array(curve) for name, curve in curves.items()}
    taken = {"learned": [0, 5, 10], "plain_tuned_sgd": [0, 5, 10], "ppo": [0, 100, 200, 300]}
    # The best final gain is PPO's 10: 8 is reached by the learned loss after 10 steps and by PPO after 200.
    reached = {"learned": 10, "plain_tuned_sgd": None, "ppo": 200}
    assert results.steps_to_gain(curves, taken, maximize=True) == reached
    falling = {name: -curve for name, curve in curves.items()}
    assert results.steps_to_gain(falling, taken, maximize=False) == reached
    assert results.steps_to_gain(curves, {}, maximize=True) == {}
    worse = {name: -curve for name, curve in curves.items()}
    assert results.steps_to_gain(worse, taken, maximize=True) == dict.fromkeys(curves)


def test_ppo_on_the_first_tasks_is_compared_on_these():
    # On the first task alone PPO has 4 after 100 steps, and the learned loss 5 after 10; the second task would hide both.
    curves = {"learned": np.array([[0.0, 5.0], [0.0, -100.0]]), "ppo": np.array([[0.0, 4.0, 5.0]])}
    taken = {"learned": [0, 10], "ppo": [0, 100, 200]}
    assert results.steps_to_gain(curves, taken, maximize=True) == {"learned": 10, "ppo": 100}
    part = section({"learned": [[0.0, 5.0], [0.0, -100.0]], "plain_tuned_sgd": [[0.0, 1.0], [0.0, 1.0]]})
    part["curves"]["ppo"] = [[0.0, 4.0, 2.0]]
    ppo = results.table("returns", part).splitlines()[-1]
    assert ppo.split() == ["ppo", "(1", "tasks)", "-", "2", "0", "0%", "-", "3.000", "+-", "0.000"]


def test_ppo_has_a_curve_of_its_own_length_and_its_own_break_even():
    scenario = line.scenarios(experiments.build("line"))[""]
    scenario = scenario._replace(problem=scenario.problem._replace(samples_per_step=10), maximize=True, other_metrics=())
    traces = {name: {"distance": np.array([[0.0, last]])} for name, last in (("learned", 9.0), *((n, 2.0) for n in TUNED))}
    outcome = evaluate.Outcome(traces, dict.fromkeys(traces, 0.1), {}, dict.fromkeys(traces, SWEEP), [0], None)
    ppo = Reference([0, 100, 200], {"distance": np.array([[0.0, 5.0, 10.0]])}, [True])
    part = results.section(scenario, outcome, seconds=1.0, env_steps=1000, reference=ppo)
    assert part["curves"]["ppo"] == [[0.0, 5.0, 10.0]]
    assert part["env_steps"]["ppo"] == [0, 100, 200]
    assert part["env_steps_to_gain"]["learned"] == 10
    assert part["cost"]["break_even_tasks_ppo"] == 6  # 1000 / (200 - 10) = 5.3
    assert part["ppo_converged"] == [True]
    assert "ppo" in results.table("with PPO", part)
