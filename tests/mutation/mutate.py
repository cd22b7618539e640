"""Breaks the library at places that a seed draws, one at a time, and reports which faults its tests catch.

    python -m tests.mutation.mutate [--count=20] [--seed=0] [--tree=PATH] [--also-tree=OLD] [--out=FILE.json] [--at-least=18]

The faults are put into a temporary copy of the tree, which must pass its tests. The tests of the mutated module's own file
run first, then the others of the folder that mirrors its folder, with `-x`. With --also-tree each fault that survives is also
put into another tree, where the line reads the same, and that tree's tests are run. A mutant that changes nothing belongs
into EQUIVALENT with the reason: another one is then drawn in its place.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.mutation import mutants
from tests.mutation.mutants import Equivalent, Mutant

ROOT = pathlib.Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_ANY_NUMBER = "folded into the key of the auxiliary loss: any number that no inner step has gives an independent draw"
_AUXILIARY = "_AUXILIARY = 2**32 - 1  # folded into the key of the auxiliary loss; no inner step has this number"
_CHECKPOINT = 'if gradient != "reverse" and collect_gradient == "score":'
_OR = "gradient != 'reverse' or collect_gradient == 'score'"
EQUIVALENT = (
    Equivalent("ml3_jax/meta_gradient.py", _AUXILIARY, "2", _ANY_NUMBER),
    Equivalent("ml3_jax/checkpoint_record.py", "return 0", "1", "a placeholder of a leaf: only the structure is used"),
    Equivalent("ml3_jax/inner.py", _CHECKPOINT, _OR, "rematerialises a log-probability: memory, no number"),
)


class Outcome(NamedTuple):
    """The result of the tests on one mutant."""

    caught: bool
    by: str  # the test that failed first, "timeout", or ""
    seconds: float


def commands_for(tree: pathlib.Path, path: str) -> list[list[str]]:
    """Arguments of pytest for a module: the files that are named after it or its package, then the rest of the folder."""
    module = pathlib.PurePosixPath(path)
    folder = tree / "tests" / module.parent
    names = {f"test_{module.stem}.py"}
    while not folder.is_dir():
        names |= {f"test_{folder.name}.py", f"test_{folder.name}_{module.stem}.py"}
        folder = folder.parent
    files = sorted(folder.glob("test_*.py"))
    first = [file for file in files if file.name in names]
    rest = [file for file in files if file not in first]
    return [[str(file.relative_to(tree)) for file in some] for some in (first, rest) if some]


def run_tests(tree: pathlib.Path, files: Sequence[str], timeout: float) -> Outcome:
    """Runs test files in a tree until one fails.

    Raises:
      RuntimeError: pytest ended with neither passed nor failed tests.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-rfE", "--tb=no", "-p", "no:cacheprovider", *files]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the workers and what they start end with it
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome(True, "timeout", time.monotonic() - began)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode not in (0, 1, 2):
        raise RuntimeError(f"expected passed or failed tests, got exit status {process.returncode}:\n{output}")
    failed = FAILED.search(output)
    by = failed.group(1) if failed else "import" if process.returncode else ""
    return Outcome(process.returncode != 0, by, time.monotonic() - began)


@contextlib.contextmanager
def broken(tree: pathlib.Path, mutant: Mutant) -> Iterator[None]:
    """Puts the fault into a tree for the time of the block."""
    path = tree / mutant.path
    source = path.read_text()

    def write(text: str) -> None:
        path.write_text(text)
        # Two versions of one size that are written within a second share their bytecode.
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)

    write(mutants.apply(source, mutant))
    try:
        yield
    finally:
        write(source)


def try_mutant(tree: pathlib.Path, mutant: Mutant, timeout: float) -> Outcome:
    """Runs the tests that mirror the mutated module until one fails."""
    seconds = 0.0
    with broken(tree, mutant):
        for files in commands_for(tree, mutant.path):
            outcome = run_tests(tree, files, timeout)
            seconds += outcome.seconds
            if outcome.caught:
                return outcome._replace(seconds=seconds)
    return Outcome(False, "", seconds)


def copy_of(tree: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a tree without results, from which its library is imported.

    Raises:
      RuntimeError: another installation of the library comes first.
    """
    shutil.copytree(tree, folder, ignore=IGNORED)
    code = "import importlib.util as u; print(u.find_spec('ml3_jax').origin)"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    if not found.stdout.startswith(str(folder)):
        raise RuntimeError(f"expected ml3_jax from {folder}, got {found.stdout.strip()}; uninstall it or use another Python")
    return folder


def sources_of(tree: pathlib.Path) -> dict[str, str]:
    """{path: text} of the library's modules."""
    return {path.relative_to(tree).as_posix(): path.read_text() for path in sorted((tree / "ml3_jax").rglob("*.py"))}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tries all mutants: the report as JSON."""
    chosen, replaced = mutants.choose(sources_of(arguments.tree), arguments.count, arguments.seed, EQUIVALENT)
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutation_") as name:
        tree = copy_of(arguments.tree, pathlib.Path(name).resolve() / "tree")
        other = None if arguments.also_tree is None else copy_of(arguments.also_tree, tree.parent / "other_tree")
        for mutant in chosen:
            row = _as_row(mutant, try_mutant(tree, mutant, arguments.timeout))
            if other is not None and not row["caught"]:
                same = mutants.same_in(other, mutant)
                row["other_tree"] = None if same is None else _as_row(same, try_mutant(other, same, arguments.timeout))
            rows.append(row)
            print(_line(row), flush=True)
    return {
        "seed": arguments.seed,
        "caught": sum(row["caught"] for row in rows),
        "count": len(rows),
        "mutants": rows,
        "replaced": [{**_named(mutant), "reason": reason} for mutant, reason in replaced],
    }


def _named(mutant: Mutant) -> dict[str, Any]:
    return {name: value for name, value in mutant._asdict().items() if name != "span"}


def _as_row(mutant: Mutant, outcome: Outcome) -> dict[str, Any]:
    return _named(mutant) | outcome._asdict() | {"seconds": round(outcome.seconds, 1)}


def _line(row: dict[str, Any]) -> str:
    place, outcome = f"{row['path']}:{row['line']}", "caught" if row["caught"] else "SURVIVED"
    cells = [place, row["kind"], f"`{row['before']}`", f"`{row['after']}`", outcome, row["by"], f"{row['seconds']:.0f}"]
    if "other_tree" in row:
        other = row["other_tree"]
        cells[5] = "other tree: " + ("no such line" if other is None else other["by"] or "survived too")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    """Reads the command line; returns 1 where fewer mutants than asked for are caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT)
    parser.add_argument("--also-tree", type=pathlib.Path, help="survivors are tried on this tree's tests too")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a run of tests; then a mutant is caught")
    parser.add_argument("--at-least", type=int, default=0, help="mutants that must be caught")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    arguments = parser.parse_args()
    print("| place | kind | before | after | outcome | test | seconds |\n|---|---|---|---|---|---|---|", flush=True)
    report = measure(arguments)
    for one in report["replaced"]:
        print(f"replaced: {one['path']}:{one['line']} `{one['before']}` -> `{one['after']}`: {one['reason']}")
    print(f"{report['caught']} of {report['count']} mutants caught, seed {report['seed']}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["caught"] >= arguments.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
