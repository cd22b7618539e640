"""How every figure looks: colours and names of the curves, titles, log axes, and how a picture is written."""

import pathlib
from typing import Any

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
# Okabe and Ito's palette, told apart with any colour vision; line styles differ too, for print in grey. The same step size is
# drawn over the tuned one: dashes show both where they coincide.
LOOKS: dict[str, dict[str, Any]] = {
    curves.LEARNED: {"color": "#0072B2", "linestyle": "-", "linewidth": 2.6, "zorder": 5},
    curves.UNTRAINED: {"color": "#888888", "linestyle": ":", "linewidth": 1.8, "zorder": 2},
    curves.SAME_LR: {"color": "#F0C000", "linestyle": "--", "linewidth": 1.8, "zorder": 4},
    "plain_tuned_sgd": {"color": "#D55E00", "linestyle": "-", "linewidth": 1.8, "zorder": 3},
    "plain_tuned_adam": {"color": "#009E73", "linestyle": "-.", "linewidth": 1.8, "zorder": 3},
    curves.PPO: {"color": "black", "linestyle": (0, (3, 1, 1, 1)), "linewidth": 1.8, "zorder": 3},
    curves.PRETRAINED: {"color": "#CC79A7", "linestyle": (0, (5, 1)), "linewidth": 1.8, "zorder": 3},
}
_OTHER_LOOK = {"color": "black", "linestyle": "-", "linewidth": 1.8}
LABELS = {
    curves.LEARNED: "learned loss",
    curves.UNTRAINED: "learned loss before meta-training",
    curves.SAME_LR: "plain loss, same step size",
    "plain_tuned_sgd": "plain loss, SGD, tuned step size",
    "plain_tuned_adam": "plain loss, Adam, tuned step size",
    curves.PPO: "PPO (brax.training)",
    curves.PRETRAINED: "pretrained on the training tasks, tuned",
}


def look(name: str) -> dict[str, Any]:
    """How a curve is drawn: keyword arguments of matplotlib's plot."""
    return LOOKS.get(name, _OTHER_LOOK)


def label(name: str) -> str:
    """A curve's name in words."""
    return LABELS.get(name, name.replace("_", " "))


def title(axes: Axes, main: str, below: str) -> None:
    """A title that says what is shown, and a smaller line on how to read it."""
    axes.set_title(main, loc="left", pad=19, fontsize=11)
    axes.text(0.0, 1.012, below, transform=axes.transAxes, fontsize=8.5, color="0.35", ha="left", va="bottom")


def log_axis(axes: Axes, *, ceiling: float | None = None) -> None:
    """A vertical log axis with plain numbers; nothing above the ceiling is shown, so that what blows up flattens nothing."""
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


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as a whole; other modules' figures go through here too."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
