"""The content of meta_test.json, a section for each scenario, and the printed table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.curves import LEARNED, PPO, TUNED, mean_curve
from launch.evaluation.evaluate import Outcome
from launch.experiment import Reference, Scenario

GAIN = 0.8  # share of the best final gain of any curve, for "env_steps_to_gain"

Section = dict[str, Any]


def section(
    scenario: Scenario,
    outcome: Outcome,
    *,
    seconds: float | None,
    env_steps: int | None,
    reference: Reference | None = None,
) -> Section:
    """The section of a scenario in meta_test.json.

    `seconds` and `env_steps` are the costs of meta-training: None if unknown, or if nothing is sampled. `reference` has the
    curves "ppo" of all or the first tasks.
    """
    curves = {name: trace[scenario.metric] for name, trace in outcome.traces.items()}
    num_steps = next(iter(curves.values())).shape[1]
    success = {}
    if scenario.success is not None:
        success = {
            name: _numbers((np.isfinite(curve) & np.asarray(scenario.success(curve), dtype=bool)).mean(axis=0))
            for name, curve in curves.items()
        }
    samples = scenario.problem.samples_per_step
    others = {metric: {name: trace[metric] for name, trace in outcome.traces.items()} for metric in scenario.other_metrics}
    taken = {} if samples is None else {name: [samples * step for step in range(num_steps)] for name in curves}
    everything = dict(curves)
    if reference is not None:
        everything[PPO] = reference.values[scenario.metric]
        taken[PPO] = reference.env_steps
        for metric, values in others.items():
            values[PPO] = reference.values[metric]
    reached = steps_to_gain(everything, taken, maximize=scenario.maximize)
    return {
        "metric": scenario.metric,
        "unit": scenario.unit,
        "steps": list(range(num_steps)),
        "tasks": outcome.tasks,
        "curves": {name: _numbers(curve) for name, curve in everything.items()},
        "success": success,
        "step_size": outcome.step_sizes,
        "schedule": {name: tuned.schedule for name, tuned in outcome.schedules.items()},
        "other_metrics": {
            metric: {name: _numbers(curve) for name, curve in values.items()} for metric, values in others.items()
        },
        "env_steps": taken,
        "env_steps_to_gain": reached,
        "ppo_converged": [] if reference is None else reference.converged,
        "sweep": {name: sweep._asdict() for name, sweep in outcome.sweeps.items()},
        "schedules_tried": {name: tuned.tried for name, tuned in outcome.schedules.items()},
        "cost": {
            "seconds": seconds,
            "env_steps": env_steps,
            "break_even_tasks": _break_even(scenario, curves, samples, env_steps),
            "break_even_tasks_ppo": _break_even_ppo(reached, env_steps),
        },
    }


def steps_to_gain(
    curves: Mapping[str, np.ndarray], env_steps: Mapping[str, Sequence[int]], *, maximize: bool
) -> dict[str, int | None]:
    """The environment steps after which the mean of each curve has `GAIN` of the best final gain of any curve.

    Args:
      curves: {NAME: [M, E]} of the metric. Gains count from the start of the learned loss. If some curves cover only the
        first tasks, all are compared on these.
      env_steps: {NAME: [E]}; empty if nothing is sampled.
      maximize: whether a larger metric is better.

    Returns:
      {NAME: the first such number; None if it is never reached, or if no curve ends better than the start}.
    """
    if not env_steps:
        return {}
    common = min(len(curve) for curve in curves.values())
    shared = {name: curve[:common] for name, curve in curves.items()}
    gain = best_gain(shared, maximize=maximize)
    if not gain > 0:
        return dict.fromkeys(curves)
    start = mean_curve(shared[LEARNED])[0]
    return {name: steps_to(curve, env_steps[name], start, gain, maximize=maximize) for name, curve in shared.items()}


def best_gain(curves: Mapping[str, np.ndarray], *, maximize: bool) -> float:
    """How much better than the learned loss's start the best of these curves' means ends; they are of the same tasks."""
    sign = 1.0 if maximize else -1.0
    ends = [sign * mean_curve(curve)[-1] for curve in curves.values()]
    return float(np.nanmax(ends) - sign * mean_curve(curves[LEARNED])[0])


def steps_to(curve: np.ndarray, env_steps: Sequence[int], start: float, gain: float, *, maximize: bool) -> int | None:
    """The environment steps after which the mean of a curve is better than a start by `GAIN` of a gain; None: never."""
    sign = 1.0 if maximize else -1.0
    reached = np.flatnonzero(sign * mean_curve(curve) >= sign * start + GAIN * gain)
    return int(env_steps[reached[0]]) if reached.size else None


def table(title: str, part: Section) -> str:
    """The final metric of each curve as text: mean and standard deviation over tasks, and a comparison.

    Success is the share of tasks after the last step. The last column compares with the learned loss on the tasks where
    both curves are finite: the ratio of the means if no value is negative, else the difference of the means. The standard
    error of the paired values follows after +-.
    """
    unit = f" ({part['unit']})" if part["unit"] else ""
    finals = {name: np.array(curve, dtype=np.float64)[:, -1] for name, curve in part["curves"].items()}
    learned = finals[LEARNED]
    positive = all((final[np.isfinite(final)] >= 0).all() and np.nansum(final) > 0 for final in finals.values())
    lines = [
        f"{title}: {part['metric']}{unit} after {part['steps'][-1]} steps, {len(part['tasks'])} tasks",
        f"  {'curve':<22}{'step size':>10}{'mean':>11}{'std':>11}{'diverged':>10}{'success':>10}"
        f"   learned {'/' if positive else '-'} it",
    ]
    for name, final in finals.items():
        finite = final[np.isfinite(final)]
        mean, std = (finite.mean(), finite.std()) if finite.size else (math.nan, math.nan)
        ours = learned[: final.size]
        both = np.isfinite(final) & np.isfinite(ours)
        compared = "" if name == LEARNED or not both.any() else _compare(ours[both], final[both], positive)
        size = part["step_size"].get(name)
        shown = name if final.size == learned.size else f"{name} ({final.size} tasks)"
        lines.append(
            f"  {shown:<22}{'-' if size is None else f'{size:.3g}':>10}{mean:>11.4g}{std:>11.3g}"
            f"{1 - finite.size / final.size:>10.0%}{_share(part['success'], name):>10}   {compared}".rstrip()
        )
    return "\n".join(lines)


def table_of_runs(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """The final mean of each curve in several runs, {folder: content of meta_test.json}, with their mean and the worst."""
    first = next(iter(contents.values()))
    unit = f" ({first['unit']})" if first["unit"] else ""
    worst = np.nanmin if first["maximize"] else np.nanmax
    lines = [
        f"{len(contents)} runs: {first['metric']}{unit} after the last step",
        f"  {'curve':<22}{'mean':>11}{'worst':>11}   runs",
    ]
    for name in first["curves"]:
        found = [content["curves"].get(name) for content in contents.values()]
        means = [math.nan if curve is None else float(mean_curve(np.array(curve, dtype=np.float64))[-1]) for curve in found]
        of_all = (np.nanmean(means), worst(means)) if np.isfinite(means).any() else (math.nan, math.nan)
        lines.append(f"  {name:<22}{of_all[0]:>11.4g}{of_all[1]:>11.4g}   {' '.join(f'{mean:.4g}' for mean in means)}")
    return "\n".join([*lines, *(f"  run {number}: {folder}" for number, folder in enumerate(contents, 1))])


def _share(success: Mapping[str, Any], name: str) -> str:
    """The share of tasks that succeed at the last step; "-" if the scenario has no success."""
    return f"{success[name][-1]:.1%}" if name in success else "-"


def _compare(ours: np.ndarray, theirs: np.ndarray, as_ratio: bool) -> str:
    factor = ours.mean() / theirs.mean() if as_ratio else 1.0
    value = factor if as_ratio else float((ours - theirs).mean())
    error = (ours - factor * theirs).std() / math.sqrt(ours.size) / (theirs.mean() if as_ratio else 1.0)
    return f"{value:.3f} +- {error:.3f}"


def _break_even(scenario: Scenario, curves: Mapping[str, np.ndarray], samples: int | None, env_steps: int | None) -> int | None:
    """The number of new tasks that save the samples of meta-training; None: never, or nothing is sampled.

    The target is the final mean of the best tuned baseline. A new task saves the difference in samples between the
    baseline and the learned loss until each first reaches it.
    """
    if samples is None or env_steps is None:
        return None
    sign = -1.0 if scenario.maximize else 1.0
    means = {name: sign * mean_curve(curves[name]) for name in (LEARNED, *TUNED) if name in curves}
    tuned = [means[name] for name in TUNED if name in means and np.isfinite(means[name][-1])]
    if not tuned:
        return None
    best = min(tuned, key=lambda mean: mean[-1])
    ours, theirs = (np.flatnonzero(mean <= best[-1]) for mean in (means[LEARNED], best))
    saved = samples * int(theirs[0] - ours[0]) if ours.size else 0
    return math.ceil(env_steps / saved) if saved > 0 else None


def _break_even_ppo(reached: Mapping[str, int | None], env_steps: int | None) -> int | None:
    """The same against PPO, with `GAIN` of the best final gain as target; None: never."""
    ours, theirs = reached.get(LEARNED), reached.get(PPO)
    if env_steps is None or ours is None or theirs is None or theirs <= ours:
        return None
    return math.ceil(env_steps / (theirs - ours))


def _numbers(values: np.ndarray) -> list[Any]:
    """Nested lists of numbers, None where not finite: JSON has no NaN."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [float(value) if math.isfinite(value) else None for value in values]
