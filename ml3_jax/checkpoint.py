"""Saving and restoring: a trained loss as one folder (`save`, `restore`), and a meta-training's steps (`Checkpoints`).

Orbax writes the arrays; beside them lies a JSON record of what they are, with a digest, because a flipped bit in the
array data would otherwise be restored as a wrong number without an error. No pickle on any path.
"""

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ml3_jax import losses, sharding
from ml3_jax.types import LearnedLoss, LossParams, PyTree

FORMAT = 1
_LEAF = "leaf"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else."""


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _digest(leaves: list[Any], record: Mapping[str, Any]) -> str:
    """sha256 over the record (its own digest aside) and over dtype, shape and bytes of each leaf; keys by their data."""
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
        **json.loads(json.dumps(dict(about))),  # as it will be read again, tuples as lists: the digest covers it
        "format": FORMAT,
        "structure": _structure(tree),
        "treedef": str(jax.tree.structure(tree)),
        "leaves": [_describe(leaf) for leaf in leaves],
    }
    record["digest"] = _digest(leaves, record)
    named = _named(leaves)
    return ocp.args.Composite(state=ocp.args.StandardSave(named), about=ocp.args.JsonSave(record))


def _named(leaves: list[Any]) -> dict[str, Any]:
    """Leaves by number; those without elements are left out, since Orbax refuses them and their shape says it all."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}


def _unpack(named: Mapping[str, Any], record: Mapping[str, Any], like: list[Any]) -> list[Any]:
    """The leaves, verified; each tied to a device where the one that it is like is."""
    described = enumerate(record["leaves"])
    leaves = [named[f"{i:05d}"] if f"{i:05d}" in named else jnp.zeros(leaf["shape"], leaf["dtype"]) for i, leaf in described]
    if [_describe(leaf) for leaf in leaves] != record["leaves"] or _digest(leaves, record) != record["digest"]:
        raise CheckpointError("it is not what was saved (the digest differs)")
    # Orbax ties what it reads to one device.
    return [leaf if old.committed else sharding.free(leaf) for leaf, old in zip(leaves, like, strict=True)]


def save(
    path: str | os.PathLike[str],
    learned_loss: LearnedLoss,
    loss_params: LossParams,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a learned loss and its parameters to a new folder.

    Args:
      path: a folder that does not exist yet; its parents are made.
      learned_loss: the loss; one with a spec is restored by its name, one's own (spec=None) needs its functions again.
      loss_params: its parameters, nested dictionaries, lists and tuples of arrays, or any other pytree (which `restore`
        then needs as a template).
      metadata: anything JSON, kept beside it.

    Raises:
      FileExistsError: something is there already.
    """
    folder = pathlib.Path(path).resolve()
    if folder.exists():
        raise FileExistsError(f"{path} exists: expected a path where nothing is yet; choose another or move it away")
    if learned_loss.spec is None:
        warnings.warn(
            "this learned loss has no spec, so only its parameters are saved: "
            "restore them with restore(path, learned_loss=...)",
            stacklevel=2,
        )
    spec = None if learned_loss.spec is None else dict(learned_loss.spec)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=_pack(loss_params, {"spec": spec, "metadata": dict(metadata or {})}))


def restore(
    path: str | os.PathLike[str], learned_loss: LearnedLoss | None = None, template: LossParams | None = None
) -> tuple[LearnedLoss, LossParams]:
    """Reads what `save` wrote, ready to use.

    Args:
      path: the folder.
      learned_loss: the functions of a loss that was saved without a spec; None builds the saved spec's.
      template: a pytree like the parameters, for containers other than dictionaries, lists and tuples.

    Returns:
      (learned_loss, loss_params).

    Raises:
      CheckpointError: (a ValueError) nothing is there, it is damaged, or it is not a saved loss.
      ValueError: it was saved without a spec and learned_loss is None, or it needs a template.
    """
    folder = pathlib.Path(path).resolve()
    record = _read_record(folder)
    if "spec" not in record:
        raise CheckpointError(f"{path} is no saved loss: expected a folder that ml3_jax.save wrote")
    try:
        blank = [jnp.zeros(leaf["shape"], leaf["dtype"]) for leaf in record["leaves"]]
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            read = checkpointer.restore(folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(_named(blank))))
        leaves = _unpack(read["state"], record, blank)
    except Exception as error:  # Orbax raises many types for damaged files; all mean the same to a caller
        raise CheckpointError(f"{path} is damaged: {error}; restore another copy") from error
    if learned_loss is None:
        if record["spec"] is None:
            raise ValueError(
                f"{path} holds the parameters of a loss that has no spec: give its functions, restore(path, learned_loss=...)"
            )
        learned_loss = losses.from_spec(record["spec"])
    if template is None:
        if record["structure"] is None:
            raise ValueError(
                f"the parameters in {path} are a pytree of their own kind, {record['treedef']}: give one like it, "
                "restore(path, template=...)"
            )
        template = _rebuild(record["structure"])
    if str(jax.tree.structure(template)) != record["treedef"]:
        raise ValueError(f"template: expected the structure {record['treedef']}, got {jax.tree.structure(template)}")
    return learned_loss, jax.tree.unflatten(jax.tree.structure(template), leaves)


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected a folder that ml3_jax.save wrote, found {'a file' if folder.exists() else 'nothing'}"
        )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    except Exception as error:  # as above
        raise CheckpointError(f"{folder} is damaged or was not written by ml3_jax.save: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{folder} was not written by this version of ml3_jax.save (format {FORMAT})")
    return record


class Checkpoints:
    """The checkpoints of one meta-training, below one folder, newest last; writes are synchronous and atomic."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, *, read_only: bool = False):
        """Opens the folder, and makes it unless read_only; `keep` newest steps stay."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=not read_only, read_only=read_only
        )
        self._folder = pathlib.Path(folder).resolve()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._damaged: set[int] = set()  # steps that restore_latest could not read

    def steps(self) -> list[int]:
        """The steps that are listed, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, about: Mapping[str, Any] | None = None) -> None:
        """Writes a state; a step that is there already is left as it is, unless restore_latest found it damaged.

        Raises:
          OSError or ValueError: the disk is full or read-only; older steps stay readable.
        """
        if step in self._damaged:
            self._manager.delete(step)
            self._damaged.discard(step)
        elif step in self._manager.all_steps():
            return
        if not self._manager.save(step, args=_pack(state, {"about": dict(about or {})}), force=True):
            raise CheckpointError(f"step {step} was not saved in {self._folder}: a newer one, {self.steps()[-1]}, is there")
        self._manager.wait_until_finished()

    def restore_latest(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest step that verifies against its digest and the template: (step, state, about); None without any step.

        Args:
          template: a concrete state of the same structure, shapes and dtypes.

        Raises:
          CheckpointError: steps are listed, but none of them can be read.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                return (step, *self._restore(step, template))
            except Exception as error:  # damaged files raise many types; an older step may still be whole
                self._damaged.add(step)
                failures.append(f"step {step}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        if failures:
            raise CheckpointError(f"no checkpoint in {self._folder} can be read ({'; '.join(failures)})")
        return None

    def _restore(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        leaves, treedef = jax.tree.flatten(template)
        leaves = [leaf if _is_key(leaf) else jnp.asarray(leaf) for leaf in leaves]
        record = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if record["treedef"] != str(treedef) or record["leaves"] != [_describe(leaf) for leaf in leaves]:
            raise CheckpointError("it was saved from a state of another structure")
        read = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_named(leaves))))["state"]
        return jax.tree.unflatten(treedef, _unpack(read, record, leaves)), record["about"]

    def close(self) -> None:
        """Releases what Orbax holds."""
        self._manager.close()
