"""The tables of docs/benchmarks.md, each from the JSON file of one part of `benchmarks.all`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import large_optimizees as large_optimizees_benchmark
from benchmarks import machine, report
from benchmarks.meta_step import FUNC, OTHERS, PLAIN, RELEASED, TORCHOPT
from ml3_jax.types import GRADIENT_MODES


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    return "\n".join(report.table(rows)) + "\n"


def read(part: str) -> dict[str, Any]:
    """The data of a part."""
    return json.loads((machine.RESULTS / f"{part}.json").read_text())


def speed() -> str:
    """How many times as fast as other loops a meta-step is."""
    content = read("meta_step")
    rows = [["tasks x inner steps", "ms, `step`", "ms, `run`", *(f"`run` against {name}" for name in OTHERS)]]
    timings = {(row["tasks"], row["inner_steps"], row["implementation"]): row for row in content["timings"]}
    for tasks, steps in _sizes(content["timings"]):
        step, run = (timings[tasks, steps, f"ml3_jax {name}"] for name in ("step", "run"))
        milliseconds = [f"{one['ms']['median']:.3g}" for one in (step, run)]
        rows.append([f"{tasks} x {steps}", *milliseconds, *(_ratio(run, name) for name in OTHERS)])
    return table(rows)


def _ratio(run: dict[str, Any], name: str) -> str:
    if name in run["speed"]:
        return f"{run['speed'][name]['median']:.3g} x"
    return {RELEASED: "no PyTorch", FUNC: "no PyTorch", TORCHOPT: "not installed", PLAIN: ""}[name]


def memory() -> str:
    """Temporaries of a meta-step."""
    kept = read("meta_step")["temporaries"]
    return table(
        [
            [f"MB, {kept['tasks']} tasks x {kept['inner_steps']} inner steps", *kept["mb"]],
            ["temporaries", *(f"{megabytes:.1f}" for megabytes in kept["mb"].values())],
        ]
    )


def bare_products() -> str:
    """The share of a meta-step that its matrix products alone would take."""
    rows = [["tasks x inner steps", "products", "ms, `run`", "ms, products alone", "share", "aim", "GFLOP/s of the products"]]
    for row in read("bare_products")["rows"]:
        share, aim = f"{row['share']:.2f}", "" if row["floor"] is None else f"at least {row['floor']:g}"
        milliseconds = [f"{row['ms'][name]:.3g}" for name in ("run", "bare")]
        rows.append(
            [
                f"{row['tasks']} x {row['inner_steps']}",
                f"{row['products']:,}",
                *milliseconds,
                share,
                aim,
                f"{row['gflop_per_s']:.0f}",
            ]
        )
    return table(rows)


def gradient_modes() -> str:
    """Memory and time of a meta-step by gradient mode."""
    content = read("gradient_modes")
    modes = list(dict.fromkeys(row["mode"] for row in content["rows"]))
    by_size = {(row["tasks"], row["inner_steps"], row["mode"]): row for row in content["rows"]}
    rows = [["tasks x inner steps", *(f"MB, {mode}" for mode in modes), *(f"ms, {mode}" for mode in modes)]]
    for tasks, steps in _sizes(content["rows"]):
        of_size = [by_size[tasks, steps, mode] for mode in modes]
        rows.append([f"{tasks} x {steps}", *(f"{row['mb']:.1f}" for row in of_size), *(f"{row['ms']:.3g}" for row in of_size)])
    return table(rows)


def precision() -> str:
    """Time and agreement by precision."""
    rows = [
        [
            "tasks x inner steps",
            "precision",
            "ms, `run`",
            "times as fast as float32",
            "error of the meta-gradient",
            "1 - cosine",
        ]
    ]
    for row in read("precision")["rows"]:
        shown = [f"{row['ms']:.3g}", f"{row['times_as_fast']:.2f} x", f"{row['error']:.1e}", f"{1.0 - row['cosine']:.1e}"]
        rows.append([f"{row['tasks']} x {row['inner_steps']}", row["variant"], *shown])
    return table(rows)


def scaling_tasks() -> str:
    """Time and memory against tasks."""
    rows = [["tasks", "ms, `run`", "ms a task", "MB on one device"]]
    for row in read("scaling_tasks")["rows"]:
        rows.append([f"{row['tasks']:,}", f"{row['ms']:.3g}", f"{row['ms_a_task']:.3g}", f"{row['mb']:.1f}"])
    return table(rows)


def scaling_seeds() -> str:
    """Time and memory against seeds under one vmap."""
    rows = [["seeds", "ms for all", "times one seed", "MB"]]
    for row in read("scaling_seeds")["rows"]:
        rows.append([str(row["seeds"]), f"{row['ms']:.3g}", f"{row['times_one']:.2f} x", f"{row['mb']:.1f}"])
    return table(rows)


def throughput() -> str:
    """Meta-steps a second of each experiment."""
    rows = [["experiment", "tasks", "inner steps of a meta-step", "meta-steps a second", "minutes for the default training"]]
    for row in read("throughput")["rows"]:
        rate = row["meta_steps_a_second"]
        numbers = [str(row["tasks"]), str(row["unroll"]), f"{rate:.3g}", f"{row['meta_steps'] / rate / 60:.2g}"]
        rows.append([f"`{row['experiment']}`", *numbers])
    return table(rows)


def startup() -> str:
    """Cold and warm start."""
    parts = ("process", "compiling", "tracing", "lowering")
    rows = [["launch", "start", *(f"s, {part}" for part in parts), "programs compiled", "compilation saved"]]
    for row in read("startup")["rows"]:
        for kind in ("cold", "warm"):
            seconds = [f"{row[kind][part]:.1f}" for part in parts]
            saved = f"{row['saved']:.0%}" if kind == "warm" else ""
            rows.append([f"`{row['job']}`" if kind == "cold" else "", kind, *seconds, f"{row[kind]['programs']:.0f}", saved])
    return table(rows)


def measured_on() -> str:
    """The device, the version and the command of each table."""
    rows = [["table", "device", "jax", "load at the start", "command"]]
    for part in ("bare_products", "precision", "gradient_modes", "scaling_tasks", "scaling_seeds", "throughput", "startup"):
        content = read(part)
        load, command = content.get("load_average", ""), content.get("command", f"python -m benchmarks.{part}")
        cells = [content["device"], content["jax"], str(load), f"`{command}`"]
        rows.append([part, *cells])
    return table(rows)


def _sizes(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["tasks"], row["inner_steps"]) for row in rows))


def estimators() -> str:
    """Bias, variance, memory and time of each estimator."""
    head = ["estimator", "pairs", "unroll", "bias", "its sampling error", "cosine", "variance"]
    rows = [[*head, "MB, temporaries", "MB, state", "ms", "times backprop"]]
    for row in read("estimators")["rows"]:
        accuracy = [f"{row[name]:.2f}" for name in ("bias", "bias_error", "cosine")]
        megabytes = [f"{row[name]:.2g}" for name in ("mb_temporaries", "mb_state")]
        costs = [*megabytes, f"{row['ms']:.3g}", f"{row['times_backprop']:.2g}"]
        steps = f"{row['unroll']} of {row['inner_steps']}"
        rows.append([row["estimator"], str(row["pairs"] or ""), steps, *accuracy, f"{row['variance']:.2g}", *costs])
    return table(rows)


def large_optimizees() -> str:
    """Temporaries of a meta-step in copies of the optimizee, beside one step's activations, and seconds, by gradient mode."""
    found = {(row["size"], row["optimizer"], row["scheduler"], row["mode"]): row for row in read("large_optimizees")["rows"]}
    variants = large_optimizees_benchmark.VARIANTS
    names = [mode if scheduler == "default" else f"{mode}, flag" for scheduler, mode in variants]
    rows = [["parameters, inner optimizer", "activations", *names, *(f"s, {mode}" for mode in GRADIENT_MODES)]]
    for size, optimizer in sorted({key[:2] for key in found}, key=lambda key: (float(key[0].split()[0]), key[1] == "Adam")):
        of_size = [found.get((size, optimizer, *variant)) for variant in variants]
        first = next(row for row in of_size if row is not None)
        cells = [
            "" if row is None else f"{(row['temporaries'] - row['activations']) / row['theta_bytes']:.2f}" for row in of_size
        ]
        seconds = [
            "" if row is None or row["seconds"] is None else f"{row['seconds']:.3g}" for row in of_size[: len(GRADIENT_MODES)]
        ]
        rows.append([f"{size}, {optimizer}", f"{first['activations'] / first['theta_bytes']:.2f}", *cells, *seconds])
    return table(rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        speed,
        memory,
        bare_products,
        precision,
        gradient_modes,
        estimators,
        large_optimizees,
        scaling_tasks,
        scaling_seeds,
        throughput,
        startup,
        measured_on,
    )
}
