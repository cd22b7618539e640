"""Draws the figures of docs/experiments that come from the data in benchmarks/results.

python -m benchmarks.figures
"""

import pathlib
from typing import NamedTuple

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from benchmarks import tables
from benchmarks.lines import Line

FOLDER = tables.ROOT / "docs" / "figures"
STYLE = {
    "learned": ("#2a6f97", "-"),
    "SGD": ("#bc4b51", "--"),
    "Adam": ("#e09f3e", "--"),
    "pretrained": ("#5f7470", ":"),
    "MAML": ("#7b5ea7", ":"),
    "same step size": ("#b8b8b8", "--"),
    "untrained": ("#9a9a9a", ":"),
}


class Figure(NamedTuple):
    """One metric of a row over its reported steps."""

    line: Line  # the step does not count
    x: str
    y: str
    samples_per_step: int = 1
    log: bool = True


FIGURES = {
    "digits": Figure(Line("", "digits", "cross_entropy", 20), "", "cross-entropy (nats) after 20 steps", log=False),
    "few_shot_sine": Figure(Line("", "few_shot_sine_all", "mse", 10), "inner steps", "MSE of a sine from five points"),
    "point_mass_mbrl": Figure(
        Line("", "point_mass_mbrl", "relative_distance", 1), "policy updates", "final over initial distance"
    ),
    "reacher_expert": Figure(Line("", "reacher_expert", "return", 1), "policy updates", "return", log=False),
    "inverse_dynamics": Figure(
        Line("", "inverse_dynamics", "torque_rmse", 1), "samples", "torque error (N m)", samples_per_step=10
    ),
}


class _Plain(LogFormatter):
    """Labels of a log axis as plain decimals: 0.1, not 1e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos) and f"{x:g}"


def draw(name: str, path: pathlib.Path) -> None:
    """Draws a figure: every seed of the learned loss, and the mean of each baseline."""
    figure = FIGURES[name]
    steps = tables.steps(figure.line)
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}):
        canvas, axes = plt.subplots(figsize=(7.2, 4.0), dpi=130)
        if len(steps) == 1:
            _dots(axes, figure)
        else:
            _curves(axes, figure, steps)
        axes.set_ylabel(figure.y)
        canvas.tight_layout()
        canvas.savefig(path)
        plt.close(canvas)


def _curves(axes: Axes, figure: Figure, steps: list[int]) -> None:
    x = [figure.samples_per_step * step for step in steps]
    for column, (colour, style) in STYLE.items():
        found = [tables.by_seed(figure.line._replace(step=step), tables.CURVES[column]) for step in steps]
        values = np.array([one for one in found if one is not None])
        if values.size == 0:
            continue
        for seed in range(values.shape[1]):
            label = (f"{column}, {values.shape[1]} seeds" if column == "learned" else column) if seed == 0 else None
            axes.plot(x, values[:, seed], style, color=colour, label=label, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{one:,}" for one in x])
    axes.minorticks_off()
    if figure.log:
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(_Plain(labelOnlyBase=False, minor_thresholds=(1.2, 0.4)))
    axes.set_xlabel(figure.x)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _dots(axes: Axes, figure: Figure) -> None:
    names = []
    for column, (colour, _) in STYLE.items():
        values = tables.by_seed(figure.line, tables.CURVES[column])
        if values is None:
            continue
        axes.plot([len(names)] * values.size, values, "o", color=colour, markersize=8)
        names.append(column)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, None)


def main() -> None:
    """Draws all figures."""
    for name in FIGURES:
        draw(name, FOLDER / f"results_{name}.png")
        print(FOLDER / f"results_{name}.png")


if __name__ == "__main__":
    main()
