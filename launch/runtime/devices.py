"""One CPU device per core; `ml3_jax.sharding` distributes tasks over devices."""

import contextlib
import os

import jax

BY_FLAG = "xla_force_host_platform_device_count"  # in XLA_FLAGS, the older way to ask for CPU devices


def one_per_core(processes: int = 1) -> None:
    """Gives JAX one CPU device per core of this process, unless the environment sets their number.

    `processes` share the cores of this machine, each with at least one device. It must run before JAX starts a backend;
    afterwards it changes nothing. It starts no backend itself.
    """
    asked = "JAX_NUM_CPU_DEVICES" in os.environ or BY_FLAG in os.environ.get("XLA_FLAGS", "")
    if not asked:
        count = max(1, cores() // processes)
        with contextlib.suppress(RuntimeError):  # a backend has started
            jax.config.update("jax_num_cpu_devices", count)
            if processes > 1:  # XLA's threads: by default each process has one for every core, and they are in each other's way
                os.environ.setdefault("NPROC", str(count))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
