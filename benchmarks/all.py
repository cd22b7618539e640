"""Speed, memory and startup: every benchmark that needs no training, one after the other, in processes of their own.

    python -m benchmarks.all [--quick] [--gpu] [--parts meta_step ...] [--out DIR] [--seconds N]

Each part writes DIR/PART.json; `python -m benchmarks.tables` makes the tables of the documents from benchmarks/results. --quick
takes sizes for a smoke test, and a temporary folder unless --out names one. --gpu takes sizes for one GPU: each part has a time
limit, and all of them together take at most --seconds. A part that is stopped keeps the rows that it has written.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import machine, report

GPU_SECONDS = 465.0  # of all parts with --gpu: below 8 minutes with Python's start
LEAST_SECONDS = 15.0  # no part starts with less time left
CPU_LIMIT = 3600.0  # seconds of a part without --gpu


class Part(NamedTuple):
    """One program: its module and its arguments for each purpose. None: it has no place there."""

    module: str
    full: str | None
    quick: str | None
    gpu: str | None = None
    gpu_seconds: float = 0.0


# In the order of importance on a GPU.
PARTS = {
    "precision": Part("precision", "--sizes 100x20", "--sizes 2x2 --rounds 1", "--sizes 4096x20,100x20", gpu_seconds=110),
    "gradient_modes": Part(
        "gradient_modes",
        "",
        "--tasks 2 --steps 1,3 --modes mixed,nested --rounds 1",
        "--tasks 100 --steps 1,100 --modes mixed,nested --rounds 3",
        gpu_seconds=70,
    ),
    "scaling_tasks": Part(
        "scaling", "tasks", "tasks --numbers 1,2 --rounds 1", "tasks --numbers 1,64,1024,4096 --rounds 3", gpu_seconds=60
    ),
    "vmapped_speed": Part(
        "vmapped_speed",
        None,
        "--experiment shaped_sine --config num_tasks=2 --seeds 2 --meta_steps 1 --blocks 1",
        "--seeds 5 --meta_steps 1 --blocks 2",
        gpu_seconds=170,
    ),
    "scaling_seeds": Part("scaling", "seeds", "seeds --numbers 1,2 --rounds 1", "seeds --rounds 3", gpu_seconds=45),
    "meta_step": Part("meta_step", "", "--sizes 1x1 --rounds 1", "--sizes 100x20 --rounds 5", gpu_seconds=90),
    "bare_products": Part("bare_products", "", "--sizes 2x2 --rounds 1", "--sizes 100x20", gpu_seconds=60),
    "throughput": Part(
        "throughput",
        "",
        "--experiments shaped_sine --small --blocks 1",
        "--experiments shaped_sine sine digits --blocks 2",
        gpu_seconds=60,
    ),
    "startup": Part("startup", "", "--jobs quick --rounds 1", "--jobs quick --rounds 1", gpu_seconds=90),
    "estimators": Part("estimators", "", None),
    "large_optimizees": Part("large_optimizees", "", None),
    "processes": Part("processes", "", None),
}


class Outcome(NamedTuple):
    """How a part ended."""

    part: str
    ended: str  # "done", "stopped after N s" or "failed with exit code N"
    seconds: float


def run(name: str, arguments: str, folder: pathlib.Path, limit: float, environment: Mapping[str, str]) -> Outcome:
    """Runs a part; after `limit` seconds it is stopped, with the processes that it has started."""
    command = [sys.executable, "-m", f"benchmarks.{PARTS[name].module}", *arguments.split(), f"--out={folder}/{name}.json"]
    print(f"== {name}: {' '.join(command[2:])} (at most {limit:.0f} s)", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(name, ended, time.monotonic() - began)


def run_all(names: Sequence[str], folder: pathlib.Path, *, quick: bool, gpu: bool, seconds: float) -> list[Outcome]:
    """Runs parts in order. They share a cache of compiled programs, which is new: no part reads what another run compiled."""
    outcomes, deadline = [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="ml3_jax_cache_") as cache:
        cached = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for name in names:
            part, left = PARTS[name], deadline - time.monotonic()
            arguments = part.quick if quick else part.gpu if gpu else part.full
            if arguments is None:
                continue
            if left < LEAST_SECONDS:
                outcomes.append(Outcome(name, "left out: no time", 0.0))
                continue
            limit = min(left, part.gpu_seconds if gpu else CPU_LIMIT)
            outcomes.append(run(name, arguments, folder, limit, {**os.environ, **cached}))
    return outcomes


def summary(folder: pathlib.Path, outcomes: Sequence[Outcome]) -> str:
    """How every part ended, and the rows that it wrote."""
    lines = report.table([["part", "ended", "seconds"], *([o.part, o.ended, f"{o.seconds:.0f}"] for o in outcomes)])
    for outcome in outcomes:
        path = folder / f"{outcome.part}.json"
        if path.exists():
            content = json.loads(path.read_text())
            lines += ["", f"{outcome.part}: {_where(content)}", "", *_rows(content)]
    return "\n".join(lines)


def _where(content: Mapping[str, Any]) -> str:
    if "machine" in content:  # of meta_step
        return f"{content['machine']['devices']} devices of {content['machine']['backend']}, jax {content['versions']['jax']}"
    return f"{content['device']}, jax {content['jax']}"


def _rows(content: Mapping[str, Any]) -> list[str]:
    rows = content.get("rows") or content.get("timings") or []
    if not rows:
        return ["no rows"]
    return report.table([list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return str(value)


def main() -> int:
    """Runs the parts and prints the summary; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the JSON files")
    parser.add_argument("--seconds", type=float, help="of all parts together")
    arguments = parser.parse_args()
    folder = arguments.out
    if folder is None:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ml3_jax_benchmarks_")) if arguments.quick else machine.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    seconds = arguments.seconds or (GPU_SECONDS if arguments.gpu else len(PARTS) * CPU_LIMIT)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `run` stops its part
    outcomes = run_all(arguments.parts, folder, quick=arguments.quick, gpu=arguments.gpu, seconds=seconds)
    print(f"\n{summary(folder, outcomes)}\n\n{folder}", flush=True)
    return int(any(outcome.ended.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
