"""Figures of inverse_dynamics: errors of the torque, of the inertia matrix and of each joint against samples seen."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from launch import curves
from launch.figures import style

JOINT = "torque_rmse_"  # prefix of the metrics of single joints
COLUMNS = 4


def draw(folder: pathlib.Path, content: Mapping[str, Any], *, extra: bool) -> None:
    """Writes errors.png and joints.png from the content of meta_test.json. `extra` is that of the config."""
    legend = f"learned loss: meta-trained {'with' if extra else 'without'} the true inertia"
    with style.drawing(folder / "errors.png", 10.5, 4.6, constrained=False) as figure:
        left, right = figure.subplots(1, 2)
        _curves(left, content, content["curves"])
        left.set_ylabel("torque error (N m, root mean square over joints)")
        _curves(right, content, content["other_metrics"]["inertia"])
        right.set_ylabel("error of the inertia matrix / its size")
        style.legend_beside(right, title=legend)
        words = f"mean over {len(content['tasks'])} loads; band: ±1 standard error; dotted: before any update"
        title = "An arm with a new load learns its inertia matrix from one pass over its measurements"
        style.title(left, title, f"on motions not in the stream; {words}")

    names = [name for name in content["other_metrics"] if name.startswith(JOINT)]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with style.drawing(folder / "joints.png", 3.1 * columns, 2.7 * rows + 0.8) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            _curves(axes, content, content["other_metrics"][name])
            axes.set_title(f"joint {name.removeprefix(JOINT)}", fontsize=10)
            axes.set_ylabel("torque error (N m)")
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        lines = {label: line for line in panels[0].get_lines() if not (label := str(line.get_label())).startswith("_")}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, title=legend)
        figure.suptitle("Torque error of each joint on motions not in the stream, mean over loads", fontsize=11)


def _curves(axes: Axes, content: Mapping[str, Any], values: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """`against_samples`, with name and step size of each curve in the legend."""
    lines = {}
    for name, curve in values.items():
        size = content["step_size"].get(name)
        lines[style.label(name) + (f" ({size:.3g})" if size is not None else "")] = (curve, style.look(name))
    against_samples(axes, content["env_steps"][curves.LEARNED], lines, start=curves.mean_curve(values[curves.LEARNED])[0])


def against_samples(
    axes: Axes, seen: Sequence[int], lines: Mapping[str, tuple[Any, Mapping[str, Any]]], *, start: float
) -> None:
    """Draws the mean over loads and its standard error against samples seen, on log axes. Diverged loads are left out.

    Args:
      axes: the axes.
      seen: [K + 1] samples, the first 0.
      lines: {label: ([load][step], keyword arguments of plot)}.
      start: the error before any update, a dotted line.
    """
    lowest = start
    for label, (curve, look) in lines.items():
        array = np.array(curve, dtype=np.float64)
        stayed = array[np.isfinite(array).all(axis=1)]
        lost = 1 - len(stayed) / len(array)
        words = label + (f"\n{lost:.0%} of loads diverged, left out" if lost else "")
        if not len(stayed):
            axes.plot([], [], label=words, **look)
            continue
        mean, error = stayed.mean(axis=0), stayed.std(axis=0) / np.sqrt(len(stayed))
        axes.plot(seen[1:], mean[1:], label=words, **look)
        axes.fill_between(seen[1:], (mean - error)[1:], (mean + error)[1:], color=look["color"], alpha=0.15, linewidth=0)
        lowest = min(lowest, mean.min())
    axes.axhline(start, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    axes.set_xlabel("samples seen")
    # A spike is cut off, so that it does not flatten the other curves.
    axes.set_ylim(0.8 * lowest, 1.25 * start)
    style.log_axis(axes)
