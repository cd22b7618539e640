"""Bias, variance, memory and time of the estimators of the meta-gradient, on inner loops of 100 steps.

    python -m benchmarks.estimators [--loops 400] [--rounds 5]

Sines as in `benchmarks.sine`, with a smaller optimizee and a smaller learned loss, which stays as it was initialised. The
objective is the mean task loss over all inner steps. Its exact gradient is that of backpropagation through whole inner loops,
as a mean over many more tasks. It writes benchmarks/results/estimators.json.
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ml3_jax
from benchmarks import machine, sine, timing
from launch.runtime import devices
from ml3_jax import chunks, estimators
from ml3_jax.networks import MLP
from ml3_jax.problems.supervised import make_problem

RESULTS = machine.RESULTS / "estimators.json"
PROBLEM = make_problem(MLP((20, 1)), sine.sample_task)
LOSS = ml3_jax.losses.mlp((8,), activation="tanh")
INNER_LR = 0.01
SIGMA = 0.03
TASKS = 10
REFERENCE_LOOPS = 5  # inner loops of the exact gradient, in those of a row
BLOCKS = 20  # means over so many parts of a row give its sampling error


class Row(NamedTuple):
    """An estimator and the length of its unroll."""

    estimator: str
    truncated: bool
    pairs: int | None = None


ROWS = (
    Row("backprop", False),
    Row("backprop", True),
    Row("es", False, 4),
    Row("es", True, 4),
    Row("pes", True, 4),
    Row("pes", True, 16),
)
# The state of this optimizer is the last meta-gradient, and phi stays.
KEEPS_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


class Sampled(NamedTuple):
    """Meta-gradients of one row."""

    mean: np.ndarray  # [D]
    error: float  # norm of the standard error of the mean
    variance: float  # of one meta-gradient, summed over its D numbers


def learner(row: Row, inner_steps: int, unroll: int) -> ml3_jax.MetaLearner:
    """The meta-learner of a row; all rows have the same phi."""
    phi = LOSS.init(jax.random.key(5), 2)
    settings = () if row.pairs is None else (SIGMA, row.pairs)
    return ml3_jax.make_meta_learner(
        PROBLEM,
        LOSS._replace(init=lambda key, features: phi),
        inner_optimizer=optax.sgd(INNER_LR),
        meta_optimizer=KEEPS_GRADIENT,
        num_tasks=TASKS,
        inner_steps=inner_steps,
        unroll=unroll if row.truncated else None,
        estimator=estimators.ESTIMATORS[row.estimator](*settings),
        objective="mean",
    )


def sample(meta: ml3_jax.MetaLearner, seed: int, loops: int, unrolls: int) -> Sampled:
    """Meta-gradients of `loops` inner loops a task, each of `unrolls` meta-steps, after one that staggers their ages."""

    def step(state: ml3_jax.MetaState, _: None) -> tuple[ml3_jax.MetaState, jax.Array]:
        after = meta.step(state)[0]
        return after, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(after.opt_state)])

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        return jax.lax.scan(step, meta.init(key), length=(1 + loops) * unrolls)[1][unrolls:]

    found = np.asarray(run(jax.random.key(seed)), dtype=np.float64)
    # Meta-gradients of one inner loop depend on each other; the means of long parts hardly do.
    parts = found.reshape(BLOCKS, -1, found.shape[1]).mean(axis=1)
    error = np.sqrt(parts.var(axis=0, ddof=1).sum() / BLOCKS)
    return Sampled(found.mean(axis=0), float(error), float(found.var(axis=0, ddof=1).sum()))


def measure(inner_steps: int, unroll: int, loops: int, rounds: int, rows: tuple[Row, ...] = ROWS) -> list[dict[str, Any]]:
    """Measures the rows; the first one is the measure of the times.

    Args:
      inner_steps: of an inner loop.
      unroll: inner steps of a truncated meta-gradient.
      loops: inner loops a task in each row, so that all rows take as many inner steps; a multiple of BLOCKS.
      rounds: rounds of the timings.
      rows: what to measure.
    """
    learners = {str(index): learner(row, inner_steps, unroll) for index, row in enumerate(rows)}
    states = {index: meta.init(jax.random.key(0)) for index, meta in learners.items()}
    exact = sample(learner(ROWS[0], inner_steps, unroll), 1, REFERENCE_LOOPS * loops, 1)
    norm = float(np.linalg.norm(exact.mean))
    seconds = timing.alternated({index: timing.stepping(meta.step, states[index]) for index, meta in learners.items()}, rounds)
    measured = []
    for row, (index, meta) in zip(rows, learners.items(), strict=True):
        found = sample(meta, 2, loops, inner_steps // unroll if row.truncated else 1)
        measured.append(
            {
                "estimator": row.estimator,
                "pairs": row.pairs,
                "unroll": unroll if row.truncated else inner_steps,
                "inner_steps": inner_steps,
                "bias": float(np.linalg.norm(found.mean - exact.mean)) / norm,
                "bias_error": float(np.hypot(found.error, exact.error)) / norm,
                "cosine": float(found.mean @ exact.mean / (np.linalg.norm(found.mean) * norm)),
                "variance": found.variance / norm**2,
                "mb_temporaries": timing.temporaries_mb(jax.jit(meta.step).lower(states[index]).compile()),
                "mb_state": chunks.tree_bytes(states[index]) / 1e6,
                "ms": 1e3 * float(np.median(seconds[index])),
                "times_backprop": float(np.median(seconds[index] / seconds["0"])),
            }
        )
        print(measured[-1], flush=True)
    return measured


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--loops", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    rows = measure(100, 10, arguments.loops, arguments.rounds)
    content = {
        **machine.head("benchmarks.estimators"),
        "loops": arguments.loops,
        "rounds": arguments.rounds,
        "tasks": TASKS,
        "sigma": SIGMA,
        "loss_parameters": sum(leaf.size for leaf in jax.tree.leaves(LOSS.init(jax.random.key(5), 2))),
        "rows": rows,
    }
    machine.write(arguments.out, content)


if __name__ == "__main__":
    main()
