"""Memory and time of a meta-step on transformers of 1, 10 and 100 million parameters, for each gradient mode.

    python -m benchmarks.large_optimizees [--sizes "1 M,10 M,100 M"] [--timed "1 M,10 M"] [--rounds 3]

One task, 4 inner steps of SGD or Adam (`benchmarks.transformer`). Temporaries are XLA's count for one compiled step, as a
multiple of the optimizee's bytes. Beside them are those of one gradient of the same loss, which are a step's activations. XLA's
CPU compiler has two schedulers: the default one prefers concurrency to memory; "memory" is with the flag in `SCHEDULERS`. Each
row is measured in a process of its own. It writes benchmarks/results/large_optimizees.json.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import ml3_jax
from benchmarks import machine, transformer
from ml3_jax.inner import observed_loss
from ml3_jax.types import GRADIENT_MODES

RESULTS = machine.RESULTS / "large_optimizees.json"
INNER_STEPS = 4
OPTIMIZERS = {"SGD": optax.sgd(0.1), "Adam": optax.adam(1e-3, eps_root=1e-8)}
SCHEDULERS = {"default": "", "memory": "--xla_cpu_enable_concurrency_optimized_scheduler=false"}
VARIANTS = [*(("default", mode) for mode in GRADIENT_MODES), ("memory", "mixed"), ("memory", "nested")]


def measure(shape: transformer.Shape, optimizer: str, mode: str, rounds: int) -> dict[str, Any]:
    """One row: bytes of a meta-step and of a gradient of the learned loss, and the median seconds (None for no rounds)."""
    problem, loss = transformer.make_problem(shape), transformer.learned_loss()
    meta = ml3_jax.make_meta_learner(
        problem,
        loss,
        inner_optimizer=OPTIMIZERS[optimizer],
        meta_optimizer=optax.adam(1e-3),
        num_tasks=1,
        inner_steps=INNER_STEPS,
        gradient=mode,
        tasks_at_once=1,
    )
    state = jax.eval_shape(meta.init, jax.random.key(0))
    compiled = jax.jit(meta.step).lower(state).compile()
    task = jax.eval_shape(problem.sample_task, jax.random.key(0), None)
    params = jax.eval_shape(problem.init, jax.random.key(0), task)
    slope = jax.jit(jax.grad(observed_loss(problem.for_inner_steps(INNER_STEPS), loss), argnums=1))
    single = slope.lower(state.loss_params, params, task, None, jax.random.key(0), 0).compile()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    found, one = compiled.memory_analysis(), single.memory_analysis()
    return {
        "optimizer": optimizer,
        "mode": mode,
        "parameters": count,
        "theta_bytes": 4 * count,
        "temporaries": None if found is None else found.temp_size_in_bytes,
        "arguments": None if found is None else found.argument_size_in_bytes,
        "outputs": None if found is None else found.output_size_in_bytes,
        "activations": None if one is None else one.temp_size_in_bytes,
        "seconds": _seconds(compiled, meta.init(jax.random.key(0)), rounds) if rounds else None,
    }


def _seconds(step: Any, state: ml3_jax.MetaState, rounds: int) -> float:
    """The median seconds of a compiled meta-step, after one that is not counted."""
    state, _ = jax.block_until_ready(step(state))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def in_own_process(size: str, optimizer: str, mode: str, scheduler: str, rounds: int) -> dict[str, Any]:
    """The row of `measure` from a process with the flag of a scheduler."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {SCHEDULERS[scheduler]}".strip()}
    command = [sys.executable, "-m", "benchmarks.large_optimizees", "--row", size, optimizer, mode, str(rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"size": size, "scheduler": scheduler, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default=",".join(transformer.SHAPES))
    parser.add_argument("--timed", default="1 M,10 M", help="the sizes that are run, besides compiled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", nargs=4, help="print one row: size, optimizer, mode, rounds")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.row:
        size, optimizer, mode, rounds = arguments.row
        print(json.dumps(measure(transformer.SHAPES[size], optimizer, mode, int(rounds))))
        return
    sizes = {"inner_steps": INNER_STEPS, "rounds": arguments.rounds}
    content = {**machine.head("benchmarks.large_optimizees"), **sizes, "rows": []}
    for size, optimizer, (scheduler, mode) in itertools.product(arguments.sizes.split(","), OPTIMIZERS, VARIANTS):
        timed = size in arguments.timed.split(",") and scheduler == "default"
        row = in_own_process(size, optimizer, mode, scheduler, arguments.rounds if timed else 0)
        print(row, flush=True)
        content["rows"].append(row)
        machine.write(arguments.out, content)


if __name__ == "__main__":
    main()
