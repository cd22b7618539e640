"""The share of a meta-step that its matrix products alone would take, on the same devices and in the same run.

    python -m benchmarks.bare_products [--sizes 1x1,100x20] [--rounds 5] [--out FILE.json]

The bare program has the products of a meta-step of `benchmarks.sine` in their number and shapes, and nothing else: no
activation, bias, sum, random draw or update. Of one task they are

    an inner step      14: optimizee 3, learned loss 3 forward and 3 back, gradient of the optimizee 5
    the task loss       8: optimizee 3, its gradient 5
    an inner step back 36: forward over reverse of the inner step, less what does not depend on the direction

so 50 K + 8 for K inner steps. With K = 1 both passes share 10 products, here as in `ml3_jax`, and XLA computes them once.

Each product reads the result of an earlier one: none can be left out or moved out of a loop. All numbers are zero,
which costs as much and never overflows. The tasks are split over the devices, and on a CPU into chunks of the fastest size.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from benchmarks import machine, sine, timing
from benchmarks.meta_step import parse_sizes
from launch.runtime import devices

RESULTS = machine.RESULTS / "bare_products.json"
SIZES = ((1, 1), (100, 20))
FLOORS = {(1, 1): 0.5, (100, 20): 0.75}  # the aims of the share
CHUNKS = (1, 2, 5, 10, 25, 50)  # tasks at a time on a device
OPTIMIZEE = (1, *sine.WIDTHS)
LOSS = (2, *sine.HIDDEN, 1)
Weights = tuple[Array, ...]


def count(inner_steps: int) -> int:
    """Matrix products of one task in one meta-step."""
    return 50 * inner_steps + 8


def _forward(x: Array, weights: Weights) -> list[Array]:
    """The inputs of all layers and the output."""
    values = [x]
    for weight in weights:
        values.append(values[-1] @ weight)
    return values


def _backward(inputs: Sequence[Array], delta: Array, weights: Weights) -> Weights:
    """Gradients of all weights."""
    gradients = []
    for i in reversed(range(len(weights))):
        gradients.append(inputs[i].T @ delta)
        delta = delta @ weights[i].T if i else delta
    return tuple(reversed(gradients))


def _back_to_features(delta: Array, weights: Weights) -> list[Array]:
    """The derivatives at all layers' outputs, and that at the prediction."""
    deltas = [delta]
    for weight in reversed(weights):
        deltas.append(deltas[-1] @ weight.T)
    return [*deltas[:-1], deltas[-1][:, :1]]


def inner_step(params: Weights, phi: Weights, x: Array, y: Array) -> Weights:
    """The 14 products of an inner step; those of the weights' gradients are returned."""
    hidden = _forward(x, params)
    out = _forward(jnp.concatenate([hidden[-1], y], axis=1), phi)[-1]
    return _backward(hidden, _back_to_features(out, phi)[-1], params)


def task_loss(params: Weights, x: Array) -> Weights:
    """The 8 products of the task loss and of its gradient."""
    hidden = _forward(x, params)
    return _backward(hidden, hidden[-1], params)


def inner_step_back(params: Weights, direction: Weights, phi: Weights, x: Array, y: Array) -> tuple[Weights, list[Array]]:
    """The 36 products of the derivative of an inner step; (those of the new direction, all others that nothing reads).

    A tangent is a sum of products. Here each term goes on by itself, so that the sums are left out.
    """
    hidden = _forward(x, params)  # 3
    moved = _forward(x, direction)  # 3
    carried = _forward(moved[1], params[1:])  # 2
    features, slopes = (_forward(jnp.concatenate([end, y], axis=1), phi) for end in (hidden[-1], moved[-1]))  # 6
    deltas, moved_deltas = _back_to_features(features[-1], phi), _back_to_features(slopes[-1], phi)  # 6
    of_phi = []
    for i in range(len(phi)):  # 6
        of_phi += [features[i].T @ moved_deltas[len(phi) - 1 - i], slopes[i].T @ deltas[len(phi) - 1 - i]]
    new = _backward(hidden, moved_deltas[-1], params)  # 5
    last, other = deltas[-1], carried[-1]
    of_theta = [moved[2].T @ last]  # 1
    last, other = last @ params[2].T, other @ direction[2].T  # 2
    of_theta.append(carried[0].T @ last)  # 1
    return new, [*of_phi, *of_theta, other @ direction[1].T]  # 1


def one_task(phi: Weights, inner_steps: int, params: Weights, x: Array, y: Array) -> tuple[Weights, list[Array]]:
    """All products of one task in one meta-step."""

    def forward(params: Weights, _: None) -> tuple[Weights, Weights]:
        return inner_step(params, phi, x, y), params

    def backward(carry: tuple[Weights, Any], params: Weights) -> tuple[tuple[Weights, Any], None]:
        return inner_step_back(params, carry[0], phi, x, y), None

    params, stored = jax.lax.scan(forward, params, None, length=inner_steps, unroll=inner_steps == 1)
    direction = task_loss(params, x)
    unread = jax.tree.map(jnp.zeros_like, jax.eval_shape(inner_step_back, params, direction, phi, x, y)[1])
    carry, _ = jax.lax.scan(backward, (direction, unread), stored, reverse=True, unroll=inner_steps == 1)
    return carry


def make_run(num_tasks: int, inner_steps: int, chunk: int):
    """run(arrays, n): n bare meta-steps; tasks are split over as many devices as divide their number."""
    shards = max(n for n in range(1, len(jax.devices()) + 1) if num_tasks % n == 0)
    mesh = jax.make_mesh((shards,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:shards])
    split, shared = PartitionSpec("tasks"), PartitionSpec()

    def some_tasks(phi: Weights, arrays: Any) -> Any:
        return jax.vmap(functools.partial(one_task, phi, inner_steps))(*arrays)

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays: Any, steps: int) -> Any:
        def shard(phi: Weights, params: Weights, x: Array, y: Array) -> Any:
            if chunk == x.shape[0]:
                return some_tasks(phi, (params, x, y))
            chunked = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), (params, x, y))
            done = jax.lax.map(functools.partial(some_tasks, phi), chunked)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), done)

        on_devices = jax.shard_map(shard, mesh=mesh, in_specs=(shared, split, split, split), out_specs=split, check_vma=False)

        def meta_step(params: Weights, _: None) -> tuple[Weights, Any]:
            return on_devices(phi, params, x, y)

        phi, params, x, y = arrays
        params, unread = jax.lax.scan(meta_step, params, None, length=steps)
        return params, jax.tree.map(lambda leaf: leaf[-1], unread)

    return run


def arrays_of(num_tasks: int) -> Any:
    """Zeros for phi, the optimizees, inputs and targets."""
    phi = tuple(jnp.zeros(shape) for shape in itertools.pairwise(LOSS))
    params = tuple(jnp.zeros((num_tasks, *shape)) for shape in itertools.pairwise(OPTIMIZEE))
    return phi, params, *(jnp.zeros((num_tasks, sine.SAMPLES, 1)) for _ in range(2))


def flops(num_tasks: int, inner_steps: int) -> float:
    """Floating-point operations of the products of one meta-step, from the shapes in its program."""
    phi, params, x, y = (jax.tree.map(lambda leaf, i=i: leaf[0] if i else leaf, part) for i, part in enumerate(arrays_of(1)))
    parts = (
        (inner_steps, inner_step, (params, phi, x, y)),
        (1, task_loss, (params, x)),
        (inner_steps, inner_step_back, (params, params, phi, x, y)),
    )
    return num_tasks * sum(times * sum(map(_flops, products(function, *args))) for times, function, args in parts)


def products(function: Any, *args: Any) -> list[Any]:
    """The matrix products of a function without loops, as equations."""
    return [one for one in jax.make_jaxpr(function)(*args).jaxpr.eqns if one.primitive.name == "dot_general"]


def _flops(product: Any) -> float:
    (contracted, _), _ = product.params["dimension_numbers"]
    length = np.prod([product.invars[0].aval.shape[axis] for axis in contracted])
    return 2.0 * float(length * np.prod(product.outvars[0].aval.shape))


def measure(num_tasks: int, inner_steps: int, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of `run` and of the bare products of a meta-step, and their ratio."""
    shards = max(n for n in range(1, len(jax.devices()) + 1) if num_tasks % n == 0)
    on_one = num_tasks // shards
    arrays, length = arrays_of(num_tasks), timing.loop_length(num_tasks, inner_steps)
    chunks = {on_one} if jax.default_backend() != "cpu" else {*(c for c in CHUNKS if on_one % c == 0), on_one}
    bare = {chunk: timing.fused(make_run(num_tasks, inner_steps, chunk), arrays, length) for chunk in sorted(chunks)}
    first = timing.alternated({str(chunk): take for chunk, take in bare.items()}, rounds=2)
    best = min(bare, key=lambda chunk: first[str(chunk)].min())
    meta = sine.meta_learner(num_tasks, inner_steps)
    takes = {"run": timing.fused(meta.run, meta.init(jax.random.key(0)), length), "bare": bare[best]}
    seconds = timing.alternated(takes, rounds)
    return {
        "tasks": num_tasks,
        "inner_steps": inner_steps,
        "products": num_tasks * count(inner_steps),
        "chunk": best,
        "ms": {name: 1e3 * float(np.median(values)) for name, values in seconds.items()},
        "gflop_per_s": flops(num_tasks, inner_steps) / float(np.median(seconds["bare"])) / 1e9,
        "share": float(np.median(seconds["bare"] / seconds["run"])),
        "floor": FLOORS.get((num_tasks, inner_steps)),
    }


def main() -> None:
    """Measures, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=parse_sizes, default=list(SIZES), help="TASKSxINNER_STEPS, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    devices.one_per_core()
    rows = []
    for num_tasks, inner_steps in arguments.sizes:
        rows.append(measure(num_tasks, inner_steps, arguments.rounds))
        print(rows[-1], flush=True)
        machine.write(arguments.out, {**machine.head("benchmarks.bare_products"), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
