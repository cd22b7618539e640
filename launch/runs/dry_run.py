"""What a meta-training would cost: compile time, time of a meta-step, memory. Nothing is written."""

import resource
import time
from collections.abc import Sequence
from typing import Any

import jax

from launch.errors import rejected_config
from launch.experiment import Experiment
from launch.runs import single_run
from ml3_jax import sharding


def report(experiment: Experiment, seeds: Sequence[int]) -> str:
    """Compiles and runs two blocks of `log_every` meta-steps of all seeds; returns lines about time and memory.

    Raises:
      UsageError: the config cannot be trained.
    """
    config: Any = experiment.config
    count = min(config.log_every, config.meta_steps)
    starts, seconds = [single_run.make_start(experiment, seed) for seed in seeds], []
    state, advance = starts[0], experiment.meta.run
    if len(seeds) > 1:
        state, advance = sharding.stack(starts), experiment.meta.run_seeds
    with rejected_config(experiment.name, "trained"):
        for _ in range(2):
            began = time.monotonic()
            state, _ = advance(state, count)
            jax.block_until_ready(state)
            seconds.append(time.monotonic() - began)
    first, step = seconds[0], seconds[1] / count
    compiling = max(first - seconds[1], 0.0)
    total = compiling + config.meta_steps * step
    devices = jax.local_devices()
    of_seeds = f" of {len(seeds)} seeds" if len(seeds) > 1 else ""
    owner = "the process" if devices[0].platform == "cpu" else "a device"
    return "\n".join(
        [
            f"devices: {len(devices)} of {devices[0].device_kind}",
            f"compile time: {compiling:.1f} s",
            f"one meta-step{of_seeds}: {_duration(step)} (mean of {count})",
            f"{config.meta_steps} meta-steps: about {_duration(total)}",
            f"peak memory: {_peak_memory() / 1e6:,.0f} MB of {owner}",
        ]
    )


def _peak_memory() -> int:
    """Bytes: the most that a device of this process had in use, on a CPU the process itself."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return max(peaks) if peaks else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _duration(seconds: float) -> str:
    if seconds < 1.0:
        return f"{1e3 * seconds:.3g} ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.3g} s"
