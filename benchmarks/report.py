"""The Markdown report of `meta_step`'s JSON data.

python -m benchmarks.report [FILE.json]
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results" / "meta_step.json"
NO_TORCH = "PyTorch or higher is not installed: their rows are left out (`pip install -e '.[bench]'`)."


def write(path: pathlib.Path) -> str:
    """Writes FILE.md next to FILE.json and returns its text."""
    text = render(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    return text


def render(results: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# One meta-step of the sine problem",
        "",
        f"`{results['command']}`: {machine['cpu']}, {machine['cores']} cores, {machine['devices']} devices of "
        f"{machine['backend']}, load average {machine['load_average']:.1f} at the start; {versions}.",
        "",
        f"Optimizee 1-100-10-1, learned loss 2-50-50-1, 100 points, float32. Medians over {results['rounds']} rounds in turn, "
        "the quartiles in brackets; ratios are taken within a round, above 1 is faster. PyTorch has one thread.",
        "",
    ]
    if not results["torch"]:
        lines += [NO_TORCH, ""]
    lines += [*_timings(results["timings"]), "", *_agreement(results["agreement"]), ""]
    memory = results["temporaries"]
    sizes = "; ".join(f"{name} {mb:.1f} MB" for name, mb in memory["mb"].items())
    lines += [f"Temporaries of a meta-step of {memory['tasks']} tasks and {memory['inner_steps']} inner steps: {sizes}.", ""]
    return "\n".join(lines)


def _timings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    others = list(rows[0]["speed"])
    lines = [["tasks x inner steps", "implementation", "ms a meta-step", *(f"times as fast as {name}" for name in others)]]
    for row in rows:
        ratios = [_spread(row["speed"][name]) if name != row["implementation"] else "" for name in others]
        lines.append([f"{row['tasks']} x {row['inner_steps']}", row["implementation"], _spread(row["ms"]), *ratios])
    return table(lines)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = [
        "tasks x inner steps",
        "implementation",
        "task loss",
        "its relative error",
        "error of the meta-gradient / its largest entry",
    ]
    lines = [head]
    for row in rows:
        size = f"{row['tasks']} x {row['inner_steps']}"
        errors = [f"{row[name]:.0e}" for name in ("task_loss_error", "gradient_error")]
        lines.append([size, row["implementation"], f"{row['task_loss']:.6g}", *errors])
    return ["From the same weights and data, beside what `ml3_jax` computed in a step as it is timed:", "", *table(lines)]


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3g} [{values['low']:.3g}, {values['high']:.3g}]"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def main() -> None:
    """Renders the data of an earlier run."""
    parser = argparse.ArgumentParser(description="Renders the report of benchmarks.meta_step.")
    parser.add_argument("path", type=pathlib.Path, nargs="?", default=RESULTS)
    print(write(parser.parse_args().path))


if __name__ == "__main__":
    main()
