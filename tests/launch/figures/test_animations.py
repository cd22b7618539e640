"""The GIFs: a frame per step and a pause, explanations, and refusals with a reason."""

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import envs
from launch import curves
from launch.figures import animations

GOALS = {"point_mass": [1.0, 0.5], "mountain_car": [0.5, 1.0375], "reacher": [0.5, -1.0]}


def rollout(env: envs.GoalEnv, goal, steps: int = 6) -> np.ndarray:
    """A straight line in the positions that ends at the goal, at rest."""
    states = np.zeros((steps + 1, env.observation_size))
    ends = np.asarray(goal)[: env.position_size]
    states[:, : env.position_size] = np.linspace(np.zeros_like(ends) - 0.1, ends, steps + 1)
    return states


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The text of every picture."""
    frames = []
    frames_of = animations._frames

    def spy(canvas, *rest):
        drawn = frames_of(canvas, *rest)
        assert isinstance(canvas.figure, Figure)
        frames.append("\n".join(text.get_text() for text in canvas.figure.findobj() if isinstance(text, Text)))
        return drawn

    monkeypatch.setattr(animations, "_frames", spy)
    return frames


@pytest.mark.parametrize("name", GOALS)
def test_every_environment_has_an_animation_that_explains_itself(name, said, tmp_path):
    env, path = envs.make(name), tmp_path / "rollout.gif"
    animations.save_gif(path, env, rollout(env, GOALS[name]), np.array(GOALS[name]), title="After 10 updates", fps=10)
    body = env.sketch(np.zeros(env.observation_size), np.array(GOALS[name])).body
    at_goal = f"{body}, at the end 0 {env.distance_unit}".strip() + " from the goal"
    for part in ("After 10 updates", f"step 6 of 6, {6 * env.dt:.2f} s", at_goal, "a dot a step", "goal"):
        assert part in said[0]
    picture: Any
    with Image.open(path) as picture:
        assert picture.n_frames == 7
        assert picture.info["loop"] == 0
        durations, pixels = [], []
        for frame in range(7):
            picture.seek(frame)
            durations.append(picture.info["duration"])
            pixels.append(np.asarray(picture.convert("RGB")).astype(int))
    assert durations == [100] * 6 + [1000]
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(pixels))
    assert list(tmp_path.iterdir()) == [path]


def test_rollouts_are_told_apart_by_name_and_colour(said, tmp_path):
    env, goal = envs.make("reacher"), np.array([0.5, -1.0])
    states = rollout(env, goal)
    rollouts = {curves.LEARNED: states, "plain_tuned_adam": states[:3], "by hand": states, "expert": states[::-1]}
    animations.save_gif(tmp_path / "many.gif", env, rollouts, goal, title="Four")
    for part in (
        "learned loss, at the end 0 rad",
        "plain loss, Adam, tuned step size, at the end",
        "by hand",
        "arm at the goal",
    ):
        assert part in said[0]
    colors = animations._colors(list(rollouts))
    assert list(colors) == list(rollouts)
    assert len(set(colors.values())) == 4
    picture: Any
    with Image.open(tmp_path / "many.gif") as picture:
        assert picture.n_frames == 7  # the shorter rollout waits
        picture.seek(3)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for color in (*colors.values(), animations.GOAL_COLOR):  # none was lost to the palette
        rgb = np.round(255 * np.array(to_rgb(color)))
        assert np.sum(np.abs(pixels - rgb).max(axis=-1) < 16) > 20


def test_a_state_outside_the_limits_of_the_sketch_widens_them(monkeypatch, tmp_path):
    env, limits = envs.make("point_mass"), []
    frames_of = animations._frames
    monkeypatch.setattr(
        animations, "_frames", lambda c, *rest: limits.append(c.figure.axes[0].get_xlim()) or frames_of(c, *rest)
    )
    states = np.array([[0.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]])
    animations.save_gif(tmp_path / "far.gif", env, states, np.array([1.0, 0.0]), title="Far")
    assert limits[0][0] < -1.5
    assert limits[0][1] > 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "a.png"}, "ending in .gif"),
        ({"fps": 0}, "1 to 50 frames"),
        ({"states": {}}, "at least one rollout"),
        ({"states": np.zeros(4)}, r"expected one rollout \[T \+ 1, S\]"),
        ({"states": {"learned": np.full((3, 4), np.nan)}}, "'learned': expected .* finite"),
    ],
    ids=str,
)
def test_misuse_is_refused_and_nothing_is_written(change, message, tmp_path):
    env = envs.make("point_mass")
    given = {"path": "a.gif", "states": np.zeros((3, 4)), "fps": 20} | change
    with pytest.raises(ValueError, match=message):
        animations.save_gif(tmp_path / given["path"], env, given["states"], np.zeros(2), title="", fps=given["fps"])
    assert list(tmp_path.iterdir()) == []


def test_the_pace_of_an_animation_in_words():
    assert animations.pace(0.05, 20) == "in real time"
    assert animations.pace(0.01, 20) == "slowed down 5 times"
