"""Animations of rollouts: a GIF with title, clock and legend, of any environment that can sketch its state."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

import envs
from launch.figures import style
from launch.runtime import files

GOAL_COLOR = "#009E73"
COLORS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "black")  # of rollouts with a label that style does not know
DPI = 80
PAUSE = 1.0  # s on the last frame
# Keyword arguments of matplotlib's plot: the path, the point of the goal, the body at the goal.
TRAIL: dict[str, Any] = {"linestyle": "none", "marker": ".", "markersize": 5, "alpha": 0.6, "markeredgewidth": 0}
RING: dict[str, Any] = {"color": GOAL_COLOR, "marker": "o", "fillstyle": "none", "linestyle": "none"}
DASHES: dict[str, Any] = {"color": GOAL_COLOR, "linestyle": (0, (2, 1.5))}


def pace(dt: float, fps: float) -> str:
    """The pace of an animation, in words: steps of dt seconds at fps frames a second."""
    slower = 1 / (dt * fps)
    return "in real time" if slower < 1.5 else f"slowed down {slower:.0f} times"


def save_gif(
    path: pathlib.Path,
    env: envs.GoalEnv,
    states: np.ndarray | Mapping[str, np.ndarray],
    goal: np.ndarray,
    *,
    title: str,
    fps: int = 20,
) -> None:
    """Writes rollouts towards one goal as a GIF with one frame per step. It pauses at its end and starts again.

    Args:
      path: the picture, ending in ".gif".
      env: the environment.
      states: [T + 1, S] of one rollout, or several by label (a curve's name, or any words), drawn over each other. A shorter
        one stays at its end.
      goal: [G].
      title: the subject, in words.
      fps: frames a second; players show up to 50.

    Raises:
      ValueError: no rollout, not [T + 1, S], not finite, another suffix, or fps not from 1 to 50.
    """
    if path.suffix != ".gif":
        raise ValueError(f"path: expected a name ending in .gif, got {path.name!r}")
    if not 1 <= fps <= 50:
        raise ValueError(f"fps: expected 1 to 50 frames a second, got {fps!r}")
    goal = np.asarray(goal)
    rollouts = {name: np.asarray(x) for name, x in (states if isinstance(states, Mapping) else {"": states}).items()}
    if not rollouts:
        raise ValueError("states: expected at least one rollout [T + 1, S], got none")
    for name, x in rollouts.items():
        if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
            raise ValueError(f"states {name!r}: expected one rollout [T + 1, S] of finite numbers, got {x.shape}: {x!r:.80}")
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        movers = [_Mover(axes, env, name, rollouts[name], goal, color) for name, color in _colors(list(rollouts)).items()]
        above, clock = _lay_out(figure, axes, movers, title)
        frames = _frames(canvas, movers, above, clock, env.dt)
    durations = [1000 / fps] * (len(frames) - 1) + [1000 * PAUSE]  # ms
    with files.replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _frames(canvas: FigureCanvasAgg, movers: Sequence["_Mover"], above: Sequence[Artist], clock: Text, dt: float) -> list[Any]:
    """Every step as a picture. The background is drawn once, the movers over a copy of it, and `above` over them."""
    canvas.draw()
    still = canvas.copy_from_bbox(canvas.figure.bbox)
    moving = sorted((artist for mover in movers for artist in mover.artists), key=lambda artist: artist.get_zorder())
    steps = max(len(mover.points) for mover in movers) - 1
    frames = []
    for step in range(steps + 1):
        canvas.restore_region(still)
        clock.set_text(f"step {step} of {steps}, {step * dt:.2f} s")
        for mover in movers:
            mover.show(step)
        for artist in (*moving, *above, clock):
            artist.draw(canvas.get_renderer())
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    # One palette from the last frame, which has every colour: with a palette per frame, colours flicker.
    palette = frames[-1].quantize(256, method=Image.Quantize.FASTOCTREE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each rollout: the colour of its curve in the other figures, or the next unused one."""
    known = {name: style.look(name)["color"] for name in names if name in style.LOOKS}
    unused = itertools.cycle(color for color in COLORS if color not in known.values())
    return {name: known[name] if name in known else next(unused) for name in names}


class _Mover:
    """The artists of one rollout: its body, the followed point, and the path of that point."""

    def __init__(self, axes: Axes, env: envs.GoalEnv, name: str, states: np.ndarray, goal: np.ndarray, color: str):
        self.sketches = [env.sketch(x, goal) for x in states]
        self.points = np.array([sketch.point for sketch in self.sketches])  # [T + 1, 2]
        (self._trail,) = axes.plot([], [], color=color, **TRAIL, zorder=3)
        self._links = LineCollection([], colors=color, linewidths=5, capstyle="round", zorder=4)
        axes.add_collection(self._links)
        (self._point,) = axes.plot([], [], "o", color=color, markersize=9, markeredgecolor="white", zorder=5)
        self.artists = (self._trail, self._links, self._point)
        for artist in self.artists:
            artist.set_animated(True)  # not drawn with the background
        links = len(self.sketches[0].segments) > 0
        distance = float(env.distance(states[-1], goal))
        unit = f" {env.distance_unit}" if env.distance_unit else ""
        who = style.label(name) if name else self.sketches[0].body
        label = f"{who}, at the end {distance:.2g}{unit} from the goal"
        self.handle = Line2D([], [], color=color, marker="o", markeredgecolor="white", linewidth=4 if links else 0, label=label)

    def show(self, step: int) -> None:
        """Moves everything to its state at a step, or to the last state."""
        last = min(step, len(self.sketches) - 1)
        self._trail.set_data(*self.points[: last + 1].T)
        self._point.set_data(*self.points[last : last + 1].T)
        self._links.set_segments(list(self.sketches[last].segments))


def _lay_out(figure: Figure, axes: Axes, movers: Sequence[_Mover], title: str) -> tuple[list[Artist], Text]:
    """Draws the background and sizes the figure to equal scales; returns the artists of the goal, and the clock."""
    sketch = movers[0].sketches[0]
    handles = [mover.handle for mover in movers]
    path = f"path of the {sketch.followed or sketch.body}, a dot a step"
    handles.append(Line2D([], [], color="0.4", **TRAIL, label=path))
    above: list[Artist] = [*axes.plot(*sketch.goal, animated=True, markersize=15, markeredgewidth=2.5, **RING)]
    handles.append(Line2D([], [], label="goal", markersize=10, markeredgewidth=2.5, **RING))
    if len(sketch.goal_segments):
        above.append(axes.add_collection(LineCollection(list(sketch.goal_segments), animated=True, linewidth=2, **DASHES)))
        handles.append(Line2D([], [], label=f"{sketch.body} at the goal", linewidth=2, **DASHES))
    if sketch.background is not None:
        axes.plot(*sketch.background.T, color="0.75", linewidth=3, zorder=1)
    xmin, xmax, ymin, ymax = sketch.limits
    points = np.concatenate([mover.points for mover in movers] + [sketch.goal[None]])
    margin = 0.04 * (xmax - xmin)
    xmin, ymin = np.minimum((xmin, ymin), points.min(axis=0) - margin)
    xmax, ymax = np.maximum((xmax, ymax), points.max(axis=0) + margin)
    axes.set(xlim=(xmin, xmax), ylim=(ymin, ymax), aspect="equal", xlabel=sketch.axes[0], ylabel=sketch.axes[1])
    # In inches: a drawing of at most 4.6 by 4.6, with room for axis labels, the title above and the legend below.
    scale = 4.6 / max(xmax - xmin, ymax - ymin)
    width, height = scale * (xmax - xmin), scale * (ymax - ymin)
    below, over = 0.62 + 0.24 * len(handles), 0.75
    size = max(width, 4.6) + 0.95, below + height + over
    figure.set_size_inches(*size)
    axes.set_position(((size[0] - width + 0.6) / 2 / size[0], below / size[1], width / size[0], height / size[1]))
    axes.set_title(title, loc="left", pad=24, fontsize=11)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.02, 0.0), borderaxespad=0.3, labelspacing=0.35)
    return above, axes.text(0.0, 1.015, "", transform=axes.transAxes, va="bottom", fontsize=9.5, color="0.35", animated=True)
