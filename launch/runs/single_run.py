"""One run while it is meta-trained: its folder with the logs and checkpoints, and what it says of its updates.

A `Trainer` computes the meta-steps, of one run or of several seeds at once, and hands each `Run` its own.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch.errors import UsageError, rejected_config
from launch.experiment import Experiment
from launch.runs import metrics_log, processes, run_folder
from launch.runs.folder_lock import FolderLock
from launch.runs.history import History
from ml3_jax import sharding
from ml3_jax.checkpoint import CheckpointError, Checkpoints

DEAD_STEPS = 50  # in a row with a meta-gradient of zero: the learned loss is dead
METRIC_NAMES = tuple(field.name for field in dataclasses.fields(ml3_jax.Metrics))


class Run:
    """One seed in its folder.

    Attributes:
      folder: the run folder.
      step: meta-steps done.
      saved: the meta-step of the newest checkpoint.
      skipped: updates skipped since the run was opened.
      skipping: of them in a row up to now.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        record: run_folder.Record,
        start: ml3_jax.MetaState,
        lock: FolderLock,
        history: Callable[[Any], Array] | None = None,
    ):
        """Restores the newest checkpoint of the folder, or else starts from `start`; writes nothing.

        `record` is the content of its config.json, `lock` that of the folder: held if there is a run to resume. `history` maps
        loss_params to the array recorded at each logged meta-step.

        Raises:
          UsageError: the run in the folder cannot be resumed.
        """
        self.folder, self._record, self._lock = folder, record, lock
        metrics_log.check(folder / run_folder.METRICS, METRIC_NAMES)
        # _window: {metric: its value at each meta-step since the last row}.
        self.step, self.restored, self._window = restore(folder, start) or (0, start, {})
        self.saved = self._start = self.step
        self.skipped = self.skipping = self._dead = 0
        self._said_dead = False
        self._history = None
        if history is not None:
            self._history = History(folder, self.step, jax.jit(history))
            if self.step == 0:
                self._history.add(0, start.loss_params)
        self._log: metrics_log.Log | None = None  # of the first process
        self._checkpoints: Checkpoints | None = None
        self._seconds = 0.0

    @property
    def name(self) -> str:
        """The seed, for messages about several runs."""
        return f"seed {self._record.seed}"

    @contextlib.contextmanager
    def opened(self) -> Iterator["Run"]:
        """Claims the folder, and holds its logs and checkpoints open."""
        with contextlib.ExitStack() as stack:
            processes.on_first(lambda: run_folder.claim(self.folder, self._record, self._lock))

            def open_log() -> None:
                self._log = metrics_log.Log(self.folder, METRIC_NAMES, self._start)
                self._move_unread_aside()

            processes.on_first(open_log)
            if self._log is not None:
                stack.enter_context(contextlib.closing(self._log))
                self._seconds = self._log.seconds
            self._checkpoints = stack.enter_context(contextlib.closing(Checkpoints(self.folder / run_folder.CHECKPOINTS)))
            yield self

    def _move_unread_aside(self) -> None:
        """Moves unreadable checkpoints, newer than the resumed meta-step, aside."""
        for path in (self.folder / run_folder.CHECKPOINTS).glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) > self._start:
                aside = self.folder / f"{run_folder.CHECKPOINTS}_unread" / path.name
                if aside.exists():
                    shutil.rmtree(aside)
                aside.parent.mkdir(exist_ok=True)
                path.rename(aside)
                print(f"note: the checkpoint of meta-step {path.name} now lies in {aside.parent}", file=sys.stderr)

    def add(self, latest: ml3_jax.Metrics, log_every: int, seconds: float, loss_params: Any) -> list[str]:
        """Takes the metrics of the next meta-steps, each field [n], and logs a row where one is due.

        Args:
          latest: the metrics.
          log_every: meta-steps between rows. These steps do not cross one.
          seconds: spent by this call of meta_train.
          loss_params: phi after these meta-steps, for the history.

        Returns:
          What is to be said of them.
        """
        values = {name: np.asarray(getattr(latest, name)) for name in METRIC_NAMES}
        self.step += values["skipped"].size
        said = self._judge(values)
        before = self._window
        self._window = {name: np.concatenate([before[name], new]) if before else new for name, new in values.items()}
        if self.step % log_every == 0:
            if self._history:
                self._history.add(self.step, sharding.local(loss_params))
            log, window = self._log, self._window
            if log is not None:
                log.write(self.step, window, self._seconds + seconds)
            self._window = {}
        return said

    def _judge(self, values: dict[str, np.ndarray]) -> list[str]:
        """What is to be said of updates that were skipped, or of a loss that is dead."""
        said = []
        skipped = int(values["skipped"].sum())
        if skipped:
            self.skipped += skipped
            said.append(
                f"meta-step {self.step}: {skipped} of the last {values['skipped'].size} updates skipped, their "
                "meta-gradient was not finite or exploded (a smaller --config.inner_lr or --config.unroll may help)"
            )
        self.skipping, self._dead = _trailing(values["skipped"], self.skipping), _trailing(values["dead"], self._dead)
        if self._dead >= DEAD_STEPS and not self._said_dead:
            self._said_dead = True
            said.append(
                f"meta-step {self.step}: the learned loss is dead: its meta-gradient has been exactly zero for {self._dead} "
                "meta-steps (start again with another --seed, a smaller --config.meta_lr or another loss)"
            )
        return said

    def save(self, state: ml3_jax.MetaState) -> None:
        """Writes the logs before the checkpoint: a resume can remove surplus rows, but not restore missing ones.

        Raises:
          OSError: a file cannot be written; earlier checkpoints stay.
        """
        assert self._checkpoints is not None
        processes.on_first(self._write_logs)
        window = {name: values.tolist() for name, values in self._window.items()}
        if self.saved == self.step and self.step:
            return
        try:
            self._checkpoints.save(self.step, state, {"window": window})
        except (OSError, ValueError) as error:  # of a full disk Orbax makes a ValueError
            cause = " ".join(str(error).split())
            raise OSError(f"the checkpoint of meta-step {self.step} could not be written: {cause}") from error
        self.saved = self.step

    def _write_logs(self) -> None:
        assert self._log is not None
        self._log.flush()
        if self._history:
            self._history.write()


def _trailing(flags: np.ndarray, before: int) -> int:
    """How many steps in a row up to the last one have their flag set; `before`: the same before these steps."""
    clear = np.flatnonzero(flags == 0)
    return before + flags.size if clear.size == 0 else flags.size - 1 - int(clear[-1])


def make_start(experiment: Experiment, seed: int) -> ml3_jax.MetaState:
    """The state before any meta-step. Training donates it, so it holds a copy of the experiment's context.

    Raises:
      UsageError: functions of the problem do not fit each other.
    """
    context = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), experiment.context)
    with rejected_config(experiment.name, "built"):
        return experiment.meta.init(jax.random.key(seed), context)


def restore(folder: pathlib.Path, template: ml3_jax.MetaState) -> tuple[int, ml3_jax.MetaState, dict[str, np.ndarray]] | None:
    """The newest readable checkpoint: (meta-step, state, metrics since the last row); None if there is none.

    Raises:
      UsageError: there are checkpoints, but none can be read.
    """
    path = folder / run_folder.CHECKPOINTS
    if not path.is_dir():
        return None
    checkpoints = Checkpoints(path, read_only=True)
    try:
        steps = checkpoints.steps()
        found = checkpoints.restore_latest(template)
    except CheckpointError as error:
        raise UsageError(f"{error}: nothing was changed; move {path} away to start this run again") from error
    finally:
        checkpoints.close()
    if found is None:
        return None
    step, state, about = found
    if step < steps[-1]:
        print(f"note: the checkpoint of meta-step {steps[-1]} in {path} is damaged; using that of {step}", file=sys.stderr)
    window = {name: np.array(values, dtype=np.float32) for name, values in about.get("window", {}).items()}
    if window:  # of an older run
        window = {**{name: np.zeros_like(window["task_loss"]) for name in metrics_log.ADDED}, **window}
    return step, state, window
