"""Memory and time of a meta-step against the number of inner steps, for each gradient mode.

    python -m benchmarks.gradient_modes [--tasks 10] [--steps 1,10,100,1000] [--modes mixed,nested] [--rounds 5]
        [--out FILE.json]

The sine problem of `benchmarks.sine`. Temporaries are XLA's count for one compiled step. Times are medians over rounds in which
the modes take turns; compilation is not in them. It writes after every number of steps.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import machine, sine, timing
from launch.runtime import devices
from ml3_jax.types import GRADIENT_MODES

RESULTS = machine.RESULTS / "gradient_modes.json"


def measure(num_tasks: int, inner_steps: int, rounds: int, modes: Sequence[str] = GRADIENT_MODES) -> list[dict[str, Any]]:
    """One row for each mode: megabytes of temporaries and milliseconds of a meta-step."""
    state = sine.meta_learner(num_tasks, inner_steps).init(jax.random.key(0))
    takes, megabytes = {}, {}
    for mode in modes:
        step = sine.meta_learner(num_tasks, inner_steps, gradient=mode).step
        on_one = jax.jit(step).lower(state).compile()
        megabytes[mode] = timing.temporaries_mb(on_one)
        takes[mode] = timing.stepping(step if len(jax.devices()) > 1 else on_one, state)
    seconds = timing.alternated(takes, rounds)
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
    parser.add_argument("--modes", default=",".join(GRADIENT_MODES), help="the first one is compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    rows = []
    for steps in map(int, arguments.steps.split(",")):
        rows += measure(arguments.tasks, steps, arguments.rounds, arguments.modes.split(","))
        print(*rows[-len(arguments.modes.split(",")) :], sep="\n", flush=True)
        machine.write(arguments.out, {**machine.head("benchmarks.gradient_modes"), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
