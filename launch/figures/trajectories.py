"""Figures of controlled systems: paths before and after updates, a model's errors, and what a learned loss wants.

Everything comes as arrays and words; `rollouts` computes them. What is not finite is left out.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from launch.figures import animations, loss_landscapes, style

GOAL: dict[str, Any] = {
    "color": animations.GOAL_COLOR,
    "marker": "o",
    "fillstyle": "none",
    "markersize": 13,
    "markeredgewidth": 1.8,
    "linestyle": "none",
}
START: dict[str, Any] = {"color": "black", "marker": "s", "markersize": 5, "linestyle": "none"}
END: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
EXTRA: dict[str, Any] = {"color": "#CC79A7", "marker": "*", "markersize": 14, "markeredgecolor": "white", "linestyle": "none"}
BEFORE: dict[str, Any] = {"color": "0.55", "linestyle": (0, (1, 1)), "linewidth": 1.8}
DASHES = ("-", (0, (5, 1.5)), "-")
STATES = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "black")
STATE_DASHES = ("-", "--", "-.", ":")
SIDE = 3.1  # inches, of a panel


class Postures(NamedTuple):
    """A body that is more than a point, drawn behind its path: M tasks, L lines each from [..., 0, :] to [..., 1, :]."""

    starts: np.ndarray  # [M, L, 2, 2]
    goals: np.ndarray  # [M, L, 2, 2]
    name: str  # in words


def in_words(updates: int) -> str:
    """How a path after so many updates is named."""
    return "before any update" if updates == 0 else f"after {updates} update{'s' * (updates > 1)}"


def in_plane(
    path: pathlib.Path,
    rows: Mapping[str, np.ndarray],
    distances: Mapping[str, np.ndarray],
    goals: np.ndarray,
    updates: Sequence[int],
    *,
    names: tuple[str, str],
    unit: str,
    title: str,
    postures: Postures | None = None,
) -> None:
    """Paths in a plane: a column for each task, a row for each loss, a curve for each number of updates.

    Args:
      path: the picture.
      rows: {a loss in words: [M, U, T + 1, 2]}.
      distances: {the same words: [M, U] how far from the goal each path ends}.
      goals: [M, 2].
      updates: U numbers of updates.
      names: the axes, with units.
      unit: of the distances.
      title: what the figure shows.
      postures: what else to draw at starts and goals.
    """
    rows = {name: _finite(paths) for name, paths in rows.items()}
    count = len(goals)
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(SIDE * count + 0.8, (SIDE + 0.35) * len(rows) + 1.0), layout="constrained")
        panels = figure.subplots(len(rows), count, squeeze=False)
        looks = _looks(updates)
        for row, (name, paths) in enumerate(rows.items()):
            for task, axes in enumerate(panels[row]):
                if postures is not None:
                    _postures(axes, postures, task)
                _curves(axes, paths[task], looks)
                axes.plot(*rows[name][task, 0, 0], **START, zorder=6)
                axes.plot(*goals[task], **GOAL, zorder=7)
                everything = [shown[task].reshape(-1, 2) for shown in rows.values()] + [goals[task][None]]
                if postures is not None:
                    everything += [postures.starts[task].reshape(-1, 2), postures.goals[task].reshape(-1, 2)]
                _square(axes, np.concatenate(everything))
                ends = ", ".join(_number(value) for value in distances[name][task])
                style.title(axes, f"task {task + 1}", f"{ends} {unit}".rstrip() + " away")
                axes.set_xlabel(names[0] if row == len(rows) - 1 else "")
                axes.set_ylabel(names[1] if task else f"{name}\n\n{names[1]}")
        handles = [Line2D([], [], **look, **END, label=in_words(k)) for look, k in zip(looks, updates, strict=True)]
        handles += [Line2D([], [], **START, label="start"), Line2D([], [], **dict(GOAL, markersize=9), label="goal")]
        if postures is not None:
            handles += [Line2D([], [], color="0.8", linewidth=4, label=f"{postures.name} at the start")]
            handles += [Line2D([], [], **_at_goal(), label=f"{postures.name} at the goal")]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        order = ", ".join(str(k) for k in updates)
        figure.suptitle(f"{title}\nin grey: how far from the goal the path ends, after {order} updates", fontsize=11)
        style.save(figure, path)


def phase_portrait(
    path: pathlib.Path,
    rows: Mapping[str, np.ndarray],
    closest: Mapping[str, np.ndarray],
    updates: Sequence[int],
    *,
    goal: float,
    wall: float,
    extra: np.ndarray | None,
    reached: float,
    names: tuple[str, str],
    title: str,
) -> None:
    """Velocity against position: a row for each loss, a column for each number of updates, a curve for each initialisation.

    Args:
      path: the picture.
      rows: {a loss in words: [M, U, T + 1, 2] positions and velocities}.
      closest: {the same words: [M, U] how near each path comes to the goal}.
      updates: U numbers of updates.
      goal: the position that is wanted.
      wall: the position that stops what moves, on the left.
      extra: [2] the goal on the way, as a state; None: there is none.
      reached: how near to the goal counts as there.
      names: the axes, with units.
      title: what the figure shows.
    """
    rows = {name: _finite(paths) for name, paths in rows.items()}
    everything = np.concatenate([paths.reshape(-1, 2) for paths in rows.values()])
    low, high = _bounds(everything, margin=0.06)
    low[0], high[0] = min(low[0], wall - 0.12), max(high[0], goal + 0.12)
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(2.4 * len(updates) + 0.8, 2.5 * len(rows) + 1.3), layout="constrained")
        panels = figure.subplots(len(rows), len(updates), sharex=True, sharey=True, squeeze=False)
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(next(iter(rows.values())))))
        for row, (name, paths) in enumerate(rows.items()):
            for column, axes in enumerate(panels[row]):
                axes.axvspan(low[0], wall, color="0.75", linewidth=0, zorder=1)
                axes.axvline(goal, color=animations.GOAL_COLOR, linewidth=2.5, zorder=2)
                if extra is not None:
                    axes.plot(*extra, **EXTRA, zorder=6)
                for shade, one in zip(shades, paths[:, column], strict=True):
                    axes.plot(*one.T, color=shade, linewidth=1.5, marker=".", markersize=3, zorder=4)
                    axes.plot(*_last(one), color=shade, **END, zorder=5)
                axes.plot(*paths[0, 0, 0], **START, zorder=7)
                style.title(axes, in_words(updates[column]), _arrived(closest[name][:, column], reached))
                axes.set_xlabel(names[0] if row == len(rows) - 1 else "")
                axes.set_ylabel("" if column else f"{name}\n\n{names[1]}")
        panels[0][0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        middle = shades[len(shades) // 2]
        handles = [
            Line2D([], [], color=middle, marker=".", label="path from one initialisation, a dot a step"),
            Line2D([], [], color=middle, **END, linestyle="none", label="its end"),
            Line2D([], [], **START, label="start, at rest"),
            Line2D([], [], color=animations.GOAL_COLOR, linewidth=2.5, label="goal, at any velocity"),
            Patch(color="0.75", label="wall"),
        ]
        if extra is not None:
            handles.append(Line2D([], [], **EXTRA, label="goal on the way: the task loss of meta-training alone knew it"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=11)
        style.save(figure, path)


class ErrorPanel(NamedTuple):
    """A model's error against time, of coordinates in one unit."""

    title: str
    unit: str
    errors: dict[str, np.ndarray]  # {coordinate: [T]}
    still: np.ndarray  # [T], of a model that says that nothing changes


def model_error(
    path: pathlib.Path,
    times: np.ndarray,
    panels: Sequence[ErrorPanel],
    horizon_error: np.ndarray,
    rollouts: np.ndarray,
    *,
    unit: str,
    notes: str,
) -> None:
    """A model's open-loop error on held-out rollouts: against time, and at the horizon after each fit.

    Args:
      path: the picture.
      times: [T] s.
      panels: what is shown against time.
      horizon_error: [F] of what the first panel shows, at the last time, after each fit.
      rollouts: [F] in the buffer at each fit.
      unit: of horizon_error.
      notes: on the fits, in words.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(4.1 * (len(panels) + 1), 3.9), layout="constrained")
        *left, right = figure.subplots(1, len(panels) + 1)
        for axes, panel in zip(left, panels, strict=True):
            for index, (name, values) in enumerate(panel.errors.items()):
                look: dict[str, Any] = {"color": STATES[index], "linestyle": STATE_DASHES[index % 2], "linewidth": 2.2}
                axes.plot(times, _positive(values), **look, label=name)
            axes.plot(times, _positive(panel.still), color="0.55", linestyle=":", linewidth=1.8, label="if nothing moved")
            style.log_axis(axes)
            axes.set(xlabel="time from the start of the rollout (s)", ylabel=f"error{_in(panel.unit)}, root mean square")
            axes.legend()
            style.title(axes, panel.title, "latest fit, run from the start state on its own")
        fits = np.arange(1, len(horizon_error) + 1)
        right.plot(fits, _positive(horizon_error), color="#0072B2", marker="o", markersize=4, linewidth=2)
        style.log_axis(right)
        shown = np.unique(np.linspace(0, len(fits) - 1, len(fits) if len(fits) <= 8 else 6).round().astype(int))
        right.set_xticks(fits[shown], [f"{fits[at]}\n{int(rollouts[at])}" for at in shown])
        right.set(xlabel="fit; below: real rollouts in the buffer then", ylabel=f"error{_in(unit)}, root mean square")
        style.title(right, f"{panels[0].title} after {times[-1]:.2g} s, fit by fit", notes)
        figure.suptitle("How far the learned model is from the real system, on real rollouts held out of the fit", fontsize=11)
        style.save(figure, path)


def over_action(
    path: pathlib.Path,
    grid: np.ndarray,
    curves: Mapping[str, np.ndarray],
    states: Sequence[str],
    *,
    title: str,
) -> None:
    """The learned loss of one sample against its action, at a few states; it marks where the loss is least.

    Args:
      path: the picture.
      grid: [P] values of one coordinate of the action, in limits; the others are 0.
      curves: {the coordinate in words: [C, P] at C states}.
      states: C states in words.
      title: what the figure shows.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(4.4 * len(curves), 3.6 + 0.22 * len(states)), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, (name, losses) in zip(panels, curves.items(), strict=True):
            axes.axvspan(grid[0], -1.0, color="0.93", linewidth=0)
            axes.axvspan(1.0, grid[-1], color="0.93", linewidth=0)
            for index, values in enumerate(loss_landscapes.unit_range(_finite(losses))):
                look = _state_look(index)
                axes.plot(grid, values, **look)
                if np.isfinite(values).all():
                    _mark_least(axes, grid, values, look["color"])
            axes.set(xlabel=f"{name}, in units of its limit", xlim=(grid[0], grid[-1]))
        panels[0].set_ylabel("learned loss, each curve\nscaled to run from 0 to 1")
        handles: list[Any] = [Line2D([], [], **_state_look(index), label=words) for index, words in enumerate(states)]
        handles.append(Line2D([], [], color="0.3", **END, linestyle="none", label="the action that it wants"))
        handles.append(Line2D([], [], color="0.3", marker=">", linestyle="none", label="it wants one beyond what is shown"))
        handles.append(Patch(color="0.93", label="the system clips actions to its limit"))
        figure.legend(handles=handles, loc="outside lower center", ncols=1 if len(curves) == 1 else 2)
        figure.suptitle(title, fontsize=11)
        style.save(figure, path)


def _arrived(closest: np.ndarray, reached: float) -> str:
    """How many of the paths get as near as that, and how many broke down."""
    broken = int(np.sum(~np.isfinite(closest)))
    words = f"{int(np.sum(closest <= reached))} of {len(closest)} reach the goal"
    return f"{words}, {broken} diverged" if broken else words


def _looks(updates: Sequence[int]) -> list[dict[str, Any]]:
    """How the path after each number of updates is drawn: grey dots before any, then from light to dark."""
    later = [k for k in updates if k]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.8, 0.15, max(1, len(later))))
    dashes = [DASHES[i % len(DASHES)] for i in range(len(later))]
    widths = np.linspace(3.4, 1.6, max(1, len(later)))  # a later path over an earlier one hides no part of it
    drawn = [
        {"color": shade, "linestyle": dash, "linewidth": width}
        for shade, dash, width in zip(shades, dashes, widths, strict=True)
    ]
    return [BEFORE] * (len(updates) - len(later)) + drawn[: len(later)]


def _curves(axes: Axes, paths: np.ndarray, looks: Sequence[dict[str, Any]]) -> None:
    """The paths [U, T + 1, 2] of one task, with a dot where each ends."""
    for order, (one, look) in enumerate(zip(paths, looks, strict=True)):
        axes.plot(*one.T, **look, zorder=3 + 0.1 * order)
        axes.plot(*_last(one), color=look["color"], **END, zorder=4 + 0.1 * order)


def _at_goal() -> dict[str, Any]:
    return {"color": animations.GOAL_COLOR, "linewidth": 1.5, "linestyle": (0, (2, 1.5))}


def _postures(axes: Axes, postures: Postures, task: int) -> None:
    """The body at start and goal, behind everything."""
    axes.add_collection(LineCollection(list(postures.starts[task]), colors="0.8", linewidths=4, capstyle="round", zorder=1))
    look = _at_goal()
    look = {"colors": look["color"], "linewidths": look["linewidth"], "linestyles": [look["linestyle"]]}
    axes.add_collection(LineCollection(list(postures.goals[task]), **look, zorder=2))


def _state_look(index: int) -> dict[str, Any]:
    return {
        "color": STATES[index % len(STATES)],
        "linestyle": STATE_DASHES[index % len(STATE_DASHES)],
        "linewidth": 2.2,
    }


def _mark_least(axes: Axes, grid: np.ndarray, values: np.ndarray, color: Any) -> None:
    """A dot at the minimum of a curve, or an arrow where it lies beyond the edge."""
    at = int(values.argmin())
    if at in (0, len(grid) - 1):
        inside = grid[at] + (0.03 if at == 0 else -0.03) * (grid[-1] - grid[0])
        axes.plot(inside, values[at], color=color, marker="<" if at == 0 else ">", markersize=8, zorder=5)
    else:
        axes.plot(grid[at], values[at], color=color, **dict(END, markersize=8), zorder=5)


def _square(axes: Axes, points: np.ndarray) -> None:
    """Equal scales, and limits around what is finite of the points [P, 2]."""
    low, high = _bounds(points, margin=0.0)
    middle, half = (low + high) / 2, 0.56 * float((high - low).max())
    axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half), aspect="equal")


def _bounds(points: np.ndarray, *, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and largest of each coordinate of [P, 2], with a margin as a share of the range."""
    points = points[np.isfinite(points).all(axis=-1)]
    if len(points) == 0:
        return np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.maximum(margin * (high - low), 1e-3)
    return low - room, high + room


def _finite(values: np.ndarray) -> np.ndarray:
    """The values, with NaN for what is not finite: matplotlib leaves that out."""
    return np.where(np.isfinite(values), values, np.nan)


def _last(path: np.ndarray) -> np.ndarray:
    """The last finite point of a path [T + 1, 2]; NaN where there is none."""
    finite = path[np.isfinite(path).all(axis=-1)]
    return finite[-1:].T if len(finite) else np.full((2, 1), np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    """What a log axis can show; NaN for the rest."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "diverged"


def _in(unit: str) -> str:
    return f" ({unit})" if unit else ""
