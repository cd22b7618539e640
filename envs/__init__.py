"""Simulated systems as Brax environments with a goal, built by name; `envs.base.GoalEnv` says what they share."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from envs.base import Env, GoalEnv, Sketch, State
from envs.mountain_car import MountainCar
from envs.point_mass import PointMass
from envs.reacher import Reacher
from envs.reacher_mjx import ReacherMjx

__all__ = ["Env", "GoalEnv", "Sketch", "State", "make", "names"]

# Name -> physics -> class.
_ENVS: dict[str, dict[str, Callable[..., GoalEnv]]] = {
    "mountain_car": {"closed_form": MountainCar},
    "point_mass": {"closed_form": PointMass},
    "reacher": {"closed_form": Reacher, "mjx": ReacherMjx},
}


def names() -> tuple[str, ...]:
    """Every name that `make` knows."""
    return tuple(sorted(_ENVS))


def make(name: str, *, physics: str = "closed_form", **options: Any) -> GoalEnv:
    """Builds an environment.

    Args:
      name: one of `names()`.
      physics: "closed_form", or a simulator where the environment has one ("mjx" for the reacher); it becomes `backend`.
      **options: of the environment's class.

    Returns:
      The environment.

    Raises:
      ValueError: an unknown name or physics, or an option out of its range.
      TypeError: an unknown option.
    """
    if name not in _ENVS:
        raise ValueError(_unknown("environment", name, _ENVS))
    if physics not in _ENVS[name]:
        raise ValueError(f"{name}: " + _unknown("physics", physics, _ENVS[name]))
    known = [p for p in inspect.signature(_ENVS[name]["closed_form"]).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise TypeError(f"{name}: " + _unknown("option", option, [*known, "physics"]))
    return _ENVS[name][physics](**options)


def _unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    known = sorted(choices)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {kind} '{name}'{hint} (one of {', '.join(known)})"
