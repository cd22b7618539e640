"""The registry of experiments, each a module with a `DEFINITION` that is imported when it is asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from launch.errors import UsageError, unknown
from launch.experiments import base, config

MODULES = {
    "sine": "launch.experiments.sine",
    "digits": "launch.experiments.digits",
    "shaped_sine": "launch.experiments.shaped_sine",
    "point_mass_mbrl": "launch.experiments.point_mass_mbrl",
    "reacher_mbrl": "launch.experiments.reacher_mbrl",
    "mountain_car": "launch.experiments.mountain_car",
    "reacher_mfrl": "launch.experiments.reacher_mfrl",
    "reacher_expert": "launch.experiments.reacher_expert",
    "inverse_dynamics": "launch.experiments.inverse_dynamics",
    "ant_mfrl": "launch.experiments.ant_mfrl",
}


def names() -> list[str]:
    """The experiments there are, in the order of the registry."""
    return list(MODULES)


def definition(name: str) -> base.Definition:
    """The definition of an experiment.

    Raises:
      UsageError: nobody knows the name.
    """
    if name not in MODULES:
        raise UsageError(unknown("experiment", name, MODULES))
    return importlib.import_module(MODULES[name]).DEFINITION


def build(name: str, overrides: Mapping[str, Any] | None = None) -> base.Experiment:
    """An experiment as the launches run it.

    Args:
      name: one of `names()`.
      overrides: config fields to set, as `--config.FIELD` does.

    Raises:
      UsageError: an unknown experiment or config field, or a value that the field does not take.
    """
    found = definition(name)
    resolved = base.resolve(found, config.override(found.config_class(), dict(overrides or {})))
    return found.build(resolved)
