"""Configs of experiments: frozen dataclasses whose fields carry their own rules; `Config` has what all of them have.

An experiment subclasses `Config`, gives other defaults and adds fields. A field that is redefined with a bare default
keeps the rules of the field that it replaces; `setting` states new ones.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from launch import optimizers
from launch.errors import UsageError, unknown

C = TypeVar("C", bound="Config")


def setting(
    default: Any,
    *,
    choices: tuple[Any, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> Any:
    """A field of a config with its rules.

    Args:
      default: its default; None where `resolve` derives it from other fields.
      choices: the values that it may take; empty: any.
      above, at_least, at_most: bounds, for numbers and for each entry of a tuple of numbers.
      optional: whether None is a value in its own right, so that `resolve` may leave it.
    """
    rules = {"choices": choices, "above": above, "at_least": at_least, "at_most": at_most, "optional": optional}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True)
class Config:
    """What every experiment has; step sizes are those of the optimiser named beside them."""

    inner_optimizer: str = setting("sgd", choices=optimizers.INNER)
    inner_lr: float | None = setting(None, above=0.0)
    inner_steps: int = setting(1, at_least=1)
    inner_decay_steps: int = setting(0, at_least=0)  # inner steps over which inner_lr decays along a cosine; 0: constant
    unroll: int | None = setting(None, at_least=1)  # inner steps that one meta-gradient spans; None: inner_steps
    meta_optimizer: str = setting("adam", choices=optimizers.META)
    meta_lr: float = setting(1e-3, above=0.0)
    meta_steps: int = setting(1000, at_least=1)  # how far to go; no part of what a resumed run must share
    meta_decay_steps: int = setting(0, at_least=0)  # meta-steps over which meta_lr decays along a cosine; 0: constant
    meta_clip: float = setting(0.0, at_least=0.0)  # largest global norm of the meta-gradient; 0: unlimited
    num_tasks: int = setting(1, at_least=1)  # tasks in one meta-step
    gradient: str = setting("mixed", choices=("mixed", "remat", "reverse"))
    objective: str = setting("last", choices=("last", "mean"))
    log_every: int = setting(10, at_least=1)  # meta-steps between rows of metrics.csv
    save_every: int = setting(100, at_least=1)  # meta-steps between checkpoints, a multiple of log_every


def rules(config_class: type[Config], name: str) -> Mapping[str, Any]:
    """The rules of a field: its own, or those of the field that it replaces."""
    for base in config_class.__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata:
            return field.metadata
    return {}


def names(config_class: type[Config]) -> list[str]:
    """The fields of a config, in order."""
    return [field.name for field in dataclasses.fields(config_class)]


def expected(config_class: type[Config], name: str) -> str:
    """What a field takes, in words, e.g. "a whole number"."""
    return _describe(typing.get_type_hints(config_class)[name])


def mutable_twin(config: Config) -> Any:
    """A dataclass with the same fields and values that can be assigned to: ml_collections sets fields in place."""
    hints = typing.get_type_hints(type(config))
    fields = [(name, hints[name], dataclasses.field(default=getattr(config, name))) for name in names(type(config))]
    return dataclasses.make_dataclass(type(config).__name__, fields)()


def override(config: C, overrides: Mapping[str, Any]) -> C:
    """The config with some fields replaced, each checked against its type and rules.

    Args:
      config: the config to start from.
      overrides: field name to new value.

    Raises:
      UsageError: an unknown field, a value of the wrong type, not finite or against the field's rules.
    """
    known = names(type(config))
    for name in overrides:
        if name not in known:
            raise UsageError(unknown("config field", name, known))
    checked = {name: _checked(type(config), name, value) for name, value in overrides.items()}
    return dataclasses.replace(config, **checked)


def check(config: C) -> C:
    """The resolved config, each field checked alone and against the fields that it must fit.

    Raises:
      UsageError: a field that is still None, breaks its rules or does not fit another.
    """
    values = {name: getattr(config, name) for name in names(type(config))}
    for name, value in values.items():
        if value is None and not rules(type(config), name).get("optional"):
            raise UsageError(f"config field '{name}' has no value: pass --config.{name}=VALUE")
    config = dataclasses.replace(config, **{name: _checked(type(config), name, value) for name, value in values.items()})
    assert config.unroll is not None  # checked above; tells the type checker
    if config.inner_steps % config.unroll:
        raise UsageError(
            f"config field 'unroll' must divide inner_steps = {config.inner_steps}, got {config.unroll}: "
            f"pass one of {', '.join(str(n) for n in _divisors(config.inner_steps))}"
        )
    if config.save_every % config.log_every:
        raise UsageError(
            f"config field 'save_every' must be a multiple of log_every = {config.log_every}, got {config.save_every}: "
            "checkpoints are written where a row of metrics.csv ends"
        )
    refresh_every = values.get("refresh_every")
    if refresh_every and config.log_every % refresh_every:
        raise UsageError(
            f"config field 'log_every' must be a multiple of refresh_every = {refresh_every}, got {config.log_every}: "
            "the context is refreshed where a run of meta-steps starts"
        )
    return config


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _checked(config_class: type[Config], name: str, value: Any) -> Any:
    """The value as the field's type, or a UsageError that names the field."""
    rule = rules(config_class, name)
    value = _typed(name, value, typing.get_type_hints(config_class)[name])
    if value is None:
        return None
    if rule.get("choices") and value not in rule["choices"]:
        shown = ", ".join(str(choice) for choice in rule["choices"])
        if isinstance(value, str):
            raise UsageError(f"config field '{name}': " + unknown("value", value, rule["choices"]))
        raise UsageError(f"config field '{name}' must be one of {shown}, got {value!r}")
    for entry in value if isinstance(value, tuple) else (value,):
        _check_number(name, entry, rule)
    return value


def _check_number(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    bounds = (
        (rule.get("above"), "above", lambda bound: value > bound),
        (rule.get("at_least"), "at least", lambda bound: value >= bound),
        (rule.get("at_most"), "at most", lambda bound: value <= bound),
    )
    if not math.isfinite(value):
        raise UsageError(f"config field '{name}' must be finite, got {value}")
    for bound, words, holds in bounds:
        if bound is not None and not holds(bound):
            raise UsageError(f"config field '{name}' must be {words} {bound:g}, got {value}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the type of the field: an int passes for a float, a list for a tuple, nothing else for another."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(name, value, next(argument for argument in arguments if argument is not type(None)))
    wrong = UsageError(f"config field '{name}' must be {_describe(hint)}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise wrong
        return tuple(_typed(name, entry, arguments[0]) for entry in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise wrong


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _describe(next(argument for argument in typing.get_args(hint) if argument is not type(None)))
    if typing.get_origin(hint) is tuple:
        return f"a list of values, each {_describe(typing.get_args(hint)[0])}"
    return {float: "a number", int: "a whole number", bool: "True or False", str: "text"}[hint]
