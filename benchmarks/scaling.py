"""Time and memory of a meta-step of the sine problem against the number of tasks, and against seeds in one program.

    python -m benchmarks.scaling {tasks,seeds} [--numbers 1,64,4096] [--rounds 5] [--out FILE.json]

Tasks: one inner step, `MetaLearner.run` on all devices of the process. Seeds: 100 tasks, `MetaLearner.run_seeds`; `times_one`
compares with `run` of one seed. Temporaries are those that the compiler plans for the same loop on one device. "tasks" writes
after every row, so that a time limit loses the last rows alone.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, sine, timing
from launch.runtime import devices

NUMBERS = {"tasks": "1,4,16,64,256,1024,4096", "seeds": "1,2,5"}
SEED_TASKS = 100
INNER_STEPS = 1


def of_tasks(num_tasks: int, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of a meta-step and of one of its tasks, and megabytes of temporaries."""
    meta = sine.meta_learner(num_tasks, INNER_STEPS)
    state, length = meta.init(jax.random.key(0)), timing.loop_length(num_tasks, INNER_STEPS)
    on_one = jax.jit(lambda state: meta.run(state, length)).lower(state).compile()
    run = meta.run if len(jax.devices()) > 1 else lambda state, _: on_one(state)
    seconds = timing.alternated({"run": timing.fused(run, state, length)}, rounds)["run"]
    milliseconds, megabytes = 1e3 * float(np.median(seconds)), timing.temporaries_mb(on_one)
    return {"tasks": num_tasks, "ms": milliseconds, "ms_a_task": milliseconds / num_tasks, "mb": megabytes}


def of_seeds(numbers: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each number of seeds: milliseconds of a meta-step of all, its ratio to one seed, megabytes of temporaries."""
    meta = sine.meta_learner(SEED_TASKS, INNER_STEPS)
    length = timing.loop_length(SEED_TASKS, INNER_STEPS)
    run_all = jax.jit(jax.vmap(lambda state: meta.run(state, length)))
    one, takes, megabytes = meta.init(jax.random.key(0)), {}, {}
    for seeds in dict.fromkeys([1, *numbers]):
        states = jax.tree.map(lambda leaf, n=seeds: jnp.stack([leaf] * n), one)
        states = states.replace(key=jax.random.split(jax.random.key(0), seeds))
        megabytes[seeds] = timing.temporaries_mb(run_all.lower(states).compile())
        takes[str(seeds)] = timing.fused(meta.run_seeds, states, length)
    takes["run"] = timing.fused(meta.run, one, length)
    seconds = timing.alternated(takes, rounds)
    return [
        {
            "seeds": seeds,
            "tasks": SEED_TASKS,
            "ms": 1e3 * float(np.median(seconds[str(seeds)])),
            "times_one": float(np.median(seconds[str(seeds)] / seconds["run"])),
            "mb": megabytes[seeds],
        }
        for seeds in megabytes
    ]


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("axis", choices=list(NUMBERS))
    parser.add_argument("--numbers", help=f"with commas between; {NUMBERS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/scaling_AXIS.json")
    arguments = parser.parse_args()
    axis, path = arguments.axis, arguments.out or machine.RESULTS / f"scaling_{arguments.axis}.json"
    numbers = [int(number) for number in (arguments.numbers or NUMBERS[axis]).split(",")]
    devices.one_per_core()
    rows: list[dict[str, Any]] = []
    for some in [numbers] if axis == "seeds" else [[number] for number in numbers]:
        rows += of_seeds(some, arguments.rounds) if axis == "seeds" else [of_tasks(some[0], arguments.rounds)]
        print(rows[-1], flush=True)
        sizes = {"inner_steps": INNER_STEPS, "rounds": arguments.rounds}
        machine.write(path, {**machine.head("benchmarks.scaling"), **sizes, "rows": rows})


if __name__ == "__main__":
    main()
