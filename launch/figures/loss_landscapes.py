"""Figures of a learned loss itself: over the prediction, beside the squared error, and over a parameter as it evolves."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from launch.figures import style


def unit_range(values: np.ndarray) -> np.ndarray:
    """Each curve along the last axis, shifted and scaled to run from 0 to 1: the scale of a loss is only a step size."""
    low = values.min(axis=-1, keepdims=True)
    span = np.maximum(values.max(axis=-1, keepdims=True) - low, np.finfo(np.float32).tiny)
    return (values - low) / span


def over_prediction(
    path: pathlib.Path,
    predictions: np.ndarray,
    targets: Sequence[float],
    curves: Mapping[str, np.ndarray],
    *,
    subtitle: str,
) -> None:
    """The loss of one sample against its prediction, a panel for each target, beside the squared error.

    Args:
      path: the picture.
      predictions: [P], the horizontal axis.
      targets: T targets, one panel each.
      curves: {legend: [T, P]} of the learned loss; those of a panel share one scale.
      subtitle: how to read it, in words.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(3.1 * len(targets), 3.6), layout="constrained")
        panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.8, len(curves)))
        for index, (axes, target) in enumerate(zip(panels, targets, strict=True)):
            squared = unit_range((predictions - target) ** 2)
            axes.plot(predictions, squared, color="#D55E00", linestyle="--", linewidth=1.8, label="squared error")
            joint = unit_range(np.concatenate([values[index] for values in curves.values()])).reshape(len(curves), -1)
            for shade, name, values in zip(shades, curves, joint, strict=True):
                axes.plot(predictions, values, color=shade, linewidth=2.2, label=name)
            axes.axvline(target, color="0.5", linewidth=1, linestyle=":")
            axes.set_title(f"target {target:g} (dotted)", fontsize=10)
            axes.set_xlabel("prediction")
        panels[0].set_ylabel("loss, scaled to\nrun from 0 to 1")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        figure.suptitle(f"The learned loss beside the squared error\n{subtitle}", fontsize=10)
        style.save(figure, path)


def over_parameter(
    path: pathlib.Path,
    grid: np.ndarray,
    truths: Sequence[float],
    values: np.ndarray,
    steps: Sequence[int],
    reference: np.ndarray,
    *,
    parameter: str,
    title: str,
) -> None:
    """The loss of a whole task against the optimizee's only parameter, as meta-training shapes it.

    Args:
      path: the picture.
      grid: [P] values of the parameter.
      truths: T true values, one panel each.
      values: [H, T, P] the learned loss after `steps` meta-steps.
      steps: H meta-steps; a few of them are drawn.
      reference: [T, P] the mean squared error of the same tasks.
      parameter: the parameter's name, for the axis.
      title: what the figure shows.
    """
    chosen = sorted({int(i) for i in np.linspace(0, len(steps) - 1, 5) ** 2 // max(1, len(steps) - 1)} | {len(steps) - 1})
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(3.1 * len(truths), 3.7), layout="constrained")
        panels = figure.subplots(1, len(truths), sharey=True, squeeze=False)[0]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0.1, len(chosen)))
        for index, (axes, truth) in enumerate(zip(panels, truths, strict=True)):
            axes.plot(grid, unit_range(reference[index]), color="#D55E00", linestyle="--", label="mean squared error")
            for shade, at in zip(shades, chosen, strict=True):
                name = f"learned, after {steps[at]} meta-steps" if steps[at] else "learned, before meta-training"
                axes.plot(grid, unit_range(values[at, index]), color=shade, linewidth=2, label=name)
            axes.axvline(truth, color="0.5", linewidth=1, linestyle=":")
            axes.set_title(f"true {parameter} {truth:g} (dotted)", fontsize=10)
            axes.set_xlabel(f"{parameter} of the optimizee")
        panels[0].set_ylabel("loss over the task's samples,\nscaled to run from 0 to 1")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=11)
        style.save(figure, path)


def stacked(*columns: Any) -> np.ndarray:
    """Features [N, F] of single numbers and arrays [N], broadcast to one length."""
    return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)


def gradient_over_margin(path: pathlib.Path, margins: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    """How hard a loss pushes a sample, against how right it already is, beside cross-entropy.

    Args:
      path: the picture.
      margins: [P], logit of the right class minus that of the wrong one.
      curves: {legend: [P] slope of the loss in the sample's margin}; each is scaled to a largest size of 1.
    """
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(6.5, 4.0), layout="constrained")
        axes = figure.subplots()
        reference = -1.0 / (1.0 + np.exp(margins))
        axes.plot(margins, reference / -reference[0], color="#D55E00", linestyle="--", linewidth=1.8, label="cross-entropy")
        shades = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.7, len(curves)))
        for shade, (name, slopes) in zip(shades, curves.items(), strict=True):
            scale = max(float(np.abs(slopes).max()), float(np.finfo(np.float32).tiny))
            axes.plot(margins, slopes / scale, color=shade, linewidth=2.2, label=name)
        axes.axvline(0.0, color="0.5", linewidth=1, linestyle=":")
        axes.set_xlabel("margin of a sample: logit of the right class minus that of the wrong one")
        axes.set_ylabel("slope of the loss in the margin,\nlargest size scaled to 1")
        axes.legend()
        style.title(axes, "How hard a sample is pushed", "below zero: towards a larger margin; left of the dots: still wrong")
        style.save(figure, path)
