"""Memory and time of a meta-step against the number of inner steps, for each gradient mode.

    python -m benchmarks.gradient_modes [--tasks 10] [--steps 1,10,100,1000] [--rounds 5]

The sine problem of `benchmarks.sine`. Temporaries are XLA's count for one compiled step. Times are medians over rounds in which
the modes take turns; compilation is not in them. It writes benchmarks/results/gradient_modes.json.
"""

import argparse
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import sine, turns
from launch.runtime import devices
from ml3_jax.types import GRADIENT_MODES

RESULTS = pathlib.Path(__file__).parent / "results" / "gradient_modes.json"


def measure(num_tasks: int, inner_steps: int, rounds: int, modes: Sequence[str] = GRADIENT_MODES) -> list[dict[str, Any]]:
    """One row for each mode: megabytes of temporaries and milliseconds of a meta-step."""
    learners, megabytes = {}, {}
    for mode in modes:
        meta = sine.meta_learner(num_tasks, inner_steps, gradient=mode)
        learners[mode] = meta, meta.init(jax.random.key(0))
        megabytes[mode] = turns.temporaries(*learners[mode])
    seconds = turns.seconds(learners, rounds)
    return [
        {
            "tasks": num_tasks,
            "inner_steps": inner_steps,
            "mode": mode,
            "mb": megabytes[mode],
            "ms": 1e3 * float(np.median(seconds[mode])),
            "times_mixed": float(np.median(seconds[mode] / seconds[modes[0]])),
        }
        for mode in modes
    ]


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
