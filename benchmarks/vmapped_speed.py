"""Meta-training an experiment with several seeds under one vmap: seconds to compile, time of a meta-step, memory.

    python -m benchmarks.vmapped_speed [--experiment ant_mfrl] [--config size=full] [--seeds 5] [--meta_steps 2]
        [--out FILE.json]

The default is the ant with the sizes of the paper, which needs a GPU. `benchmarks.seeds --vmapped` trains it to the end.
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, timing
from launch import experiments
from launch.runs import single_run
from launch.runtime import compilation_cache, devices

RESULTS = machine.RESULTS / "vmapped_speed.json"


def measure(name: str, overrides: dict[str, Any], seeds: int, meta_steps: int, blocks: int) -> dict[str, Any]:
    """The row of `seeds` seeds; a block is `meta_steps` meta-steps in one compiled loop."""
    experiment = experiments.build(name, overrides)
    starts = [single_run.make_start(experiment, seed) for seed in range(seeds)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    began = time.perf_counter()
    run = jax.jit(jax.vmap(lambda state: experiment.meta.run(state, meta_steps))).lower(states).compile()
    compiling, seconds = time.perf_counter() - began, []
    for _ in range(blocks + 1):
        began = time.perf_counter()
        states, metrics = run(states)
        jax.block_until_ready(states)
        seconds.append((time.perf_counter() - began) / meta_steps)
    step = float(np.median(seconds[1:]))
    return {
        "experiment": name,
        "config": overrides,
        "seeds": seeds,
        "tasks": experiment.config.num_tasks,
        "unroll": experiment.config.unroll,
        "compiling_seconds": compiling,
        "step_seconds": step,
        "meta_steps": experiment.config.meta_steps,
        "training_hours": experiment.config.meta_steps * step / 3600.0,
        "temporaries_mb": timing.temporaries_mb(run),
        "skipped": int(np.asarray(metrics.skipped).sum()),
    }


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else value


def main() -> None:
    """Measures, prints and writes the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiment", default="ant_mfrl", choices=experiments.names())
    parser.add_argument("--config", type=_value, nargs="*", default=[("size", "full")], help="FIELD=VALUE ...")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--meta_steps", type=int, default=2, help="of one compiled block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    compilation_cache.enable()
    sizes = (arguments.seeds, arguments.meta_steps, arguments.blocks)
    row = measure(arguments.experiment, dict(arguments.config), *sizes)
    print(row, flush=True)
    machine.write(arguments.out, {**machine.head("benchmarks.vmapped_speed"), "rows": [row]})


if __name__ == "__main__":
    main()
