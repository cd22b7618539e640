"""Entry point: measures the learned loss of a run folder on tasks that it never saw, beside its baselines.

python -m launch.meta_test --workdir=DIR [--workdir=DIR2] [--tasks=N] [--steps=K] [--seed=S] [--variants=NAME,NAME]
"""

import contextlib
import hashlib
import pathlib
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.errors import UsageError, rejected_config, unknown
from launch.evaluation import evaluate, results
from launch.evaluation.unfinished import Unfinished
from launch.experiment import Reference, Scenario, Trained
from launch.experiments import saved
from launch.figures import run as figures
from launch.runs import cli, history, metrics_log, run_folder
from launch.runs.folder_lock import FolderLock
from launch.runs.progress import Progress
from launch.runs.stopping import StopRequest
from launch.runtime import compilation_cache, files, precision

SEED = 1906  # of the tested tasks; the default of meta_train is 0
LOCK = ".meta_test.lock"  # apart from that of meta_train: a run may be tested while it goes on
FIRST_CURVES = "first_curves.png"  # until meta_test.png is drawn; that of an earlier meta-test stays until then
ALL, NONE = "all", "none"  # for --variants
_STREAM = 1  # folded into the key: the draws differ from those of a meta-training with the same seed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the entry point; returns its exit code."""
    return cli.main(_define, _run, __doc__ or "", argv)


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    del argv
    words = "a run folder of meta_train, or the folder of several --seeds; may be given several times"
    flags.DEFINE_multi_string("workdir", None, words, flag_values=values)
    cli.define_bounded(values, "tasks", None, "number of tested tasks (default: the experiment's)")
    cli.define_bounded(values, "steps", None, "inner steps (default: the experiment's)")
    words = f"variants that are tested too: names with commas between, {ALL} or {NONE} (default: the quick ones)"
    flags.DEFINE_string("variants", None, words, flag_values=values)
    cli.define_bounded(values, "seed", SEED, "of tasks, initialisations and data", low=0, high=cli.MAX_SEED)


def _run(values: flags.FlagValues) -> None:
    names = values["workdir"].value or [""]
    if "" in names:
        raise UsageError("--workdir is missing: pass --workdir=runs/NAME")
    folders = [pathlib.Path(name).expanduser() for name in names]
    compilation_cache.enable()
    options: dict[str, Any] = {name: values[name].value for name in ("tasks", "steps", "seed", "variants")}
    measure_all(folders, **options)


def measure_all(folders: Sequence[pathlib.Path], **options: Any) -> list[dict[str, Any]]:
    """Meta-tests run folders, one after the other, and prints a table over several of them; `options` are those of `measure`.

    A folder without a config.json stands for the run folders seed_N in it.

    Raises:
      KeyboardInterrupt, UsageError: as `measure`. What is measured before is kept.
    """
    found = [run for folder in folders for run in (_runs_of(folder) or [folder])]
    contents = []
    for folder in found:
        if len(found) > 1:
            print(f"\n{folder}:", flush=True)
        contents.append(measure(folder, **options))
    if len(found) > 1:
        print("\n" + results.table_of_runs({str(folder): content for folder, content in zip(found, contents, strict=True)}))
    return contents


def _runs_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The run folders of several seeds in a folder that is no run folder itself."""
    return [] if (folder / run_folder.CONFIG).exists() else run_folder.below(folder)


def measure(
    folder: pathlib.Path,
    *,
    tasks: int | None = None,
    steps: int | None = None,
    seed: int = SEED,
    variants: str | None = None,
) -> dict[str, Any]:
    """Meta-tests a run folder, writes meta_test.json and its figures there, and prints a table.

    `tasks` and `steps` replace the defaults of each scenario. `variants` are names of variants with commas between, "all" or
    "none"; None: the variants that are not `on_request`.

    Returns:
      The content of meta_test.json.

    Raises:
      KeyboardInterrupt: (`Stopped` after a signal) the scenarios that are measured are kept for the same call.
      UsageError: the folder holds no run that can be tested, or there is no such variant. Nothing was written.
    """
    run_folder.check_writable(folder)
    run = saved.load(folder)
    recorded = history.read(folder)
    about = {"seed": seed, "tasks": tasks, "steps": steps, "loss": _digest(run), "versions": run_folder.versions()}
    chosen, unfinished = _chosen(run, variants), Unfinished(folder, about)
    stopping = StopRequest(lambda: _said(unfinished, chosen), at_once=True)
    with FolderLock(folder, LOCK) as lock, stopping.listening(), precision.products(run.experiment.config.precision):
        lock.acquire()
        left = {name: scenario for name, scenario in chosen.items() if name not in unfinished.parts}
        for name in chosen:
            if name not in left:
                print(f"measured already: {chosen[name].title}", flush=True)
        with contextlib.closing(_Report(folder, left)) as report:
            for name, scenario in left.items():
                report.say(f"testing on: {scenario.title}")
                unfinished.add(name, _measure(run, scenario, folder, tasks, steps, seed, report))
        parts = {name: unfinished.parts[name] for name in chosen}
        content = _write(run, folder, seed, parts, recorded)
        (folder / FIRST_CURVES).unlink(missing_ok=True)
        unfinished.clear()
    return content


def _digest(run: saved.SavedRun) -> str:
    """A text that differs for another config, meta-step or learned loss: a new run may lie in the folder of an old one."""
    total = hashlib.sha256(f"{run.definition.name} {run.experiment.config} {run.step}".encode())
    for leaf in jax.tree.leaves(run.learned):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def _said(unfinished: Unfinished, chosen: Mapping[str, Scenario]) -> str:
    done = sum(name in unfinished.parts for name in chosen)
    return f"{done} of {len(chosen)} settings are measured and kept: the same command goes on from there"


def _write(run: saved.SavedRun, folder: pathlib.Path, seed: int, parts: dict[str, Any], recorded: Any) -> dict[str, Any]:
    """Writes meta_test.json and the figures, prints the tables, and returns the content of the file."""
    content = {
        "experiment": run.definition.name,
        "seed": seed,
        "meta_steps": run.step,
        "inner_optimizer": run.experiment.config.inner_optimizer,
        **parts[""],
        "variants": {name: part for name, part in parts.items() if name},
    }
    files.write_json(folder / run_folder.RESULTS, content)
    figures.meta_test(folder, content)
    if run.definition.figures is not None:
        run.definition.figures(Trained(run.experiment, run.loss_params, content, recorded), folder)
    for part in parts.values():
        print("\n" + results.table(part["title"], part))
    pictures = sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".gif") and path.name != FIRST_CURVES)
    print(f"\n{folder / run_folder.RESULTS}, and beside it {', '.join(pictures)}")
    return content


def _measure(
    run: saved.SavedRun,
    scenario: Scenario,
    folder: pathlib.Path,
    tasks: int | None,
    steps: int | None,
    seed: int,
    report: "_Report",
) -> dict[str, Any]:
    """One section of meta_test.json."""
    count = steps or scenario.steps or int(run.experiment.config.inner_steps)
    scenario = scenario.with_steps(count)
    seconds = metrics_log.read(folder).get("seconds")

    def section(outcome: evaluate.Outcome, reference: Reference | None = None) -> dict[str, Any]:
        part = results.section(
            scenario,
            outcome,
            seconds=None if seconds is None else float(seconds[-1]),
            env_steps=run.definition.count_env_steps(run.experiment, run.step),
            reference=reference,
        )
        learned = zip(("loss", "initialisation", "step sizes"), vars(run.learned).values(), strict=True)
        return {
            **part,
            "title": scenario.title,
            "log_scale": scenario.log_scale,
            "maximize": scenario.maximize,
            "learned_parts": [name for name, params in learned if params is not None],
        }

    outcome = evaluate.evaluate(
        run.experiment,
        scenario,
        run.learned,
        run.initial,
        key=jax.random.fold_in(jax.random.key(seed), _STREAM),
        num_tasks=tasks or scenario.num_tasks,
        steps=count,
        watch=evaluate.Watch(lambda first: report.first(section(first)), report.descent),
    )
    return section(outcome, None if scenario.reference is None else scenario.reference(outcome.tested, folder / run_folder.PPO))


class _Report:
    """What a meta-test says while it works: the first curves, and how far its searches over step sizes are."""

    def __init__(self, folder: pathlib.Path, scenarios: Mapping[str, Scenario]):
        """Starts the report of scenarios, the first of which gets a figure and a table as soon as it has curves."""
        self._folder, self._scenarios = folder, scenarios
        self._done, self._shown, self._lock = 0, False, threading.Lock()
        total = sum(map(evaluate.descents, scenarios.values()))
        self._progress = Progress(max(total, 1), work="meta-test", step="descent")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._progress.say(text)

    def first(self, part: dict[str, Any]) -> None:
        """Shows the curves of the main scenario before any step size is tuned."""
        if self._shown or "" not in self._scenarios:
            return
        self._shown = True
        figures.curves(self._folder / FIRST_CURVES, part)
        self.say(results.table(part["title"], part))
        self.say(f"first curves: {self._folder / FIRST_CURVES}")
        main = self._scenarios[""]
        further = ["step sizes of the plain loss"]
        controls = {"pretraining": main.pretrain, "MAML": main.maml, "PPO": main.reference}
        further += [words for words, control in controls.items() if control is not None]
        further += [scenario.title for name, scenario in self._scenarios.items() if name]
        self.say(f"next: {'; '.join(further)}")

    def descent(self) -> None:
        """One more descent is done; searches that widen their range take more than were counted."""
        with self._lock:
            self._done = min(self._done + 1, self._progress.total)
            self._progress.update(self._done)

    def close(self) -> None:
        """Ends the report."""
        self._progress.close()


def _chosen(run: saved.SavedRun, variants: str | None) -> dict[str, Scenario]:
    """The main scenario and the requested variants, each with a title."""
    experiment = run.definition.name
    products = precision.products(run.experiment.config.precision)
    with rejected_config(experiment, "tested"), products:  # a system or a policy that meta-training does not use
        scenarios = run.definition.scenarios(run.experiment)
    names = [name for name in scenarios if name]
    if variants is None:
        wanted = [name for name in names if not scenarios[name].on_request]
    elif variants in (ALL, NONE):
        wanted = names if variants == ALL else []
    else:
        wanted = [name.strip() for name in variants.split(",")]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--variants: {unknown('variant', name, [*names, ALL, NONE])}")
    return {
        name: scenario._replace(title=scenario.title or (f"{experiment}, {name}" if name else experiment))
        for name, scenario in scenarios.items()
        if not name or name in wanted
    }


if __name__ == "__main__":
    sys.exit(main())
