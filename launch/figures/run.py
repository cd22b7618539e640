"""The figures of every run folder, drawn from metrics.csv and meta_test.json. Titles and legends explain them."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from launch.curves import LEARNED, PPO, SAME_LR, TUNED, mean_curve
from launch.figures import style

BLOWN_UP = 1000.0  # times the highest start; on a linear axis, larger values are cut off
SMOOTHING = 0.05  # window of the moving average, as a share of all points
INNER_STEP = "inner step (update of the optimizee)"
BEFORE: dict[str, Any] = {"color": "0.5", "linewidth": 1, "linestyle": (0, (1, 2))}  # the line of the start


def meta_training(path: pathlib.Path, name: str, columns: Mapping[str, np.ndarray], config: Any) -> None:
    """The meta-training curve of the experiment `name`: task loss and norm of the meta-gradient, from metrics.csv."""
    with style.drawing(path, 7, 5.4, constrained=False) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for axes, column, words in (
            (upper, "task_loss", "task loss"),
            (lower, "meta_grad_norm", "norm of the\nmeta-gradient"),
        ):
            values = columns[column]
            axes.plot(columns["step"], values, ".", color="#0072B2", alpha=0.3, markersize=4)
            axes.plot(columns["step"], _smooth(values), color="#0072B2", linewidth=2)
            axes.set_ylabel(words)
            _log_if_wide(axes, values)
        skipped = int(columns["skipped"].sum())
        tasks = "1 task" if config.num_tasks == 1 else f"{config.num_tasks} tasks"
        style.title(
            upper,
            f"Meta-training of the learned loss: {name}",
            f"points: mean over {config.log_every} meta-steps of {tasks} each; line: moving average"
            + (f"; {skipped} updates skipped (meta-gradient not finite or too large)" if skipped else ""),
        )
        lower.set_xlabel("meta-step (one update of the learned loss)")


def meta_test(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """All figures of meta_test.json: curves, step sizes, further metrics, environment steps, variants."""
    curves(folder / "meta_test.png", content)
    _step_sizes(folder / "step_sizes.png", content)
    # Parts of the metric (METRIC_PART, such as one joint's) are many: the experiment draws them in a figure of its own.
    parts = content["metric"] + "_"
    others = {name: values for name, values in content["other_metrics"].items() if not name.startswith(parts)}
    if content["success"]:
        others["share of tasks that succeed"] = content["success"]
    if others:
        _other_metrics(folder / "other_metrics.png", content, others)
    if PPO in content["curves"]:
        environment_steps(folder / "env_steps.png", content)
    if content["variants"]:
        _variants(folder / "variants.png", content)
    else:
        (folder / "variants.png").unlink(missing_ok=True)  # an earlier meta-test may have left one


def curves(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """The figure of the main scenario's curves."""
    with style.drawing(path, 7.5, 4.8, constrained=False) as figure:
        axes = figure.subplots()
        draw_curves(axes, content, content["curves"], axis_label(content))
        style.legend_beside(axes)
        axes.set_xlabel(INNER_STEP)
        style.title(axes, f"Meta-test on tasks never seen: {content['title']}", _how_to_read(content))


def axis_label(part: Mapping[str, Any]) -> str:
    """The metric with its unit."""
    metric = part["metric"].replace("_", " ")
    return f"{metric} ({part['unit']})" if part["unit"] else metric


def draw_curves(
    axes: Axes, part: Mapping[str, Any], values: Mapping[str, Any], words: str, *, log_scale: bool | None = None
) -> None:
    """Draws the mean over tasks of each curve, with its standard error, against inner steps.

    `part` is a section of meta_test.json; `values` are {NAME: [task][step]}, or {NAME: [step]} for shares, which have no
    standard error. `words` label the vertical axis.
    """
    highest = -np.inf
    for name, curve in values.items():
        if name == PPO:  # It has no inner steps; `environment_steps` draws it.
            continue
        array = np.array(curve, dtype=np.float64)
        mean = mean_curve(array) if array.ndim > 1 else array
        error = np.zeros(mean.size)
        if array.ndim > 1:
            finite = np.isfinite(array)
            squares = np.where(finite, (array - mean) ** 2, 0.0).sum(axis=0)
            error = np.sqrt(squares) / np.maximum(finite.sum(axis=0), 1)
        style.plot_band(axes, np.arange(mean.size), mean, error, name, _entry(name, part, array))
        highest = max(highest, mean[0]) if np.isfinite(mean[0]) else highest
    axes.set_ylabel(words)
    axes.margins(x=0.01)
    if part["log_scale"] if log_scale is None else log_scale:
        style.log_axis(axes, ceiling=10 * highest)
    elif 0 < BLOWN_UP * highest < axes.get_ylim()[1]:
        axes.set_ylim(-0.05 * highest, 2 * highest)


def environment_steps(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """The metric of every curve, PPO included, against environment steps on a log axis."""
    with style.drawing(path, 7.5, 4.8, constrained=False) as figure:
        axes = figure.subplots()
        for name, curve in content["curves"].items():
            array, steps = np.array(curve, dtype=np.float64), np.array(content["env_steps"][name])
            mean, error, after = mean_curve(array), np.nanstd(array, axis=0) / np.sqrt(len(array)), steps > 0
            style.plot_band(axes, steps[after], mean[after], error[after], name, _entry(name, content, array))
        start = np.array(content["curves"][LEARNED], dtype=np.float64)[:, 0].mean()
        axes.axhline(start, **BEFORE, label="before any update")
        axes.set_xscale("log")
        axes.set_ylabel(axis_label(content))
        axes.set_xlabel("environment steps on the new task")
        style.legend_beside(axes)
        style.title(axes, f"What a new task costs: {content['title']}", _how_to_read(content))


def _entry(name: str, part: Mapping[str, Any], array: np.ndarray) -> str:
    """The entry of a curve in the legend."""
    size = part["step_size"].get(name)
    entry = style.label(name, _learned(part)) + (f" ({size:.3g})" if size is not None else "")
    if array.ndim > 1 and len(array) < len(part["tasks"]):
        entry += f"\non {len(array)} of {len(part['tasks'])} tasks"
    diverged = 1 - np.isfinite(array[:, -1]).mean() if array.ndim > 1 else 0.0
    return entry + (f"\n{diverged:.0%} of tasks diverged, not in the mean" if diverged else "")


def _learned(part: Mapping[str, Any]) -> Sequence[str]:
    """The learned parts; older files are of a loss alone."""
    return part.get("learned_parts", ("loss",))


def _how_to_read(part: Mapping[str, Any]) -> str:
    return f"mean over {len(part['tasks'])} tasks; band: ±1 standard error; in brackets: step size"


def _step_sizes(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """The result of each loss at each step size. The plain loss at the same step size is a point on a tuned line."""
    sweeps = dict(content["sweep"])
    if any(sweeps[SAME_LR] == sweeps[name] for name in TUNED):
        del sweeps[SAME_LR]
    start = sweeps[LEARNED]["start"]
    with style.drawing(path, 7.5, 7.2, constrained=False) as figure:
        upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        for name, sweep in sweeps.items():
            look, sizes = style.look(name), np.array(sweep["step_sizes"])
            final = np.array(sweep["final"], dtype=np.float64)
            words = (
                style.label(name, _learned(content))
                .replace(", tuned step size", "")
                .replace("same step size", content["inner_optimizer"])
            )
            for axes, values in ((upper, final), (middle, sweep["improved"]), (lower, sweep["diverged"])):
                axes.plot(sizes, values, marker="o", markersize=3.5, label=words, **look)
            used = content["step_size"][name]
            height = np.interp(np.log(used), np.log(sizes), final, left=np.nan, right=np.nan)
            upper.plot(used, height, "o", markersize=10, markerfacecolor="none", color=look["color"], zorder=6)
        if start is not None:
            upper.axhline(start, **BEFORE, label="before any step")
        upper.set_xscale("log")
        if content["log_scale"]:
            style.log_axis(upper, ceiling=None if start is None else 10 * start)
        upper.set_ylabel(f"{axis_label(content)}\nafter {content['steps'][-1]} steps")
        style.legend_beside(upper)
        style.title(
            upper,
            f"How much the step size matters: {content['title']}",
            "mean over the tasks that stayed finite, on the draws used for tuning; circle: step size used in the test",
        )
        middle.set(ylabel="share that\nimproved", ylim=(-0.05, 1.05))
        lower.set(ylabel="share that\ndiverged", ylim=(-0.05, 1.05), xlabel="inner step size")


def _other_metrics(path: pathlib.Path, content: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    with style.drawing(path, 7.5, 0.6 + 2.8 * len(others), constrained=False) as figure:
        panels = figure.subplots(len(others), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (metric, values) in zip(panels, others.items(), strict=True):
            draw_curves(axes, content, values, metric.replace("_", " "), log_scale=False)
        style.legend_beside(panels[0])
        panels[-1].set_xlabel(INNER_STEP)
        style.title(panels[0], f"Meta-test, further metrics: {content['title']}", _how_to_read(content))


def _variants(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    parts = {"": content, **content["variants"]}
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    entries: dict[str, Any] = {}
    with style.drawing(path, 4.2 * columns, 3.5 * rows + 0.6) as figure:
        for index, (name, part) in enumerate(parts.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            draw_curves(axes, part, part["curves"], axis_label(part))
            axes.set_xlabel("inner step")
            axes.set_title(f"{name or 'main'}: {part['title']} ({len(part['tasks'])} tasks)", fontsize=9, wrap=True)
            # Step sizes and divergence differ between panels: the shared legend names only the curves.
            names = [name for name in part["curves"] if name != PPO]
            labels = [style.label(name, _learned(part)) for name in names]
            entries |= dict(zip(labels, axes.get_lines(), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, columns + 1))
        words = f"Meta-test: {content['experiment']} and its variants; mean over tasks, band: ±1 standard error"
        figure.suptitle(words, fontsize=11)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average of the finite values, with shorter windows at both ends."""
    half = max(1, round(SMOOTHING * values.size / 2))
    return np.array([mean_curve(values[max(0, i - half) : i + half + 1]) for i in range(values.size)])


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    """A log axis where positive values span more than a factor of ten."""
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        style.log_axis(axes)
