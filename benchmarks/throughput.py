"""Meta-steps a second of every experiment with its default config, warm, on all devices of the process.

    python -m benchmarks.throughput [--experiments sine ...] [--blocks 3] [--small] [--out FILE.json]

One block is `MetaLearner.run` over `log_every` meta-steps, with the refreshes of the context that belong to them, as
`launch.meta_train` runs it. The figure is the median of the blocks after a first one, which compiles. It writes after every
row.
"""

import argparse
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from benchmarks.one_meta_step import OVERRIDES as SMALL
from launch import experiments
from launch.runs import single_run
from launch.runtime import compilation_cache, devices

RESULTS = machine.RESULTS / "throughput.json"


def measure(name: str, blocks: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One row: meta-steps a second, and what a meta-step is."""
    experiment = experiments.build(name, overrides, donate=True)
    config: Any = experiment.config
    state = single_run.make_start(experiment, 0)
    seconds = []
    for _ in range(blocks + 1):
        began = time.perf_counter()
        state, _ = experiment.meta.run(state, config.log_every)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return {
        "experiment": name,
        "tasks": config.num_tasks,
        "unroll": config.unroll,
        "meta_steps_a_second": config.log_every / float(np.median(seconds[1:])),
        "first_block_seconds": seconds[0],  # with compilation, unless a cache has the program
        "meta_steps": config.meta_steps,
    }


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", nargs="+", choices=experiments.names(), default=experiments.names())
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="small sizes and short blocks, for a smoke test")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    compilation_cache.enable()
    rows = []
    for name in arguments.experiments:
        overrides = {**SMALL[name], "log_every": 2, "save_every": 2} if arguments.small else {}
        rows.append(measure(name, arguments.blocks, overrides))
        print(rows[-1], flush=True)
        machine.write(arguments.out, {**machine.head("benchmarks.throughput"), "blocks": arguments.blocks, "rows": rows})


if __name__ == "__main__":
    main()
