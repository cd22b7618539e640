"""Saving and restoring: a trained loss as one folder (`save`, `restore`), and a meta-training's steps (`Checkpoints`).

Orbax writes the arrays. A JSON record beside them has their structure and a digest: without it, a flipped bit in the array
data would be restored as a wrong number without an error. Nothing is pickled.
"""

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ml3_jax import checkpoint_record as records
from ml3_jax import losses
from ml3_jax.arguments import check_count, check_kind
from ml3_jax.checkpoint_record import CheckpointError, DoesNotFitError
from ml3_jax.losses.forms import as_json
from ml3_jax.types import LearnedLoss, LossParams, MetaParams, OptimizerParams, Params, PyTree

_PARTS = "parts"  # in a record: the learned parts, if there is more than a loss


def _pack(tree: PyTree, about: Mapping[str, Any]) -> ocp.args.Composite:
    leaves = [leaf if records.is_key(leaf) else jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if jax.process_count() > 1:  # Orbax takes arrays of all processes or NumPy's, and none of one process
        leaves = [np.asarray(x) if x.is_fully_addressable and not records.is_key(x) else x for x in leaves]
    record = records.make_record(tree, leaves, as_json(dict(about)))  # as it is read again: the digest covers it
    return ocp.args.Composite(state=ocp.args.StandardSave(records.by_number(leaves)), about=ocp.args.JsonSave(record))


def _arrays_like(leaves: list[Any]) -> ocp.args.Composite:
    """What to restore: arrays like these, on their devices."""
    return ocp.args.Composite(state=ocp.args.StandardRestore(records.by_number(leaves)))


def _in_this_process() -> ocp.options.MultiprocessingOptions:
    """Options for Orbax in this process alone: by default it waits for all processes of `jax.distributed` to call it."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )


def _alone() -> ocp.Checkpointer:
    options = _in_this_process()
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options))
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save(
    path: str | os.PathLike[str],
    learned_loss: LearnedLoss | None,
    loss_params: LossParams,
    metadata: Mapping[str, Any] | None = None,
    *,
    init_params: Params = None,
    optimizer_params: OptimizerParams = None,
) -> None:
    """Writes a learned loss and its parameters to a new folder. If it fails, there is no folder.

    A learned initialisation and the parameters of a learned inner optimizer go with them; `restore_parts` reads all.

    Args:
      path: a folder that does not exist yet; its parents are made.
      learned_loss: the loss, None if the plain loss was descended. `restore` finds a loss with a spec by its name; without a
        spec it needs the functions again.
      loss_params: its parameters: nested dictionaries, lists and tuples of arrays, or any other pytree (`restore` then
        needs a template).
      metadata: any JSON, for the record.
      init_params: a learned initialisation.
      optimizer_params: the parameters of a learned inner optimizer.

    Raises:
      FileExistsError: the path exists.
      OSError: it cannot be written.
      TypeError: an argument of another kind, or parameters that are no arrays.
      ValueError: parameters without an array, metadata that are no JSON, a path that cannot be one, or a call in another than
        the first of several processes.
    """
    given = {"loss_params": loss_params, "init_params": init_params, "optimizer_params": optimizer_params}
    others = init_params is not None or optimizer_params is not None
    if learned_loss is not None or not others:
        check_kind("learned_loss", learned_loss, LearnedLoss, "as ml3_jax.losses has them")
    elif loss_params is not None:
        raise ValueError("loss_params: expected None without a learned loss, got parameters: give their learned_loss")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    if learned_loss is not None and not jax.tree.leaves(loss_params):
        raise ValueError("loss_params: expected at least one array, got none")
    folder = _resolved(path)
    if jax.process_index() > 0:
        raise ValueError("save: expected a call in the first process alone, or in a single one; this is another process")
    if folder.exists():
        raise FileExistsError(f"{path} exists: expected a path that does not exist; choose another or move it away")
    if learned_loss is not None and learned_loss.spec is None:
        warnings.warn(
            "this learned loss has no spec, so only its parameters are saved: "
            "restore them with restore(path, learned_loss=...)",
            stacklevel=2,
        )
    spec = None if learned_loss is None or learned_loss.spec is None else dict(learned_loss.spec)
    about: dict[str, Any] = {"spec": spec, "metadata": dict(metadata or {})}
    tree = loss_params
    if others:
        tree = {name: part for name, part in given.items() if part is not None}
        about[_PARTS] = sorted(tree)
    packed = _pack(tree, about)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone() as checkpointer:
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
    learned_loss, params, parts = _read(path, learned_loss, template)
    if learned_loss is None:
        raise ValueError(f"{path} holds {' and '.join(parts)}, and no learned loss: read it with restore_parts")
    return learned_loss, params["loss_params"] if parts else params


def restore_parts(
    path: str | os.PathLike[str], learned_loss: LearnedLoss | None = None, template: MetaParams | None = None
) -> tuple[LearnedLoss | None, MetaParams]:
    """Reads all learned parts that `save` wrote.

    Args:
      path: the folder.
      learned_loss: the functions of a loss saved without a spec; None builds them from the saved spec.
      template: pytrees like the parts, for containers other than dictionaries, lists and tuples.

    Returns:
      (learned_loss, MetaParams); None for a part that was not saved.

    Raises:
      CheckpointError, ValueError: as `restore`.
    """
    like: Any = template
    if template is not None:
        like = {name: part for name, part in vars(template).items() if part is not None}
        like = like["loss_params"] if list(like) == ["loss_params"] else like
    learned_loss, params, parts = _read(path, learned_loss, like)
    found: dict[str, Any] = params if parts else {"loss_params": params}
    return learned_loss, MetaParams(**{"loss_params": None, "init_params": None, "optimizer_params": None, **found})


def _read(
    path: str | os.PathLike[str], learned_loss: LearnedLoss | None, template: PyTree
) -> tuple[LearnedLoss | None, PyTree, list[str]]:
    """What `save` wrote: the loss, the saved pytree, and the names of its parts, empty if it is the parameters of a loss."""
    folder = _resolved(path)
    record = _read_record(folder)
    if "spec" not in record:
        raise CheckpointError(f"{path} is no saved loss: expected a folder that ml3_jax.save wrote")
    try:
        records.check_fits(record, path)
        blank = [jnp.zeros(leaf["shape"], leaf["dtype"]) for leaf in record["leaves"]]
        with _alone() as checkpointer:
            read = checkpointer.restore(folder, args=_arrays_like(blank))
        leaves = records.verified(read["state"], record, blank)
    except DoesNotFitError:
        raise
    except Exception as error:  # Orbax raises many types for damaged files; a caller needs one
        raise CheckpointError(f"{path} is damaged: {error}; restore another copy") from error
    parts = record.get(_PARTS, [])
    if learned_loss is None and (not parts or "loss_params" in parts):
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
        template = records.rebuild(record["structure"])
    difference = records.difference(record, template)
    if not difference and shapes is not None and shapes != [leaf.shape for leaf in leaves]:
        difference = f"expected leaves of the shapes {[leaf.shape for leaf in leaves]}, got {shapes}"
    if difference:
        raise ValueError(f"template: {difference}")
    return learned_loss, jax.tree.unflatten(jax.tree.structure(template), leaves), parts


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
        with _alone() as checkpointer:
            record = checkpointer.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    except Exception as error:  # as above
        raise CheckpointError(f"{folder} is damaged or was not written by ml3_jax.save: {error}") from error
    if not isinstance(record, dict) or "format" not in record:
        raise CheckpointError(f"{folder} was not written by ml3_jax.save: its record has no format")
    records.check_format(record, folder)
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
            multiprocessing_options=_in_this_process() if read_only else ocp.options.MultiprocessingOptions(),
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
        leaves = [leaf if records.is_key(leaf) else jnp.asarray(leaf) for leaf in leaves]
        record = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        records.check_format(record, self._folder / str(step))
        difference = records.difference(record, template) or records.difference_of_leaves(
            record, records.paths_of(template), leaves
        )
        if difference:
            version = record.get("version", records.VERSION)
            by = "" if version == records.VERSION else f" by ml3_jax {version}, and this is {records.VERSION}"
            raise CheckpointError(f"it was saved from a state of another structure{by}: {difference}")
        records.check_fits(record, self._folder)
        read = self._manager.restore(step, args=_arrays_like(leaves))["state"]
        return jax.tree.unflatten(treedef, records.verified(read, record, leaves)), record["about"]

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()
