"""meta_train in processes of its own, on small problems, and what they computed."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.runs import metrics_log

ROOT = pathlib.Path(__file__).parents[3]
STEPS = 600
SMALL = ["--config.num_tasks=2", "--config.inner_steps=4", "--config.log_every=5", "--config.save_every=50"]


class Run:
    """One command of meta_train on a small problem, in a process of its own."""

    def __init__(
        self,
        folder: pathlib.Path,
        *flags: str,
        experiment: str = "shaped_sine",
        steps: int = STEPS,
        wrapper: Sequence[str] = (),
        small: bool = True,
        environment: Mapping[str, str] | None = None,
    ):
        command = [sys.executable, "-m", "launch.meta_train", f"--experiment={experiment}", f"--workdir={folder}"]
        self.folder = folder
        self.process = subprocess.Popen(
            [*wrapper, *command, f"--meta_steps={steps}", *(SMALL if small else []), *flags],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Waits until something is true of the folder. The run must not end before."""
        while not reached():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Sends a signal if there is one; returns the exit code and what the run said."""
        if number is not None:
            self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=600)
        return self.process.returncode, output + errors


def rows(folder: pathlib.Path) -> int:
    path = folder / "metrics.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def numbers(folder: pathlib.Path) -> dict[str, Any]:
    """Everything that a run computed: its metrics without the seconds, and the bytes of its learned loss."""
    columns = metrics_log.read(folder)
    kept = {name: values.tolist() for name, values in columns.items() if name not in metrics_log.TIME_COLUMNS}
    about = json.loads((folder / "learned_loss" / "about" / "metadata").read_text())
    return {**kept, "digest": about["digest"]}
