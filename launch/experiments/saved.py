"""The experiment of a run folder: built from its config.json and restored from its newest checkpoint."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import ml3_jax
from launch import config as config_lib
from launch import experiments
from launch.errors import UsageError
from launch.experiment import Definition, Experiment
from launch.runs import run_folder, single_run


class SavedRun(NamedTuple):
    """A run, read from its folder."""

    definition: Definition
    experiment: Experiment  # with the context at the end of meta-training
    step: int  # meta-steps taken
    learned: ml3_jax.MetaParams  # all learned parts, None for fixed ones
    initial: ml3_jax.MetaParams  # the same before meta-training

    @property
    def loss_params(self) -> Any:
        """The parameters of the learned loss; None without one."""
        return self.learned.loss_params


def load(folder: pathlib.Path) -> SavedRun:
    """The run of a folder.

    Raises:
      UsageError: there is no run, it does not fit this version, or no checkpoint can be read.
    """
    definition, experiment, record = rebuild(folder)
    template = single_run.make_start(experiment, record.seed)
    restored = single_run.restore(folder, template)
    if restored is None:
        raise UsageError(
            f"{folder} holds no checkpoint: expected one below {run_folder.CHECKPOINTS}/; run meta_train on it first"
        )
    step, state, _ = restored
    experiment = experiment._replace(context=state.context)
    parts = [ml3_jax.MetaParams(one.loss_params, one.init_params, one.optimizer_params) for one in (state, template)]
    return SavedRun(definition, experiment, step, *parts)


def rebuild(folder: pathlib.Path) -> tuple[Definition, Experiment, run_folder.Record]:
    """The experiment of a folder's config.json.

    Raises:
      UsageError: there is no run, or it does not fit this version.
    """
    if not folder.is_dir():
        raise UsageError(f"--workdir {folder} does not exist: expected a run folder that meta_train made")
    record = run_folder.read_record(folder)
    path = folder / run_folder.CONFIG
    if record is None:
        raise UsageError(f"{folder} holds no {run_folder.CONFIG}: expected a run folder that meta_train made")
    given = {**record.config, "meta_steps": record.meta_steps}
    try:
        definition = experiments.find(record.experiment)
        config = config_lib.resolve(definition.config, given)
    except UsageError as error:
        raise UsageError(f"{path} does not fit this version of the code: {error}") from error
    # The default of a newer field may differ from the behaviour of an old run.
    missing = [name for name in config_lib.names(definition.config) if name not in given]
    if missing:
        raise UsageError(
            f"{path} does not fit this version of the code: expected every config field, {', '.join(missing)} missing; "
            "meta-test it with the version that made it, or meta-train anew"
        )
    if dataclasses.asdict(config) != dataclasses.asdict(config_lib.override(definition.config(), given)):
        raise UsageError(f"{path} is damaged: some fields have no value; nothing was changed")
    return definition.for_config(config), definition.build(config), record
