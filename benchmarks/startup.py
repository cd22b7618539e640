"""Cold and warm start of a launch: seconds of compilation and of the whole process, in two run folders one after the other.

    python -m benchmarks.startup [--jobs main,sine] [--rounds 3] [--out FILE.json]

Each job runs twice with a compilation cache of its own, which is empty for the first run. The second run has another run
folder. JAX reports how long it traces and compiles; "compiling" includes reading from the cache. Figures are medians over
rounds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from launch.runtime import compilation_cache

RESULTS = machine.RESULTS / "startup.json"
JOBS = {
    "main": ("--experiment=shaped_sine", "--meta_test"),
    "sine": ("--experiment=sine",),
    "quick": ("--experiment=shaped_sine", "--meta_steps=10", "--config.log_every=5", "--config.save_every=5"),
}
EVENTS = {
    "compiling": "/jax/core/compile/backend_compile_duration",
    "tracing": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
}
MISS = "/jax/compilation_cache/cache_misses"  # a program that the cache did not have, and that is kept in it
# Variables that would give the processes another cache, or none.
OTHER_CACHES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def start(arguments: Sequence[str], cache: pathlib.Path) -> dict[str, float]:
    """One launch in a process and a run folder of its own: seconds by "process" and `EVENTS`, and "programs" compiled.

    Raises:
      RuntimeError: the launch failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OTHER_CACHES}
    environment[compilation_cache.SWITCH] = str(cache)
    with tempfile.TemporaryDirectory(prefix="ml3_jax_startup_") as folder:
        report = pathlib.Path(folder) / "seconds.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.startup",
            f"--report={report}",
            "--",
            f"--workdir={folder}/run",
            *arguments,
        ]
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        taken = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"launch.meta_train {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
        return {"process": taken, **json.loads(report.read_text())}


def measure(arguments: Sequence[str], rounds: int) -> dict[str, Any]:
    """{"cold", "warm": medians of the seconds of `start`; "saved": the share of compilation that a warm start saves}."""
    seconds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ml3_jax_cache_") as cache:
            for kind in seconds:
                seconds[kind].append(start(arguments, pathlib.Path(cache)))
    shares = [1.0 - warm["compiling"] / cold["compiling"] for cold, warm in zip(seconds["cold"], seconds["warm"], strict=True)]
    medians = {
        kind: {name: float(np.median([one[name] for one in of_kind])) for name in of_kind[0]}
        for kind, of_kind in seconds.items()
    }
    return {**medians, "saved": float(np.median(shares))}


def _launch(report: pathlib.Path, arguments: Sequence[str]) -> int:
    """Runs `launch.meta_train` as from its command line, and writes the seconds that JAX reports."""
    from launch import meta_train

    seconds = dict.fromkeys([*EVENTS, "programs"], 0.0)
    names = {event: name for name, event in EVENTS.items()}

    def add(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in names:
            seconds[names[event]] += duration_secs

    def count(event: str, **kwargs: str | int) -> None:
        if event == MISS:
            seconds["programs"] += 1

    jax.monitoring.register_event_duration_secs_listener(add)
    jax.monitoring.register_event_listener(count)
    sys.argv = ["launch.meta_train", *arguments]
    code = meta_train.main()
    report.write_text(json.dumps(seconds))
    return code


def main() -> int:
    """Measures the jobs; with --report it is one launch of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", default="main,sine", help=f"some of {', '.join(JOBS)}, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--report", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("launch", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report is not None:
        return _launch(arguments.report, arguments.launch)
    rows = []
    for job in arguments.jobs.split(","):
        rows.append({"job": " ".join(["meta_train", *JOBS[job]]), **measure(JOBS[job], arguments.rounds)})
        print(rows[-1], flush=True)
    machine.write(arguments.out, {**machine.head("benchmarks.startup"), "rounds": arguments.rounds, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
