"""Old keyword arguments of public functions: they are accepted with a DeprecationWarning until ml3_jax 0.3."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def accept_old(*, renamed: dict[str, str] | None = None, **groups: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a function also takes the keywords that it had before 0.3.

    Args:
      renamed: {old keyword: new keyword}.
      **groups: parameter=dataclass. Keywords with the names of the dataclass's fields make its instance.

    Raises:
      TypeError: from the function, if an old keyword and its replacement are given at once.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            keywords: dict[str, Any] = dict(given)
            advice = []
            for old, new in (renamed or {}).items():
                if old in keywords:
                    _refuse_both(old, new, keywords)
                    keywords[new] = keywords.pop(old)
                    advice.append(f"{old}= is now {new}=")
            for parameter, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group) if field.name in keywords]
                if fields:
                    _refuse_both(fields[0], parameter, keywords)
                    keywords[parameter] = group(**{name: keywords.pop(name) for name in fields})
                    advice.append(f"{', '.join(fields)} are now fields of {parameter}={group.__name__}(...)")
            if advice:
                warnings.warn(f"{function.__name__}: {'; '.join(advice)} (until 0.3)", DeprecationWarning, stacklevel=2)
            return function(*args, **keywords)

        return call

    return decorate


def _refuse_both(old: str, new: str, keywords: dict[str, Any]) -> None:
    if new in keywords:
        raise TypeError(f"expected {old}= or {new}=, got both: give {new}= alone")
