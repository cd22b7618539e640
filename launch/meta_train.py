"""Entry point: meta-trains the learned loss of an experiment into a run folder, or resumes it there.

python -m launch.meta_train --experiment=NAME --workdir=DIR [--seed=0] [--meta_steps=N] [--config.FIELD=VALUE]
    [--meta_test] [--dry_run] [--debug_nans]
python -m launch.meta_train --experiment=NAME --workdir=DIR --seeds=0,1,2    one program, run folders DIR/seed_0, ...
python -m launch.meta_train ... --coordinator_address=HOST:PORT --num_processes=N --process_id=I    one of N processes
python -m launch.meta_train --list
"""

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

import ml3_jax
from launch import config as config_lib
from launch import experiments, meta_test
from launch.errors import UsageError
from launch.experiment import Definition, Experiment
from launch.figures import run as figures
from launch.runs import cli, dry_run, metrics_log, processes, run_folder, single_run, trainer
from launch.runs.folder_lock import FolderLock
from launch.runtime import compilation_cache, files, precision
from ml3_jax import sharding


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the entry point; returns its exit code."""
    return cli.main(_define, _run, __doc__ or "", argv)


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("experiment", None, f"what to meta-train: {', '.join(experiments.names())}", flag_values=values)
    flags.DEFINE_string("workdir", None, "the run folder; a folder that holds this very run is resumed", flag_values=values)
    cli.define_bounded(values, "seed", None, "of every random draw (default: 0)", low=0, high=cli.MAX_SEED)
    words = "several seeds with commas between, meta-trained in one program; run folders seed_N below --workdir"
    flags.DEFINE_string("seeds", None, words, flag_values=values)
    stop_at = "the meta-step to stop at (default: the experiment's)"
    cli.define_bounded(values, "meta_steps", None, stop_at, high=config_lib.LARGEST_INT)
    flags.DEFINE_bool("meta_test", False, "end with python -m launch.meta_test on its defaults", flag_values=values)
    dry = "say what the run would cost (compile time, time of a meta-step, memory) and write nothing"
    flags.DEFINE_bool("dry_run", False, dry, flag_values=values)
    debug = "stop at the first update that is not finite and name the operation to blame"
    flags.DEFINE_bool("debug_nans", False, debug, flag_values=values)
    processes.define_flags(values)
    flags.DEFINE_bool("list", False, "print a line for each experiment and stop", flag_values=values)
    name = cli.peek(argv, "experiment")
    if name:
        cli.define_config(values, experiments.find(name).config(), argv)


def _run(values: flags.FlagValues) -> None:
    if values["list"].value:
        for name in experiments.names():
            print(f"{name:<18}{experiments.find(name).summary}")
        return
    definition = experiments.find(cli.require(values, "experiment", experiments.names()[0]))
    config = make_config(definition, cli.config_overrides(values), values["meta_steps"].value)
    seeds = _seeds(values)
    compilation_cache.enable()
    if values["dry_run"].value:
        print(dry_run.report(definition.build(config, donate=True), seeds or [values["seed"].value or 0]))
        return
    folder = pathlib.Path(cli.require(values, "workdir", "runs/NAME")).expanduser()
    debug_nans = bool(values["debug_nans"].value)
    if seeds is None:
        train(definition, config, values["seed"].value or 0, folder, debug_nans=debug_nans)
    else:
        train_seeds(definition, config, seeds, folder, debug_nans=debug_nans)
    if not processes.leave():
        return
    print("\nmeta-test:" if values["meta_test"].value else "\nto measure it on tasks that it never saw:")
    print(f"  python -m launch.meta_test --workdir={shlex.quote(str(folder))}", flush=True)
    if values["meta_test"].value:
        meta_test.measure_all([folder])


def _seeds(values: flags.FlagValues) -> list[int] | None:
    """The seeds of --seeds, None without them.

    Raises:
      UsageError: no whole numbers, a seed twice or out of range, or --seed beside them.
    """
    text = values["seeds"].value
    if text is None:
        return None
    if values["seed"].value is not None:
        raise UsageError("--seed and --seeds exclude each other: pass one of them")
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds must be whole numbers with commas between, for example 0,1,2, got '{text}'")
    seeds = [int(part) for part in parts]
    if max(seeds) > cli.MAX_SEED:
        raise UsageError(f"--seeds must be from 0 to {cli.MAX_SEED}, got {max(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must differ from each other, got '{text}'")
    return seeds


def make_config(definition: Definition, overrides: dict[str, Any], meta_steps: int | None) -> Any:
    """The resolved config that the flags describe.

    Raises:
      UsageError: fields that do not fit each other, or different --meta_steps and --config.meta_steps.
    """
    if meta_steps is not None:
        if overrides.get("meta_steps", meta_steps) != meta_steps:
            raise UsageError(
                f"--meta_steps={meta_steps} and --config.meta_steps={overrides['meta_steps']} differ: pass one of them"
            )
        overrides = {**overrides, "meta_steps": meta_steps}
    config = config_lib.resolve(definition.config, overrides)
    refresh_every = getattr(config, "refresh_every", None)
    if refresh_every and config.meta_steps % refresh_every:
        raise UsageError(
            f"--meta_steps must be a multiple of refresh_every = {refresh_every}, got {config.meta_steps}: "
            "only there does a resumed run equal an uninterrupted one"
        )
    return config


def train(definition: Definition, config: Any, seed: int, folder: pathlib.Path, *, debug_nans: bool = False) -> None:
    """Meta-trains from the meta-step of the run folder, 0 for a new one, to config.meta_steps, then draws the curve.

    Raises:
      TrainingError: with `debug_nans` an update, or else too many in a row, were not finite.
      UsageError: the folder cannot take this run or another process works in it, or this config cannot be trained. Nothing
        was written.
    """
    _train(definition, config, {folder: seed}, debug_nans)


def train_seeds(
    definition: Definition, config: Any, seeds: Sequence[int], folder: pathlib.Path, *, debug_nans: bool = False
) -> list[pathlib.Path]:
    """As `train`, for several seeds in one program; returns their run folders, seed_N below `folder`.

    Raises:
      UsageError: as `train`, or `folder` is a run folder itself.
    """
    if (folder / run_folder.CONFIG).exists():
        raise UsageError(f"{folder} is a run folder itself: choose another --workdir for the folders of --seeds")
    folders = {run_folder.of_seed(folder, seed): seed for seed in seeds}
    _train(definition, config, folders, debug_nans)
    return list(folders)


def _train(definition: Definition, config: Any, folders: Mapping[pathlib.Path, int], debug_nans: bool) -> None:
    records = {
        folder: run_folder.check_claimable(folder, run_folder.make_record(definition.name, seed, config))
        for folder, seed in folders.items()
    }
    definition = definition.for_config(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision.products(config.precision))
        locks = {folder: stack.enter_context(FolderLock(folder, run_folder.LOCK)) for folder in folders}
        for folder, lock in locks.items():
            if (folder / run_folder.CONFIG).exists():  # a new folder is made, and locked, after the first meta-steps
                processes.on_first(lock.acquire)
        experiment = definition.build(config, donate=not debug_nans)
        history = definition.history(experiment) if definition.history else None
        runs = [
            single_run.Run(folder, records[folder], single_run.make_start(experiment, seed), locks[folder], history)
            for folder, seed in folders.items()
        ]
        for one in runs:
            if one.step:
                rest = (
                    f"going on to {config.meta_steps}" if one.step < config.meta_steps else "nothing to do; raise --meta_steps"
                )
                print(f"{one.folder} is at meta-step {one.step}: {rest}")
        states = trainer.Trainer(experiment, runs, debug_nans=debug_nans).run(config.meta_steps)
        for one, state in zip(runs, states, strict=True):
            parts = sharding.local(ml3_jax.MetaParams(state.loss_params, state.init_params, state.optimizer_params))
            processes.on_first(lambda one=one, parts=parts: _finish(definition, experiment, one, parts))


def _finish(definition: Definition, experiment: Experiment, trained: single_run.Run, parts: ml3_jax.MetaParams) -> None:
    """Writes the learned parts and the curve of a run that is meta-trained, and says what its folder holds."""
    folder, loss = trained.folder, experiment.learned_loss
    if trained.skipped:
        print(f"{trained.skipped} updates were skipped because their meta-gradient was not finite or exploded")
    if loss is None or loss.spec is not None:  # ml3_jax.restore needs a spec to rebuild the loss from a file
        others = {"init_params": parts.init_params, "optimizer_params": parts.optimizer_params}
        with files.replacing_folder(folder / (run_folder.LEARNED_LOSS if loss else run_folder.LEARNED_PARTS)) as temporary:
            ml3_jax.save(temporary, loss, parts.loss_params, **others)
    columns = metrics_log.read(folder)
    if columns:
        figures.meta_training(folder / "meta_train.png", definition.name, columns, experiment.config)
    written = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    print(f"{folder}: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(main())
