"""Writes every table of README and docs from the data in benchmarks/results.

    python -m benchmarks.tables [--check]

A table lies between two comments, <!-- table NAME --> and <!-- end of table -->. The program replaces what is between them.
With --check it writes nothing, and fails if a file differs.
"""

import argparse
import functools
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import scale_tables, speed_tables
from benchmarks.lines import FURTHER, GAIN, PAGES, SUMMARY, Line
from benchmarks.speed_tables import table

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# {column: the curve in the data}
CURVES = {
    "learned": "learned",
    "SGD": "plain_tuned_sgd",
    "Adam": "plain_tuned_adam",
    "pretrained": "pretrained_tuned",
    "MAML": "maml",
    "policy with memory": "context_policy",
    "same step size": "plain_same_lr",
    "untrained": "untrained",
    "PPO": "ppo",
}
COMPARED = (
    "learned",
    "SGD",
    "Adam",
    "pretrained",
    "MAML",
    "policy with memory",
)  # the columns in which the best value of a line is bold
OLDER_DRAW = 4711  # of rows that do not record theirs
_NONE = "-"


@functools.cache
def _row(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"seeds_{name}.json").read_text())


def by_seed(line: Line, curve: str) -> np.ndarray | None:
    """[S] the number of a line for each seed of a curve: a mean over tasks, or a share in %. None if it was not measured.

    Infinity stands for a number that was not reached, NaN for tasks of which all diverged.
    """
    part = _row(line.row)["scenarios"][line.scenario]
    if line.metric == GAIN:
        reached = [seed.get(curve, math.nan) for seed in part["env_steps_to_gain"]]
        return None if any(isinstance(n, float) for n in reached) else np.array([math.inf if n is None else n for n in reached])
    if curve == "ppo":
        return _end_of_ppo(line)
    values = part["curves"][line.metric].get(curve)
    if values is None:
        return None
    after = np.array(values, dtype=float)[:, :, part["steps"].index(line.step)]
    if line.within is not None:
        return 100.0 * np.nan_to_num(after <= line.within).mean(axis=1)
    return np.nanmean(after, axis=1)


def steps(line: Line) -> list[int]:
    """The steps that the row of a line reports."""
    return list(_row(line.row)["scenarios"][line.scenario]["steps"])


def _end_of_ppo(line: Line) -> np.ndarray | None:
    """[1] PPO's mean at the end of its curves; it stands beside the last reported step of a row."""
    part = _row(line.row)["scenarios"][line.scenario]
    ppo = part.get("ppo")
    if ppo is None or line.metric not in ppo["values"] or line.step != part["steps"][-1]:
        return None
    return np.array(ppo["values"][line.metric], dtype=float)[:, -1].mean(keepdims=True)


def diverged(line: Line, curve: str) -> float:
    """The share of tasks that diverged."""
    part = _row(line.row)["scenarios"][line.scenario]
    if line.metric == GAIN or line.within is not None or curve not in part["curves"][line.metric]:
        return 0.0
    after = np.array(part["curves"][line.metric][curve], dtype=float)[:, :, part["steps"].index(line.step)]
    return float(np.isnan(after).mean())


def mean(line: Line, column: str) -> float | None:
    """The number in a column: the mean over seeds."""
    values = by_seed(line, CURVES[column])
    return None if values is None else float(values.mean())


def _shown(line: Line, value: float | None) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return _NONE
    if line.within is not None:
        return f"{value:.0f}"
    return f"{value:,.0f}" if line.metric == GAIN or abs(value) >= 1000 else f"{value:.3g}"


def _is_higher_better(line: Line) -> bool:
    return line.higher or line.within is not None


def _cells(line: Line, columns: Sequence[str]) -> list[str]:
    """The cells of a line; the best of `COMPARED` is bold, and shares of diverged tasks stand in brackets."""
    found = {column: mean(line, column) for column in columns}
    known = [value for column in COMPARED if (value := found.get(column)) is not None]
    best = (max if _is_higher_better(line) else min)(known) if known else None
    cells = []
    for column in columns:
        text = _shown(line, found[column])
        if column in COMPARED and found[column] is not None and _shown(line, found[column]) == _shown(line, best):
            text = f"**{text}**"
        lost = diverged(line, CURVES[column])
        cells.append(f"{text} ({lost:.0%} diverged)" if lost else text)
    return cells


def _worst(line: Line) -> str:
    values = by_seed(line, "learned")
    if values is None:
        return ""
    return _shown(line, float(values.min() if _is_higher_better(line) else values.max()))


def _arrow(line: Line) -> str:
    return "↑" if _is_higher_better(line) else "↓"


def summary() -> str:
    """The table of all experiments."""
    rows, before = [["experiment", "metric", *COMPARED]], ""
    for experiment, line in SUMMARY:
        rows.append(
            [f"`{experiment}`" if experiment != before else "", f"{line.label} {_arrow(line)}", *_cells(line, COMPARED)]
        )
        before = experiment
    return table(rows)


def page(experiment: str) -> str:
    """A table of an experiment's page."""
    lines = {**PAGES, **FURTHER}[experiment]
    columns = [name for name in CURVES if any(by_seed(line, CURVES[name]) is not None for line in lines)]
    rows = [["measured", columns[0], "its worst seed", *columns[1:]]]
    for line in lines:
        first, *others = _cells(line, columns)
        rows.append([f"{line.label} {_arrow(line)}", first, _worst(line), *others])
    return table(rows)


def drawn(content: dict[str, Any]) -> tuple[list[int], int]:
    """(meta-training seeds, key of the tested draws) of a measured row."""
    return content.get("seeds", list(range(len(content["seconds"])))), content.get("draw", OLDER_DRAW)


def price() -> str:
    """Seconds of meta-training of each row, on what it was measured."""
    rows = [["row of `benchmarks.seeds`", "seeds", "draw", "seconds by seed", "device", "jax"]]
    for path in sorted(RESULTS.glob("seeds_*.json")):
        content = _row(path.stem.removeprefix("seeds_"))
        seconds = " ".join(f"{seconds:.0f}" for seconds in content["seconds"])
        seeds, draw = drawn(content)
        made = [f"`{content['row']}`", f"{seeds[0]}-{seeds[-1]}", str(draw), seconds]
        rows.append([*made, content.get("device", ""), content.get("jax", "")])
    return table(rows)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "price": price,
    **speed_tables.TABLES,
    "processes": scale_tables.measured,
    "scale_predictions": scale_tables.predictions,
    **{name: functools.partial(page, name) for name in (*PAGES, *FURTHER)},
}


def files() -> list[pathlib.Path]:
    """The files with tables."""
    return [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(path.read_text())]


def written(text: str) -> str:
    """A text with all its tables made anew.

    Raises:
      ValueError: an unknown table.
    """

    def made(block: re.Match[str]) -> str:
        start, name, end = block.groups()
        if name not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(sorted(TABLES))}, got {name!r}")
        return f"{start}\n{TABLES[name]()}\n{end}"

    return BLOCK.sub(made, text)


def main() -> int:
    """Writes the tables, or checks them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a file differs")
    check, stale = parser.parse_args().check, []
    for path in files():
        before = path.read_text()
        after = written(before)
        if before != after:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(after)
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
