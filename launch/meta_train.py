"""Entry point: meta-trains the learned loss of an experiment into a run folder, or goes on with one.

python -m launch.meta_train --experiment=NAME --workdir=DIR [--seed=0] [--meta_steps=N] [--config.FIELD=VALUE]
    [--meta_test]
python -m launch.meta_train --list
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

import ml3_jax
from launch import cli, compilation_cache, experiments, meta_test, run_folder, training
from launch.errors import UsageError
from launch.experiments import base
from launch.experiments import config as config_lib


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the entry point; returns its exit code."""
    return cli.main(_define, _run, __doc__ or "", argv)


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    flags.DEFINE_string("experiment", None, f"what to meta-train: {', '.join(experiments.names())}", flag_values=values)
    flags.DEFINE_string(
        "workdir", None, "the run folder; a folder that holds this very run is gone on with", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "what every random draw follows from", flag_values=values)
    flags.DEFINE_integer("meta_steps", None, "how far to go (default: the experiment's)", flag_values=values)
    flags.DEFINE_bool("meta_test", False, "end with python -m launch.meta_test on its defaults", flag_values=values)
    flags.DEFINE_bool("list", False, "print a line for each experiment and stop", flag_values=values)
    name = cli.peek(argv, "experiment")
    if name:
        cli.define_config(values, experiments.definition(name).config_class(), argv)


def _run(values: flags.FlagValues) -> None:
    if values["list"].value:
        for name in experiments.names():
            print(f"{name:<18}{experiments.definition(name).summary}")
        return
    definition = experiments.definition(cli.require(values, "experiment", experiments.names()[0]))
    folder = pathlib.Path(cli.require(values, "workdir", "runs/NAME")).expanduser()
    seed = cli.bounded(values, "seed", 0, cli.MAX_SEED)
    assert seed is not None  # it has a default
    config = make_config(definition, cli.config_overrides(values), cli.bounded(values, "meta_steps", 1))
    compilation_cache.enable()
    train(definition, config, seed, folder)
    print("\nto see what it is worth on tasks that it never saw:" if not values["meta_test"].value else "\nmeta-test:")
    command = f"python -m launch.meta_test --workdir={shlex.quote(str(folder))}"
    print(f"  {command}", flush=True)
    if values["meta_test"].value:
        meta_test.measure(folder)


def make_config(definition: base.Definition, overrides: dict[str, Any], meta_steps: int | None) -> Any:
    """The resolved config that the flags describe.

    Raises:
      UsageError: the fields do not fit each other, or --meta_steps and --config.meta_steps differ.
    """
    if meta_steps is not None:
        if overrides.get("meta_steps", meta_steps) != meta_steps:
            raise UsageError(
                f"--meta_steps={meta_steps} and --config.meta_steps={overrides['meta_steps']} differ: pass one of them"
            )
        overrides = {**overrides, "meta_steps": meta_steps}
    config = base.resolve(definition, config_lib.override(definition.config_class(), overrides))
    refresh_every = getattr(config, "refresh_every", None)
    if refresh_every and config.meta_steps % refresh_every:
        raise UsageError(
            f"--meta_steps must be a multiple of refresh_every = {refresh_every}, got {config.meta_steps}: "
            "only there does a run that goes on equal one that never stopped"
        )
    return config


def train(definition: base.Definition, config: Any, seed: int, folder: pathlib.Path) -> None:
    """Meta-trains to config.meta_steps in a run folder, from where that folder is, and draws what came of it.

    Args:
      definition: the experiment.
      config: its resolved config.
      seed: the seed.
      folder: the run folder; made if need be.

    Raises:
      UsageError: the folder cannot take this run, or this config cannot be trained; nothing was written.
    """
    record = run_folder.make_record(definition.name, seed, config)
    before = run_folder.check_claimable(folder, record)
    if before is not None and before.versions != record.versions:
        changed = [
            f"{name} {version} (now {record.versions.get(name)})"
            for name, version in before.versions.items()
            if version != record.versions.get(name)
        ]
        print(f"note: this run was started with {', '.join(changed)}; from here on its last digits may differ")
        record = dataclasses.replace(record, versions=before.versions)
    try:
        experiment = definition.build(config, donate=True)
        start = training.start_state(experiment, seed)
    except UsageError:
        raise
    except ValueError as error:  # the library's word on a problem or a config that does not fit
        raise UsageError(f"experiment '{definition.name}' cannot be built with this config: {error}") from error
    history = definition.history(experiment) if definition.history else None
    trainer = training.Trainer(experiment, folder, record, start, history)
    if trainer.step:
        print(
            f"{folder} is at meta-step {trainer.step}: "
            + (
                f"going on to {config.meta_steps}"
                if trainer.step < config.meta_steps
                else "nothing to do (a larger --meta_steps goes on)"
            )
        )
    state = trainer.run(config.meta_steps)
    if trainer.skipped:
        print(f"{trainer.skipped} updates were skipped because their meta-gradient was not finite")
    _save_loss(folder, experiment, state)
    training.draw(folder, definition, experiment)
    made = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    print(f"{folder}: {', '.join(made)}")


def _save_loss(folder: pathlib.Path, experiment: base.Experiment, state: ml3_jax.MetaState) -> None:
    """The learned loss alone, for ml3_jax.restore; one without a spec cannot be rebuilt from a file."""
    if experiment.learned_loss.spec is None:
        return
    with run_folder.replacing_folder(folder / run_folder.LEARNED_LOSS) as temporary:
        ml3_jax.save(temporary, experiment.learned_loss, state.loss_params)


if __name__ == "__main__":
    sys.exit(main())
