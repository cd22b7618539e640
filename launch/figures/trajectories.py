"""Figures of controlled systems: paths before and after updates, errors of a model, and the action with the least loss.

They take arrays and words; `rollouts` computes them. Values that are not finite are left out.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from launch.figures import animations, loss_landscapes, style

Look = dict[str, Any]  # keyword arguments of matplotlib's plot
GOAL: Look = animations.RING | {"markersize": 13, "markeredgewidth": 1.8}
START: Look = {"color": "black", "marker": "s", "markersize": 5, "linestyle": "none"}
END: Look = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
EXTRA: Look = {"color": "#CC79A7", "marker": "*", "markersize": 14, "markeredgecolor": "white", "linestyle": "none"}
BEFORE: Look = {"color": "0.55", "linestyle": (0, (1, 1)), "linewidth": 1.8}
AT_GOAL: Look = animations.DASHES | {"linewidth": 1.5}
DASHES = ("-", (0, (5, 1.5)), "-")
STATES = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "black")
STATE_DASHES = ("-", "--", "-.", ":")
SIDE = 3.1  # inches, of a panel


class Postures(NamedTuple):
    """A body of several lines, drawn behind its path: M tasks, L lines each from [..., 0, :] to [..., 1, :]."""

    starts: np.ndarray  # [M, L, 2, 2]
    goals: np.ndarray  # [M, L, 2, 2]
    name: str  # in words


class ErrorPanel(NamedTuple):
    """The error of a model against time, for coordinates in one unit."""

    title: str
    unit: str
    errors: dict[str, np.ndarray]  # {coordinate: [T]}
    still: np.ndarray  # [T], error of the prediction that nothing changes


def in_words(updates: int) -> str:
    """The name of a path after so many updates."""
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
      distances: {the same words: [M, U] distance between the end of each path and the goal}.
      goals: [M, 2].
      updates: U numbers of updates.
      names: the axes, with units.
      unit: of the distances.
      title: the subject of the figure.
      postures: the body at starts and goals.
    """
    looks = _looks(updates)
    with style.drawing(path, SIDE * len(goals) + 0.8, (SIDE + 0.35) * len(rows) + 1.0) as figure:
        panels = figure.subplots(len(rows), len(goals), squeeze=False)
        for row, (name, paths) in enumerate(rows.items()):
            for task, axes in enumerate(panels[row]):
                everything = [shown[task].reshape(-1, 2) for shown in rows.values()] + [goals[task][None]]
                if postures is not None:
                    _draw_postures(axes, postures, task)
                    everything += [postures.starts[task].reshape(-1, 2), postures.goals[task].reshape(-1, 2)]
                _draw_paths(axes, _finite(paths[task]), looks)
                axes.plot(*paths[task, 0, 0], **START, zorder=6)
                axes.plot(*goals[task], **GOAL, zorder=7)
                _square(axes, np.concatenate(everything))
                ends = ", ".join(f"{value:.2g}" if np.isfinite(value) else "diverged" for value in distances[name][task])
                style.title(axes, f"task {task + 1}", f"{ends} {unit}".rstrip() + " away")
            _label(panels[row], names, name, bottom=row == len(rows) - 1)
        handles = [Line2D([], [], **look, **END, label=in_words(k)) for look, k in zip(looks, updates, strict=True)]
        handles += [Line2D([], [], **START, label="start"), Line2D([], [], **dict(GOAL, markersize=9), label="goal")]
        if postures is not None:
            handles += [Line2D([], [], color="0.8", linewidth=4, label=f"{postures.name} at the start")]
            handles += [Line2D([], [], **AT_GOAL, label=f"{postures.name} at the goal")]
        order = ", ".join(str(k) for k in updates)
        _explain(figure, handles, 4, f"{title}\nin grey: distance from the goal at the end of the path, after {order} updates")


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
      closest: {the same words: [M, U] smallest distance between each path and the goal}.
      updates: U numbers of updates.
      goal: the goal position.
      wall: the position of the wall on the left.
      extra: [2] the goal on the way, as a state; None: there is none.
      reached: the distance up to which a path counts as at the goal.
      names: the axes, with units.
      title: the subject of the figure.
    """
    low, high = _bounds(np.concatenate([paths.reshape(-1, 2) for paths in rows.values()]), margin=0.06)
    low[0], high[0] = min(low[0], wall - 0.12), max(high[0], goal + 0.12)
    shades = style.shades(0.1, 0.8, len(next(iter(rows.values()))))
    line: Look = {"color": animations.GOAL_COLOR, "linewidth": 2.5}
    with style.drawing(path, 2.4 * len(updates) + 0.8, 2.5 * len(rows) + 1.3) as figure:
        panels = figure.subplots(len(rows), len(updates), sharex=True, sharey=True, squeeze=False)
        for row, (name, paths) in enumerate(rows.items()):
            for column, axes in enumerate(panels[row]):
                axes.axvspan(low[0], wall, color="0.75", linewidth=0, zorder=1)
                axes.axvline(goal, **line, zorder=2)
                if extra is not None:
                    axes.plot(*extra, **EXTRA, zorder=6)
                for shade, one in zip(shades, _finite(paths[:, column]), strict=True):
                    axes.plot(*one.T, color=shade, linewidth=1.5, marker=".", markersize=3, zorder=4)
                    axes.plot(*_last(one), color=shade, **END, zorder=5)
                axes.plot(*_finite(paths[0, 0, 0]), **START, zorder=7)
                style.title(axes, in_words(updates[column]), _arrived(closest[name][:, column], reached))
            _label(panels[row], names, name, bottom=row == len(rows) - 1)
        panels[0][0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        middle = shades[len(shades) // 2]
        handles = [
            Line2D([], [], color=middle, marker=".", label="path from one initialisation, a dot a step"),
            Line2D([], [], color=middle, **END, linestyle="none", label="its end"),
            Line2D([], [], **START, label="start, at rest"),
            Line2D([], [], **line, label="goal, at any velocity"),
            Patch(color="0.75", label="wall"),
        ]
        if extra is not None:
            handles.append(Line2D([], [], **EXTRA, label="goal on the way, known only to the task loss of meta-training"))
        _explain(figure, handles, 2, title)


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
    """The open-loop error of a model on held-out rollouts: against time, and at the horizon after each fit.

    Args:
      path: the picture.
      times: [T] s.
      panels: errors against time.
      horizon_error: [F] error of the first panel at the last time, after each fit.
      rollouts: [F] in the buffer at each fit.
      unit: of horizon_error.
      notes: on the fits, in words.
    """
    with style.drawing(path, 4.1 * (len(panels) + 1), 3.9) as figure:
        *left, right = figure.subplots(1, len(panels) + 1)
        for axes, panel in zip(left, panels, strict=True):
            for index, (name, values) in enumerate(panel.errors.items()):
                look = _state_look(index) | {"linestyle": STATE_DASHES[index % 2]}
                axes.plot(times, _positive(values), **look, label=name)
            axes.plot(times, _positive(panel.still), color="0.55", linestyle=":", linewidth=1.8, label="if nothing moved")
            axes.set(xlabel="time from the start of the rollout (s)", ylabel=_error_label(panel.unit))
            axes.legend()
            style.title(axes, panel.title, "latest fit, run from the start state on its own")
        fits = np.arange(1, len(horizon_error) + 1)
        right.plot(fits, _positive(horizon_error), color="#0072B2", marker="o", markersize=4, linewidth=2)
        shown = np.unique(np.linspace(0, len(fits) - 1, len(fits) if len(fits) <= 8 else 6).round().astype(int))
        right.set_xticks(fits[shown], [f"{fits[at]}\n{int(rollouts[at])}" for at in shown])
        right.set(xlabel="fit; below: real rollouts in the buffer then", ylabel=_error_label(unit))
        style.title(right, f"{panels[0].title} after {times[-1]:.2g} s, fit by fit", notes)
        for axes in (*left, right):
            style.log_axis(axes)
        figure.suptitle("Error of the learned model on real rollouts held out of the fit", fontsize=11)


def over_action(
    path: pathlib.Path, grid: np.ndarray, curves: Mapping[str, np.ndarray], states: Sequence[str], *, title: str
) -> None:
    """The learned loss of one sample against its action, at a few states, with a mark where it is least.

    Args:
      path: the picture.
      grid: [P] values of one coordinate of the action, in units of its limit; the others are 0.
      curves: {the coordinate in words: [C, P] at C states}.
      states: C states in words.
      title: the subject of the figure.
    """
    with style.drawing(path, 4.4 * len(curves), 3.6 + 0.22 * len(states)) as figure:
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
        handles.append(Line2D([], [], color="0.3", **END, linestyle="none", label="action with the least loss"))
        handles.append(Line2D([], [], color="0.3", marker=">", linestyle="none", label="least loss beyond the shown range"))
        handles.append(Patch(color="0.93", label="the system clips actions to its limit"))
        _explain(figure, handles, 1 if len(curves) == 1 else 2, title)


def _explain(figure: Figure, handles: Sequence[Any], columns: int, title: str) -> None:
    """The legend below all panels and the title above them."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.suptitle(title, fontsize=11)


def _label(row: Sequence[Axes], names: tuple[str, str], loss: str, *, bottom: bool) -> None:
    """The axis labels of a row of panels: x on the bottom row, y on each row, the loss beside the first panel."""
    for axes in row:
        axes.set_xlabel(names[0] if bottom else "")
    row[0].set_ylabel(f"{loss}\n\n{names[1]}")


def _arrived(closest: np.ndarray, reached: float) -> str:
    """The numbers of paths that reach the goal and that diverged, in words."""
    broken = int(np.sum(~np.isfinite(closest)))
    words = f"{int(np.sum(closest <= reached))} of {len(closest)} reach the goal"
    return f"{words}, {broken} diverged" if broken else words


def _looks(updates: Sequence[int]) -> list[Look]:
    """The look of the path after each number of updates: grey dots before any, then from light to dark."""
    later = sum(k > 0 for k in updates)
    widths = np.linspace(3.4, 1.6, max(1, later))  # a thin later path does not hide an earlier one
    drawn: list[Look] = [
        {"color": shade, "linestyle": DASHES[index % len(DASHES)], "linewidth": width}
        for index, (shade, width) in enumerate(zip(style.shades(0.8, 0.15, max(1, later)), widths, strict=True))
    ]
    return [BEFORE] * (len(updates) - later) + drawn[:later]


def _draw_paths(axes: Axes, paths: np.ndarray, looks: Sequence[Look]) -> None:
    """The paths [U, T + 1, 2] of one task, with a dot at each end."""
    for order, (one, look) in enumerate(zip(paths, looks, strict=True)):
        axes.plot(*one.T, **look, zorder=3 + 0.1 * order)
        axes.plot(*_last(one), color=look["color"], **END, zorder=4 + 0.1 * order)


def _draw_postures(axes: Axes, postures: Postures, task: int) -> None:
    """The body at start and goal, behind everything else."""
    axes.add_collection(LineCollection(list(postures.starts[task]), colors="0.8", linewidths=4, capstyle="round", zorder=1))
    axes.add_collection(LineCollection(list(postures.goals[task]), **AT_GOAL, zorder=2))


def _state_look(index: int) -> Look:
    dash = STATE_DASHES[index % len(STATE_DASHES)]
    return {"color": STATES[index % len(STATES)], "linestyle": dash, "linewidth": 2.2}


def _mark_least(axes: Axes, grid: np.ndarray, values: np.ndarray, color: Any) -> None:
    """A dot at the minimum of a curve, or an arrow where it lies at the edge."""
    at = int(values.argmin())
    if at in (0, len(grid) - 1):
        inside = grid[at] + (0.03 if at == 0 else -0.03) * (grid[-1] - grid[0])
        axes.plot(inside, values[at], color=color, marker="<" if at == 0 else ">", markersize=8, zorder=5)
    else:
        axes.plot(grid[at], values[at], color=color, **dict(END, markersize=8), zorder=5)


def _square(axes: Axes, points: np.ndarray) -> None:
    """Equal scales, and limits around the finite points of [P, 2]."""
    low, high = _bounds(points, margin=0.0)
    middle, half = (low + high) / 2, 0.56 * float((high - low).max())
    axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half), aspect="equal")


def _bounds(points: np.ndarray, *, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and largest of each coordinate of the finite points [P, 2], with a margin as a share of the range."""
    points = points[np.isfinite(points).all(axis=-1)]
    if len(points) == 0:
        return np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.maximum(margin * (high - low), 1e-3)
    return low - room, high + room


def _finite(values: np.ndarray) -> np.ndarray:
    """The values, with NaN for infinities: matplotlib leaves NaN out."""
    return np.where(np.isfinite(values), values, np.nan)


def _last(path: np.ndarray) -> np.ndarray:
    """The last finite point of a path [T + 1, 2], as [2, 1]; NaN if there is none."""
    finite = path[np.isfinite(path).all(axis=-1)]
    return finite[-1:].T if len(finite) else np.full((2, 1), np.nan)


def _positive(values: np.ndarray) -> np.ndarray:
    """The values that a log axis can show; NaN for the rest."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _error_label(unit: str) -> str:
    return f"error{f' ({unit})' if unit else ''}, root mean square"
