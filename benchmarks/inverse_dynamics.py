"""Compares two run folders of inverse_dynamics in one figure: with and without extra information on the true inertia.

    python -m benchmarks.inverse_dynamics runs/inverse_dynamics runs/inverse_dynamics_no_extra [PICTURE]

Meta-test both with the same seed and tasks, so that all curves have the same loads, motions and networks.
"""

import argparse
import json
import pathlib
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from launch import curves
from launch.experiments.inverse_dynamics import figures as inverse_dynamics_figures
from launch.figures import style
from launch.runs import run_folder

UNSHAPED = {"color": "#56B4E9", "linestyle": (0, (4, 2)), "linewidth": 2.2, "zorder": 4}
BASELINES = ("plain_same_lr", "plain_tuned_sgd", "plain_tuned_adam", "pretrained_tuned")
SHOWN = {
    "torque_rmse": "torque error (N m)",
    "inertia": "error of the inertia matrix / its size",
    "inertia_by_joint": "the same, each joint alike",
}


def compare(path: pathlib.Path, shaped: dict[str, Any], unshaped: dict[str, Any]) -> None:
    """Draws torque error and both inertia errors against samples, for both losses and the baselines.

    Args:
      path: the picture.
      shaped, unshaped: content of meta_test.json with and without extra information.

    Raises:
      ValueError: the tasks differ.
    """
    if (shaped["seed"], shaped["tasks"]) != (unshaped["seed"], unshaped["tasks"]):
        raise ValueError(
            "expected two runs that were meta-tested on the same tasks, got different ones: pass the same --seed and --tasks"
        )
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(14, 4.4))
        panels = figure.subplots(1, len(SHOWN))
        for axes, (metric, words) in zip(panels, SHOWN.items(), strict=True):
            own, other = (_values(content, metric) for content in (shaped, unshaped))
            lines = {"learned loss, shaped by the true inertia": (own["learned"], style.look("learned"))}
            lines["learned loss, meta-trained on torque alone"] = (other["learned"], UNSHAPED)
            lines |= {style.label(name): (own[name], style.look(name)) for name in BASELINES if name in own}
            start = curves.mean_curve(own["learned"])[0]
            inverse_dynamics_figures.against_samples(axes, shaped["env_steps"]["learned"], lines, start=start)
            axes.set_ylabel(words)
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        style.title(
            panels[0],
            "An arm with a new load learns its inertia matrix from one pass over its measurements",
            f"other motions; mean over {len(shaped['tasks'])} loads; band: ±1 standard error; dotted: at the start",
        )
        figure.subplots_adjust(wspace=0.3)
        style.save(figure, path)


def _values(content: dict[str, Any], metric: str) -> dict[str, Any]:
    return content["curves"] if metric == content["metric"] else content["other_metrics"][metric]


def main() -> None:
    """Draws the figure of the run folders named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shaped", type=pathlib.Path)
    parser.add_argument("unshaped", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path, nargs="?", default=pathlib.Path("docs/figures/inverse_dynamics.png"))
    arguments = parser.parse_args()
    contents = [json.loads((folder / run_folder.RESULTS).read_text()) for folder in (arguments.shaped, arguments.unshaped)]
    compare(arguments.picture, *contents)


if __name__ == "__main__":
    main()
