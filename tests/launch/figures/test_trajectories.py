"""The figures of controlled systems explain themselves; diverged paths neither break nor flatten them."""

import pathlib
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import envs
from launch.experiments.model_based import figures as control_figures
from launch.figures import style, trajectories

UPDATES = (0, 1, 2, 5)
GOALS = np.array([[1.0, 0.5], [-0.4, 1.2]])


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Figure]:
    """Figures by file name, written all the same."""
    figures: dict[str, Figure] = {}
    save = style.save

    def spy(figure: Figure, path: pathlib.Path) -> None:
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(style, "save", spy)
    return figures


def words(figure: Figure) -> str:
    """All text in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj() if isinstance(text, Text))


def is_whole(path: pathlib.Path) -> bool:
    """Whether a PNG file was written to its end."""
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


def straight(goals: np.ndarray, steps: int = 6) -> np.ndarray:
    """Paths [M, 4, steps + 1, 2] from the origin that end at 0, 0.5, 0.9 and 1 of the way to their goal."""
    share = np.array([0.0, 0.5, 0.9, 1.0])[:, None, None] * np.linspace(0.0, 1.0, steps + 1)[:, None]
    return goals[:, None, None] * share


def draw_in_plane(path: pathlib.Path, plain: np.ndarray, **options: Any) -> None:
    rows = {"learned loss": straight(GOALS), "plain loss": plain}
    ends = {name: np.linalg.norm(states[..., -1, :] - GOALS[:, None], axis=-1) for name, states in rows.items()}
    trajectories.in_plane(
        path, rows, ends, GOALS, UPDATES, names=("x (m)", "y (m)"), unit="m", title="Paths of the mass", **options
    )


def test_paths_in_the_plane_are_explained(drawn, tmp_path):
    draw_in_plane(tmp_path / "a.png", straight(GOALS))
    assert is_whole(tmp_path / "a.png")
    said = words(drawn["a.png"])
    for part in (
        *("Paths of the mass", "task 2", "x (m)", "y (m)", "learned loss", "plain loss", "start", "goal"),
        *("before any update", "after 1 update\n", "after 5 updates"),
        "1.1, 0.56, 0.11, 0 m away",  # |goal 1| = sqrt(1.25) = 1.118, and 1, 0.5, 0.1 and 0 times it
    ):
        assert part in said


def test_postures_are_drawn_behind_paths_and_named(drawn, tmp_path):
    lines = np.zeros((2, 2, 2, 2))
    lines[:, :, 1] = 1.0
    draw_in_plane(tmp_path / "a.png", straight(GOALS), postures=trajectories.Postures(lines, lines, "arm"))
    said = words(drawn["a.png"])
    assert "arm at the start" in said
    assert "arm at the goal" in said
    assert len(drawn["a.png"].axes[0].collections) == 2


def test_a_path_that_diverged_is_named_and_leaves_the_axes_finite(drawn, tmp_path):
    plain = straight(GOALS)
    plain[0, 1:, 1:] = np.inf
    plain[1] = np.nan
    draw_in_plane(tmp_path / "a.png", plain)
    assert is_whole(tmp_path / "a.png")
    said = words(drawn["a.png"])
    assert "1.1, diverged, diverged, diverged m away" in said
    for axes in drawn["a.png"].axes:
        assert max(np.abs([*axes.get_xlim(), *axes.get_ylim()])) < 3.0


def draw_phase_portrait(path: pathlib.Path, plain: np.ndarray, closest: np.ndarray, extra: np.ndarray | None) -> None:
    trajectories.phase_portrait(
        path,
        {"learned loss": straight(GOALS), "plain loss": plain},
        {"learned loss": np.array([[1.0, 0.5, 0.1, 0.0]] * 2), "plain loss": closest},
        UPDATES,
        goal=0.5,
        wall=-1.2,
        extra=extra,
        reached=1e-3,
        names=("position", "velocity (1/s)"),
        title="A car",
    )


def test_the_phase_portrait_explains_goals_and_wall_and_counts_who_arrives(drawn, tmp_path):
    closest = np.full((2, 4), 1.0)
    draw_phase_portrait(tmp_path / "a.png", straight(GOALS), closest, np.array([-0.9, 0.0]))
    draw_phase_portrait(tmp_path / "b.png", straight(GOALS), closest, None)
    assert is_whole(tmp_path / "a.png")
    said = words(drawn["a.png"])
    for part in ("position", "velocity (1/s)", "wall", "goal, at any velocity", "2 of 2 reach the goal", "after 2 updates"):
        assert part in said
    assert "goal on the way, known only to the task loss of meta-training" in said
    assert "goal on the way" not in words(drawn["b.png"])


def test_a_phase_portrait_of_paths_that_diverged_says_so(drawn, tmp_path):
    draw_phase_portrait(tmp_path / "a.png", np.full((2, 4, 7, 2), np.nan), np.full((2, 4), np.nan), None)
    assert is_whole(tmp_path / "a.png")
    assert "0 of 2 reach the goal, 2 diverged" in words(drawn["a.png"])


@pytest.mark.parametrize("fits", [1, 3, 64])
def test_the_models_error_has_units_a_reference_and_the_data_behind_each_fit(fits, drawn, tmp_path):
    times, growth = 0.1 * np.arange(1, 6), np.arange(5.0)  # the first error is 0: a log axis cannot show it
    panels = [
        trajectories.ErrorPanel("Position", "m", {"x": 0.01 * growth, "y": 0.02 * growth}, growth),
        trajectories.ErrorPanel("Velocity", "m/s", {"x": np.full(5, np.nan), "y": 0.02 * growth}, growth),
    ]
    rollouts = np.minimum(16 * np.arange(1, fits + 1), 256)
    trajectories.model_error(
        tmp_path / "a.png", times, panels, 1.0 / np.arange(1, fits + 1), rollouts, unit="m", notes="a fit every 100 meta-steps"
    )
    assert is_whole(tmp_path / "a.png")
    said = words(drawn["a.png"])
    for part in (
        *("error (m)", "error (m/s)", "(s)", "if nothing moved", "Position after 0.5 s", "a fit every 100 meta-steps"),
        f"{fits}\n{rollouts[-1]}",
    ):
        assert part in said


def test_the_loss_over_the_action_marks_its_minimum_inside_and_beyond(drawn, tmp_path):
    grid = np.linspace(-1.5, 1.5, 31)
    losses = np.array([(grid - 0.5) ** 2, (grid - 4.0) ** 2, np.full(31, np.nan)])
    trajectories.over_action(
        tmp_path / "a.png", grid, {"force": losses}, ["at rest", "moving", "broken"], title="The learned loss"
    )
    assert is_whole(tmp_path / "a.png")
    said = words(drawn["a.png"])
    for part in ("force, in units of its limit", "at rest", "moving", "action with the least loss", "beyond the shown range"):
        assert part in said
    points = [line for line in drawn["a.png"].axes[0].lines if np.size(line.get_xdata()) == 1]
    marks = {line.get_marker(): np.asarray(line.get_xdata()).item() for line in points}
    assert marks["o"] == pytest.approx(0.5)
    assert marks[">"] > 1.0


@pytest.mark.parametrize("name", ["point_mass", "mountain_car", "reacher"])
def test_every_coordinate_of_an_environment_has_a_name(name):
    env, said = envs.make(name), control_figures.WORDS[name]
    assert len(said.positions) == env.position_size
    assert len(said.actions) == env.action_size
