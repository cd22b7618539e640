"""Entry point: measures the learned loss of a run folder on tasks that it never saw, beside its baselines.

python -m launch.meta_test --workdir=DIR [--tasks=N] [--steps=K] [--seed=S] [--variants=NAME,NAME]
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from launch import (
    cli,
    compilation_cache,
    evaluation,
    experiments,
    history,
    metrics,
    plots,
    results,
    run_folder,
    training,
)
from launch.errors import UsageError, unknown
from launch.experiments import base
from launch.experiments import config as config_lib

SEED = 1906  # of the tasks that are tested; training's default is 0
ALL, NONE = "all", "none"  # for --variants
_STREAM = 1  # keeps the draws apart from those of a training with the same seed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the entry point; returns its exit code."""
    return cli.main(_define, _run, __doc__ or "", argv)


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "a run folder that meta_train made", flag_values=values)
    flags.DEFINE_integer("tasks", None, "tasks to test on (default: the experiment's)", flag_values=values)
    flags.DEFINE_integer("steps", None, "inner steps (default: the experiment's)", flag_values=values)
    words = f"which variants are tested too: names with commas between, {ALL} or {NONE} (default: those that are quick)"
    flags.DEFINE_string("variants", None, words, flag_values=values)
    flags.DEFINE_integer("seed", SEED, "what tasks, initialisations and data follow from", flag_values=values)


def _run(values: flags.FlagValues) -> None:
    folder = pathlib.Path(cli.require(values, "workdir", "runs/NAME")).expanduser()
    tasks, steps, seed = (
        cli.bounded(values, "tasks", 1),
        cli.bounded(values, "steps", 1),
        cli.bounded(values, "seed", 0, cli.MAX_SEED),
    )
    compilation_cache.enable()
    measure(folder, tasks=tasks, steps=steps, seed=SEED if seed is None else seed, variants=values["variants"].value)


def measure(
    folder: pathlib.Path,
    *,
    tasks: int | None = None,
    steps: int | None = None,
    seed: int = SEED,
    variants: str | None = None,
) -> dict[str, Any]:
    """Meta-tests a run folder, writes meta_test.json and its figures there, and prints a table.

    Args:
      folder: the run folder.
      tasks: how many tasks; None: each setting's default.
      steps: inner steps; None: each setting's default.
      seed: what tasks, initialisations and data follow from.
      variants: names of the variants that are tested too, with commas between, "all" or "none"; None: those that are not
        `on_request`.

    Returns:
      What meta_test.json holds.

    Raises:
      UsageError: the folder holds no run that can be tested, or there is no such variant; nothing was written.
    """
    run_folder.check_writable(folder)
    definition, experiment, record = load(folder)
    template = training.start_state(experiment, record.seed)
    restored = training.restore(folder, template)
    if restored is None:
        raise UsageError(
            f"{folder} holds no checkpoint: expected one below {run_folder.CHECKPOINTS}/; run meta_train on it first"
        )
    meta_step, state, _ = restored
    experiment = experiment._replace(context=state.context)  # what meta-training learned beside the loss, such as a model
    recorded = history.read(folder)
    seconds = metrics.read(folder).get("seconds")
    env_steps = _env_steps(definition, experiment, meta_step)
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    parts, titles = {}, {}
    try:
        settings = _chosen(definition.settings(experiment), variants)
    except UsageError:
        raise
    except ValueError as error:  # a system or a policy that is there for meta-test alone
        raise UsageError(f"experiment '{definition.name}' cannot be tested with this config: {error}") from error
    for name, setting in settings.items():
        titles[name] = setting.title or (f"{definition.name}, {name}" if name else definition.name)
        if setting.problem_for is not None:
            setting = setting._replace(problem=setting.problem_for(steps or setting.steps))
        print(f"testing on: {titles[name]}", flush=True)
        outcome = evaluation.evaluate(
            experiment,
            setting,
            state.loss_params,
            template.loss_params,
            key=key,
            num_tasks=tasks or setting.num_tasks,
            steps=steps or setting.steps,
        )
        parts[name] = results.section(
            setting,
            outcome,
            seconds=None if seconds is None else float(seconds[-1]),
            env_steps=env_steps,
            reference=None if setting.reference is None else setting.reference(outcome.tested, folder / run_folder.PPO),
        )
        parts[name] |= {"title": titles[name], "log_scale": setting.log_scale, "maximize": setting.maximize}
    content = {
        "experiment": definition.name,
        "seed": seed,
        "meta_steps": meta_step,
        "inner_optimizer": experiment.config.inner_optimizer,
        **parts[""],
        "variants": {name: part for name, part in parts.items() if name},
    }
    run_folder.write_json(folder / run_folder.RESULTS, content)
    plots.meta_test(folder, content)
    if definition.figures is not None:
        definition.figures(experiment, state.loss_params, content, recorded, folder)
    for name, part in parts.items():
        print("\n" + results.table(titles[name], part))
    figures = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".gif"))
    print(f"\n{folder / run_folder.RESULTS}, and beside it {', '.join(figures)}")
    return content


def _chosen(settings: dict[str, base.Setting], variants: str | None) -> dict[str, base.Setting]:
    """The experiment's own setting and those variants that are asked for."""
    names = [name for name in settings if name]
    if variants is None:
        wanted = [name for name in names if not settings[name].on_request]
    elif variants in (ALL, NONE):
        wanted = names if variants == ALL else []
    else:
        wanted = [name.strip() for name in variants.split(",")]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--variants: {unknown('variant', name, [*names, ALL, NONE])}")
    return {name: setting for name, setting in settings.items() if not name or name in wanted}


def load(folder: pathlib.Path) -> tuple[base.Definition, base.Experiment, run_folder.Record]:
    """The experiment of a run folder.

    Raises:
      UsageError: there is no run, or it does not fit this version.
    """
    if not folder.is_dir():
        raise UsageError(f"--workdir {folder} does not exist: expected a run folder that meta_train made")
    record = run_folder.read_record(folder)
    if record is None:
        raise UsageError(f"{folder} holds no {run_folder.CONFIG}: expected a run folder that meta_train made")
    try:
        definition = experiments.definition(record.experiment)
        given = config_lib.override(definition.config_class(), {**record.config, "meta_steps": record.meta_steps})
        config = base.resolve(definition, given)
    except UsageError as error:
        raise UsageError(f"{folder / run_folder.CONFIG} does not fit this version of the code: {error}") from error
    # A default of today is not what a run of before the field existed had.
    missing = [name for name in config_lib.names(definition.config_class) if name not in {*record.config, "meta_steps"}]
    if missing:
        raise UsageError(
            f"{folder / run_folder.CONFIG} does not fit this version of the code: expected every config field, "
            f"{', '.join(missing)} missing; meta-test it with the version that made it, or meta-train anew"
        )
    if dataclasses.asdict(config) != dataclasses.asdict(given):
        raise UsageError(f"{folder / run_folder.CONFIG} is damaged: it leaves fields open; nothing was changed")
    return definition, definition.build(config), record


def _env_steps(definition: base.Definition, experiment: base.Experiment, meta_steps: int) -> int | None:
    """What meta-training took from the environment; None where there is none."""
    if definition.env_steps is not None:
        return definition.env_steps(experiment, meta_steps)
    samples, config = experiment.problem.samples_per_step, experiment.config
    return None if samples is None else meta_steps * config.num_tasks * config.unroll * samples


if __name__ == "__main__":
    sys.exit(main())
