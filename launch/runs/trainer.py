"""Meta-training into run folders: blocks of `log_every` meta-steps, logged, checkpointed and resumed.

`meta_train` hands a `Trainer` the experiment and one `Run`, or one for each of several seeds. Nothing is written before the
first block of meta-steps has succeeded.
"""

import contextlib
import time
from collections.abc import Sequence

import jax
import numpy as np

import ml3_jax
from launch.errors import TrainingError, UsageError, rejected_config
from launch.experiment import Experiment
from launch.runs import processes
from launch.runs.progress import Progress
from launch.runs.single_run import Run
from launch.runs.stopping import StopRequest
from ml3_jax import sharding
from ml3_jax.checks import NotFiniteError
from ml3_jax.diagnosis import NOTHING

BLOCK_SECONDS = 5.0  # longer blocks are cut into shorter ones, so that a request to stop does not wait


def agree_to_stop(stop: StopRequest) -> bool:
    """Whether any process was asked to stop; all of them stop after the same block.

    A signal that comes while they tell each other is for the next block: the others do not know of it.
    """
    asked = max(processes.of_all(stop.number or 0))
    if asked and stop.number is None:
        stop.number = asked
    return asked > 0


class Trainer:
    """One call of meta_train: from the meta-step of the run folders to a target.

    Several seeds go through one program. It has the same size until the last one is done: the numbers of a seed depend on the
    program. Where a seed is ahead of the others, as after a crash between two of their checkpoints, its meta-steps up to there
    are computed again and dropped.

    Attributes:
      step: meta-steps that all runs have done.
    """

    def __init__(self, experiment: Experiment, runs: Sequence[Run], *, debug_nans: bool = False):
        """Starts where the runs are; writes nothing.

        With `debug_nans` the first update that is not finite stops the run, with the operation to blame; the experiment must be
        built without donation.

        Raises:
          UsageError: the processes of this run see different checkpoints.
        """
        self._experiment, self._runs, self._debug_nans = experiment, runs, debug_nans
        self._log_every, self._save_every = experiment.config.log_every, experiment.config.save_every
        self.step = min(run.step for run in runs)
        found = processes.of_all(self.step)
        if len(set(found)) > 1:
            raise UsageError(
                f"the processes find different meta-steps in {runs[0].folder}, {', '.join(map(str, found))}: all need the same "
                "--workdir on a file system that they share"
            )
        starts = [run.restored for run in runs]
        self._state = starts[0] if len(runs) == 1 else sharding.stack(starts)
        self._block = self._log_every  # the most meta-steps of one compiled loop
        self._compiled: set[int] = set()  # lengths of loops that are compiled

    def run(self, target: int) -> list[ml3_jax.MetaState]:
        """Trains up to meta-step `target`; returns the last state of each run.

        Raises:
          UsageError: the first meta-step fails, or a folder cannot be used. Nothing was written.
          TrainingError: too many updates in a row were not finite; the states are saved.
          OSError: a file cannot be written; earlier checkpoints stay.
          KeyboardInterrupt: (`Stopped` after a signal) its message names the meta-step at which the same command resumes.
        """
        if self.step >= target:
            return self.states()
        stop = StopRequest(self._kept)
        try:
            with contextlib.ExitStack() as opened:
                opened.enter_context(processes.noticing_lost_ones(self._kept))
                opened.enter_context(stop.listening())
                progress = opened.enter_context(contextlib.closing(Progress(target, self.step)))
                began = time.monotonic()
                latest = self._advance(target)
                stop.finish_work()
                for run in self._runs:
                    opened.enter_context(run.opened())
                self._keep(latest, progress, time.monotonic() - began)
                while self.step < target and not agree_to_stop(stop):
                    latest = self._advance(target)
                    stop.finish_work()
                    self._keep(latest, progress, time.monotonic() - began)
                if agree_to_stop(stop):
                    stop.finish_work()
                    self._save()
                    stop.stop_if_requested()
        except KeyboardInterrupt as interrupt:
            if interrupt.args:
                raise
            raise KeyboardInterrupt(self._kept()) from interrupt
        return self.states()

    def _kept(self) -> str:
        return f"the same command goes on from meta-step {min(run.saved for run in self._runs)}"

    def states(self) -> list[ml3_jax.MetaState]:
        """The state of each run; that of its last checkpoint for one that is ahead."""
        if len(self._runs) == 1:
            return [self._state]
        return [run.restored if run.step > self.step else self._of(index) for index, run in enumerate(self._runs)]

    def _of(self, index: int) -> ml3_jax.MetaState:
        return self._state if len(self._runs) == 1 else sharding.unstack(self._state, index)

    def _advance(self, target: int) -> ml3_jax.Metrics:
        """Runs one block of meta-steps, at most to the next logged one; returns the metrics of each, on the host."""
        ends = [run.step for run in self._runs if run.step > self.step]
        ends += [self.step + length - self.step % length for length in (self._block, self._log_every)]
        count = min(*ends, target) - self.step
        began, before, meta = time.monotonic(), self._state, self._experiment.meta
        # A lost process is no fault of the config, though JAX may report it by a ValueError.
        with rejected_config(self._experiment.name, "trained"), processes.noticing_lost_ones(self._kept):
            try:
                self._state, latest = (meta.run if len(self._runs) == 1 else meta.run_seeds)(before, count)
            except NotFiniteError as error:
                if not self._debug_nans:
                    raise
                raise NotFiniteError(f"{error}. {self._blame(before, 0)}") from error
        latest = jax.device_get(latest)
        if self._debug_nans and latest.skipped.any():
            index = int(np.argwhere(latest.skipped)[:, -1].min())
            raise TrainingError(f"the update of meta-step {self.step + index} is not finite: {self._blame(before, index)}")
        if count in self._compiled:
            self._shorten_blocks((time.monotonic() - began) / count)
        self._compiled.add(count)
        self.step += count
        self._put_back()
        return latest

    def _put_back(self) -> None:
        """Replaces the state of each run that was ahead, and is not any more, by that of its checkpoint."""
        if len(self._runs) > 1 and any(run.step == self.step for run in self._runs):
            states = [run.restored if run.step == self.step else self._of(i) for i, run in enumerate(self._runs)]
            self._state = sharding.stack([sharding.uncommit(sharding.local(state)) for state in states])

    def _blame(self, before: ml3_jax.MetaState, index: int) -> str:
        """Which operation of a meta-step is not finite: the one `index` steps after a state. The first seed that has one."""
        meta, every = self._experiment.meta, getattr(self._experiment.config, "refresh_every", None)
        if index:
            before, _ = (meta.run if len(self._runs) == 1 else meta.run_seeds)(before, index)
        words = NOTHING
        for number, run in enumerate(self._runs):
            state = sharding.local(before if len(self._runs) == 1 else sharding.unstack(before, number))
            words = meta.diagnose(meta.refresh(state) if every and index % every == 0 else state, operation=True)
            if words != NOTHING:
                return words if len(self._runs) == 1 else f"{run.name}, {words}"
        return words

    def _shorten_blocks(self, seconds: float) -> None:
        """Chooses the length of a block, from the seconds that a meta-step takes. Any length gives the same numbers."""
        seconds = max(processes.of_all(int(1e6 * seconds))) / 1e6
        least = getattr(self._experiment.config, "refresh_every", None) or 1  # a block starts with a refresh
        if self._block * seconds > BLOCK_SECONDS:
            lengths = [n for n in range(least, self._block + 1, least) if self._log_every % n == 0]
            self._block = max((n for n in lengths if n * seconds <= BLOCK_SECONDS), default=least)

    def _keep(self, latest: ml3_jax.Metrics, progress: Progress, seconds: float) -> None:
        """Logs, reports and, when due, saves a block of meta-steps, `seconds` after the start of this call."""
        several = len(self._runs) > 1
        losses = []
        for index, run in enumerate(self._runs):
            if run.step >= self.step:  # it was ahead
                continue
            own = jax.tree.map(lambda leaf, i=index: leaf[i], latest) if several else latest
            losses.append(own.task_loss.mean())
            loss_params = self._of(index).loss_params
            for words in run.add(own, self._log_every, seconds, loss_params):
                progress.say(f"{run.name}, {words}" if several else words)
        progress.update(self.step, f"task loss {', '.join(f'{loss:.4g}' for loss in losses)}")
        failed = [run for run in self._runs if run.skipping >= self._experiment.config.max_skipped]
        if failed or self.step % self._save_every == 0 or self.step == progress.total:
            self._save()
        if failed:
            raise TrainingError(self._words_about(failed[0]))

    def _words_about(self, run: Run) -> str:
        """What is wrong with a run that was stopped because too many of its updates were skipped."""
        state = sharding.local(self._of(self._runs.index(run)))
        name = f"{run.name}: " if len(self._runs) > 1 else ""
        return (
            f"{name}{run.skipping} updates in a row were skipped because they were not finite (--config.max_skipped). The "
            f"learned loss before them is saved at meta-step {self.step}. The next meta-step: "
            f"{self._experiment.meta.diagnose(state)}"
        )

    def _save(self) -> None:
        for index, run in enumerate(self._runs):
            if run.step == self.step:
                run.save(self._of(index))
