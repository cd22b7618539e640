"""The persistent compilation cache of XLA: a second run of an experiment starts in seconds."""

import importlib.util
import os
import pathlib

import jax

SWITCH = "ML3_JAX_COMPILATION_CACHE"  # a folder; "0": no cache; unset: below the user's cache folder
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
PLATFORMS = "jax_platforms"
AUTOTUNING = "xla_gpu_per_fusion_autotune_cache_dir"


def enable() -> pathlib.Path | None:
    """Turns the cache on, unless it cannot be written or an environment variable of JAX or `SWITCH` says otherwise.

    Returns the folder, or None if the cache is off.
    """
    wish = os.environ.get(SWITCH)
    if wish in ("0", "") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(wish) if wish else pathlib.Path(base) / "ml3_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder, or no permission: the run works without a cache
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", AUTOTUNING if expects_gpu() else "none")
    return folder


def expects_gpu() -> bool:
    """Whether JAX will look for a GPU: it has a plugin for one, and was not told to leave it alone. Starts no backend.

    A GPU then keeps how it chose its kernels, beside whole programs: it times candidates while it compiles, and another choice
    means other last digits. The price is that a cache in a moved folder has no hits, as its path becomes part of the key. A
    CPU times nothing and need not pay it.
    """
    asked: str | None = getattr(jax.config, PLATFORMS)
    if asked:
        return any(name in ("cuda", "gpu") for name in asked.split(","))
    return any(importlib.util.find_spec(name) is not None for name in GPU_PLUGINS)
