"""The old names of everything renamed in 0.2: one table for each kind of name, and functions that read the tables.

Modules, classes and functions accept an old name with a DeprecationWarning until 0.3. Saved losses, checkpoints and configs
with old names load without a warning. This module imports nothing of `ml3_jax`.
"""

import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

LOSS_NAMES = {"split_error": "affine_split_rmse", "gained_cross_entropy": "learned_gain_cross_entropy"}

# {module: {old name: new name, as a path from the module}}
MODULE_NAMES = {
    "ml3_jax": {
        "Lives": "InnerState",
        "model_based": "problems.model_based",
        "model_learning": "problems.model_learning",
        "supervised": "problems.supervised",
    },
    "ml3_jax.types": {"Lives": "InnerState"},
    "ml3_jax.losses": LOSS_NAMES,
    "ml3_jax.sharding": {"WHOLE": "REPLICATED", "free": "uncommit", "spread": "shard", "whole": "replicate"},
}

# {function or class: {old keyword or field: new one}}
ARGUMENTS = {
    "make_meta_learner": {"spread_ages": "staggered_resets"},
    "Problem": {"collected_loss": "reused_rollout_loss"},
    "MetaState": {"lives": "inner_state"},
    "supervised.make_problem": {"horizon": "inner_steps"},
    "inverse_dynamics.make_problem": {"steps": "inner_steps"},
    "model_free.make_problem": {
        "share_samples": "reuse_rollouts",
        "rest_baseline": "rest_return_baseline",
        "scaled_task_loss": "scaled",
    },
    "make_ensemble": {"fit_steps": "steps"},
}

# {old class: new class}, as the record of a checkpoint names the nodes of its pytree. The order of fields is the same.
CLASSES = {"Lives": "InnerState"}

# Config fields of saved runs, and the values of the new fields.
CONFIG_FIELDS = {"share_samples": "reuse_rollouts", "rest_baseline": "rest_return_baseline"}
CONFIG_VALUES: dict[str, dict[str, str]] = {"loss": LOSS_NAMES}


def module_getattr(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module with old names in `MODULE_NAMES`."""

    def lookup(name: str) -> Any:
        new = MODULE_NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{new}")
        return functools.reduce(getattr, new.split("."), sys.modules[module])

    return lookup


def accept_old_keywords(owner: str, **groups: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: the function also takes the keywords of version 0.1.

    Args:
      owner: its row in `ARGUMENTS`.
      **groups: parameter=dataclass. Keywords with the names of the dataclass's fields make its instance.

    Raises:
      TypeError: from the function, if an old keyword and its replacement are both given.
    """
    renamed = ARGUMENTS.get(owner, {})

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            keywords: dict[str, Any] = dict(given)
            for old in renamed.keys() & keywords.keys():
                _refuse_both(owner, old, renamed[old], keywords)
                _warn(f"{owner}({old}=)", f"{renamed[old]}=")
                keywords[renamed[old]] = keywords.pop(old)
            for parameter, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group) if field.name in keywords]
                if fields:
                    _refuse_both(owner, fields[0], parameter, keywords)
                    _warn(f"{owner}({'=, '.join(fields)}=)", f"{parameter}={group.__name__}(...)")
                    keywords[parameter] = group(**{name: keywords.pop(name) for name in fields})
            return function(*args, **keywords)

        return call

    return decorate


def _refuse_both(owner: str, old: str, new: str, given: dict[str, Any]) -> None:
    if new in given:
        raise TypeError(f"{owner}: expected {old}= or {new}=, got both: give {new}= alone")


def accept_old_fields(cls: C) -> C:
    """Class decorator: the constructor, replacement and attributes of a NamedTuple or PyTreeNode accept old field names."""
    owner = cls.__name__
    accept = accept_old_keywords(owner)
    constructor, replace = ("__new__", "_replace") if issubclass(cls, tuple) else ("__init__", "replace")
    accepting = accept(getattr(cls, constructor))
    setattr(cls, constructor, staticmethod(accepting) if constructor == "__new__" else accepting)
    setattr(cls, replace, accept(getattr(cls, replace)))
    for old, new in ARGUMENTS[owner].items():
        setattr(cls, old, property(functools.partial(_old_field, owner=owner, old=old, new=new)))
    return cls


def current_config(config: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """A config {field: value} with the current names of fields and values.

    Args:
      config: with current or old names.
      warn: whether an old name gives a DeprecationWarning; a saved config is read without.

    Raises:
      ValueError: a field stands under both names.
    """
    current: dict[str, Any] = {}
    for old, value in config.items():
        name = CONFIG_FIELDS.get(old, old)
        if name in current or (name != old and name in config):
            raise ValueError(f"config: expected field '{old}' or '{name}', got both: give '{name}' alone")
        # A value that is no text, such as a list, has no old name and no hash.
        new = CONFIG_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        if warn and name != old:
            _warn(f"config field '{old}'", f"'{name}'")
        if warn and new is not value:
            _warn(f"{name}='{value}'", f"'{new}'")
        current[name] = new
    return current


def current_loss_name(name: Any) -> Any:
    """The registered name of a learned loss that was saved under an old one."""
    return LOSS_NAMES.get(name, name) if isinstance(name, str) else name


def current_treedef(text: str) -> str:
    """The string of a tree structure that 0.1 wrote, with the current names of its classes and fields added since."""
    text = re.sub(r"(?<=CustomNode\()\w+", lambda found: CLASSES.get(found[0], found[0]), text)
    added = ", None, None" if text.startswith("PyTreeDef(CustomNode(MetaState[") else ""  # nothing learned beside the loss
    return f"{text[: -len(']))')]}{added}]))" if added else text


def _old_field(instance: Any, *, owner: str, old: str, new: str) -> Any:
    _warn(f"{owner}.{old}", f"{owner}.{new}")
    return getattr(instance, new)


def _warn(old: str, new: str) -> None:
    """Warns at the caller's caller."""
    warnings.warn(f"{old} is called {new} since 0.2; the old name goes with 0.3", DeprecationWarning, stacklevel=3)
