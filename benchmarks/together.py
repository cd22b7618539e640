"""Meta-training of several seeds under one vmap: on a GPU it takes about as long as one of them, if they leave it room."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ml3_jax
from ml3_jax.checkpoint import Checkpoints

SAVE_AFTER = 30.0  # seconds since the last checkpoint


def train(
    experiment: Any, starts: Sequence[ml3_jax.MetaState], folder: pathlib.Path | None = None
) -> tuple[list[ml3_jax.MetaState], float]:
    """(states at the config's meta_steps, seconds that all of them took, compilation included).

    Args:
      experiment: what is meta-trained.
      starts: the seeds' states before any meta-step.
      folder: where checkpoints of all states together are kept and gone on from, or None.

    Raises:
      ValueError: the folder's states went further, or are of another config.
    """
    config = experiment.config
    # As JSON gives it back; how far to go is no part of what a run that is gone on with must share.
    settings = json.loads(json.dumps({**dataclasses.asdict(config), "meta_steps": None}))
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    step, before = 0, 0.0
    checkpoints = None if folder is None else Checkpoints(folder)
    try:
        found = None if checkpoints is None else checkpoints.restore_latest(states)
        if found is not None:
            step, states, about = found
            before = about["seconds"]
            if about["config"] != settings:
                raise ValueError(
                    f"{folder}: expected states of config {settings}, found those of {about['config']}; nothing was changed: "
                    "name another folder"
                )
            if step > config.meta_steps:
                raise ValueError(
                    f"{folder}: expected states of at most {config.meta_steps} meta-steps, found {step}; nothing was changed: "
                    "name another folder"
                )
            print(f"{folder}: going on from meta-step {step}", flush=True)
        began = saved = time.monotonic()
        while step < config.meta_steps:
            count = min(config.log_every, config.meta_steps - step)
            states, latest = _advance(experiment.meta, count)(states)
            step += count
            losses = np.asarray(latest.task_loss).mean(axis=1)
            taken = before + time.monotonic() - began
            print(f"meta-step {step} of {config.meta_steps}, {taken:.0f} s, task losses {np.round(losses, 3)}", flush=True)
            done = step == config.meta_steps
            if checkpoints is not None and (done or time.monotonic() - saved > SAVE_AFTER):
                checkpoints.save(step, states, {"seconds": taken, "config": settings})
                saved = time.monotonic()
        jax.block_until_ready(states)
        taken = before + time.monotonic() - began
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return [_of_seed(states, seed) for seed in range(len(starts))], taken


def _of_seed(states: ml3_jax.MetaState, seed: int) -> ml3_jax.MetaState:
    return jax.tree.map(lambda leaf: leaf[seed], states)


@functools.lru_cache(maxsize=8)
def _advance(meta: ml3_jax.MetaLearner, count: int) -> Any:
    """states -> (states, metrics), each leaf with the axis of the seeds first."""
    return jax.jit(jax.vmap(lambda state: meta.run(state, count)), donate_argnums=0)
