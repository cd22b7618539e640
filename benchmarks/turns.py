"""Seconds of a meta-step of several learners that take turns, so that a slow moment of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import ml3_jax

BLOCK_SECONDS = 0.3  # of one timing, at least


def seconds(learners: Mapping[str, tuple[ml3_jax.MetaLearner, ml3_jax.MetaState]], rounds: int) -> dict[str, np.ndarray]:
    """{name: [rounds] seconds of a meta-step}; compilation is not in them."""
    blocks: dict[str, tuple[Callable[[int], float], int]] = {}
    for name, (meta, state) in learners.items():
        take = _taker(meta.step, state)
        take(1)  # compiles
        blocks[name] = take, max(1, round(BLOCK_SECONDS / take(1)))
    names, found = list(learners), {name: np.zeros(rounds) for name in learners}
    for index in range(rounds):
        shift = index % len(names)  # so that the first one changes
        for name in (*names[shift:], *names[:shift]):
            take, count = blocks[name]
            found[name][index] = take(count) / count
    return found


def temporaries(meta: ml3_jax.MetaLearner, state: ml3_jax.MetaState) -> float | None:
    """Megabytes that one compiled meta-step stores between its operations, by XLA's count; None if it has none."""
    analysis = jax.jit(meta.step).lower(state).compile().memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 1e6


def _taker(step: Callable[[Any], Any], state: Any) -> Callable[[int], float]:
    """count -> the seconds of that many meta-steps in a row."""

    def take(count: int) -> float:
        current, began = state, time.perf_counter()
        for _ in range(count):
            current, _ = step(current)
        jax.block_until_ready(current)
        return time.perf_counter() - began

    return take
