"""The registry of experiments: it finds every module below this package that assigns a `DEFINITION`.

It reads names from the source, so that only the requested module is imported.
"""

import ast
import functools
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from launch import config
from launch.errors import UsageError, unknown
from launch.experiment import Definition, Experiment

FOLDER = pathlib.Path(__file__).parent
FAMILIES = ("supervised", "model_based", "model_free", "inverse_dynamics")  # the first folders of --list


def names() -> list[str]:
    """The names of all experiments, by family, then in alphabetical order."""
    return list(modules())


def find(name: str) -> Definition:
    """The definition of an experiment.

    Raises:
      UsageError: the name is unknown.
    """
    known = modules()
    if name not in known:
        raise UsageError(unknown("experiment", name, known))
    return importlib.import_module(known[name]).DEFINITION


def build(name: str, overrides: Mapping[str, Any] | None = None, **options: Any) -> Experiment:
    """An experiment, as the entry points run it.

    Args:
      name: one of `names()`.
      overrides: {config field: value}, as `--config.FIELD` sets them.
      **options: further arguments of `ml3_jax.make_meta_learner`.

    Raises:
      UsageError: an unknown experiment or config field, or an invalid value.
    """
    definition = find(name)
    return definition.build(config.resolve(definition.config, dict(overrides or {})), **options)


def modules() -> dict[str, str]:
    """{name of an experiment: its module}."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.rglob("*.py"), key=_order):
        name = _defined_name(path, path.stat().st_mtime_ns)
        if name is None:
            continue
        module = ".".join([__name__, *path.relative_to(FOLDER).with_suffix("").parts])
        if name in found:
            raise UsageError(f"two modules define the experiment '{name}': {found[name]} and {module}; rename one of them")
        found[name] = module
    return found


def _order(path: pathlib.Path) -> tuple[int, str]:
    family = path.relative_to(FOLDER).parts[0]
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), str(path))


@functools.lru_cache
def _defined_name(path: pathlib.Path, changed: int) -> str | None:
    """The name in the call that a module assigns to DEFINITION, or None.

    Raises:
      UsageError: the module is no valid Python, or the name is no text.
    """
    del changed  # part of the cache key
    try:
        body = ast.parse(path.read_text(encoding="utf-8"), str(path)).body
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}: correct the file, or move it away") from error
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if not any(isinstance(target, ast.Name) and target.id == "DEFINITION" for target in targets):
            continue
        call = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        given = (
            [*call.args[:1], *(word.value for word in call.keywords if word.arg == "name")]
            if isinstance(call, ast.Call)
            else []
        )
        if not (given and isinstance(given[0], ast.Constant) and isinstance(given[0].value, str)):
            raise UsageError(
                f'{path}, line {node.lineno}: expected DEFINITION = Definition("NAME", ...) with the name as text, as --list '
                f"reads it without importing the module; got {ast.unparse(node)[:60]}"
            )
        return given[0].value
    return None
