"""Times one meta-step of the sine problem: the released code's loop, torch.func, TorchOpt, plain JAX and `ml3_jax`.

    python -m benchmarks.meta_step [--rounds=N] [--sizes=1x1,10x1,100x1,100x20] [--out=FILE.json]

JAX has one CPU device per core, as in the launches. `ml3_jax` shards the tasks over all devices; everything else runs on one
device. All implementations run in turn in one process after a warm-up, so that a busy machine slows all of them. The figures
are medians over rounds; ratios are taken within a round. PyTorch has one thread, which is fastest for the released code's
small operations. Before the timing, every implementation computes the task loss and the meta-gradient of the same weights and
data as one meta-step of `ml3_jax`. Temporaries are the memory that XLA's compiler plans for one meta-step.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import machine, report, sine
from launch.runtime import devices

SIZES = ((1, 1), (10, 1), (100, 1), (100, 20))  # tasks, inner steps
MEMORY_SIZE = (10, 200)
RESULTS = pathlib.Path(__file__).parent / "results" / "meta_step.json"
RELEASED, FUNC, TORCHOPT = "released loop (higher)", "torch.func", "TorchOpt"
PLAIN, STEP, RUN = "plain JAX", "ml3_jax step", "ml3_jax run"
OTHERS = (RELEASED, FUNC, TORCHOPT, PLAIN)
NESTED = 'ml3_jax step, gradient="nested"'
BLOCK_SECONDS = 0.05  # the approximate length of one turn
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "higher", "torchopt")


def has_torch() -> bool:
    """Whether the extra `bench` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "higher"))


def has_torchopt() -> bool:
    """Whether TorchOpt is there beside PyTorch. No extra of this project installs it."""
    return has_torch() and importlib.util.find_spec("torchopt") is not None


class Block(NamedTuple):
    """`take(steps)` runs meta-steps one after the other, waits for each, and returns seconds per meta-step."""

    take: Callable[[int], float]
    steps: int


def _stateful(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Callable[[int], float]:
    latest = [state]

    def take(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            latest[0], metrics = step(latest[0])
            jax.block_until_ready((latest[0], metrics))
        return (time.perf_counter() - start) / steps

    return take


def _fused(run: Callable[..., Any], state: Any) -> Callable[[int], float]:
    def take(steps: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(state, steps))
        return (time.perf_counter() - start) / steps

    return take


def _eager(step: Callable[[], Any]) -> Callable[[int], float]:
    def take(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps

    return take


def _blocks(num_tasks: int, inner_steps: int) -> dict[str, Block]:
    """Every implementation at one size, after a warm-up."""
    takes: dict[str, Callable[[int], float]] = {}
    if has_torch():
        from benchmarks import torch_loops

        torch_loops.one_thread()
        takes[RELEASED] = _eager(torch_loops.released_loop(num_tasks, inner_steps))
        takes[FUNC] = _eager(torch_loops.func_loop(num_tasks, inner_steps))
    if has_torchopt():
        from benchmarks import torchopt_loop

        takes[TORCHOPT] = _eager(torchopt_loop.loop(num_tasks, inner_steps))
    init, step = sine.plain_loop(num_tasks, inner_steps)
    takes[PLAIN] = _stateful(step, init(jax.random.key(0)))
    meta = sine.meta_learner(num_tasks, inner_steps)
    state = meta.init(jax.random.key(0))
    takes[STEP] = _stateful(meta.step, state)
    takes[RUN] = _fused(meta.run, state)
    blocks = {}
    for name, take in takes.items():
        take(1)  # compiles
        steps = max(1, round(BLOCK_SECONDS / take(1)))
        if name == RUN:
            take(steps)  # another number of steps is another program
        blocks[name] = Block(take, steps)
    return blocks


def time_size(num_tasks: int, inner_steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row per implementation: milliseconds per meta-step, and the speed relative to the other implementations."""
    blocks = _blocks(num_tasks, inner_steps)
    names = list(blocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)  # so that the first one changes
        for name in names[shift:] + names[:shift]:
            seconds[name].append(blocks[name].take(blocks[name].steps))
    return [
        {
            "tasks": num_tasks,
            "inner_steps": inner_steps,
            "implementation": name,
            "ms": _spread([1e3 * s for s in seconds[name]]),
            "speed": {
                other: _spread([a / b for a, b in zip(seconds[other], seconds[name], strict=True)])
                for other in OTHERS
                if other in seconds
            },
        }
        for name in names
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high), "least": float(min(values))}


def agreement(num_tasks: int, inner_steps: int) -> list[dict[str, Any]]:
    """One row per implementation: task loss and meta-gradient compared with `ml3_jax`, from the same weights and data.

    Errors are relative. That of the meta-gradient is the largest difference over the largest entry.
    """
    case, expected = sine.library_outcome(num_tasks, inner_steps, jax.random.key(1))
    outcomes: Mapping[str, sine.Outcome] = {PLAIN: sine.plain_outcome(case, inner_steps)}
    if has_torch():
        from benchmarks import torch_loops

        outcomes = {
            RELEASED: torch_loops.released_outcome(case, inner_steps),
            FUNC: torch_loops.func_outcome(case, inner_steps),
            **outcomes,
        }
    if has_torchopt():
        from benchmarks import torchopt_loop

        outcomes = {TORCHOPT: torchopt_loop.outcome(case, inner_steps), **outcomes}
    return [
        {
            "tasks": num_tasks,
            "inner_steps": inner_steps,
            "implementation": name,
            "task_loss": outcome.task_loss,
            "task_loss_error": abs(outcome.task_loss - expected.task_loss) / abs(expected.task_loss),
            "gradient_error": float(np.abs(outcome.gradient - expected.gradient).max() / np.abs(expected.gradient).max()),
        }
        for name, outcome in outcomes.items()
    ]


def temporaries_mb(num_tasks: int, inner_steps: int, only: str | None = None) -> dict[str, float]:
    """Megabytes of temporaries of one meta-step, from XLA's compiler, of all implementations or of one."""
    init, step = sine.plain_loop(num_tasks, inner_steps)
    meta, nested = (sine.meta_learner(num_tasks, inner_steps, gradient=mode) for mode in ("mixed", "nested"))
    key = jax.random.key(0)
    programs = {PLAIN: (step, init(key)), STEP: (meta.step, meta.init(key)), NESTED: (nested.step, nested.init(key))}
    sizes = {}
    for name, (function, state) in programs.items():
        if only not in (None, name):
            continue
        analysis = jax.jit(function).lower(state).compile().memory_analysis()
        if analysis is None:
            raise RuntimeError(
                f"expected a memory analysis, got none from the backend {jax.default_backend()}; run on a CPU or GPU"
            )
        sizes[name] = analysis.temp_size_in_bytes / 1e6
    return sizes


def _machine() -> dict[str, Any]:
    return {
        "cpu": machine.cpu(),
        "cores": devices.cores(),
        "load_average": os.getloadavg()[0],
        "backend": jax.default_backend(),
        "devices": jax.local_device_count(),
    }


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            known[name] = importlib.metadata.version(name)
    return known


def measure(sizes: Sequence[tuple[int, int]], rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The data of the report, as JSON."""
    results: dict[str, Any] = {
        "command": "python -m benchmarks.meta_step",
        "machine": _machine(),
        "versions": _versions(),
        "rounds": rounds,
        "torch": has_torch(),
        "torchopt": has_torchopt(),
        "agreement": [],
        "timings": [],
    }
    for num_tasks, inner_steps in sizes:
        progress(f"{num_tasks} tasks, {inner_steps} inner steps")
        results["agreement"] += agreement(num_tasks, inner_steps)
        results["timings"] += time_size(num_tasks, inner_steps, rounds)
        jax.clear_caches()
    progress("temporaries of {} tasks, {} inner steps".format(*MEMORY_SIZE))
    results["temporaries"] = {"tasks": MEMORY_SIZE[0], "inner_steps": MEMORY_SIZE[1], "mb": temporaries_mb(*MEMORY_SIZE)}
    return results


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Sizes like "1x1,100x20" as (tasks, inner steps)."""
    sizes = []
    for part in text.split(","):
        tasks, _, steps = part.partition("x")
        if not (tasks.isdigit() and steps.isdigit() and int(tasks) and int(steps)):
            raise argparse.ArgumentTypeError(f"expected TASKSxINNER_STEPS like 100x20, got {part!r}")
        sizes.append((int(tasks), int(steps)))
    return sizes


def main() -> None:
    """Measures, prints the report, and writes data and report."""
    parser = argparse.ArgumentParser(description="Times one meta-step of the sine problem.")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--sizes", type=parse_sizes, default=list(SIZES), help="like 1x1,100x20")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="JSON file; the report has the same name with .md")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    devices.one_per_core()
    results = measure(arguments.sizes, arguments.rounds, functools.partial(print, flush=True))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(report.write(arguments.out))


if __name__ == "__main__":
    main()
