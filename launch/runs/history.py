"""Recordings of the learned loss in the course of meta-training, from which figures show how it evolves."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

from launch.errors import UsageError
from launch.runs import run_folder
from launch.runtime import files


class History:
    """The recordings of a run; `write` puts them into history.npz as steps [H] and values [H, ...]."""

    def __init__(self, folder: pathlib.Path, step: int, observe: Callable[[Any], Array]):
        """Reads the recordings of the run folder up to the meta-step `step`, from which training continues.

        `observe` maps loss_params to the recorded array.
        """
        self._path = folder / run_folder.HISTORY
        self._observe = observe
        before = (read(folder) if step else None) or {"steps": np.zeros(0, int), "values": np.zeros(0)}
        kept = np.flatnonzero(before["steps"] <= step)
        self._steps, self._values = before["steps"][kept].tolist(), [*before["values"][kept]]

    def add(self, step: int, loss_params: Any) -> None:
        """Records the loss parameters after `step` meta-steps."""
        self._steps.append(step)
        self._values.append(np.asarray(self._observe(loss_params)))

    def write(self) -> None:
        """Replaces history.npz, unless nothing is recorded yet."""
        if self._steps:
            with files.replacing(self._path) as temporary:
                np.savez_compressed(temporary, steps=np.array(self._steps), values=np.stack(self._values))


def read(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """{"steps": [H], "values": [H, ...]} of a run folder; None if it has none.

    Raises:
      UsageError: history.npz is damaged.
    """
    path = folder / run_folder.HISTORY
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            return {"steps": content["steps"], "values": content["values"]}
    except Exception as error:  # a damaged archive raises many types
        raise UsageError(f"{path} is damaged ({error}): move it away to go on without it") from error
