"""The record of a checkpoint: what its arrays are, how they are structured, and a digest of everything.

`checkpoint` writes it beside the arrays, and compares it when it reads them. Nothing here touches a file.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from importlib import metadata as packages
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml3_jax import aliases, sharding
from ml3_jax.types import PyTree

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


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def paths_of(tree: PyTree) -> list[str]:
    """The path of each leaf, such as ".inner_state.params['w']". Unlike the text of a treedef it holds no addresses."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def difference(record: Mapping[str, Any], tree: PyTree) -> str:
    """How the structure of a template differs from that of the saved tree, in words; empty if it does not."""
    paths, saved = paths_of(tree), record.get("paths")
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


def difference_of_leaves(record: Mapping[str, Any], paths: list[str], leaves: list[Any]) -> str:
    """The first leaf whose dtype or shape differs from the saved one, in words; empty if there is none."""
    for path, there, leaf in zip(paths, record["leaves"], leaves, strict=True):
        here = _describe(leaf)
        if there != here:
            return f"{path} is {there['dtype']} {there['shape']} there, and {here['dtype']} {here['shape']} here"
    return ""


def check_format(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Checks that this version reads the format of a record.

    Raises:
      DoesNotFitError: another format; the message names both versions.
    """
    if record.get("format") != FORMAT:
        raise DoesNotFitError(
            f"{path} was written by ml3_jax {record.get('version', 'of an unknown version')} in format {record.get('format')}, "
            f"and ml3_jax {VERSION} reads format {FORMAT}: read it with the version that wrote it"
        )


def check_fits(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
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


def digest(leaves: list[Any], record: Mapping[str, Any]) -> str:
    """sha256 over the record without its digest, and over dtype, shape and bytes of each leaf (of a key: its data)."""
    said = {name: value for name, value in record.items() if name != "digest"}
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for leaf in leaves:
        data = np.asarray(sharding.local(jax.random.key_data(leaf) if is_key(leaf) else leaf))
        total.update(f"{leaf.dtype}{leaf.shape}".encode())
        total.update(np.ascontiguousarray(data).tobytes())
    return total.hexdigest()


def structure_of(tree: PyTree) -> Any:
    """Nested dictionaries, lists and tuples as JSON, with "leaf" for arrays; None if there is any other container."""
    if isinstance(tree, Mapping) and type(tree) is dict and all(isinstance(k, str) for k in tree):
        children = {k: structure_of(v) for k, v in tree.items()}
        return None if None in children.values() else {"dict": children}
    if type(tree) in (list, tuple):
        children = [structure_of(v) for v in tree]
        return None if None in children else {type(tree).__name__: children}
    return _LEAF if jax.tree.leaves(tree) and jax.tree.structure(tree).num_nodes == 1 else None


def rebuild(structure: Any) -> PyTree:
    """A tree of the recorded structure with a zero at each leaf."""
    if structure == _LEAF:
        return 0
    ((kind, children),) = structure.items()
    if kind == "dict":
        return {k: rebuild(v) for k, v in children.items()}
    parts = [rebuild(v) for v in children]
    return parts if kind == "list" else tuple(parts)


def make_record(tree: PyTree, leaves: list[Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a pytree: `about`, which is JSON, with structure, dtypes, shapes and digest.

    Args:
      tree: the pytree.
      leaves: its leaves as arrays.
      about: further entries.
    """
    record = {
        **about,
        "format": FORMAT,
        "version": VERSION,
        "structure": structure_of(tree),
        "paths": paths_of(tree),
        "treedef": _ADDRESS.sub("", str(jax.tree.structure(tree))),  # for people
        "leaves": [_describe(leaf) for leaf in leaves],
    }
    return {**record, "digest": digest(leaves, record)}


def by_number(leaves: list[Any]) -> dict[str, Any]:
    """Leaves by number, without empty leaves: Orbax refuses them, and the record has their shapes."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}


def verified(named: Mapping[str, Any], record: Mapping[str, Any], like: list[Any]) -> list[Any]:
    """The leaves that were read, each committed to a device if the leaf of the template is.

    Args:
      named: of `by_number`.
      record: the record beside them.
      like: the leaves of the template.

    Raises:
      CheckpointError: they do not agree with the record.
    """
    described = enumerate(record["leaves"])
    leaves = [named[f"{i:05d}"] if f"{i:05d}" in named else jnp.zeros(leaf["shape"], leaf["dtype"]) for i, leaf in described]
    if difference_of_leaves(record, [""] * len(leaves), leaves) or digest(leaves, record) != record["digest"]:
        raise CheckpointError("the data changed after they were saved (the digest differs)")
    # Orbax commits every leaf to one device.
    return [leaf if old.committed else sharding.uncommit(leaf) for leaf, old in zip(leaves, like, strict=True)]
