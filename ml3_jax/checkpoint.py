"""Saving and restoring: a trained loss as one folder (`save`, `restore`), and a meta-training's steps (`Checkpoints`).

Orbax writes the arrays. A JSON record beside them has their structure and a digest: without it, a flipped bit in the array
data would be restored as a wrong number without an error. Nothing is pickled.
"""

import hashlib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from importlib import metadata as packages
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ml3_jax import aliases, losses, sharding
from ml3_jax.arguments import check_count, check_kind
from ml3_jax.losses.forms import as_json
from ml3_jax.types import LearnedLoss, LossParams, PyTree

FORMAT = 1
VERSION = packages.version("ml3_jax")
WIDE = {"float64", "int64", "uint64", "complex128"}
KEY_BYTES = 16  # of a typed key, at most
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LEAF = "leaf"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another kind."""


class DoesNotFitError(CheckpointError):
    """A checkpoint that is whole, and that this process cannot hold or this version cannot read."""


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _paths(tree: PyTree) -> list[str]:
    """The path of each leaf, such as ".inner_state.params['w']". Unlike the text of a treedef it holds no addresses."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _difference(record: Mapping[str, Any], tree: PyTree) -> str:
    """How the structure of a template differs from that of the saved tree, in words; empty if it does not."""
    paths, saved = _paths(tree), record.get("paths")
    if saved is None:  # written before 0.2: the text of the treedef, in which functions may have addresses
        before, now = (_ADDRESS.sub("", text) for text in (record["treedef"], str(jax.tree.structure(tree))))
        same = aliases.current_treedef(before) == now
        return "" if same else f"expected the structure {record['treedef']}, got {jax.tree.structure(tree)}"
    missing, extra = [path for path in saved if path not in paths], [path for path in paths if path not in saved]
    if missing or extra:
        return (
            f"expected the leaves of the saved structure {record['treedef']}: {_listed(missing)} missing, {_listed(extra)} new"
        )
    return "" if saved == paths else f"expected the order of the leaves {', '.join(saved)}, got {', '.join(paths)}"


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") if paths else "nothing"


def _difference_of_leaves(record: Mapping[str, Any], paths: list[str], leaves: list[Any]) -> str:
    """The first leaf whose dtype or shape differs from the saved one, in words; empty if there is none."""
    for path, there, leaf in zip(paths, record["leaves"], leaves, strict=True):
        here = _describe(leaf)
        if there != here:
            return f"{path} is {there['dtype']} {there['shape']} there, and {here['dtype']} {here['shape']} here"
    return ""


def _check_format(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Checks that this version reads the format of a record.

    Raises:
      DoesNotFitError: another format; the message names both versions.
    """
    if record.get("format") != FORMAT:
        raise DoesNotFitError(
            f"{path} was written by ml3_jax {record.get('version', 'of an unknown version')} in format {record.get('format')}, "
            f"and ml3_jax {VERSION} reads format {FORMAT}: read it with the version that wrote it"
        )


def _check_fits(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Checks that this process can hold the leaves. Without 64-bit mode JAX would truncate numbers without an error.

    Raises:
      DoesNotFitError: 64-bit numbers in a process of 32 bits, or more bytes than the machine has memory.
    """
    wide, config = sorted({leaf["dtype"] for leaf in record["leaves"]} & WIDE), jax.config
    if wide and not config.read("jax_enable_x64"):
        raise DoesNotFitError(
            f"{path} holds {', '.join(wide)}, and this process has 32 bits: set JAX_ENABLE_X64=1 to read it. To use it with 32 "
            "bits, read it so, convert its leaves with astype(jnp.float32), and save it again"
        )
    size = sum(math.prod(leaf["shape"]) * _item_bytes(leaf["dtype"]) for leaf in record["leaves"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise DoesNotFitError(f"{path} says that it holds {size:.3g} bytes, and this machine has {memory:.3g} bytes of memory")


def _item_bytes(dtype: str) -> int:
    return KEY_BYTES if dtype.startswith("key<") else jnp.dtype(dtype).itemsize


def _digest(leaves: list[Any], record: Mapping[str, Any]) -> str:
    """sha256 over the record without its digest, and over dtype, shape and bytes of each leaf (of a key: its data)."""
    said = {name: value for name, value in record.items() if name != "digest"}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for leaf in leaves:
        data = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        total.update(f"{leaf.dtype}{leaf.shape}".encode())
        total.update(np.ascontiguousarray(data).tobytes())
    return total.hexdigest()


def _structure(tree: PyTree) -> Any:
    """Nested dictionaries, lists and tuples as JSON, with "leaf" for arrays; None if there is any other container."""
    if isinstance(tree, Mapping) and type(tree) is dict and all(isinstance(k, str) for k in tree):
        children = {k: _structure(v) for k, v in tree.items()}
        return None if None in children.values() else {"dict": children}
    if type(tree) in (list, tuple):
        children = [_structure(v) for v in tree]
        return None if None in children else {type(tree).__name__: children}
    return _LEAF if jax.tree.leaves(tree) and jax.tree.structure(tree).num_nodes == 1 else None


def _rebuild(structure: Any) -> PyTree:
    """A tree of the recorded structure with a zero at each leaf."""
    if structure == _LEAF:
        return 0
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {k: _rebuild(v) for k, v in children.items()}
    parts = [_rebuild(v) for v in children]
    return parts if kind == "list" else tuple(parts)


def _pack(tree: PyTree, about: Mapping[str, Any]) -> ocp.args.Composite:
    leaves = [leaf if _is_key(leaf) else jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    record = {
        **as_json(dict(about)),  # as it is read again: the digest covers it
        "format": FORMAT,
        "version": VERSION,
        "structure": _structure(tree),
        "paths": _paths(tree),
        "treedef": _ADDRESS.sub("", str(jax.tree.structure(tree))),  # for people
        "leaves": [_describe(leaf) for leaf in leaves],
    }
    record["digest"] = _digest(leaves, record)
    named = _named(leaves)
    return ocp.args.Composite(state=ocp.args.StandardSave(named), about=ocp.args.JsonSave(record))


def _named(leaves: list[Any]) -> dict[str, Any]:
    """Leaves by number, without empty leaves: Orbax refuses them, and the record has their shapes."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}


def _unpack(named: Mapping[str, Any], record: Mapping[str, Any], like: list[Any]) -> list[Any]:
    """The verified leaves, each committed to a device if the leaf of the template is."""
    described = enumerate(record["leaves"])
    leaves = [named[f"{i:05d}"] if f"{i:05d}" in named else jnp.zeros(leaf["shape"], leaf["dtype"]) for i, leaf in described]
    if _difference_of_leaves(record, [""] * len(leaves), leaves) or _digest(leaves, record) != record["digest"]:
        raise CheckpointError("the data changed after they were saved (the digest differs)")
    # Orbax commits every leaf to one device.
    return [leaf if old.committed else sharding.uncommit(leaf) for leaf, old in zip(leaves, like, strict=True)]


def save(
    path: str | os.PathLike[str],
    learned_loss: LearnedLoss,
    loss_params: LossParams,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a learned loss and its parameters to a new folder. If it fails, there is no folder.

    Args:
      path: a folder that does not exist yet; its parents are made.
      learned_loss: the loss. `restore` finds a loss with a spec by its name; without a spec it needs the functions again.
      loss_params: its parameters: nested dictionaries, lists and tuples of arrays, or any other pytree (`restore` then
        needs a template).
      metadata: any JSON, for the record.

    Raises:
      FileExistsError: the path exists.
      OSError: it cannot be written.
      TypeError: an argument of another kind, or parameters that are no arrays.
      ValueError: parameters without an array, metadata that are no JSON, or a path that cannot be one.
    """
    check_kind("learned_loss", learned_loss, LearnedLoss, "as ml3_jax.losses has them")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    if not jax.tree.leaves(loss_params):
        raise ValueError("loss_params: expected at least one array, got none")
    folder = _resolved(path)
    if folder.exists():
        raise FileExistsError(f"{path} exists: expected a path that does not exist; choose another or move it away")
    if learned_loss.spec is None:
        warnings.warn(
            "this learned loss has no spec, so only its parameters are saved: "
            "restore them with restore(path, learned_loss=...)",
            stacklevel=2,
        )
    spec = None if learned_loss.spec is None else dict(learned_loss.spec)
    packed = _pack(loss_params, {"spec": spec, "metadata": dict(metadata or {})})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=packed)


def _resolved(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path.

    Raises:
      ValueError: it is empty, or has a null byte or bytes that are not UTF-8.
    """
    text = os.fsdecode(path)
    if not text or "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):  # surrogates: other bytes
        raise ValueError(f"path: expected the path of a folder in UTF-8, got {text!r}")
    return pathlib.Path(text).resolve()


def restore(
    path: str | os.PathLike[str], learned_loss: LearnedLoss | None = None, template: LossParams | None = None
) -> tuple[LearnedLoss, LossParams]:
    """Reads a loss that `save` wrote, ready to use.

    Args:
      path: the folder.
      learned_loss: the functions of a loss saved without a spec; None builds them from the saved spec.
      template: a pytree like the parameters, for containers other than dictionaries, lists and tuples.

    Returns:
      (learned_loss, loss_params).

    Raises:
      CheckpointError: (a ValueError) the folder is missing, damaged, or not a saved loss.
      ValueError: the loss was saved without a spec and learned_loss is None, or it needs a template.
    """
    folder = _resolved(path)
    record = _read_record(folder)
    if "spec" not in record:
        raise CheckpointError(f"{path} is no saved loss: expected a folder that ml3_jax.save wrote")
    try:
        _check_fits(record, path)
        blank = [jnp.zeros(leaf["shape"], leaf["dtype"]) for leaf in record["leaves"]]
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            read = checkpointer.restore(folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(_named(blank))))
        leaves = _unpack(read["state"], record, blank)
    except DoesNotFitError:
        raise
    except Exception as error:  # Orbax raises many types for damaged files; a caller needs one
        raise CheckpointError(f"{path} is damaged: {error}; restore another copy") from error
    if learned_loss is None:
        if record["spec"] is None:
            raise ValueError(
                f"{path} holds the parameters of a loss that has no spec: give its functions, restore(path, learned_loss=...)"
            )
        learned_loss = losses.from_spec(record["spec"])
    shapes = None if template is None else [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(template)]
    if template is None:
        if record["structure"] is None:
            raise ValueError(
                f"the parameters in {path} are a pytree with other containers, {record['treedef']}: give one like it, "
                "restore(path, template=...)"
            )
        template = _rebuild(record["structure"])
    difference = _difference(record, template)
    if not difference and shapes is not None and shapes != [leaf.shape for leaf in leaves]:
        difference = f"expected leaves of the shapes {[leaf.shape for leaf in leaves]}, got {shapes}"
    if difference:
        raise ValueError(f"template: {difference}")
    return learned_loss, jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_inside(folder: pathlib.Path) -> None:
    """Checks that no link leads out of the folder: a checkpoint of a stranger must not read other files.

    Raises:
      CheckpointError: one does.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{path} is a link to {path.resolve()}, outside of the folder: copy the file in its place")


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder that ml3_jax.save wrote, found {'a file' if folder.exists() else 'nothing'}"
        )
    _check_inside(folder)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    except Exception as error:  # as above
        raise CheckpointError(f"{folder} is damaged or was not written by ml3_jax.save: {error}") from error
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError(f"{folder} was not written by ml3_jax.save: its record has no format")
    _check_format(record, folder)
    return record


class Checkpoints:
    """The checkpoints of one meta-training, below one folder, newest last; writes are synchronous and atomic."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, *, read_only: bool = False):
        """Opens the folder, and makes it unless read_only; the `keep` newest steps stay.

        Raises:
          CheckpointError: the path is a file.
          ValueError: keep is below 1.
        """
        check_count("keep", keep)
        self._folder = _resolved(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise CheckpointError(f"{folder}: expected a folder, found a file")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,  # Orbax warns of options without effect
            save_interval_steps=0 if read_only else 1,
            enable_async_checkpointing=False,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._damaged: set[int] = set()  # steps that restore_latest could not read

    def steps(self) -> list[int]:
        """The saved steps, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, about: Mapping[str, Any] | None = None) -> None:
        """Writes a state. A saved step is not written again, unless restore_latest found it damaged.

        Raises:
          OSError or ValueError: the disk is full or read-only; older steps stay readable.
          ValueError: step is no whole number of at least 0.
        """
        if step != 0:
            check_count("step", step)
        if step in self._damaged:
            self._manager.delete(step)
            self._damaged.discard(step)
        elif step in self._manager.all_steps():
            return
        if not self._manager.save(step, args=_pack(state, {"about": dict(about or {})}), force=True):
            raise CheckpointError(f"step {step} was not saved in {self._folder}, which has the newer step {self.steps()[-1]}")
        self._manager.wait_until_finished()

    def restore_latest(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest step that agrees with its digest and the template: (step, state, about); None without any step.

        Args:
          template: a concrete state of the same structure, shapes and dtypes.

        Raises:
          CheckpointError: there are steps, but none of them can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                return (step, *self._restore(step, template))
            except Exception as error:  # damaged files raise many types; an older step may still be readable
                self._damaged.add(step)
                failures.append(f"step {step}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        if failures:
            raise CheckpointError(f"no checkpoint in {self._folder} can be read ({'; '.join(failures)})")
        return None

    def _restore(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        _check_inside(self._folder / str(step))
        leaves, treedef = jax.tree.flatten(template)
        leaves = [leaf if _is_key(leaf) else jnp.asarray(leaf) for leaf in leaves]
        record = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        _check_format(record, self._folder / str(step))
        difference = _difference(record, template) or _difference_of_leaves(record, _paths(template), leaves)
        if difference:
            version = record.get("version", VERSION)
            by = "" if version == VERSION else f" by ml3_jax {version}, and this is {VERSION}"
            raise CheckpointError(f"it was saved from a state of another structure{by}: {difference}")
        _check_fits(record, self._folder)
        read = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_named(leaves))))["state"]
        return jax.tree.unflatten(treedef, _unpack(read, record, leaves)), record["about"]

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()
