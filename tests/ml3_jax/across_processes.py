"""What `in_processes` computes: meta-steps, seeds and checkpoints over all processes of a program."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import ml3_jax
from ml3_jax import sharding
from ml3_jax.checkpoint import Checkpoints
from tests.ml3_jax import on_two_devices, toys

NAMES = ("carried inner state", "refreshed context", "score function")
SEEDS = 2


def start(meta: ml3_jax.MetaLearner, name: str, seed: int = 0) -> ml3_jax.MetaState:
    """A first state; the context of a learner without one is None."""
    return meta.init(jax.random.key(seed), jnp.zeros(()) if "context" in name else None)


def computed(name: str) -> dict[str, np.ndarray]:
    """{name of a number: its value}: after one meta-step, and after one of several seeds."""
    meta = on_two_devices.make(name)
    found: dict[str, Any] = {
        "one": meta.run(start(meta, name), 1),
        "seeds": meta.run_seeds(sharding.stack([start(meta, name, seed) for seed in range(SEEDS)]), 1),
    }
    leaves = jax.tree_util.tree_leaves_with_path(sharding.local(found))
    return {
        f"{name} {jax.tree_util.keystr(path)}": np.asarray(leaf)
        for path, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def check_files(number: int, count: int, folder: pathlib.Path) -> None:
    """Saves a checkpoint and a loss, and reads them and those of programs with other numbers of processes."""
    meta = on_two_devices.make("carried inner state")
    before, _ = meta.run(start(meta, ""), 2)
    checkpoints = Checkpoints(folder / f"checkpoints_{count}")
    checkpoints.save(2, before, {"said": count})
    checkpoints.close()
    for other in sorted(folder.glob("checkpoints_*")):
        reader = Checkpoints(other, read_only=True)
        found = reader.restore_latest(start(meta, ""))
        reader.close()
        assert found is not None
        toys.assert_close(sharding.local(found[1]), sharding.local(before))
        meta.run(found[1], 1)
    loss, path = ml3_jax.losses.mlp(hidden=(3,)), folder / f"loss_{count}"
    loss_params = loss.init(jax.random.key(0), 2)
    if number == 0:
        ml3_jax.save(path, loss, loss_params)
    multihost_utils.sync_global_devices("saved")
    toys.assert_same(ml3_jax.restore(path)[1], loss_params)


def main(number: int, count: int, folder: pathlib.Path) -> None:
    """Computes and checks everything; the first process writes the numbers."""
    assert (len(jax.devices()), jax.local_device_count()) == (count, 1)
    numbers = {path: value for name in NAMES for path, value in computed(name).items()}
    check_files(number, count, folder)
    if number == 0:
        np.savez(folder / f"{count}.npz", allow_pickle=False, **numbers)
