"""Configs: values that a field takes, fields that depend on others, and messages about misuse."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from launch import config as config_lib
from launch import experiments
from launch.errors import UsageError, unknown
from tests.launch import line

MISUSES = [
    ({"inner_lrr": 1.0}, "unknown config field 'inner_lrr'; did you mean 'inner_lr'?"),
    ({"inner_lr": -1.0}, "'inner_lr' must be above 0, got -1.0"),
    ({"inner_lr": float("nan")}, "'inner_lr' must be finite (in float32), got nan"),
    ({"inner_lr": float("inf")}, "'inner_lr' must be finite (in float32), got inf"),
    ({"inner_lr": "fast"}, "'inner_lr' must be a number, got 'fast'"),
    ({"inner_lr": True}, "'inner_lr' must be a number, got True"),
    ({"num_tasks": 2.0}, "'num_tasks' must be a whole number, got 2.0"),
    ({"num_tasks": 0}, "'num_tasks' must be at least 1, got 0"),
    ({"num_tasks": None}, "'num_tasks' must be a whole number, got None"),
    ({"outliers": 1.5}, "'outliers' must be at most 1, got 1.5"),
    ({"extra": 1}, "'extra' must be True or False, got 1"),
    ({"hidden": 8}, "'hidden' must be a list of values, each a whole number, got 8"),
    ({"hidden": [8, 0]}, "'hidden' must be at least 1, got 0"),
    ({"gradient": "mix"}, "'gradient': unknown value 'mix'; did you mean 'mixed'?"),
    ({"inner_steps": 4, "unroll": 3}, "'unroll' must divide inner_steps = 4, got 3: pass one of 1, 2, 4"),
    ({"log_every": 4}, "'save_every' must be a multiple of log_every = 4, got 10"),
]


@pytest.mark.parametrize(("overrides", "message"), MISUSES)
def test_a_wrong_value_is_refused_with_what_was_expected(overrides, message):
    with pytest.raises(UsageError) as caught:
        experiments.build("line", overrides)
    assert message in str(caught.value)


def test_an_experiment_is_built_from_overrides_and_dependent_defaults():
    built = experiments.build("line", {"inner_optimizer": "adam", "hidden": [4, 4]})
    assert (built.config.inner_lr, built.config.unroll, built.config.hidden) == (0.05, 4, (4, 4))
    assert experiments.build("line").config.inner_lr == 0.1
    assert "[4, 4]" in json.dumps(built.learned_loss.spec)


def test_unknown_experiments_are_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError,
        match="unknown experiment 'lime'; did you mean 'line'\\? \\(one of ant_mfrl, digits, few_shot_sine, inverse_dynamics, ",
    ):
        experiments.build("lime")
    assert unknown("flag", "zzz", ["a", "b"]) == "unknown flag 'zzz'; (one of a, b)"


def test_a_redefined_default_keeps_the_rules_of_the_field_it_replaces():
    @dataclasses.dataclass(frozen=True)
    class Mine(config_lib.Config):
        num_tasks: int = 7
        meta_lr: float = config_lib.field(0.5, at_most=1.0)

    with pytest.raises(UsageError, match="at least 1"):
        config_lib.override(Mine(), {"num_tasks": 0})
    assert config_lib.override(Mine(), {"meta_lr": -1}).meta_lr == -1.0  # rules that are stated replace the old ones
    with pytest.raises(UsageError, match="at most 1"):
        config_lib.override(Mine(), {"meta_lr": 2})


def test_a_field_without_a_value_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Open(config_lib.Config):
        size: int | None = config_lib.field(None, at_least=1)

    with pytest.raises(UsageError, match=r"'size' has no value: pass --config\.size=VALUE"):
        config_lib.resolve(Open, {})
    assert config_lib.resolve(Open, {"size": 2}).size == 2


def test_given_values_win_over_the_preset_and_the_preset_over_defaults():
    @dataclasses.dataclass(frozen=True)
    class Sized(config_lib.Config):
        PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {"inner_steps": 6, "unroll": 2, "meta_lr": 0.5}}
        protocol: str = config_lib.field("default", choices=("default", "published"))
        meta_lr: float = 0.25

    default, published = config_lib.resolve(Sized, {}), config_lib.resolve(Sized, {"protocol": "published"})
    assert (default.meta_lr, default.inner_steps, default.unroll) == (0.25, 1, 1)
    assert (published.meta_lr, published.inner_steps, published.unroll) == (0.5, 6, 2)
    # A given default still wins over the preset.
    assert config_lib.resolve(Sized, {"protocol": "published", "meta_lr": 0.25}).meta_lr == 0.25
    # Another number of inner steps makes a preset's unroll void.
    assert config_lib.resolve(Sized, {"protocol": "published", "inner_steps": 7}).unroll == 7
    assert config_lib.resolve(Sized, {"protocol": "published", "inner_steps": 8, "unroll": 4}).unroll == 4


def test_runs_end_where_the_context_is_refreshed():
    @dataclasses.dataclass(frozen=True)
    class Refreshed(line.LineConfig):
        refresh_every: int = 3

    with pytest.raises(UsageError, match="'log_every' must be a multiple of refresh_every = 3"):
        config_lib.resolve(Refreshed, {})
    assert config_lib.resolve(Refreshed, {"log_every": 6, "save_every": 12}).unroll == 4


def test_an_unroll_of_a_preset_holds_for_the_inner_steps_of_the_preset():
    @dataclasses.dataclass(frozen=True)
    class Unrolled(config_lib.Config):
        PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {"unroll": 2}}
        inner_steps: int = 6

    assert config_lib.resolve(Unrolled, {}).unroll == 2
    assert config_lib.resolve(Unrolled, {"inner_steps": 6}).unroll == 2
    assert config_lib.resolve(Unrolled, {"inner_steps": 4}).unroll == 4


def test_old_names_of_fields_and_values_are_translated_with_a_warning():
    @dataclasses.dataclass(frozen=True)
    class Renamed(config_lib.Config):
        reuse_rollouts: bool = config_lib.field(False)
        loss: str = config_lib.field("mlp", choices=("mlp", "affine_split_rmse"))

    with pytest.warns(DeprecationWarning, match="config field 'share_samples' is called 'reuse_rollouts' since 0.2"):
        assert config_lib.resolve(Renamed, {"share_samples": True}).reuse_rollouts
    with pytest.warns(DeprecationWarning, match="loss='split_error' is called 'affine_split_rmse' since 0.2"):
        assert config_lib.resolve(Renamed, {"loss": "split_error"}).loss == "affine_split_rmse"
    with pytest.raises(UsageError, match="expected field 'share_samples' or 'reuse_rollouts', got both"):
        config_lib.resolve(Renamed, {"share_samples": True, "reuse_rollouts": True})
