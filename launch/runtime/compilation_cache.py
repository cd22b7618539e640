"""The persistent compilation cache of XLA: a second run of an experiment starts in seconds."""

import os
import pathlib

import jax

SWITCH = "ML3_JAX_COMPILATION_CACHE"  # a folder; "0": no cache; unset: below the user's cache folder


def enable() -> pathlib.Path | None:
    """Turns the cache on if it can be written, unless an environment variable of JAX or `SWITCH` says otherwise.

    Returns:
      The folder, or None if the cache is off.
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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else a moved folder never hits
    return folder
