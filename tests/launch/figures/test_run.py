"""The figures explain themselves: axes with units, curves by name with their step size, the meaning of the band."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from launch.figures import run as plots
from launch.figures import style
from launch.runs import metrics_log
from tests.launch import line


@pytest.fixture
def drawn(monkeypatch):
    """Figures by file name, as they are saved."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(style, "save", lambda figure, path: figures.update({path.name: figure}))
    return figures


@pytest.fixture
def content(finished):
    return json.loads((finished / "meta_test.json").read_text())


def words(figure: Figure) -> str:
    """All text in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj() if isinstance(text, Text))


def test_meta_test_figures_explain_themselves(drawn, content, tmp_path):
    plots.meta_test(tmp_path, content)
    assert set(drawn) == {"meta_test.png", "step_sizes.png", "other_metrics.png", "variants.png"}
    said = words(drawn["meta_test.png"])
    tuned = content["step_size"]["plain_tuned_adam"]
    for part in (
        "distance (m)",
        "inner step",
        "lines with outliers",
        "12 tasks",
        "±1 standard error",
        "learned loss (0.1)",
        f"plain loss, Adam, tuned step size ({tuned:.3g})",
    ):
        assert part in said
    assert "share that\ndiverged" in words(drawn["step_sizes.png"])
    assert "twice the outliers" in words(drawn["variants.png"])
    for control in ("pretrained on the training tasks, tuned", "MAML on the training tasks, tuned"):
        assert control in words(drawn["variants.png"])
    for name in ("offset error", "gradient cosine", "share of tasks that succeed"):
        assert name in words(drawn["other_metrics.png"])


def test_a_diverged_curve_is_named_and_does_not_flatten_the_others(drawn, content, tmp_path):
    content["curves"]["plain_same_lr"][0][1:] = [1e30, None, None, None, None, None]
    plots.meta_test(tmp_path, content)
    assert "8% of tasks diverged, not in the mean" in words(drawn["meta_test.png"])
    axes = drawn["meta_test.png"].axes[0]
    start = np.mean([task[0] for task in content["curves"]["learned"]])
    assert axes.get_ylim()[1] <= 10.01 * start


def test_a_curve_without_finite_values_is_drawn_and_variants_of_an_earlier_meta_test_are_removed(drawn, content, tmp_path):
    content["curves"]["untrained"] = [[None] * 7 for _ in range(12)]
    content["variants"] = {}
    (tmp_path / "variants.png").write_text("of an earlier meta-test")
    plots.meta_test(tmp_path, content)
    assert "100% of tasks diverged" in words(drawn["meta_test.png"])
    assert list(tmp_path.iterdir()) == []


def test_the_meta_training_curve_says_what_a_point_is(drawn, finished, tmp_path):
    columns = metrics_log.read(finished)
    config = dataclasses.replace(line.LineConfig(), num_tasks=1)
    plots.meta_training(tmp_path / "a.png", "line", {**columns, "skipped": columns["skipped"] + 1}, config)
    said = words(drawn["a.png"])
    for part in ("task loss", "meta-step", "mean over 5 meta-steps of 1 task each", "4 updates skipped"):
        assert part in said


def test_pictures_are_complete_png_files(finished):
    for name in ("meta_train.png", "meta_test.png", "step_sizes.png", "other_metrics.png", "variants.png"):
        data = (finished / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")
