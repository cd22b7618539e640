"""Every valid config of every experiment survives its record, the command line and a resume; every wrong one is refused."""

import dataclasses
import math
import pathlib
import tempfile
import typing
from typing import Any

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import config as config_lib
from launch import experiments
from launch.errors import UsageError
from launch.runs import cli, run_folder

# The same examples on every machine, and no folder of found examples.
SETTINGS = settings(derandomize=True, database=None, deadline=None, max_examples=12)
NAMES = experiments.names()
EACH = pytest.mark.parametrize("name", NAMES)


def valid(config_class: type[config_lib.Config], name: str) -> st.SearchStrategy[Any]:
    """Values that the rules of a field allow."""
    rule = config_lib.rules(config_class, name)
    hint = config_lib._required(typing.get_type_hints(config_class)[name])
    if rule.get("choices"):
        return st.sampled_from(rule["choices"])
    if typing.get_origin(hint) is tuple:
        return st.lists(number(typing.get_args(hint)[0], rule), min_size=1, max_size=3).map(tuple)
    if hint in (int, float):
        return number(hint, rule)
    return st.booleans() if hint is bool else st.text(max_size=5)


def number(kind: type, rule: Any) -> st.SearchStrategy[Any]:
    low, high = rule.get("at_least"), rule.get("at_most")
    if kind is int:
        least = low if low is not None else rule.get("above", None)
        return st.integers(int(least) if least is not None else -50, int(high) if high is not None else 200).filter(
            lambda n: rule.get("above") is None or n > rule["above"]
        )
    exclusive = rule.get("above") is not None
    least = rule["above"] if exclusive else low
    # Text of a float32: other numbers change when they are read back as one.
    return st.floats(
        -1e6 if least is None else least,
        1e6 if high is None else high,
        exclude_min=exclusive,
        allow_nan=False,
        allow_subnormal=False,
    )


def wrong(config_class: type[config_lib.Config], name: str) -> st.SearchStrategy[Any]:
    """Values that no rule of a field allows."""
    rule = config_lib.rules(config_class, name)
    hint = config_lib._required(typing.get_type_hints(config_class)[name])
    if typing.get_origin(hint) is tuple:
        entries = wrong_entry(typing.get_args(hint)[0], rule)
        return st.one_of(entries.map(lambda entry: (entry,)), st.integers())
    return wrong_entry(hint, rule)


def wrong_entry(kind: type, rule: Any) -> st.SearchStrategy[Any]:
    other_types: list[Any] = [st.just(value) for value in (object, {}, b"x")]
    if kind in (int, float):
        found = [*other_types, st.text(), st.booleans(), st.just(math.nan), st.just(math.inf), st.just(10**400)]
        if kind is int:
            found.append(st.floats())
        if rule.get("at_least") is not None:
            found.append(st.integers(-(2**31), math.ceil(rule["at_least"]) - 1))
        if rule.get("above") is not None:
            found.append(st.integers(-(2**31), math.floor(rule["above"])))
        return st.one_of(found)
    if kind is bool:
        return st.one_of(*other_types, st.integers(), st.text())
    numbers = st.one_of(*other_types, st.integers(), st.floats())
    return st.one_of(numbers, st.text().filter(lambda text: text not in rule["choices"])) if rule.get("choices") else numbers


@st.composite
def overrides(draw: st.DrawFn, config_class: type[config_lib.Config]) -> dict[str, Any]:
    """Valid values for some of the fields."""
    chosen = draw(st.lists(st.sampled_from(config_lib.names(config_class)), unique=True, max_size=6))
    return {name: draw(valid(config_class, name)) for name in chosen}


def resolved(config_class: type[config_lib.Config], values: dict[str, Any]) -> Any:
    """The config; None if the values do not fit each other, which a message must say with the name of a field."""
    try:
        return config_lib.resolve(config_class, values)
    except UsageError as error:
        message = str(error)
    assert any(f"config field '{name}'" in message for name in config_lib.names(config_class)), message
    assert "\n" not in message
    return None


@EACH
@SETTINGS
@given(data=st.data())
def test_a_valid_config_survives_its_record_and_resumes_and_one_other_field_is_refused(name: str, data: st.DataObject):
    definition = experiments.find(name)
    config = resolved(definition.config, data.draw(overrides(definition.config)))
    if config is None:
        return
    record = run_folder.make_record(name, 3, config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "run"
        run_folder.claim(folder, record)
        read = run_folder.read_record(folder)
        assert read is not None
        assert read == record
        assert run_folder.check_claimable(folder, record) == record  # the same command resumes
        again = config_lib.resolve(definition.config, {**read.config, "meta_steps": read.meta_steps})
        assert again == config
        field = data.draw(st.sampled_from(sorted(read.config)))
        value = data.draw(valid(definition.config, field).filter(lambda value: value != getattr(config, field)), label=field)
        other = dataclasses.replace(config, **{field: value})
        with pytest.raises(UsageError, match=f"config field '{field}' is .* there, .* here"):
            run_folder.check_claimable(folder, run_folder.make_record(name, 3, other))
        with pytest.raises(UsageError, match="seed is 3 there, 4 here"):
            run_folder.check_claimable(folder, run_folder.make_record(name, 4, config))


@EACH
@SETTINGS
@given(data=st.data())
def test_the_command_line_gives_the_same_config(name: str, data: st.DataObject):
    definition = experiments.find(name)
    values = data.draw(overrides(definition.config))
    argv = ["meta_train", *(f"--config.{field}={value}" for field, value in values.items())]
    parsed = flags.FlagValues()
    cli.define_config(parsed, definition.config(), argv)
    cli._parse(parsed, argv)
    assert cli.config_overrides(parsed) == values
    assert resolved(definition.config, cli.config_overrides(parsed)) == resolved(definition.config, values)


@EACH
@SETTINGS
@given(data=st.data())
def test_a_wrong_value_is_refused_with_the_name_of_its_field(name: str, data: st.DataObject):
    config_class = experiments.find(name).config
    field = data.draw(st.sampled_from(config_lib.names(config_class)))
    value = data.draw(wrong(config_class, field), label=field)
    with pytest.raises(UsageError, match=f"config field '{field}'"):
        config_lib.resolve(config_class, {field: value})
