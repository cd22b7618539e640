"""Task loss and meta-gradient of one meta-step of each experiment, to compare two versions of the code.

    python -m benchmarks.one_meta_step dump FILE.npz [EXPERIMENT ...]
    python -m benchmarks.one_meta_step compare OLD.npz NEW.npz [--tolerance=1e-5]

Run `dump` in both versions on the same machine. `compare` prints relative errors and fails if one exceeds the tolerance. The
experiments are smaller than their defaults, and start from the same random keys. Gradient descent with step size 1 makes the
change of the learned parameters the meta-gradient.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from launch import experiments

KEY = 3
GRADIENT_DESCENT = {"meta_optimizer": "sgd", "meta_lr": 1.0, "meta_clip": 0.0, "meta_decay_steps": 0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "sine": {},
    "digits": {"inner_steps": 5, "num_tasks": 4},
    "shaped_sine": {},
    "few_shot_sine": {},
    "point_mass_mbrl": {"num_tasks": 4, "fit_steps": 50},
    "reacher_mbrl": {"num_tasks": 4, "fit_steps": 50},
    "mountain_car": {"num_tasks": 2},
    "reacher_mfrl": {"num_tasks": 2, "horizon": 20},
    "reacher_expert": {"num_tasks": 2, "horizon": 20, "expert_goals": 4, "expert_starts": 2},
    "inverse_dynamics": {},
    "ant_mfrl": {"num_tasks": 2, "horizon": 10, "inner_steps": 2, "unroll": 2},
}


class Row(NamedTuple):
    """Relative errors of one experiment; infinite where it or its parameters are not in both files."""

    name: str
    task_loss: float
    gradient: float  # in the Euclidean norm

    def within(self, tolerance: float) -> bool:
        """Whether both errors are at most the tolerance."""
        return max(self.task_loss, self.gradient) <= tolerance


def one_step(name: str) -> dict[str, np.ndarray]:
    """{"task_loss": [], "grad": [P]} of an experiment, after its `refresh` where it has one.

    Raises:
      RuntimeError: the meta-gradient is not finite.
    """
    experiment = experiments.build(name, OVERRIDES[name] | GRADIENT_DESCENT)
    state = experiment.meta.init(jax.random.key(KEY), experiment.context)
    if experiment.problem.refresh is not None:
        state = experiment.meta.refresh(state)
    after, metrics = experiment.meta.step(state)
    if bool(metrics.skipped):
        raise RuntimeError(f"{name}: expected a finite meta-gradient, got norm {float(metrics.meta_grad_norm)}")
    parts = [(one.loss_params, one.init_params, one.optimizer_params) for one in (state, after)]
    old, new = (np.asarray(ravel_pytree(part)[0], np.float64) for part in parts)
    return {"task_loss": np.asarray(metrics.task_loss), "grad": old - new}


def dump(path: str, names: Sequence[str]) -> None:
    """Writes {EXPERIMENT/task_loss, EXPERIMENT/grad} to an .npz file."""
    arrays = {}
    for name in names:
        began = time.monotonic()
        found = one_step(name)
        arrays |= {f"{name}/{part}": value for part, value in found.items()}
        norm, seconds = np.linalg.norm(found["grad"]), time.monotonic() - began
        print(f"{name}: task loss {found['task_loss']:.6g}, gradient norm {norm:.6g}, {seconds:.1f} s", flush=True)
    np.savez(path, **arrays)


def compare(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> list[Row]:
    """One row per experiment of either dump."""
    names = dict.fromkeys(key.rpartition("/")[0] for arrays in (old, new) for key in arrays)
    return [Row(name, *(_error(old, new, f"{name}/{part}") for part in ("task_loss", "grad"))) for name in names]


def _error(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], key: str) -> float:
    if key not in old or key not in new or old[key].shape != new[key].shape:
        return np.inf
    error = float(np.linalg.norm(old[key] - new[key]) / max(1e-12, float(np.linalg.norm(old[key]))))
    return error if np.isfinite(error) else np.inf


def main() -> int:
    """Reads the command line; returns 1 where two dumps differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump")
    dumping.add_argument("path")
    dumping.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(OVERRIDES))
    comparing = commands.add_parser("compare")
    comparing.add_argument("old")
    comparing.add_argument("new")
    comparing.add_argument("--tolerance", type=float, default=1e-5)
    arguments = parser.parse_args()
    if arguments.command == "dump":
        unknown = sorted(set(arguments.names) - set(OVERRIDES))
        if unknown:
            parser.error(f"expected names among {', '.join(OVERRIDES)}, got {', '.join(unknown)}")
        dump(arguments.path, arguments.names or list(OVERRIDES))
        return 0
    rows = compare(np.load(arguments.old), np.load(arguments.new))
    for row in rows:
        agrees = "agrees" if row.within(arguments.tolerance) else "DIFFERS"
        print(f"{row.name:20s} task loss {row.task_loss:.1e}  meta-gradient {row.gradient:.1e}  {agrees}")
    return 0 if all(row.within(arguments.tolerance) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
