"""A CPU device for each core: what works on many tasks shares them out among devices (`ml3_jax.sharding`)."""

import contextlib
import os

import jax

BY_FLAG = "xla_force_host_platform_device_count"  # in XLA_FLAGS, the older way to ask for CPU devices


def one_per_core() -> None:
    """Gives JAX as many CPU devices as this process has cores, unless the environment asks for a number of them.

    To be called before anything asks JAX for a device; afterwards it changes nothing. It starts no backend.
    """
    asked = "JAX_NUM_CPU_DEVICES" in os.environ or BY_FLAG in os.environ.get("XLA_FLAGS", "")
    if not asked:
        with contextlib.suppress(RuntimeError):  # too late: the devices are there
            jax.config.update("jax_num_cpu_devices", cores())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
