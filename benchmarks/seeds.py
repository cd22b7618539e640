"""Learned losses over meta-training seeds: each experiment is meta-trained five times and tested on the same tasks.

    python -m benchmarks.seeds [--rows sine ...] [--seeds 5] [--first_seed 10] [--tasks 100] [--draw 8191] [--runs DIR]
        [--vmapped]

Each row meta-trains one loss per seed and follows it on held-out draws, beside the plain loss at the same and at tuned step
sizes. Step sizes (half-decades) and schedules are tuned on other draws for each reported step. The program prints a table and
writes benchmarks/results/seeds_ROW.json.

With --runs, seed N is meta-trained in the run folder DIR/ROW/seed_N, or resumed there. Several `launch.meta_train` can then
meta-train a long row beforehand.
With --vmapped, all seeds are meta-trained in one program, as by `launch.meta_train --seeds`.
"""

import argparse
import contextlib
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ml3_jax
from benchmarks import baselines
from launch import curves as curve_names
from launch import experiments, meta_train
from launch.evaluation import evaluate, results
from launch.runs import metrics_log, single_run
from launch.runtime import compilation_cache, devices

POLICIES = (
    "policy_1x64_tanh",
    "policy_3x64_tanh",
    "policy_4x64_tanh",
    "policy_2x32_tanh",
    "policy_2x256_tanh",
    "policy_2x64_relu",
    "policy_4x256_relu",
)  # of reacher_mfrl
ARM_SETTINGS = ("", "plain_network", "other_arm", "whole_range")  # of inverse_dynamics
RESULTS = pathlib.Path(__file__).parent / "results"
FIRST_SEED, DRAW = 10, 8191  # of reported numbers; those for choosing settings are seeds from 0 on and other draws

BOUNDS = {"parameter_error": (0.1, 0.02), "joint_distance": (0.25,), "relative_distance": (0.05,), "distance": (1e-3,)}
MEDIANS = ("joint_distance", "relative_distance")


class Row(NamedTuple):
    """One row of the results: an experiment, a config, and the reported steps."""

    experiment: str
    overrides: dict[str, Any]
    at: dict[str, tuple[int, ...]]  # {scenario: reported inner steps}; the baselines are tuned for each of them
    others: bool = True  # whether to train what saw the same tasks (pretrained, rivals) and PPO; another row may have them


VISIBLE = {"goal": "visible"}
RULE_STEPS = (5, 10, 20, 40, 80, 160)
UNSEEN = {"shifted": (20,), "shifted_goals": (20,), **dict.fromkeys(POLICIES, (20,))}
CONTROLS = dict.fromkeys(("rewards_hidden", "rewards_shuffled"), (10, 20))

ROWS = {
    "sine": Row("sine", {}, {"": (100,)}),
    "sine_published": Row("sine", {"protocol": "published"}, {"": (100,), "train_task": (1,)}),
    "sine_wide_adam": Row("sine", {"train_tasks": "wide", "inner_optimizer": "adam"}, {"": (100,)}),
    "shaped_sine": Row("shaped_sine", {}, {"": (10, 50), "start_anywhere": (10, 50)}),
    "shaped_sine_no_extra": Row("shaped_sine", {"extra": False}, {"": (10, 50), "start_anywhere": (10, 50)}),
    "shaped_sine_range_2": Row("shaped_sine", {"input_range": 2.0}, {"": (10, 50), "start_anywhere": (10, 50)}),
    **{
        f"few_shot_sine_{learn}": Row("few_shot_sine", {"learn": learn}, {"": (1, 2, 5, 10)})
        for learn in ("all", "loss", "maml", "step_sizes", "meta_sgd", "loss_init", "loss_step_sizes")
    },
    "few_shot_sine_published": Row("few_shot_sine", {"protocol": "published"}, {"": (1, 10)}),
    "digits": Row("digits", {}, {"": (20,), "cnn": (20,)}),
    "point_mass_mbrl": Row("point_mass_mbrl", {}, {"": (1, 2, 5, 10), "goals_inside": (1, 2, 5, 10)}),
    "reacher_mbrl": Row(
        "reacher_mbrl", {}, {"": (1, 2, 5), "policy_without_goal": (1, 2, 5), "closed_form": (1, 2, 5, 10, 20, 50)}
    ),
    "reacher_mbrl_real": Row("reacher_mbrl", {"adapt_on": "real"}, {"closed_form": (1, 2, 5)}),
    "reacher_mbrl_large_start": Row("reacher_mbrl", {"policy_last_scale": 1.0}, {"closed_form": (1, 2, 5)}),
    "reacher_mbrl_published": Row("reacher_mbrl", {"protocol": "published"}, {"closed_form": (1, 2, 5)}),
    "mountain_car": Row("mountain_car", {}, {"": (1, 2, 5, 20)}),
    "mountain_car_published": Row("mountain_car", {"protocol": "published"}, {"": (1, 2, 5, 20)}),
    # Hidden goals; the rows without this word have visible ones.
    "reacher_mfrl_hidden": Row("reacher_mfrl", {"ppo_tasks": 5}, {"": RULE_STEPS, **UNSEEN, **CONTROLS}),
    "reacher_mfrl_hidden_paper": Row("reacher_mfrl", {"loss": "paper"}, {"": RULE_STEPS, **CONTROLS}, others=False),
    "reacher_mfrl_hidden_temporal": Row("reacher_mfrl", {"loss": "temporal"}, {"": RULE_STEPS}, others=False),
    "reacher_mfrl_hidden_gradient": Row("reacher_mfrl", {"loss": "summary_gradient"}, {"": RULE_STEPS}, others=False),
    "ant_mfrl_hidden": Row("ant_mfrl", {}, {"": (5, 10, 20)}),
    "reacher_mfrl": Row(
        "reacher_mfrl",
        VISIBLE,
        {
            "": (1, 2, 5, 10, 20, 40, 100),
            "shifted": (5, 10, 20, 40),
            "shifted_goals": (5, 10, 20, 40),
            **dict.fromkeys(POLICIES, (20,)),
        },
    ),
    # Meta-gradients through the inner loop only.
    "reacher_mfrl_updates_alone": Row(
        "reacher_mfrl", {**VISIBLE, "target_weight": 0.0, "inner_optimizer": "adam"}, {"": (1, 2, 5, 10, 20, 40, 100)}
    ),
    "reacher_mfrl_full": Row("reacher_mfrl", {**VISIBLE, "size": "full", "target_weight": 0.0}, {"": (1, 2, 5, 10, 20)}),
    "reacher_expert": Row("reacher_expert", {}, {"": (1, 2, 5, 10, 20, 40, 100)}),
    # An update from 100 environment steps instead of 200, with and without the expert.
    "reacher_mfrl_two_rollouts": Row("reacher_mfrl", {**VISIBLE, "rollouts": 2}, {"": (1, 2, 5, 10, 20, 40, 100)}),
    "reacher_expert_two_rollouts": Row("reacher_expert", {"rollouts": 2}, {"": (1, 2, 5, 10, 20, 40, 100)}),
    "reacher_mfrl_score": Row(
        "reacher_mfrl", {**VISIBLE, "collect_gradient": "score", "target_weight": 0.0}, {"": (1, 2, 5, 10, 20, 40)}
    ),
    "inverse_dynamics": Row("inverse_dynamics", {}, dict.fromkeys(ARM_SETTINGS, (1, 10, 50, 200))),
    "inverse_dynamics_no_extra": Row("inverse_dynamics", {"extra": False}, dict.fromkeys(ARM_SETTINGS, (1, 10, 50, 200))),
    # Baselines that are tuned for the 100th sample, and a plain loss in N m.
    "inverse_dynamics_100_samples": Row("inverse_dynamics", {}, {"": (1, 10)}),
    "inverse_dynamics_newton_metres": Row("inverse_dynamics", {"plain_scaled": False}, {"": (1, 10, 50, 200)}),
    "ant_mfrl": Row("ant_mfrl", VISIBLE, {"": (1, 2, 5, 10, 20), "shifted_goals": (5, 10, 20)}),
    "ant_mfrl_updates_alone": Row(
        "ant_mfrl", {**VISIBLE, "target_weight": 0.0}, {"": (1, 2, 5, 10, 20), "shifted_goals": (5, 10, 20)}
    ),
    "ant_mfrl_full": Row(
        "ant_mfrl",
        {**VISIBLE, "size": "full", "meta_steps": 300, "meta_decay_steps": 300, "log_every": 5, "target_weight": 0.0},
        {"": (1, 2, 5, 10, 20), "shifted_goals": (5, 10, 20)},
    ),
    "mountain_car_no_extra": Row("mountain_car", {"extra": False}, {"": (1, 2, 5, 20)}),
}


def measure(
    name: str,
    seeds: Sequence[int],
    num_tasks: int,
    runs: pathlib.Path | None = None,
    *,
    draw: int = DRAW,
    vmapped: bool = False,
) -> dict[str, Any]:
    """One row: {"seconds": [S], "scenarios": {SCENARIO: {"step_sizes": {NAME: [steps]}, "curves": {METRIC: {NAME: values}}}}}.

    The values of "learned" are [S][M][steps].

    Args:
      name: of the row.
      seeds: [S] of the meta-trainings.
      num_tasks: M, tested draws.
      runs: parent of the run folders, or None.
      draw: key of the tested draws, of those for tuning and of the pretraining.
      vmapped: whether the seeds are meta-trained in one program. The seconds are then those of all seeds.
    """
    row = ROWS[name]
    experiment = experiments.build(row.experiment, row.overrides)
    definition = experiments.find(row.experiment).for_config(experiment.config)
    starts = [single_run.make_start(experiment, seed) for seed in seeds]
    untrained = [_parts(start) for start in starts]
    folder = None if runs is None else runs / name
    ends, seconds = (_together if vmapped else _one_by_one)(name, experiment, dict(zip(seeds, starts, strict=True)), folder)
    trained, contexts = [_parts(state) for state in ends], [state.context for state in ends]
    parts = {}
    # The baselines descend through the model of the first seed.
    scenarios = definition.scenarios(experiment._replace(context=contexts[0]))
    for scenario_name, steps in row.at.items():
        scenario = scenarios[scenario_name]
        if scenario.problem_for is not None:
            scenario = scenario._replace(problem=scenario.problem_for(steps[-1]))
        if not row.others:
            scenario = scenario._replace(pretrain=None, maml=None, rivals={}, reference=None)
        scenario = scenario._replace(probe=None, other_metrics=tuple(m for m in scenario.other_metrics if not _left_out(m)))
        parts[scenario_name] = _follow(experiment, scenario, steps, (trained, untrained, contexts), num_tasks, draw)
    about = {"row": name, "experiment": row.experiment, "overrides": row.overrides, "seeds": list(seeds), "draw": draw}
    return {**about, "seconds": seconds, "scenarios": parts}


def _parts(state: Any) -> ml3_jax.MetaParams:
    return ml3_jax.MetaParams(state.loss_params, state.init_params, state.optimizer_params)


def _together(
    name: str, experiment: Any, starts: Mapping[int, Any], folder: pathlib.Path | None
) -> tuple[list[Any], list[float]]:
    """As `_one_by_one`, with all seeds in one program; the seconds are those of all."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        definition = experiments.find(ROWS[name].experiment)
        folders = meta_train.train_seeds(definition, experiment.config, list(starts), folder)
        found = [_finished(experiment, start, own) for start, own in zip(starts.values(), folders, strict=True)]
    return [state for state, _ in found], [round(max(seconds for _, seconds in found), 1)] * len(found)


def _one_by_one(
    name: str, experiment: Any, starts: Mapping[int, Any], folder: pathlib.Path | None
) -> tuple[list[Any], list[float]]:
    """([S] states after meta-training, [S] seconds)."""
    ends, seconds = [], []
    for seed, start in starts.items():
        if folder is None:
            began = time.monotonic()
            state, _ = experiment.meta.run(start, experiment.config.meta_steps)
            jax.block_until_ready(state)
            taken = time.monotonic() - began
        else:
            state, taken = _in_folder(ROWS[name].experiment, experiment, seed, start, folder / f"seed_{seed}")
        ends.append(state)
        seconds.append(round(taken, 1))
        print(f"{name}: seed {seed} meta-trained in {seconds[-1]} s", flush=True)
    return ends, seconds


def _in_folder(name: str, experiment: Any, seed: int, start: Any, folder: pathlib.Path) -> tuple[Any, float]:
    """(the last state, seconds) of a run folder, which is first meta-trained to the end.

    Raises:
      ValueError: the folder has more meta-steps than the row.
    """
    meta_train.train(experiments.find(name), experiment.config, seed, folder)
    return _finished(experiment, start, folder)


def _finished(experiment: Any, start: Any, folder: pathlib.Path) -> tuple[Any, float]:
    restored = single_run.restore(folder, start)
    assert restored is not None  # meta-training saved it
    if restored[0] != experiment.config.meta_steps:
        raise ValueError(
            f"{folder}: expected a run of {experiment.config.meta_steps} meta-steps, found one of {restored[0]}; nothing was "
            "changed: name another folder with --runs"
        )
    return restored[1], float(metrics_log.read(folder)["seconds"][-1])


def _left_out(metric: str) -> bool:
    """Whether a further metric is for figures only."""
    return metric == "gradient_cosine" or metric.startswith("torque_rmse_")


def _follow(
    experiment: Any,
    scenario: Any,
    steps: tuple[int, ...],
    runs: tuple[list[Any], list[Any], list[Any]],
    num_tasks: int,
    draw: int,
) -> dict[str, Any]:
    trained, untrained, contexts = runs
    test, tune = evaluate.draws(scenario, jax.random.key(draw), num_tasks)
    config = experiment.config

    def by_loss(phi: Any, context: Any) -> dict[str, np.ndarray]:
        own = scenario if scenario.context is None else scenario._replace(context=context)
        return evaluate.make_learned(experiment, own, steps[-1])(phi)(config.inner_lr, test)

    curves: dict[str, Any] = {
        "learned": [by_loss(phi, context) for phi, context in zip(trained, contexts, strict=True)],
        "untrained": [by_loss(untrained[0], contexts[0])],
    }
    same = baselines.plain(scenario, config.inner_optimizer, steps[-1], config.inner_decay_steps)
    curves[curve_names.SAME_LR] = [same(config.inner_lr, test)]
    reported = {name: [_at(traces, steps) for traces in of_seeds] for name, of_seeds in curves.items()}
    sizes = {name: [config.inner_lr] * len(steps) for name in curves}
    tuned = baselines.tuned(scenario, config, (test, tune), steps, jax.random.key(draw))
    for name, baseline in tuned.items():
        sizes[name], curves[name] = baseline.sizes, [baseline.traces[-1]]
        of_steps = [_at(traces, [step]) for traces, step in zip(baseline.traces, steps, strict=True)]
        reported[name] = [{metric: np.concatenate([one[metric] for one in of_steps], axis=1) for metric in of_steps[0]}]
    for name, traces in evaluate.rival_curves(scenario, jax.random.key(draw), test, steps[-1]).items():
        curves[name], reported[name], sizes[name] = [traces], [_at(traces, steps)], [float("nan")] * len(steps)
    reference = None if scenario.reference is None else scenario.reference(test.tasks, RESULTS / "ppo")
    return {
        "metric": scenario.metric,
        "title": scenario.title,
        "steps": list(steps),
        "step_sizes": sizes,
        "schedules": {name: baseline.schedules for name, baseline in tuned.items()},
        "env_steps_to_gain": _to_gain(scenario, curves, reference, tuned, test),
        "ppo": None if reference is None else _as_json(reference),
        "curves": {
            metric: {name: [one[metric].tolist() for one in of_seeds] for name, of_seeds in reported.items()}
            for metric in (scenario.metric, *scenario.other_metrics)
        },
    }


def _at(traces: dict[str, np.ndarray], steps: Sequence[int]) -> dict[str, np.ndarray]:
    """{METRIC: [M, S]} at S steps, NaN where not finite."""
    return {metric: np.where(np.isfinite(curve), curve, np.nan)[:, list(steps)] for metric, curve in traces.items()}


def _to_gain(
    scenario: Any, curves: dict[str, Any], reference: Any, tuned: dict[str, baselines.Baseline], test: evaluate.Draw
) -> list[dict[str, int | None]]:
    """`launch.evaluation.results.steps_to_gain` for each seed of the learned loss; [] if the problem takes no samples.

    A tuned baseline has two candidates: the step size that is fastest on the tuning draw, and the one tuned for the last
    step. The faster one on the tested draw counts.
    """
    samples = scenario.problem.samples_per_step
    if not samples:
        return []
    found = []
    for seed in range(len(curves["learned"])):
        own = {name: traces[seed if name == "learned" else 0][scenario.metric] for name, traces in curves.items()}
        taken = {name: [samples * step for step in range(curve.shape[1])] for name, curve in own.items()}
        if reference is not None:
            own["ppo"], taken["ppo"] = reference.values[scenario.metric], reference.env_steps
        reached = results.steps_to_gain(own, taken, maximize=scenario.maximize)
        common = min(len(curve) for curve in own.values())
        shared = {name: curve[:common] for name, curve in own.items()}
        start, gain = curve_names.mean_curve(shared["learned"])[0], results.best_gain(shared, maximize=scenario.maximize)
        for name, baseline in tuned.items():
            fastest = baseline.fastest(gain, test, metric=scenario.metric, maximize=scenario.maximize) if gain > 0 else None
            if fastest is not None:
                at = results.steps_to(fastest[:common], taken[name], start, gain, maximize=scenario.maximize)
                reached[name] = min((steps for steps in (at, reached[name]) if steps is not None), default=None)
        found.append(reached)
    return found


def _as_json(reference: Any) -> dict[str, Any]:
    values = {name: curve.tolist() for name, curve in reference.values.items()}
    return {"env_steps": reference.env_steps, "values": values, "converged": reference.converged}


def summary(content: dict[str, Any]) -> str:
    """The row as a Markdown table: mean over tasks for each seed, and the ratio of means to each baseline."""
    lines = [f"### {content['row']}", "", f"seconds of meta-training by seed: {content['seconds']}", ""]
    for part in content["scenarios"].values():
        for index, step in enumerate(part["steps"]):
            for metric, by_curve in part["curves"].items():
                lines += [
                    f"{part['title']}: {metric} after {step} steps",
                    "",
                    "| curve | step size | by seed | mean | learned / it |",
                ]
                lines.append("|---|---|---|---|---|")
                finals = {c: np.array(v, dtype=float)[:, :, index] for c, v in by_curve.items()}
                learned = np.nanmean(finals["learned"], axis=1)
                for curve, values in finals.items():
                    means, lost = np.nanmean(values, axis=1), float(np.isnan(values).mean())
                    compared = curve != "learned" and means.mean() > 0
                    ratio = f"{learned.mean() / means.mean():.3f}" if compared else "-"
                    ratio += f" ({lost:.0%} diverged)" if lost else ""
                    shown = " ".join(f"{m:.4g}" for m in means)
                    lines.append(
                        f"| {curve} | {part['step_sizes'][curve][index]:.3g} | {shown} | {means.mean():.4g} | {ratio} |"
                    )
                if metric == "distance":
                    lines.append("\ntasks on which the learned loss is closer, by seed")
                    for curve, values in finals.items():
                        if curve != "learned":
                            # A task that diverged counts as infinitely far.
                            closer = np.nan_to_num(finals["learned"], nan=np.inf) < np.nan_to_num(values, nan=np.inf)
                            lines.append(f"- than {curve}: {' '.join(f'{n}' for n in closer.sum(axis=1))} of {closer.shape[1]}")
                for bound in BOUNDS.get(metric, ()):
                    lines.append(f"\n% of tasks within {bound}, by seed")
                    for curve, values in finals.items():
                        share = [f"{100 * (seed <= bound).mean():.1f}" for seed in values]
                        lines.append(f"- {curve}: {' '.join(share)}")
                if metric in MEDIANS:
                    medians = [f"{np.nanmedian(seed):.4g}" for seed in finals["learned"]]
                    lines.append(f"\nmedian of learned, by seed: {' '.join(medians)}")
                lines.append("")
        for seed, reached in enumerate(part["env_steps_to_gain"]):
            shown = ", ".join(f"{name} {steps}" for name, steps in reached.items())
            lines.append(f"environment steps to {results.GAIN:.0%} of the best final gain, seed {seed}: {shown}")
        if part["ppo"] is not None:
            final = np.array(part["ppo"]["values"][part["metric"]])[:, -1]
            flat = sum(part["ppo"]["converged"])
            lines.append(f"PPO after {part['ppo']['env_steps'][-1]} steps: {final.mean():.4g}, {flat} of {len(final)} flat\n")
    return "\n".join(lines)


def main() -> None:
    """Measures the rows named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--draw", type=int, default=DRAW)
    parser.add_argument("--runs", type=pathlib.Path)
    parser.add_argument("--vmapped", action="store_true")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    devices.one_per_core()
    compilation_cache.enable()
    for name in arguments.rows:
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        options = {"draw": arguments.draw, "vmapped": arguments.vmapped}
        content = measure(name, seeds, arguments.tasks, arguments.runs, **options)
        content |= {"device": f"{jax.devices()[0].device_kind}, {platform.machine()}", "jax": jax.__version__}
        text = json.dumps(content).replace("NaN", "null")
        (RESULTS / f"seeds_{name}.json").write_text(text + "\n")
        print("\n" + summary(content), flush=True)


if __name__ == "__main__":
    main()
