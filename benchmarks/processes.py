"""A meta-step in one, two and four processes of this machine, and what the cost model says of it.

    python -m benchmarks.processes [--rounds 5] [--seconds 2]

Each program stays alive and works in turn, so that all see the same machine. Times are medians over rounds; compilation is not
in them. It writes benchmarks/results/processes.json.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import cost_model, machine
from launch.runtime import devices

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = machine.RESULTS / "processes.json"
REDUCTIONS = 100  # in one program
REDUCE = "reduce"  # an all-reduce, where the name of an experiment may stand


class Program(NamedTuple):
    """Some processes with some CPU devices each."""

    processes: int
    devices: int  # of each process

    @property
    def name(self) -> str:
        """As a row of the table."""
        return f"{self.processes} x {self.devices}"


ONE = Program(1, 1)
PROGRAMS = (ONE, Program(1, 2), Program(2, 1), Program(4, 1))


class Work(NamedTuple):
    """A meta-training to time."""

    experiment: str  # "sine": the problem of benchmarks.sine
    num_tasks: int
    inner_steps: int


WORKS = {
    "sine 100 x 20": Work("sine", 100, 20),
    "sine 20 x 20": Work("sine", 20, 20),
    "reacher_mfrl": Work("reacher_mfrl", 16, 20),
    "reacher_mfrl, 4 tasks": Work("reacher_mfrl", 4, 20),
    "ant_mfrl": Work("ant_mfrl", 4, 20),
    "ant_mfrl, 1 task": Work("ant_mfrl", 1, 20),
}
# {a meta-training: the same with few tasks}
FEW = {"sine 100 x 20": "sine 20 x 20", "reacher_mfrl": "reacher_mfrl, 4 tasks", "ant_mfrl": "ant_mfrl, 1 task"}
IN_PROCESSES = ("sine 100 x 20", "reacher_mfrl")  # the others are measured on one device, for the cost model


class Workers:
    """The processes of one program. They wait between two measurements."""

    def __init__(self, program: Program):
        """Starts them."""
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]
        self.program = program
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.processes", "--worker", str(number), *map(str, program), str(port)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(program.processes)
        ]

    def ask(self, work: Work, count: int) -> float:
        """What the first process answers; all of them work on it."""
        for process in self._processes:
            assert process.stdin is not None
            print(*work, count, file=process.stdin, flush=True)
        answers = [self._answer(process) for process in self._processes]
        return answers[0]

    def _answer(self, process: "subprocess.Popen[str]") -> float:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith("answer "):
                return float(line.split()[1])
        raise RuntimeError(f"a process of {self.program.name} has ended with exit code {process.wait()}")

    def end(self) -> None:
        """Kills them: a process of jax.distributed survives a milder signal."""
        for process in self._processes:
            process.kill()
            process.communicate()


def work_on(number: int, program: Program, port: int) -> None:
    """A worker: answers each line of standard input with the seconds of COUNT meta-steps or reductions in one program.

    A line is EXPERIMENT, TASKS, INNER_STEPS, COUNT or "reduce", BYTES, 0, COUNT.
    """
    jax.config.update("jax_num_cpu_devices", program.devices)
    if program.processes > 1:
        os.environ.setdefault("NPROC", str(program.devices))  # as `launch.runtime.devices`
    if program.processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes=program.processes, process_id=number)
    takers: dict[Work, Callable[[int], float]] = {}
    for line in sys.stdin:
        name, tasks, steps, count = line.split()
        work = Work(name, int(tasks), int(steps))
        if work not in takers:
            takers[work] = _reductions(work.num_tasks) if name == REDUCE else _meta_steps(work)
        print("answer", takers[work](int(count)), flush=True)


def _meta_steps(work: Work) -> Callable[[int], float]:
    from benchmarks import sine
    from launch import experiments

    if work.experiment == "sine":
        meta, context = sine.meta_learner(work.num_tasks, work.inner_steps), None
    else:
        experiment = experiments.build(work.experiment, {"num_tasks": work.num_tasks, "inner_steps": work.inner_steps})
        meta, context = experiment.meta, experiment.context
    state = meta.init(jax.random.key(0), context)

    def take(count: int) -> float:
        if count == 0:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(state.loss_params))
        began = time.perf_counter()
        jax.block_until_ready(meta.run(state, count))
        return time.perf_counter() - began

    return take


def _reductions(size: int) -> Callable[[int], float]:
    """All-reduces of `size` bytes, one after the other in one program."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def of_device(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.lax.pmean(x, "all") + 1.0, None), x, length=REDUCTIONS)[0]

    reduce = jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    start = np.zeros(size // 4, np.float32)
    reduce(start).block_until_ready()

    def take(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            reduce(start).block_until_ready()
        return (time.perf_counter() - began) / REDUCTIONS

    return take


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """The content of the file: milliseconds of meta-steps, seconds of all-reduces, and the parameters of the cost model."""
    groups = [Workers(program) for program in PROGRAMS]
    try:
        found = {name: _in_turn(groups if name in IN_PROCESSES else groups[:1], name, rounds, seconds) for name in FEW}
        few = {name: _in_turn(groups[:1], other, rounds, seconds)["ms"][ONE.name] for name, other in FEW.items()}
        sizes = (4_000, 4_000_000)
        reduced = {
            group.program.name: {
                size: float(np.median([group.ask(Work(REDUCE, size, 0), 1) for _ in range(rounds)])) for size in sizes
            }
            for group in groups[1:]
        }
    finally:
        for group in groups:
            group.end()
    model = {name: _compute(name, part, few[name]) for name, part in found.items()}
    for name in IN_PROCESSES:
        found[name]["predicted_ms"] = _predicted(model[name], found[name]["ms"][ONE.name], reduced)
    return {"works": found, "all_reduce": reduced, "model": model}


def _in_turn(groups: list[Workers], name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a meta-step in each program, medians over rounds in which the programs take turns."""
    counts = {}
    for group in groups:
        group.ask(WORKS[name], 1)  # compiles
        counts[group] = max(1, round(seconds / group.ask(WORKS[name], 1)))
        group.ask(WORKS[name], counts[group])  # compiles
    taken: dict[str, list[float]] = {group.program.name: [] for group in groups}
    for index in range(rounds):
        shift = index % len(groups)
        for group in (*groups[shift:], *groups[:shift]):
            taken[group.program.name].append(group.ask(WORKS[name], counts[group]) / counts[group])
    ratios = (
        {program: float(np.median(np.array(taken[Program(1, 2).name]) / times)) for program, times in taken.items()}
        if len(groups) > 1
        else {}
    )
    return {
        "phi_bytes": int(groups[0].ask(WORKS[name], 0)),
        "ms": {program: 1e3 * float(np.median(times)) for program, times in taken.items()},
        "speed": ratios,  # beside one process with two devices
    }


def _compute(name: str, part: dict[str, Any], few: float) -> dict[str, Any]:
    """The parameters of the cost model, from milliseconds on one device at two numbers of tasks."""
    work = WORKS[name]
    times = (WORKS[FEW[name]].num_tasks, few / 1e3), (work.num_tasks, part["ms"][ONE.name] / 1e3)
    found = cost_model.from_two(*times, part["phi_bytes"])
    return {
        "num_tasks": work.num_tasks,
        "fixed_ms": 1e3 * found.fixed,
        "task_ms": 1e3 * found.task,
        "phi_bytes": found.phi_bytes,
    }


def _predicted(model: dict[str, Any], on_one: float, reduced: dict[str, dict[int, float]]) -> dict[str, float]:
    """The cost model's milliseconds for each program, from one device and the all-reduces."""
    predicted = {ONE.name: on_one}
    for program in PROGRAMS[1:]:
        count = program.processes * program.devices
        crowding = max(1.0, count / devices.cores())  # more devices than cores: each computes more slowly
        own = cost_model.Compute(model["fixed_ms"] / 1e3 * crowding, model["task_ms"] / 1e3 * crowding, model["phi_bytes"])
        times = cost_model.seconds(own, network(reduced[program.name], count), model["num_tasks"], count)
        predicted[program.name] = 1e3 * times
    return predicted


def network(reduced: dict[int, float], num_devices: int) -> cost_model.Network:
    """Latency and bandwidth, from the seconds of all-reduces of two sizes, {bytes: seconds}."""
    (small, short), (large, long) = sorted(reduced.items())
    sent = 2.0 * (num_devices - 1) / num_devices
    bandwidth = sent * (large - small) / max(long - short, 1e-9)
    hops = int(np.ceil(np.log2(num_devices)))
    return cost_model.Network(max(short - sent * small / bandwidth, 0.0) / hops, bandwidth)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one timing, at least")
    parser.add_argument("--worker", nargs=4, type=int, help="number, processes, devices, port: for the program itself")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.worker:
        number, count, own, port = arguments.worker
        work_on(number, Program(count, own), port)
        return
    content = measure(arguments.rounds, arguments.seconds)
    where = f"{devices.cores()} cores ({machine.cpu()})"
    machine.write(arguments.out, {**machine.head("benchmarks.processes", where), "rounds": arguments.rounds, **content})


if __name__ == "__main__":
    main()
