"""Memory and time of a meta-step against the number of inner steps, for each gradient mode.

    python -m benchmarks.gradient_modes [--tasks 10] [--steps 1,10,100,1000] [--rounds 5]

The sine problem of `benchmarks.sine`. Temporaries are XLA's count for one compiled step. Times are medians over rounds in which
the modes take turns; compilation is not in them. It writes benchmarks/results/gradient_modes.json.
"""

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import sine
from launch.runtime import devices
from ml3_jax.types import GRADIENT_MODES

RESULTS = pathlib.Path(__file__).parent / "results" / "gradient_modes.json"
BLOCK_SECONDS = 0.3  # of one timing, at least


def measure(num_tasks: int, inner_steps: int, rounds: int, modes: Sequence[str] = GRADIENT_MODES) -> list[dict[str, Any]]:
    """One row for each mode: megabytes of temporaries and milliseconds of a meta-step."""
    blocks: dict[str, tuple[Callable[[int], float], int]] = {}
    megabytes = {}
    for mode in modes:
        meta = sine.meta_learner(num_tasks, inner_steps, gradient=mode)
        state = meta.init(jax.random.key(0))
        analysis = jax.jit(meta.step).lower(state).compile().memory_analysis()
        megabytes[mode] = None if analysis is None else analysis.temp_size_in_bytes / 1e6
        take = _taker(meta.step, state)
        take(1)  # compiles
        blocks[mode] = take, max(1, round(BLOCK_SECONDS / take(1)))
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for index in range(rounds):
        shift = index % len(modes)  # so that the first one changes
        for mode in (*modes[shift:], *modes[:shift]):
            take, count = blocks[mode]
            seconds[mode].append(take(count) / count)
    return [
        {
            "tasks": num_tasks,
            "inner_steps": inner_steps,
            "mode": mode,
            "mb": megabytes[mode],
            "ms": 1e3 * float(np.median(seconds[mode])),
            "times_mixed": float(np.median(np.array(seconds[mode]) / np.array(seconds[modes[0]]))),
        }
        for mode in modes
    ]


def _taker(step: Callable[[Any], Any], state: Any) -> Callable[[int], float]:
    """count -> the seconds of that many meta-steps in a row."""

    def take(count: int) -> float:
        current, began = state, time.perf_counter()
        for _ in range(count):
            current, _ = step(current)
        jax.block_until_ready(current)
        return time.perf_counter() - began

    return take


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--steps", default="1,10,100,1000")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    devices.one_per_core()
    rows = []
    for steps in map(int, arguments.steps.split(",")):
        for row in measure(arguments.tasks, steps, arguments.rounds):
            print(row, flush=True)
            rows.append(row)
    machine = f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {platform.machine()}"
    content = {"device": machine, "jax": jax.__version__, "rounds": arguments.rounds, "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
