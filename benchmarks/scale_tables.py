"""The tables of docs/scale.md: several processes of one machine beside the cost model, and its predictions for many devices."""

import json
from typing import Any

import jax

from benchmarks import cost_model, processes, transformer
from benchmarks.speed_tables import read, table
from ml3_jax.inner import trace_features

NETWORK = cost_model.Network(latency=1e-5, bandwidth=1e10)  # assumed: within a rack
NUMBERS_OF_DEVICES = (8, 64, 1024)
SPEEDS = (1, 100)  # of a device, beside one core of the machine that was measured


def _content() -> dict[str, Any]:
    return json.loads(processes.RESULTS.read_text())


def measured() -> str:
    """Milliseconds of a meta-step by processes and devices, and what the model predicts."""
    content = _content()
    programs = [program.name for program in processes.PROGRAMS]
    rows = [["meta-step", "", *programs]]
    for name, part in content["works"].items():
        if "predicted_ms" not in part:
            continue
        rows.append([name, "measured, ms", *(f"{part['ms'][program]:.3g}" for program in programs)])
        rows.append(["", "model, ms", *(f"{part['predicted_ms'][program]:.3g}" for program in programs)])
        rows.append(["", "speed beside 1 x 2", *(f"{part['speed'][program]:.2f}" for program in programs)])
    return table(rows) + f"\n{content['device']}, jax {content['jax']}, medians of {content['rounds']} rounds.\n"


def predictions() -> str:
    """The model's efficiency on many devices."""
    content = _content()
    heads = [
        f"{'same tasks' if same else 'tasks x devices'}, {count}" for same in (True, False) for count in NUMBERS_OF_DEVICES
    ]
    rows = [["meta-step", "tasks", "phi, kB", "device", *heads]]
    for name, part in {**content["model"], "transformer, 10 M parameters": _transformer("10 M")}.items():
        for speed in SPEEDS:
            compute = cost_model.Compute(part["fixed_ms"] / 1e3 / speed, part["task_ms"] / 1e3 / speed, part["phi_bytes"])
            shares = [
                _efficiency(compute, part["num_tasks"], count, same=same)
                for same in (True, False)
                for count in NUMBERS_OF_DEVICES
            ]
            rows.append([name, str(part["num_tasks"]), f"{part['phi_bytes'] / 1e3:.3g}", str(speed), *shares])
    return table(rows)


def _transformer(size: str) -> dict[str, Any]:
    """The parameters of the model for `benchmarks.large_optimizees`, whose meta-steps have one task."""
    rows = read("large_optimizees")["rows"]
    row = next(r for r in rows if (r["size"], r["optimizer"], r["scheduler"], r["mode"]) == (size, "SGD", "default", "mixed"))
    problem, key = transformer.make_problem(transformer.SHAPES[size]), jax.random.key(0)
    task = jax.eval_shape(problem.sample_task, key, None)
    features = trace_features(problem, jax.eval_shape(problem.init, key, task), task, None, key)
    phi = jax.eval_shape(transformer.learned_loss().init, key, features)
    phi_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(phi))
    return {"num_tasks": 1, "fixed_ms": 0.0, "task_ms": 1e3 * row["seconds"], "phi_bytes": phi_bytes}


def _efficiency(compute: cost_model.Compute, num_tasks: int, num_devices: int, *, same: bool) -> str:
    if same:
        return f"{cost_model.efficiency(compute, NETWORK, num_tasks, num_devices):.2f}"
    one = cost_model.seconds(compute, NETWORK, num_tasks, 1)
    return f"{one / cost_model.seconds(compute, NETWORK, num_tasks * num_devices, num_devices):.2f}"
