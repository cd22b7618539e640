"""Misuse of the entry points: `UsageError`, and the words of its messages. `launch.runs.cli` prints it as one line."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UsageError(ValueError):
    """A request that cannot be met. The message names the expectation, the value that came, and the remedy."""


class TrainingError(Exception):
    """A meta-training that cannot go on. The message says why, and what is saved."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The message about an unknown name, with the nearest known one.

    For example "unknown experiment 'sin'; did you mean 'sine'? (one of digits, shaped_sine, sine)".
    """
    known = sorted(choices)
    lower = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean '{lower[close[0]]}'?" if close else ";"
    return f"unknown {kind} '{name}'{hint} (one of {', '.join(known)})"


@contextlib.contextmanager
def rejected_config(experiment: str, action: str) -> Iterator[None]:
    """Reports an error of the library about a problem or an optimizer as a UsageError about the experiment's config.

    `action` is "built", "trained" or "tested".
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, FloatingPointError) as error:
        raise UsageError(f"experiment '{experiment}' cannot be {action} with this config: {error}") from error
