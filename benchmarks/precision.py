"""Time and agreement of a meta-step of the sine problem by the precision of its matrix products and of its inner loop.

    python -m benchmarks.precision [--sizes 100x20] [--rounds 5] [--out FILE.json]

"float32" and "tensorfloat32" are the products of `--config.precision`, "bfloat16" is `compute_dtype="bfloat16"` beside float32
products. A CPU has no TF32: the first two are one program there. Errors compare the meta-gradient from the same state with that
of "float32"; times are of `MetaLearner.run`.
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import machine, sine, timing
from benchmarks.meta_step import parse_sizes
from launch.runtime import devices, precision

RESULTS = machine.RESULTS / "precision.json"


class Variant(NamedTuple):
    """How a meta-step computes."""

    products: str  # of `launch.runtime.precision`
    compute_dtype: str | None = None


VARIANTS = {
    "float32": Variant("float32"),
    "tensorfloat32": Variant("tensorfloat32"),
    "bfloat16": Variant("float32", "bfloat16"),
}


def measure(num_tasks: int, inner_steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each variant: milliseconds of a meta-step, its speed beside float32, and the error of its meta-gradient."""
    takes, gradients = {}, {}
    state = _learner(None, num_tasks, inner_steps).init(jax.random.key(1))
    for name, variant in VARIANTS.items():
        run = precision.under(variant.products, _learner(variant.compute_dtype, num_tasks, inner_steps).run)
        gradients[name] = np.asarray(ravel_pytree(run(state, 1)[0].opt_state)[0], np.float64)
        takes[name] = timing.fused(run, state)
    seconds = timing.alternated(takes, rounds)
    exact = gradients["float32"]
    return [
        {
            "tasks": num_tasks,
            "inner_steps": inner_steps,
            "variant": name,
            "ms": 1e3 * float(np.median(seconds[name])),
            "times_as_fast": float(np.median(seconds["float32"] / seconds[name])),
            "error": float(np.linalg.norm(gradients[name] - exact) / np.linalg.norm(exact)),
            "cosine": float(gradients[name] @ exact / np.linalg.norm(gradients[name]) / np.linalg.norm(exact)),
        }
        for name in VARIANTS
    ]


def _learner(compute_dtype: str | None, num_tasks: int, inner_steps: int) -> Any:
    """A meta-learner whose optimizer is gradient descent, with the last meta-gradient as its state."""
    return sine.meta_learner(num_tasks, inner_steps, meta_optimizer=sine.keeps_gradient(), compute_dtype=compute_dtype)


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=parse_sizes, default=[(100, 20)], help="TASKSxINNER_STEPS, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    rows = []
    for num_tasks, inner_steps in arguments.sizes:
        rows += measure(num_tasks, inner_steps, arguments.rounds)
        print(*rows[-len(VARIANTS) :], sep="\n", flush=True)
        machine.write(arguments.out, {**machine.head("benchmarks.precision"), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
