"""Simulated systems as Brax environments with a goal, built by name. `envs.base.GoalEnv` is their common interface."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from envs import base  # first: it silences the warnings that importing Brax raises
from envs.ant_goal import AntGoal
from envs.base import Env, GoalEnv, Sketch, State
from envs.mountain_car import MountainCar
from envs.point_mass import PointMass
from envs.reacher import Reacher
from envs.reacher_mjx import ReacherMjx

__all__ = ["Env", "GoalEnv", "Sketch", "State", "make", "names"]

# Name -> physics -> class. The first is the default. The others take its options.
_ENVS: dict[str, dict[str, Callable[..., base.GoalEnv]]] = {
    "ant_goal": {"spring": AntGoal},
    "mountain_car": {"closed_form": MountainCar},
    "point_mass": {"closed_form": PointMass},
    "reacher": {"closed_form": Reacher, "mjx": ReacherMjx},
}


def names() -> tuple[str, ...]:
    """Every name that `make` knows."""
    return tuple(sorted(_ENVS))


def make(name: str, *, physics: str | None = None, **options: Any) -> GoalEnv:
    """Builds an environment.

    Args:
      name: one of `names()`.
      physics: "closed_form", "mjx" (reacher) or "spring" (ant). It becomes `backend`. None: the closed form if there is one,
        else the simulator.
      **options: keyword arguments of the environment's class.

    Returns:
      The environment.

    Raises:
      ValueError: an unknown name or physics, or an option out of its range.
      TypeError: an unknown option.
    """
    if name not in _ENVS:
        raise ValueError(_unknown("environment", name, _ENVS))
    classes = _ENVS[name]
    default = next(iter(classes))
    physics = default if physics is None else physics
    if physics not in classes:
        raise ValueError(f"{name}: " + _unknown("physics", physics, classes))
    known = [p for p in inspect.signature(classes[default]).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise TypeError(f"{name}: " + _unknown("option", option, [*known, "physics"]))
    return classes[physics](**options)


def _unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    known = sorted(choices)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {kind} '{name}'{hint} (one of {', '.join(known)})"
