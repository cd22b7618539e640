"""Misuse of the launches: what is raised for it, and how it is worded; `launch.cli` makes it one line and exit code 2."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """What the caller asked for cannot be done; the message says what was expected, what came and what to do."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Words the error about a name that nobody knows, with the nearest known one.

    Args:
      kind: what the name was meant to name, e.g. "experiment".
      name: what came.
      choices: every name that is known.

    Returns:
      For example "unknown experiment 'sin'; did you mean 'sine'? (one of digits, shaped_sine, sine)".
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {kind} '{name}'{hint} (one of {', '.join(known)})"
