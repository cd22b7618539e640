"""Meta-training of several seeds under one vmap. On a GPU with enough memory it takes about as long as one seed."""

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
    """Meta-trains to the config's `meta_steps`, from the latest checkpoint if there is one.

    Args:
      experiment: the experiment.
      starts: [S] states before any meta-step.
      folder: for checkpoints of all seeds, or None.

    Returns:
      ([S] states, seconds for all of them with compilation).

    Raises:
      ValueError: the checkpoint has more meta-steps or another config.
    """
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    if folder is None:
        states, taken = _run(experiment, states, 0, 0.0, None)
    else:
        checkpoints = Checkpoints(folder)
        try:
            found = checkpoints.restore_latest(states)
            step, before = 0, 0.0
            if found is not None:
                step, states, about = found
                _check(folder, experiment.config, step, about["config"])
                before = about["seconds"]
                print(f"{folder}: going on from meta-step {step}", flush=True)
            states, taken = _run(experiment, states, step, before, checkpoints)
        finally:
            checkpoints.close()
    return [jax.tree.map(lambda leaf, seed=seed: leaf[seed], states) for seed in range(len(starts))], taken


def _run(
    experiment: Any, states: ml3_jax.MetaState, step: int, before: float, checkpoints: Checkpoints | None
) -> tuple[ml3_jax.MetaState, float]:
    """Trains from meta-step `step`, which took `before` seconds; returns the states and all seconds."""
    config = experiment.config
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
            checkpoints.save(step, states, {"seconds": taken, "config": _shared(config)})
            saved = time.monotonic()
    jax.block_until_ready(states)
    return states, before + time.monotonic() - began


def _check(folder: pathlib.Path, config: Any, step: int, found: dict[str, Any]) -> None:
    advice = "nothing was changed: name another folder"
    if found != _shared(config):
        raise ValueError(f"{folder}: expected states of config {_shared(config)}, found those of {found}; {advice}")
    if step > config.meta_steps:
        raise ValueError(f"{folder}: expected states of at most {config.meta_steps} meta-steps, found {step}; {advice}")


def _shared(config: Any) -> dict[str, Any]:
    """The config as JSON returns it. A resumed run may have another number of meta-steps."""
    return json.loads(json.dumps({**dataclasses.asdict(config), "meta_steps": None}))


@functools.lru_cache(maxsize=8)
def _advance(meta: ml3_jax.MetaLearner, count: int) -> Any:
    """states -> (states, metrics), with the axis of the seeds first."""
    return jax.jit(jax.vmap(lambda state: meta.run(state, count)), donate_argnums=0)
