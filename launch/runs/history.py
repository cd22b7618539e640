"""What an experiment records of its loss while it is meta-trained, so that figures can show how it evolves."""

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
        """Takes up what the folder holds, up to the meta-step that is resumed.

        Args:
          folder: the run folder.
          step: the meta-step that training goes on from.
          observe: loss_params -> what is recorded.
        """
        self._path = folder / run_folder.HISTORY
        self._observe = observe
        before = read(folder) if step else None
        kept = [] if before is None else [i for i, s in enumerate(before["steps"]) if s <= step]
        self._steps = [] if before is None else [int(before["steps"][i]) for i in kept]
        self._values = [] if before is None else [before["values"][i] for i in kept]

    def add(self, step: int, loss_params: Any) -> None:
        """Records the loss parameters after `step` meta-steps."""
        self._steps.append(step)
        self._values.append(np.asarray(self._observe(loss_params)))

    def write(self) -> None:
        """Replaces history.npz; where nothing is recorded yet, nothing is written."""
        if not self._steps:
            return
        with files.replacing(self._path) as temporary:
            np.savez_compressed(temporary, steps=np.array(self._steps), values=np.stack(self._values))


def read(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """{"steps": [H], "values": [H, ...]} of a run folder; None where it has none.

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
