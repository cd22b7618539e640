"""Meta-training into a run folder: blocks of `log_every` meta-steps, logged, checkpointed and resumed.

`meta_train` hands a `Trainer` the experiment. Nothing is written before the first block of meta-steps has succeeded.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import ml3_jax
from launch.errors import TrainingError, UsageError, rejected_config
from launch.experiment import Experiment
from launch.runs import metrics_log, run_folder
from launch.runs.folder_lock import FolderLock
from launch.runs.history import History
from launch.runs.progress import Progress
from launch.runs.stopping import StopRequest
from ml3_jax.checkpoint import CheckpointError, Checkpoints
from ml3_jax.checks import NotFiniteError

BLOCK_SECONDS = 5.0  # longer blocks are cut into shorter ones, so that a request to stop does not wait
DEAD_STEPS = 50  # in a row with a meta-gradient of zero: the learned loss is dead
METRIC_NAMES = tuple(field.name for field in dataclasses.fields(ml3_jax.Metrics))


class Trainer:
    """One call of meta_train: from the meta-step of the run folder to a target.

    Attributes:
      step: meta-steps done.
      skipped: updates skipped by this call because the meta-gradient was not finite or exploded.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: pathlib.Path,
        record: run_folder.Record,
        start: ml3_jax.MetaState,
        lock: FolderLock,
        history: Callable[[Any], Array] | None = None,
        *,
        debug_nans: bool = False,
    ):
        """Restores the newest checkpoint of the folder, or else starts from `start`; writes nothing.

        `record` is the content of its config.json, `lock` that of the folder: held if there is a run to resume. `history` maps
        loss_params to the array recorded at each logged meta-step. With `debug_nans` the first update that is not finite stops
        the run, with the operation to blame; the experiment must be built without donation.

        Raises:
          UsageError: the run in the folder cannot be resumed.
        """
        self._experiment, self._folder, self._record, self._lock = experiment, folder, record, lock
        self._log_every, self._save_every = experiment.config.log_every, experiment.config.save_every
        metrics_log.check(folder / run_folder.METRICS, METRIC_NAMES)
        # _window: {metric: its value at each meta-step since the last row}.
        self.step, self._state, self._window = restore(folder, start) or (0, start, {})
        self._saved = self.step
        self._block = self._log_every  # the most meta-steps of one compiled loop
        self._compiled: set[int] = set()  # lengths of loops that are compiled
        self._debug_nans = debug_nans
        self.skipped = 0
        self._skipping = self._dead = 0  # meta-steps in a row up to now that were skipped, and that had no meta-gradient
        self._said_dead = False
        self._history = None
        if history is not None:
            self._history = History(folder, self.step, jax.jit(history))
            if self.step == 0:
                self._history.add(0, self._state.loss_params)

    def run(self, target: int) -> ml3_jax.MetaState:
        """Trains up to meta-step `target`; returns the last state.

        Raises:
          UsageError: the first meta-step fails, or the folder cannot be used. Nothing was written.
          TrainingError: too many updates in a row were not finite; the state is saved.
          OSError: a file cannot be written; earlier checkpoints stay.
          KeyboardInterrupt: (`Stopped` after a signal) its message names the meta-step at which the same command resumes.
        """
        if self.step >= target:
            return self._state
        stop = StopRequest(lambda: f"the same command goes on from meta-step {self._saved}")
        try:
            with contextlib.ExitStack() as opened:
                opened.enter_context(stop.listening())
                progress = opened.enter_context(contextlib.closing(Progress(target, self.step)))
                start, began = self.step, time.monotonic()
                latest = self._advance(target)
                stop.finish_work()
                run_folder.claim(self._folder, self._record, self._lock)
                log = opened.enter_context(contextlib.closing(metrics_log.Log(self._folder, METRIC_NAMES, start)))
                checkpoints = opened.enter_context(contextlib.closing(self._open_checkpoints(start)))
                began -= log.seconds
                self._keep(latest, log, checkpoints, progress, began)
                while self.step < target and stop.number is None:
                    latest = self._advance(target)
                    stop.finish_work()
                    self._keep(latest, log, checkpoints, progress, began)
                if stop.number is not None:
                    stop.finish_work()
                    self._save(log, checkpoints)
                    stop.stop_if_requested()
        except KeyboardInterrupt as interrupt:
            if interrupt.args:
                raise
            raise KeyboardInterrupt(f"the same command goes on from meta-step {self._saved}") from interrupt
        return self._state

    def _advance(self, target: int) -> ml3_jax.Metrics:
        """Runs one block of meta-steps, at most to the next logged one; returns the metrics of each, on the host."""
        count = min(*(length - self.step % length for length in (self._block, self._log_every)), target - self.step)
        began, before = time.monotonic(), self._state
        with rejected_config(self._experiment.name, "trained"):
            try:
                self._state, latest = self._experiment.meta.run(before, count)
            except NotFiniteError as error:
                if not self._debug_nans:
                    raise
                raise NotFiniteError(f"{error}. {self._blame(before, 0)}") from error
        latest = jax.device_get(latest)
        if self._debug_nans and latest.skipped.any():
            index = int(np.flatnonzero(latest.skipped)[0])
            raise TrainingError(f"the update of meta-step {self.step + index} is not finite: {self._blame(before, index)}")
        if count in self._compiled:
            self._shorten_blocks((time.monotonic() - began) / count)
        self._compiled.add(count)
        self.step += count
        return latest

    def _blame(self, before: ml3_jax.MetaState, index: int) -> str:
        """Which operation of a meta-step is not finite: the one `index` steps after a state."""
        meta, every = self._experiment.meta, getattr(self._experiment.config, "refresh_every", None)
        state = meta.run(before, index)[0] if index else before
        return meta.diagnose(meta.refresh(state) if every and index % every == 0 else state, operation=True)

    def _shorten_blocks(self, seconds: float) -> None:
        """Chooses the length of a block, from the seconds that a meta-step takes. Any length gives the same numbers."""
        least = getattr(self._experiment.config, "refresh_every", None) or 1  # a block starts with a refresh
        if self._block * seconds > BLOCK_SECONDS:
            lengths = [n for n in range(least, self._block + 1, least) if self._log_every % n == 0]
            self._block = max((n for n in lengths if n * seconds <= BLOCK_SECONDS), default=least)

    def _keep(
        self, latest: ml3_jax.Metrics, log: metrics_log.Log, checkpoints: Checkpoints, progress: Progress, began: float
    ) -> None:
        """Logs, reports and, when due, saves a block of meta-steps; `began` is the clock time of second 0."""
        values = {name: np.asarray(getattr(latest, name)) for name in METRIC_NAMES}
        skipped = int(values["skipped"].sum())
        if skipped:
            self.skipped += skipped
            progress.say(
                f"meta-step {self.step}: {skipped} of the last {values['skipped'].size} updates skipped, their "
                "meta-gradient was not finite or exploded (a smaller --config.inner_lr or --config.unroll may help)"
            )
        self._skipping, self._dead = _trailing(values["skipped"], self._skipping), _trailing(values["dead"], self._dead)
        if self._dead >= DEAD_STEPS and not self._said_dead:
            self._said_dead = True
            progress.say(
                f"meta-step {self.step}: the learned loss is dead: its meta-gradient has been exactly zero for {self._dead} "
                "meta-steps (start again with another --seed, a smaller --config.meta_lr or another loss)"
            )
        before = self._window
        self._window = {name: np.concatenate([before[name], new]) if before else new for name, new in values.items()}
        if self.step % self._log_every == 0:
            log.write(self.step, self._window, time.monotonic() - began)
            self._window = {}
            if self._history:
                self._history.add(self.step, self._state.loss_params)
        progress.update(self.step, f"task loss {values['task_loss'].mean():.4g}")
        failed = self._skipping >= self._experiment.config.max_skipped
        if failed or self.step % self._save_every == 0 or self.step == progress.total:
            self._save(log, checkpoints)
        if failed:
            raise TrainingError(
                f"{self._skipping} updates in a row were skipped because they were not finite (--config.max_skipped). The "
                f"learned loss before them is saved at meta-step {self.step}. The next meta-step: "
                f"{self._experiment.meta.diagnose(self._state)}"
            )

    def _open_checkpoints(self, start: int) -> Checkpoints:
        """Opens the checkpoints. Moves unreadable ones, newer than the resumed meta-step, aside."""
        folder = self._folder / run_folder.CHECKPOINTS
        for path in folder.glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) > start:
                aside = self._folder / f"{run_folder.CHECKPOINTS}_unread" / path.name
                if aside.exists():
                    shutil.rmtree(aside)
                aside.parent.mkdir(exist_ok=True)
                path.rename(aside)
                print(f"note: the checkpoint of meta-step {path.name} now lies in {aside.parent}", file=sys.stderr)
        return Checkpoints(folder)

    def _save(self, log: metrics_log.Log, checkpoints: Checkpoints) -> None:
        """Writes the logs before the checkpoint: a resume can remove surplus rows, but not restore missing ones."""
        log.flush()
        if self._history:
            self._history.write()
        window = {name: values.tolist() for name, values in self._window.items()}
        if self._saved == self.step and self.step:
            return
        try:
            checkpoints.save(self.step, self._state, {"window": window})
        except (OSError, ValueError) as error:  # of a full disk Orbax makes a ValueError
            cause = " ".join(str(error).split())
            raise OSError(f"the checkpoint of meta-step {self.step} could not be written: {cause}") from error
        self._saved = self.step


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
