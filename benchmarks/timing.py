"""Warm timings in turn: a busy machine slows all programs of a round alike, so ratios are taken within a round."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Take = Callable[[int], float]  # number of meta-steps -> seconds for all of them
BLOCK_SECONDS = 0.3  # the approximate length of one turn


def stepping(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Take:
    """Meta-steps one after the other from Python; the last one is waited for."""

    def take(count: int) -> float:
        current, began = state, time.perf_counter()
        for _ in range(count):
            current, _ = step(current)
        jax.block_until_ready(current)
        return time.perf_counter() - began

    return take


def fused(run: Callable[[Any, int], Any], state: Any, length: int = 1) -> Take:
    """Meta-steps in compiled loops of `length`, such as `MetaLearner.run`: one program for any number of them."""

    def take(count: int) -> float:
        calls, began = max(1, round(count / length)), time.perf_counter()
        for _ in range(calls):
            done = run(state, length)
        jax.block_until_ready(done)
        return (time.perf_counter() - began) * count / (calls * length)

    return take


def loop_length(num_tasks: int, inner_steps: int) -> int:
    """Meta-steps of one compiled loop: many where they are so short that a call from Python would count."""
    return max(1, min(50, 2000 // (num_tasks * inner_steps)))


def alternated(takes: Mapping[str, Take], rounds: int, block: float = BLOCK_SECONDS) -> dict[str, np.ndarray]:
    """{name: [rounds] seconds of one meta-step}, without compilation. The program that goes first changes with the round."""
    counts, names = {}, list(takes)
    for name, take in takes.items():
        take(1)  # compiles
        counts[name] = max(1, round(block / take(1)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(takes[name](counts[name]) / counts[name])
    return {name: np.array(values) for name, values in seconds.items()}


def temporaries_mb(compiled: Any) -> float | None:
    """Megabytes of temporaries that the compiler plans for a compiled program; None where it does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 1e6
