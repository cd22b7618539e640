"""The run folder: what lies where, who may write there, and how; everything is checked before anything is written.

`meta_train` opens it with `claim`, `meta_test` with `read_record`; files are replaced whole, never half-written.
"""

import dataclasses
import json
import os
import pathlib
from importlib import metadata
from typing import Any

from launch.errors import UsageError
from launch.runtime import files

CONFIG = "config.json"
METRICS = "metrics.csv"
TENSORBOARD = "tb"
CHECKPOINTS = "checkpoints"
HISTORY = "history.npz"
RESULTS = "meta_test.json"
PPO = "ppo"  # a folder of PPO's curves, a file for each task
LEARNED_LOSS = "learned_loss"  # a folder that ml3_jax.restore reads
FORMAT = "ml3_jax run folder 1"  # how a config.json of ours is told from another program's
_PICTURES = (".png", ".gif")


@dataclasses.dataclass(frozen=True)
class Record:
    """What config.json says of a run."""

    experiment: str
    seed: int
    meta_steps: int  # how far the last command on the folder was told to go
    config: dict[str, Any]  # every resolved field but meta_steps
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on: jax, jaxlib, this package."""
    found = {}
    for name, distribution in (("jax", "jax"), ("jaxlib", "jaxlib"), ("ml3_jax", "ml3_jax")):
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_record(experiment: str, seed: int, config: Any) -> Record:
    """The record of a run of an experiment's resolved config."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # as it will be read back: tuples become lists
    meta_steps = values.pop("meta_steps")
    return Record(experiment, seed, meta_steps, values, versions())


def check_writable(folder: pathlib.Path) -> None:
    """Checks, without writing, that the folder is one, or could be made, and can be written to.

    Raises:
      UsageError: it is a file, lies below one or is not writable.
    """
    absolute = folder.absolute()
    standing = next(path for path in (absolute, *absolute.parents) if os.path.exists(path))
    if not standing.is_dir():
        if standing == absolute:
            raise UsageError(f"--workdir must be a folder, but {folder} is a file: choose another path")
        raise UsageError(f"--workdir {folder} lies below {standing}, which is a file: choose another path")
    longest = os.pathconf(standing, "PC_NAME_MAX")
    for part in absolute.relative_to(standing).parts:
        if len(os.fsencode(part)) > longest:
            raise UsageError(f"--workdir has a name of over {longest} bytes, '{part[:20]}...': choose another path")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise UsageError(f"--workdir {folder} cannot be written: no permission to write in {standing}; choose another path")


def read_record(folder: pathlib.Path) -> Record | None:
    """What the folder's config.json says; None where there is none.

    Raises:
      UsageError: config.json is damaged or another program's.
    """
    path = folder / CONFIG
    advice = "nothing was changed; choose another --workdir, or move that file away"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): {advice}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is damaged: expected JSON, got {error}; {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f'{path} was not written by meta_train: expected "format": "{FORMAT}"; {advice}')
    types = {"experiment": str, "seed": int, "meta_steps": int, "config": dict, "versions": dict}
    for name, kind in types.items():
        if not isinstance(content.get(name), kind):
            raise UsageError(
                f'{path} is damaged: expected "{name}" to be {_article(kind)}, got {content.get(name)!r}; {advice}'
            )
    return Record(**{name: content[name] for name in types})


def _article(kind: type) -> str:
    return {str: "text", int: "a whole number", dict: "an object"}[kind]


def check_same(folder: pathlib.Path, before: Record, now: Record) -> None:
    """Checks that a command goes on with the run that the folder holds.

    Raises:
      UsageError: experiment, seed or a config field differs; the message names each with both values.
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
    """Checks, without writing, that a run may be started or resumed in the folder.

    Args:
      folder: the run folder, which need not exist.
      record: the run that is to be made there.

    Returns:
      The record for config.json: a resumed run keeps the versions that it was started with.

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
        if changed:
            print(f"note: this run was started with {', '.join(changed)}; from here on its last digits may differ")
        return dataclasses.replace(record, versions=before.versions)
    foreign = sorted(path.name for path in folder.iterdir() if _is_ours_by_name(path.name)) if folder.exists() else []
    if foreign:
        raise UsageError(
            f"{folder} has no {CONFIG} but holds {', '.join(foreign)}, which this run would overwrite: "
            "choose another --workdir, or move them away"
        )
    return record


def _is_ours_by_name(name: str) -> bool:
    return name in (METRICS, TENSORBOARD, CHECKPOINTS, HISTORY, RESULTS, LEARNED_LOSS, PPO) or name.endswith(_PICTURES)


def claim(folder: pathlib.Path, record: Record) -> None:
    """Makes the folder and writes config.json; call `check_claimable` first.

    Raises:
      UsageError: the file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / CONFIG, {"format": FORMAT, **dataclasses.asdict(record)})
    except OSError as error:
        raise UsageError(f"--workdir {folder} cannot be written ({error.strerror}): choose another path") from error
