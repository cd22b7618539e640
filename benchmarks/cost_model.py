"""What a meta-step costs on many devices: compute on the largest share of the tasks, and one all-reduce of phi.

    seconds(D) = fixed + task * ceil(M / D) + latency * ceil(log2 D) + 2 (D - 1) / D * bytes / bandwidth

M tasks lie on D devices. `fixed` is what a meta-step costs without tasks: the start of the program and the update of phi,
which every device computes. An all-reduce in rings or trees sends about two times the bytes of phi. `benchmarks.processes`
measures the parameters and compares; `docs/scale.md` predicts.
"""

import math
from typing import NamedTuple


class Compute(NamedTuple):
    """One experiment on one kind of device."""

    fixed: float  # s, of a meta-step without tasks
    task: float  # s, of the inner loop of one task and its meta-gradient
    phi_bytes: int  # that each device sends in a meta-step


class Network(NamedTuple):
    """What connects the devices."""

    latency: float  # s, of one hop of an all-reduce
    bandwidth: float  # bytes / s, of one device


def seconds(compute: Compute, network: Network, num_tasks: int, num_devices: int) -> float:
    """The time of a meta-step."""
    return (
        compute.fixed + compute.task * math.ceil(num_tasks / num_devices) + all_reduce(network, compute.phi_bytes, num_devices)
    )


def all_reduce(network: Network, size: int, num_devices: int) -> float:
    """The time of an all-reduce of `size` bytes; 0 on one device."""
    hops = math.ceil(math.log2(num_devices))
    return network.latency * hops + 2.0 * (num_devices - 1) / num_devices * size / network.bandwidth


def efficiency(compute: Compute, network: Network, num_tasks: int, num_devices: int) -> float:
    """The share of D times the speed of one device: 1 if a meta-step of the same tasks takes 1 / D of the time."""
    return seconds(compute, network, num_tasks, 1) / (num_devices * seconds(compute, network, num_tasks, num_devices))


def from_two(few: tuple[int, float], many: tuple[int, float], phi_bytes: int) -> Compute:
    """The parameters from the seconds of a meta-step on one device at two numbers of tasks, (M, seconds) each."""
    task = (many[1] - few[1]) / (many[0] - few[0])
    return Compute(max(few[1] - task * few[0], 0.0), task, phi_bytes)
