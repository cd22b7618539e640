"""The head of every JSON file of benchmarks: command, device, versions; and its writing."""

import argparse
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from launch.runtime import devices, files

RESULTS = pathlib.Path(__file__).parent / "results"


def cpu() -> str:
    """The name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "a CPU")


def device() -> str:
    """The devices of this process in words, e.g. "2 x cpu (AMD EPYC)". It starts JAX's backend."""
    kind = jax.devices()[0].device_kind
    return f"{len(jax.devices())} x {kind}" + (f" ({cpu()})" if jax.default_backend() == "cpu" else "")


def head(module: str, where: str | None = None) -> dict[str, Any]:
    """What a JSON file of benchmarks begins with; `where` replaces the devices of this process.

    The command has the arguments of this process, less --out.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    _, given = parser.parse_known_args()
    return {
        "command": " ".join([f"python -m {module}", *given]),
        "device": device() if where is None else where,
        "cores": devices.cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
    }


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content)
    print(f"written: {path}", flush=True)
