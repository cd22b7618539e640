"""Figures of inverse_dynamics: errors of the torque and of the inertia matrix against samples seen, and of each joint."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch import plot_style, results
from launch.evaluation import LEARNED

JOINT = "torque_rmse_"  # what the metrics of single joints start with
COLUMNS = 4


def draw(folder: pathlib.Path, content: Mapping[str, Any], *, extra: bool) -> None:
    """Writes errors.png and joints.png.

    Args:
      folder: where.
      content: what meta_test.json holds.
      extra: whether meta-training saw the true inertia matrix.
    """
    with matplotlib.rc_context(plot_style.STYLE):
        _errors(folder / "errors.png", content, extra)
        _joints(folder / "joints.png", content, extra)


def _errors(path: pathlib.Path, content: Mapping[str, Any], extra: bool) -> None:
    figure = Figure(figsize=(10.5, 4.6))
    left, right = figure.subplots(1, 2)
    _curves(left, content, content["curves"])
    left.set_ylabel("torque error (N m, root mean square over joints)")
    _curves(right, content, content["other_metrics"]["inertia"])
    right.set_ylabel("error of the inertia matrix / its size")
    right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title=_says(extra))
    count = len(content["tasks"])
    plot_style.title(
        left,
        "An arm with a new load learns its inertia matrix from one pass over its measurements",
        f"on motions not in the stream; mean over {count} loads, band: ±1 standard error; dotted: before any update",
    )
    plot_style.save(figure, path)


def _joints(path: pathlib.Path, content: Mapping[str, Any], extra: bool) -> None:
    names = [name for name in content["other_metrics"] if name.startswith(JOINT)]
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _curves(axes, content, content["other_metrics"][name])
        axes.set_title(f"joint {name.removeprefix(JOINT)}", fontsize=10)
        axes.set_ylabel("torque error (N m)")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    lines = {label: line for line in panels[0].get_lines() if not (label := str(line.get_label())).startswith("_")}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, title=_says(extra))
    figure.suptitle("Torque error of each joint on motions that are not in the stream, mean over loads", fontsize=11)
    plot_style.save(figure, path)


def _says(extra: bool) -> str:
    return f"learned loss: meta-trained {'with' if extra else 'without'} the true inertia"


def _curves(axes: Axes, content: Mapping[str, Any], values: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Each curve's mean over loads with its standard error against samples seen, both axes logarithmic."""
    start = results.mean_curve(values[LEARNED])[0]
    for name, curve in values.items():
        array, seen = np.array(curve, dtype=np.float64), np.array(content["env_steps"][name])
        mean, look, after = results.mean_curve(array), plot_style.look(name), seen > 0
        error = np.nanstd(array, axis=0) / np.sqrt(len(array))
        size = content["step_size"].get(name)
        words = plot_style.label(name) + (f" ({size:.3g})" if size is not None else "")
        axes.plot(seen[after], mean[after], label=words, **look)
        axes.fill_between(seen[after], (mean - error)[after], (mean + error)[after], color=look["color"], alpha=0.15, lw=0)
    axes.axhline(start, color="0.5", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    axes.set_xlabel("samples seen")
    plot_style.log_axis(axes, ceiling=3 * start if np.isfinite(start) else None)
