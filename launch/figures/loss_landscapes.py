"""Figures of a learned loss: over the prediction, over a parameter of the optimizee, and its slope over the margin."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.figures import style

SQUARED: dict[str, Any] = {"color": "#D55E00", "linestyle": "--", "linewidth": 1.8, "zorder": 3}  # the learned loss may hide it
DOTTED: dict[str, Any] = {"color": "0.5", "linewidth": 1, "linestyle": ":"}
TINY = float(np.finfo(np.float32).tiny)


def unit_range(values: np.ndarray) -> np.ndarray:
    """Each curve along the last axis, shifted and scaled to [0, 1]. The scale of a loss only changes the step size."""
    low = values.min(axis=-1, keepdims=True)
    return (values - low) / np.maximum(values.max(axis=-1, keepdims=True) - low, TINY)


def over_prediction(
    path: pathlib.Path,
    predictions: np.ndarray,  # [P]
    targets: Sequence[float],  # T, one panel each
    curves: Mapping[str, np.ndarray],  # {legend: [T, P]} of the learned loss; those of a panel share one scale
    *,
    subtitle: str,
) -> None:
    """The loss of one sample against its prediction, a panel for each target, beside the squared error."""
    squared = (predictions - np.array(targets)[:, None]) ** 2
    raw = np.stack(list(curves.values()), axis=1)  # [T, C, P]
    joint = unit_range(raw.reshape(len(targets), -1)).reshape(raw.shape)
    _panels(
        path,
        predictions,
        {f"target {target:g} (dotted)": target for target in targets},
        {"squared error": unit_range(squared)},
        dict(zip(curves, joint.swapaxes(0, 1), strict=True)),
        style.shades(0.15, 0.8, len(curves)),
        axes=("prediction", "loss, scaled to\nrun from 0 to 1"),
        title=f"The learned loss beside the squared error\n{subtitle}",
    )


def over_parameter(
    path: pathlib.Path,
    grid: np.ndarray,  # [P] values of the parameter
    truths: Sequence[float],  # T true values, one panel each
    values: np.ndarray,  # [H, T, P] the learned loss after `steps` meta-steps
    steps: Sequence[int],  # H meta-steps; up to six of them are drawn
    reference: np.ndarray,  # [T, P] the mean squared error of the same tasks
    *,
    parameter: str,  # its name
    title: str,
) -> None:
    """The loss of one task against the only parameter of the optimizee, in the course of meta-training."""
    chosen = sorted({int(i) for i in np.linspace(0, len(steps) - 1, 5) ** 2 // max(1, len(steps) - 1)} | {len(steps) - 1})
    words = [f"after {steps[at]} meta-steps" if steps[at] else "before meta-training" for at in chosen]
    _panels(
        path,
        grid,
        {f"true {parameter} {truth:g} (dotted)": truth for truth in truths},
        {"mean squared error": unit_range(reference)},
        {f"learned, {after}": unit_range(values[at]) for after, at in zip(words, chosen, strict=True)},
        style.shades(0.9, 0.1, len(chosen)),
        axes=(f"{parameter} of the optimizee", "loss over the task's samples,\nscaled to run from 0 to 1"),
        title=title,
    )


def _panels(
    path: pathlib.Path,
    x: np.ndarray,
    truths: Mapping[str, float],
    reference: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
    shades: np.ndarray,
    *,
    axes: tuple[str, str],
    title: str,
) -> None:
    """One panel for each of T truths: the reference {legend: [T, P]} and the curves {legend: [T, P]} over x [P]."""
    with style.drawing(path, 3.1 * len(truths), 3.7) as figure:
        panels = figure.subplots(1, len(truths), sharey=True, squeeze=False)[0]
        for index, (panel, (words, truth)) in enumerate(zip(panels, truths.items(), strict=True)):
            for name, values in reference.items():
                panel.plot(x, values[index], **SQUARED, label=name)
            for shade, (name, values) in zip(shades, curves.items(), strict=True):
                panel.plot(x, values[index], color=shade, linewidth=2.1, label=name)
            panel.axvline(truth, **DOTTED)
            panel.set_title(words, fontsize=10)
            panel.set_xlabel(axes[0])
        panels[0].set_ylabel(axes[1])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=10)


def stacked(*columns: Any) -> np.ndarray:
    """Features [N, F] of single numbers and arrays [N], broadcast to one length."""
    return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)


def gradient_over_margin(path: pathlib.Path, margins: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    """The slope of the loss of a sample in its margin, beside that of cross-entropy.

    `margins` [P] are the logit of the right class minus that of the wrong one; `curves` are {legend: slopes [P]}, scaled here
    to a largest size of 1.
    """
    with style.drawing(path, 6.5, 4.0) as figure:
        axes = figure.subplots()
        reference = -1.0 / (1.0 + np.exp(margins))
        axes.plot(margins, reference / -reference[0], **SQUARED, label="cross-entropy")
        for shade, (name, slopes) in zip(style.shades(0.15, 0.7, len(curves)), curves.items(), strict=True):
            axes.plot(margins, slopes / max(float(np.abs(slopes).max()), TINY), color=shade, linewidth=2.2, label=name)
        axes.axvline(0.0, **DOTTED)
        axes.set_xlabel("margin of a sample: logit of the right class minus that of the wrong one")
        axes.set_ylabel("slope of the loss in the margin,\nlargest size scaled to 1")
        axes.legend()
        style.title(axes, "How hard a sample is pushed", "below zero: towards a larger margin; left of the dots: still wrong")
