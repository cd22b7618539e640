"""The run folder: its file names, its record config.json, and the checks before anything is written.

`meta_train` opens it with `check_claimable` and `claim`, `meta_test` with `read_record`.
"""

import dataclasses
import json
import os
import pathlib
from importlib import metadata
from typing import Any

import jax

from launch.errors import UsageError
from launch.runs.folder_lock import FolderLock
from launch.runtime import files
from ml3_jax import aliases

CONFIG = "config.json"
LOCK = ".lock"
METRICS = "metrics.csv"
TENSORBOARD = "tb"
CHECKPOINTS = "checkpoints"
HISTORY = "history.npz"
RESULTS = "meta_test.json"
PPO = "ppo"  # a folder with a curve of PPO for each task
LEARNED_LOSS = "learned_loss"  # a folder that ml3_jax.restore reads, with all learned parts
LEARNED_PARTS = "learned_parts"  # the same for a run without a learned loss, read by ml3_jax.restore_parts
FORMAT = "ml3_jax run folder 1"  # identifies a config.json of this package
_PICTURES = (".png", ".gif")
# {experiment: former config fields with a single choice}
REMOVED_FIELDS = {"ant_mfrl": ("physics",)}
# Config fields since 0.2, with the values that older runs go on with. They change no number.
ADDED_FIELDS = {"max_skipped": 100, "precision": "default", "compute_dtype": "float32"}
# The same for some experiments.
_VISIBLE_GOALS = {"goal": "visible", "loss": "guided", "last_scale": 0.1, "context_steps": 1500, "context_batches": 6}
ADDED_TO: dict[str, dict[str, Any]] = {
    "ant_mfrl": _VISIBLE_GOALS,
    "reacher_mfrl": _VISIBLE_GOALS,
    "reacher_expert": _VISIBLE_GOALS,
    "shaped_sine": {"loss": "weighted_squared_error"},
    "inverse_dynamics": {"loss": "guided_squared_error"},
}
_TYPES = {str: "text", int: "a whole number", dict: "an object"}


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of config.json."""

    experiment: str
    seed: int
    meta_steps: int  # the last meta-step that was asked for
    config: dict[str, Any]  # every resolved field except meta_steps
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    devices: str = ""  # on which the run was started; "": not recorded by older versions


def of_seed(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The run folder of one of several seeds below a folder."""
    return folder / f"seed_{seed}"


def below(folder: pathlib.Path) -> list[pathlib.Path]:
    """The run folders of several seeds below a folder, in the order of the seeds."""
    found = {int(path.name[5:]): path for path in folder.glob("seed_*") if path.name[5:].isdecimal()}
    return [found[seed] for seed in sorted(found) if (found[seed] / CONFIG).exists()]


def versions() -> dict[str, str]:
    """The versions on which the numbers of a run depend."""
    found = {}
    for name in ("jax", "jaxlib", "ml3_jax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> str:
    """The devices on which the last digits of a run depend, for example "2 cpu" or "8 gpu in 2 processes"."""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} {jax.default_backend()}{processes}"


def make_record(experiment: str, seed: int, config: Any) -> Record:
    """The record of a run, from the resolved config of its experiment."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # as it is read back: tuples become lists
    meta_steps = values.pop("meta_steps")
    return Record(experiment, seed, meta_steps, values, versions(), devices())


def check_writable(folder: pathlib.Path) -> None:
    """Checks, without writing, that the folder exists or can be created, and is writable.

    Raises:
      UsageError: it is a file, lies below a file, is not writable or is no valid path.
    """
    absolute, advice = folder.absolute(), "choose another path"
    if "\0" in str(folder):
        raise UsageError(f"--workdir has a null byte, {str(folder)!r}: {advice}")
    if not _is_utf8(str(folder)):
        raise UsageError(f"--workdir has bytes that are not UTF-8, {str(folder)!r}: {advice}")
    parent = next(path for path in (absolute, *absolute.parents) if os.path.exists(path))
    if parent == absolute and not parent.is_dir():
        raise UsageError(f"--workdir must be a folder, but {folder} is a file: {advice}")
    if not parent.is_dir():
        raise UsageError(f"--workdir {folder} lies below {parent}, which is a file: {advice}")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    for part in absolute.relative_to(parent).parts:
        if len(os.fsencode(part)) > longest:
            raise UsageError(f"--workdir has a name of over {longest} bytes, '{part[:20]}...': {advice}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} cannot be written: no permission to write in {parent}; {advice}")


def _is_utf8(text: str) -> bool:
    """Whether a path or an argument is UTF-8. Python keeps other bytes as surrogates, which the storage of Orbax refuses."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_record(folder: pathlib.Path) -> Record | None:
    """The record of a folder, with current names; None if it has no config.json.

    Raises:
      UsageError: config.json is damaged or of another program.
    """
    path = folder / CONFIG
    advice = "nothing was changed; choose another --workdir, or move that file away"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): {advice}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: expected JSON, got {error}; {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f'{path} was not written by meta_train: expected "format": "{FORMAT}"; {advice}')
    types = {"experiment": str, "seed": int, "meta_steps": int, "config": dict, "versions": dict, "devices": str}
    content.setdefault("devices", "")
    for name, kind in types.items():
        if not isinstance(content.get(name), kind):
            wrong = f'expected "{name}" to be {_TYPES[kind]}, got {content.get(name)!r}'
            raise UsageError(f"{path} is damaged: {wrong}; {advice}")
    try:
        content["config"] = _current(content["config"], content["experiment"])
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}; {advice}") from error
    return Record(**{name: content[name] for name in types})


def _current(config: dict[str, Any], experiment: str) -> dict[str, Any]:
    """A config with the current names of fields and values, without removed fields and with added ones."""
    removed = REMOVED_FIELDS.get(experiment, ())
    kept = {name: value for name, value in config.items() if name not in removed}
    return {**ADDED_FIELDS, **ADDED_TO.get(experiment, {}), **aliases.current_config(kept, warn=False)}


def check_same(folder: pathlib.Path, before: Record, now: Record) -> None:
    """Checks that the folder's run has the settings of the current command.

    Raises:
      UsageError: experiment, seed or a config field differs. The message names each with both values.
    """
    if before.experiment != now.experiment:
        raise UsageError(
            f"{folder} holds a run of experiment '{before.experiment}', not of '{now.experiment}': choose another --workdir"
        )
    differing = [] if before.seed == now.seed else [f"seed is {before.seed} there, {now.seed} here"]
    for name in sorted({*before.config, *now.config}):
        there, here = (repr(record.config[name]) if name in record.config else "missing" for record in (before, now))
        if there != here:
            differing.append(f"config field '{name}' is {there} there, {here} here")
    if differing:
        raise UsageError(
            f"{folder} holds a run with other settings: {'; '.join(differing)}. "
            "Pass the same settings to go on with it, or choose another --workdir"
        )


def check_claimable(folder: pathlib.Path, record: Record) -> Record:
    """Checks, without writing, that a run may start or resume in the folder.

    Returns:
      The record for config.json. A resumed run keeps the versions and the devices from its start.

    Raises:
      UsageError: the folder cannot be written, holds another run or files that the run would overwrite.
    """
    check_writable(folder)
    before = read_record(folder)
    if before is not None:
        check_same(folder, before, record)
        changed = [
            f"{name} {version} (now {record.versions.get(name)})"
            for name, version in before.versions.items()
            if version != record.versions.get(name)
        ]
        if before.devices not in ("", record.devices):
            changed.append(f"{before.devices} (now {record.devices})")
        if changed:
            print(f"note: this run was started with {', '.join(changed)}; from here on its last digits may differ")
        return dataclasses.replace(record, versions=before.versions, devices=before.devices)
    foreign = sorted(path.name for path in folder.iterdir() if _is_reserved(path.name)) if folder.exists() else []
    if foreign:
        raise UsageError(
            f"{folder} has no {CONFIG} but holds {', '.join(foreign)}, which this run would overwrite: "
            "choose another --workdir, or move them away"
        )
    return record


def _is_reserved(name: str) -> bool:
    reserved = (METRICS, TENSORBOARD, CHECKPOINTS, HISTORY, RESULTS, LEARNED_LOSS, LEARNED_PARTS, PPO)
    return name in reserved or name.endswith(_PICTURES)


def claim(folder: pathlib.Path, record: Record, lock: FolderLock | None = None) -> None:
    """Creates the folder, takes its lock unless it is held, and writes config.json, after `check_claimable`.

    Raises:
      UsageError: another process has been faster.
      OSError: the file system refuses, for example because it is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None and not lock.held:
            lock.acquire()
            if read_record(folder) is not None:
                raise UsageError(f"another run was started in {folder} meanwhile: the same command resumes it")
        files.write_json(folder / CONFIG, {"format": FORMAT, **dataclasses.asdict(record)})
    except OSError as error:
        raise OSError(f"--workdir {folder} cannot be written ({error.strerror}): choose another path or make room") from error
