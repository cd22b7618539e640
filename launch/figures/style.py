"""The look of all figures: colours and names of curves, titles, bands, legends, log axes, and how a picture is written."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch import curves
from launch.runtime import files

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}
# The palette of Okabe and Ito works with any colour vision. Line styles differ too, for print in grey. The curve of the same
# step size is drawn over the tuned one: its dashes show both where they coincide.
LOOKS: dict[str, dict[str, Any]] = {
    curves.LEARNED: {"color": "#0072B2", "linestyle": "-", "linewidth": 2.6, "zorder": 5},
    curves.UNTRAINED: {"color": "#888888", "linestyle": ":", "linewidth": 1.8, "zorder": 2},
    curves.SAME_LR: {"color": "#F0C000", "linestyle": "--", "linewidth": 1.8, "zorder": 4},
    "plain_tuned_sgd": {"color": "#D55E00", "linestyle": "-", "linewidth": 1.8, "zorder": 3},
    "plain_tuned_adam": {"color": "#009E73", "linestyle": "-.", "linewidth": 1.8, "zorder": 3},
    curves.PPO: {"color": "black", "linestyle": (0, (3, 1, 1, 1)), "linewidth": 1.8, "zorder": 3},
    curves.PRETRAINED: {"color": "#CC79A7", "linestyle": (0, (5, 1)), "linewidth": 1.8, "zorder": 3},
    curves.MAML: {"color": "#56B4E9", "linestyle": (0, (1, 1)), "linewidth": 1.8, "zorder": 3},
}
_OTHER_LOOK = {"color": "black", "linestyle": "-", "linewidth": 1.8}
LABELS = {
    curves.SAME_LR: "plain loss, same step size",
    "plain_tuned_sgd": "plain loss, SGD, tuned step size",
    "plain_tuned_adam": "plain loss, Adam, tuned step size",
    curves.PPO: "PPO (brax.training)",
    curves.CONTEXT_POLICY: "policy with a memory of its task, trained on the training tasks",
    curves.PRETRAINED: "pretrained on the training tasks, tuned",
    curves.MAML: "MAML on the training tasks, tuned",
}


def look(name: str) -> dict[str, Any]:
    """Keyword arguments of matplotlib's plot for a curve."""
    return LOOKS.get(name, _OTHER_LOOK)


def label(name: str, learned: Sequence[str] = ("loss",)) -> str:
    """A curve's name in words; `learned` are the learned parts."""
    if name in (curves.LEARNED, curves.UNTRAINED):
        return f"learned {', '.join(learned)}" + " before meta-training" * (name == curves.UNTRAINED)
    return LABELS.get(name, name.replace("_", " "))


def shades(low: float, high: float, count: int) -> np.ndarray:
    """Colours [count, 4] of an ordered series, between two points of the colour map, each from 0 to 1."""
    return matplotlib.colormaps["viridis"](np.linspace(low, high, count))


@contextlib.contextmanager
def drawing(path: pathlib.Path, width: float, height: float, *, constrained: bool = True) -> Iterator[Figure]:
    """A new figure of this size in inches. It is written to `path` when the block ends."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained" if constrained else None)
        yield figure
        save(figure, path)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure; a failed write leaves the old picture."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")


def title(axes: Axes, main: str, below: str) -> None:
    """A title, and a smaller line on how to read the figure."""
    axes.set_title(main, loc="left", pad=19, fontsize=11)
    axes.text(0.0, 1.012, below, transform=axes.transAxes, fontsize=8.5, color="0.35", ha="left", va="bottom")


def legend_beside(axes: Axes, **options: Any) -> None:
    """A legend to the right of the axes."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), **options)


def plot_band(axes: Axes, x: Any, mean: np.ndarray, error: np.ndarray, name: str, words: str) -> None:
    """Draws a curve over x [P] in the look of its name, with a band of one error on either side; `words` are its legend."""
    axes.plot(x, mean, label=words, **look(name))
    axes.fill_between(x, mean - error, mean + error, color=look(name)["color"], alpha=0.15, linewidth=0)


def log_axis(axes: Axes, *, ceiling: float | None = None) -> None:
    """A vertical log axis with plain numbers. Values above the ceiling are cut off, so that they do not flatten the rest."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if ceiling is not None and np.isfinite(ceiling) and ceiling > low:
        axes.set_ylim(low, min(high, ceiling))
    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5) if decades > 0.7 else (2, 3, 4, 5, 6, 7, 8, 9)))
    axes.yaxis.set_minor_formatter(plain if decades < 2 else ticker.NullFormatter())
