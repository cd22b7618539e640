"""The lines of the tables in README and docs: which number of which measurement each one shows.

`benchmarks.tables` reads the numbers from benchmarks/results and writes the tables.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.seeds import CONTROLS, POLICIES

GAIN = "env_steps_to_gain"  # in the place of a metric: environment steps to 80 % of the best final gain of any method


class Line(NamedTuple):
    """One line: a metric after a step of one row of `benchmarks.seeds`."""

    label: str
    row: str
    metric: str
    step: int | None = None  # None for GAIN
    scenario: str = ""
    higher: bool = False  # whether a higher value is better
    within: float | None = None  # show the share of tasks, in %, whose metric is at most this; higher is better


def _arm(label: str, metric: str, step: int, scenario: str = "", row: str = "inverse_dynamics") -> Line:
    return Line(label, row, metric, step, scenario)


def _found(label: str, row: str, step: int, scenario: str = "") -> Line:
    return Line(label, row, "parameter_error", step, scenario, within=0.02)


def _top(label: str, step: int, row: str = "mountain_car") -> Line:
    return Line(label, row, "distance", step, within=1e-3)


def _returned(label: str, step: int, scenario: str = "", row: str = "reacher_mfrl") -> Line:
    return Line(label, row, "return", step, scenario, higher=True)


def _of_updates(label: str, row: str, steps: Sequence[int]) -> list[Line]:
    """The return after several numbers of updates; 200 environment steps each."""
    return [_returned(f"{label}, {step} updates", step, row=row) for step in steps]


# {scenario of `reacher_mfrl` with hidden goals: in words}
UNSEEN = {
    "rewards_hidden": "control: the loss sees no rewards",
    "rewards_shuffled": "control: the loss sees shuffled rewards",
    "shifted": "motors a third to three times as strong",
    "shifted_goals": "goals farther out",
    **{name: f"policy {name.removeprefix('policy_')}" for name in POLICIES},
}

SUMMARY: list[tuple[str, Line]] = [
    ("sine", Line("MSE of wide sines after 100 steps, meta-trained on one narrow sine", "sine", "mse", 100)),
    ("sine", Line("the same, meta-trained on wide sines with Adam inside", "sine_wide_adam", "mse", 100)),
    ("shaped_sine", _found("frequencies found to 0.02 after 10 steps (%)", "shaped_sine", 10)),
    (
        "few_shot_sine",
        Line("MSE of sines from 5 points after 10 steps: loss, start and step sizes learned", "few_shot_sine_all", "mse", 10),
    ),
    ("digits", Line("cross-entropy of unseen pairs after 20 steps, MLP", "digits", "cross_entropy", 20)),
    ("digits", Line("the same, a CNN that meta-training never saw", "digits", "cross_entropy", 20, "cnn")),
    (
        "point_mass_mbrl",
        Line("final over initial distance after 2 updates, unseen half-plane", "point_mass_mbrl", "relative_distance", 2),
    ),
    ("reacher_mbrl", Line("joint distance (rad) after 2 updates, in Brax", "reacher_mbrl", "joint_distance", 2)),
    ("mountain_car", _top("random policies at the top after 20 updates (%)", 20)),
    (
        "reacher_mfrl",
        _returned("return after 20 updates, hidden goal, samples alone (start -35)", 20, row="reacher_mfrl_hidden"),
    ),
    ("reacher_mfrl", _returned("the same, the paper's form of the loss", 20, row="reacher_mfrl_hidden_paper")),
    ("reacher_expert", _returned("return, visible goal, meta-trained on experts' actions", 20, row="reacher_expert")),
    (
        "ant_mfrl",
        Line("distance (m) from a visible goal after 20 updates, samples alone (start 2.0)", "ant_mfrl", "distance", 20),
    ),
    (
        "inverse_dynamics",
        _arm("torque error (N m) of a 7-joint arm after 100 samples", "torque_rmse", 10, row="inverse_dynamics_100_samples"),
    ),
    ("inverse_dynamics", _arm("after 2,000 samples", "torque_rmse", 200)),
]

PAGES: dict[str, list[Line]] = {
    "sine": [
        Line("MSE of wide sines after 100 steps, SGD inside", "sine", "mse", 100),
        Line("the same, Adam inside, meta-trained on wide sines", "sine_wide_adam", "mse", 100),
        Line("released protocol: wide sines, 100 steps of 1e-3", "sine_published", "mse", 100),
        Line("released protocol: the narrow sine, one step of 1e-3", "sine_published", "mse", 1, "train_task"),
    ],
    "few_shot_sine": [
        *(
            Line(f"{label}: after {step} step{'s' * (step > 1)}", f"few_shot_sine_{learn}", "mse", step)
            for learn, label in {
                "all": "loss, initialisation and step sizes",
                "meta_sgd": "initialisation and step sizes (Meta-SGD)",
                "loss_init": "loss and initialisation",
                "maml": "initialisation (MAML)",
                "loss_step_sizes": "loss and step sizes",
                "loss": "loss",
                "step_sizes": "step sizes",
            }.items()
            for step in (1, 10)
        ),
        Line("MAML as in the paper: after 1 step", "few_shot_sine_published", "mse", 1),
        Line("MAML as in the paper: after 10 steps", "few_shot_sine_published", "mse", 10),
    ],
    "shaped_sine": [
        _found("found (%), search from w = 0.1, 10 steps", "shaped_sine", 10),
        _found("the same, 50 steps", "shaped_sine", 50),
        _found("found (%), search from anywhere, 10 steps", "shaped_sine", 10, "start_anywhere"),
        _found("the same, 50 steps", "shaped_sine", 50, "start_anywhere"),
        _found("inputs in [-2, 2], from w = 0.1, 10 steps", "shaped_sine_range_2", 10),
        _found("inputs in [-2, 2], from anywhere, 10 steps", "shaped_sine_range_2", 10, "start_anywhere"),
        _found("meta-trained without the frequencies, from w = 0.1, 10 steps", "shaped_sine_no_extra", 10),
        _found("the same, from anywhere", "shaped_sine_no_extra", 10, "start_anywhere"),
    ],
    "digits": [
        Line("cross-entropy (nats), MLP", "digits", "cross_entropy", 20),
        Line("accuracy, MLP", "digits", "accuracy", 20, higher=True),
        Line("cross-entropy (nats), a CNN never seen", "digits", "cross_entropy", 20, "cnn"),
        Line("accuracy, a CNN never seen", "digits", "accuracy", 20, "cnn", higher=True),
    ],
    "point_mass_mbrl": [
        Line("unseen half-plane, 1 update", "point_mass_mbrl", "relative_distance", 1),
        Line("unseen half-plane, 2 updates", "point_mass_mbrl", "relative_distance", 2),
        Line("unseen half-plane, 10 updates", "point_mass_mbrl", "relative_distance", 10),
        Line("half-plane of meta-training, 2 updates", "point_mass_mbrl", "relative_distance", 2, "goals_inside"),
    ],
    "reacher_mbrl": [
        Line("joint distance (rad), Brax, 1 update", "reacher_mbrl", "joint_distance", 1),
        Line("joint distance (rad), Brax, 2 updates", "reacher_mbrl", "joint_distance", 2),
        Line("joint distance (rad), Brax, 5 updates", "reacher_mbrl", "joint_distance", 5),
        Line("arms within 0.25 rad (%), 2 updates", "reacher_mbrl", "joint_distance", 2, within=0.25),
        Line("a policy that does not see the goal, 2 updates", "reacher_mbrl", "joint_distance", 2, "policy_without_goal"),
        Line("closed form, 50 updates", "reacher_mbrl", "joint_distance", 50, "closed_form"),
        Line("`adapt_on=real`, 2 updates", "reacher_mbrl_real", "joint_distance", 2, "closed_form"),
        Line("usual scale of the last layer, 2 updates", "reacher_mbrl_large_start", "joint_distance", 2, "closed_form"),
        Line(
            "released protocol: arms within 0.25 rad (%), 2 updates",
            "reacher_mbrl_published",
            "joint_distance",
            2,
            "closed_form",
            within=0.25,
        ),
    ],
    "mountain_car": [
        _top("at the top (%), 1 update", 1),
        _top("at the top (%), 2 updates", 2),
        _top("at the top (%), 5 updates", 5),
        _top("at the top (%), 20 updates", 20),
        _top("without the goal on the way (%), 2 updates", 2, "mountain_car_no_extra"),
        _top("released protocol (%), 20 updates", 20, "mountain_car_published"),
    ],
    "reacher_mfrl": [
        *_of_updates("return", "reacher_mfrl_hidden", (5, 10, 20, 40, 80, 160)),
        Line("environment steps to 80 % of the best gain", "reacher_mfrl_hidden", GAIN),
        *_of_updates("the paper's form: return", "reacher_mfrl_hidden_paper", (5, 10, 20, 40, 80, 160)),
        *(_returned(f"{words}, 20 updates", 20, name, "reacher_mfrl_hidden") for name, words in UNSEEN.items()),
        *(
            _returned(f"the paper's form: {UNSEEN[name]}, 20 updates", 20, name, "reacher_mfrl_hidden_paper")
            for name in CONTROLS
        ),
    ],
    "reacher_expert": [
        _returned("return, 20 updates", 20, row="reacher_expert"),
        _returned("return, 100 updates (PPO: at its end)", 100, row="reacher_expert"),
        Line("environment steps to 80 % of the best gain", "reacher_expert", GAIN),
        _returned("two rollouts an update, 20 updates", 20, row="reacher_expert_two_rollouts"),
    ],
    "ant_mfrl": [
        Line("distance (m), 5 updates", "ant_mfrl", "distance", 5),
        Line("distance (m), 10 updates", "ant_mfrl", "distance", 10),
        Line("distance (m), 20 updates (PPO: at its end, three goals)", "ant_mfrl", "distance", 20),
        _returned("return, 20 updates (PPO: at its end, three goals)", 20, row="ant_mfrl"),
        Line("goals 1.5 times as far: distance (m), 5 updates", "ant_mfrl", "distance", 5, "shifted_goals"),
        Line("goals 1.5 times as far: distance (m), 20 updates", "ant_mfrl", "distance", 20, "shifted_goals"),
        Line("without `target_weight`: distance (m), 20 updates", "ant_mfrl_updates_alone", "distance", 20),
        Line("full size, without `target_weight`: distance (m), 20 updates", "ant_mfrl_full", "distance", 20),
    ],
    "inverse_dynamics": [
        _arm("torque error (N m), 10 samples", "torque_rmse", 1),
        _arm("torque error (N m), 100 samples", "torque_rmse", 10),
        _arm("the same, baselines tuned for it", "torque_rmse", 10, row="inverse_dynamics_100_samples"),
        _arm("torque error (N m), 500 samples", "torque_rmse", 50),
        _arm("torque error (N m), 2,000 samples", "torque_rmse", 200),
        _arm("baselines with a plain loss in N m, 2,000 samples", "torque_rmse", 200, row="inverse_dynamics_newton_metres"),
        _arm("error of the inertia matrix over the matrix, 100 samples", "inertia", 10),
        _arm("error of the inertia matrix over the matrix, 2,000 samples", "inertia", 200),
        _arm(
            "meta-trained without the true inertia, 100 samples",
            "torque_rmse",
            10,
            row="inverse_dynamics_no_extra",
        ),
        _arm("the same, 2,000 samples", "torque_rmse", 200, row="inverse_dynamics_no_extra"),
        _arm("links up to 30 % heavier or lighter: torque error, 100 samples", "torque_rmse", 10, "other_arm"),
        _arm("a plain network of the torque: torque error, 2,000 samples", "torque_rmse", 200, "plain_network"),
        _arm("motions over the whole range: torque error, 2,000 samples", "torque_rmse", 200, "whole_range"),
    ],
}

# Further tables of the experiments' pages.
FURTHER: dict[str, list[Line]] = {
    "reacher_mfrl_visible": [
        _returned("return, 5 updates (1,000 environment steps)", 5),
        _returned("return, 10 updates", 10),
        _returned("return, 20 updates", 20),
        _returned("return, 100 updates (PPO: at its end)", 100),
        Line("environment steps to 80 % of the best gain", "reacher_mfrl", GAIN),
        _returned("motors a third to three times as strong, 20 updates", 20, "shifted"),
        _returned("goals farther out, 20 updates", 20, "shifted_goals"),
        *(_returned(f"policy {name.removeprefix('policy_')}, 20 updates", 20, name) for name in POLICIES),
        _returned("without `target_weight`, 20 updates", 20, row="reacher_mfrl_updates_alone"),
        _returned("without `target_weight`, 100 updates", 100, row="reacher_mfrl_updates_alone"),
        _returned("two rollouts an update, 20 updates", 20, row="reacher_mfrl_two_rollouts"),
        _returned('`collect_gradient="score"`, without `target_weight`, 20 updates', 20, row="reacher_mfrl_score"),
    ],
}
