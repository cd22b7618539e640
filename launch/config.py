"""Configs of experiments: frozen dataclasses with rules for their fields. `Config` has the common fields.

An experiment subclasses `Config`, changes defaults and adds fields. A field redefined with a bare default keeps the rules of
the replaced field; `field` states new rules. `resolve` merges defaults, the preset and the values from the user.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

from launch import optimizers
from launch.errors import UsageError, unknown
from launch.runtime import precision
from ml3_jax import aliases
from ml3_jax.types import GRADIENT_MODES

C = TypeVar("C", bound="Config")
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32
_BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def field(
    default: Any,
    *,
    choices: tuple[Any, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> Any:
    """A config field with its rules: allowed values, or bounds of a number or of each entry of a tuple.

    A default of None is replaced by `Config.derived`, unless the field is `optional`.
    """
    rules = {"choices": choices, "above": above, "at_least": at_least, "at_most": at_most, "optional": optional}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of every experiment.

    `PRESETS` maps the name of a preset to values that replace the defaults of the class. Values from the user replace both.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    inner_optimizer: str = field("sgd", choices=optimizers.INNER)
    inner_lr: float = field(0.1, above=0.0)
    inner_steps: int = field(1, at_least=1)
    inner_decay_steps: int = field(0, at_least=0)  # inner steps over which inner_lr decays along a cosine; 0: constant
    unroll: int | None = field(None, at_least=1)  # inner steps in one meta-gradient; None: inner_steps
    meta_optimizer: str = field("adam", choices=optimizers.META)
    meta_lr: float = field(1e-3, above=0.0)
    meta_steps: int = field(1000, at_least=1)  # the last meta-step; a resumed run may change it
    meta_decay_steps: int = field(0, at_least=0)  # meta-steps over which meta_lr decays along a cosine; 0: constant
    meta_clip: float = field(0.0, at_least=0.0)  # largest global norm of the meta-gradient; 0: unlimited
    num_tasks: int = field(1, at_least=1)  # tasks in one meta-step
    gradient: str = field("mixed", choices=GRADIENT_MODES)
    objective: str = field("last", choices=("last", "mean"))
    log_every: int | None = field(10, at_least=1)  # meta-steps between rows of metrics.csv
    save_every: int | None = field(100, at_least=1)  # meta-steps between checkpoints, a multiple of log_every
    max_skipped: int = field(100, at_least=1)  # updates in a row that may be skipped because they are not finite
    precision: str = field(precision.DEFAULT, choices=precision.NAMES)  # of float32 matrix products
    compute_dtype: str = field("float32", choices=("float32", "bfloat16"))  # of the learned loss inside the inner loop

    def preset(self) -> str:
        """The name of the preset: the value of the field `protocol`, if there is one."""
        return getattr(self, "protocol", "default")

    def derived(self) -> dict[str, Any]:
        """Values for the fields that are still None after the preset."""
        return {"unroll": self.inner_steps}

    def check(self) -> None:
        """Checks fields against each other.

        Raises:
          UsageError: a field does not fit another one.
        """
        assert self.unroll is not None
        assert self.log_every is not None
        assert self.save_every is not None
        divisors = [str(n) for n in range(1, self.inner_steps + 1) if self.inner_steps % n == 0]
        if self.inner_steps % self.unroll:
            self._reject("unroll", f"divide inner_steps = {self.inner_steps}", f"pass one of {', '.join(divisors)}")
        if self.save_every % self.log_every:
            reason = "checkpoints are written where a row of metrics.csv ends"
            self._reject("save_every", f"be a multiple of log_every = {self.log_every}", reason)
        refresh_every = getattr(self, "refresh_every", None)
        if refresh_every and self.log_every % refresh_every:
            reason = "the context is refreshed where a block of meta-steps starts"
            self._reject("log_every", f"be a multiple of refresh_every = {refresh_every}", reason)

    def _reject(self, name: str, rule: str, reason: str) -> NoReturn:
        raise UsageError(f"config field '{name}' must {rule}, got {getattr(self, name)}: {reason}")


def rules(config_class: type[Config], name: str) -> Mapping[str, Any]:
    """The rules of a field, or else of the field that it replaces."""
    for base in config_class.__mro__:
        found = getattr(base, "__dataclass_fields__", {}).get(name)
        if found is not None and found.metadata:
            return found.metadata
    return {}


def names(config_class: type[Config]) -> list[str]:
    """The names of a config's fields, in order."""
    return [found.name for found in dataclasses.fields(config_class)]


def expected(config_class: type[Config], name: str) -> str:
    """The type of a field in words, e.g. "a whole number"."""
    return _describe(typing.get_type_hints(config_class)[name])


def mutable_twin(config: Config) -> Any:
    """A mutable dataclass with the same fields and values, for ml_collections, which sets fields in place."""
    hints = typing.get_type_hints(type(config))
    fields = [(name, hints[name], dataclasses.field(default=getattr(config, name))) for name in names(type(config))]
    return dataclasses.make_dataclass(type(config).__name__, fields)()


def override(config: C, overrides: Mapping[str, Any]) -> C:
    """The config with the fields of `overrides` replaced.

    Raises:
      UsageError: an unknown field, or a value of the wrong type, not finite or against the rules of the field.
    """
    known = names(type(config))
    for name in overrides:
        if name not in known:
            raise UsageError(unknown("config field", name, known))
    return dataclasses.replace(config, **{name: _checked(type(config), name, value) for name, value in overrides.items()})


def resolve(config_class: type[C], overrides: Mapping[str, Any]) -> C:
    """The complete config: defaults of the class, then the preset, then `overrides`, then derived fields.

    If inner_steps in `overrides` differs from the preset, the unroll of the preset does not apply. Old names of fields and
    values are translated (`ml3_jax.aliases`), with a DeprecationWarning.

    Raises:
      UsageError: an unknown field, a value against its rules, or fields that do not fit each other.
    """
    try:
        overrides = aliases.current_config(overrides)
    except ValueError as error:
        raise UsageError(str(error)) from error
    given = override(config_class(), overrides)
    values = config_class.PRESETS.get(given.preset(), {})
    preset = override(config_class(), values)
    config = override(preset, overrides)
    if "unroll" in values and "unroll" not in overrides and config.inner_steps != preset.inner_steps:
        config = dataclasses.replace(config, unroll=None)
    derived = {name: value for name, value in config.derived().items() if getattr(config, name) is None}
    config = override(config, derived)
    for name in names(config_class):
        if getattr(config, name) is None and not rules(config_class, name).get("optional"):
            raise UsageError(f"config field '{name}' has no value: pass --config.{name}=VALUE")
    # This checks defaults too.
    config = override(config, {name: getattr(config, name) for name in names(config_class)})
    config.check()
    return config


def _checked(config_class: type[Config], name: str, value: Any) -> Any:
    """The value in the type of the field, checked against its rules."""
    rule = rules(config_class, name)
    value = _typed(name, value, typing.get_type_hints(config_class)[name])
    if value is None:
        return None
    if rule.get("choices") and value not in rule["choices"]:
        raise UsageError(f"config field '{name}': " + unknown("value", str(value), map(str, rule["choices"])))
    for entry in value if isinstance(value, tuple) else (value,):
        _check_number(name, entry, rule)
    return value


def _check_number(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int) and abs(value) > LARGEST_INT:  # JAX counts in 32 bits
        raise UsageError(f"config field '{name}' must be at most {LARGEST_INT}, got {value}")
    if not abs(value) <= LARGEST_FLOAT:
        raise UsageError(f"config field '{name}' must be finite (in float32), got {value}")
    for bound, holds in _BOUNDS.items():
        if rule.get(bound) is not None and not holds(value, rule[bound]):
            raise UsageError(f"config field '{name}' must be {bound.replace('_', ' ')} {rule[bound]:g}, got {value}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value in the type of the field. An int is converted to a float and a list to a tuple; other types must match."""
    required = _required(hint)
    if required is not hint:
        return None if value is None else _typed(name, value, required)
    wrong = UsageError(f"config field '{name}' must be {_describe(hint)}, got {value!r}")
    if typing.get_origin(hint) is tuple and isinstance(value, tuple | list):
        return tuple(_typed(name, entry, typing.get_args(hint)[0]) for entry in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) > LARGEST_FLOAT:  # beyond what float() takes
            return math.inf if value > 0 else -math.inf
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise wrong


def _required(hint: Any) -> Any:
    """T for the type hint T | None; any other hint unchanged."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(argument for argument in typing.get_args(hint) if argument is not type(None))
    return hint


def _describe(hint: Any) -> str:
    hint = _required(hint)
    if typing.get_origin(hint) is tuple:
        return f"a list of values, each {_describe(typing.get_args(hint)[0])}"
    return {float: "a number", int: "a whole number", bool: "True or False", str: "text"}[hint]
