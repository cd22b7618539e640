"""Many processes as one: who writes, what all must agree on, and how the processes of a run find each other.

Every process runs the same command and works on its share of the tasks. The first one writes all files but the checkpoints, to
which each adds its part. `meta_train` joins them; in a single process every function here is trivial.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from launch.errors import TrainingError, UsageError

T = TypeVar("T")
HEARTBEAT_SECONDS = 30  # without a sign of life a process counts as lost
JOIN_SECONDS = 300
SHUTDOWN_SECONDS = 20
MESSAGE_BYTES = 4096
_ERRORS = {kind.__name__: kind for kind in (UsageError, TrainingError, OSError)}
# Environment variables of launchers that JAX detects: {processes in all: (processes on this machine, ...)}.
_LAUNCHERS = {
    "SLURM_NTASKS": ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
}
_STEP = {"SLURM_NTASKS": "SLURM_PROCID"}  # set by srun, and not in a shell of a SLURM job


class LostProcessError(TrainingError):
    """Another process of the run has ended or cannot be reached."""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that `join` reads."""
    words = "HOST:PORT of the first of several processes; the environment of SLURM and Open MPI says it without flags"
    flags.DEFINE_string("coordinator_address", None, words, flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of this run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=values)
    words = "several processes, found by JAX from the environment (Cloud TPU, Kubernetes, SLURM, Open MPI)"
    flags.DEFINE_bool("distributed", False, words, flag_values=values)


def join(values: flags.FlagValues) -> None:
    """Joins the processes of a run, if the flags or the environment say that there are several.

    It must run before JAX starts a backend. From then on only the first process prints.

    Raises:
      UsageError: flags that do not fit each other, or processes that do not find each other.
    """
    if "coordinator_address" not in values:  # an entry point for one process
        return
    given = {name: values[name].value for name in ("coordinator_address", "num_processes", "process_id")}
    launched = values["distributed"].value or in_environment(os.environ) > 1
    if all(value is None for value in given.values()):
        if not launched:
            return
        arguments: dict[str, Any] = {}
    else:
        arguments = _checked(given)
    with contextlib.suppress(AttributeError):  # its handler of SIGTERM would be the only one; ours saves, in all processes
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the processes of this run did not find each other ({_first_line(error)}): start all of them with the same "
            "--coordinator_address=HOST:PORT and --num_processes, and with --process_id from 0"
        ) from error
    if not first():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize`.

    Raises:
      UsageError: some are missing or out of range.
    """
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: several processes need --coordinator_address, --num_processes, --process_id"
        )
    address, count, number = given.values()
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator_address must be HOST:PORT, got '{address}'")
    if count < 1:
        raise UsageError(f"--num_processes must be at least 1, got {count}")
    if not 0 <= number < count:
        raise UsageError(f"--process_id must be from 0 to {count - 1}, one less than --num_processes, got {number}")
    return dict(given)


def in_environment(environment: Mapping[str, str]) -> int:
    """The number of processes that a launcher has started, 1 without one."""
    for name in _LAUNCHERS:
        if environment.get(name, "").isdigit() and (name not in _STEP or _STEP[name] in environment):
            return int(environment[name])
    return 1


def on_this_machine(values: flags.FlagValues, environment: Mapping[str, str]) -> int:
    """How many processes of this run share this machine's cores, as far as flags and environment say it; at least 1."""
    if "coordinator_address" not in values:
        return 1
    address = values["coordinator_address"].value
    if address and address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        return max(1, values["num_processes"].value or 1)
    for name, local in _LAUNCHERS.items():
        if in_environment(environment) > 1 and name in environment:
            found = next((environment[key] for key in local if key in environment), "1")
            return int(found.split("(")[0].split(",")[0])  # SLURM writes 4(x2),3
    return 1


def first() -> bool:
    """Whether this process writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0  # the question alone would start a backend


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_first(function: Callable[[], T]) -> T | None:
    """Calls a function in the first process alone, while the others wait; its errors are raised in all of them.

    Returns:
      The result in the first process, None elsewhere.

    Raises:
      UsageError, TrainingError, OSError: as the function.
    """
    if not several():
        return function()
    result, failure, said = None, None, {}
    if first():
        try:
            result = function()
        except tuple(_ERRORS.values()) as error:
            kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
            failure, said = error, {"kind": kind, "words": str(error)}
    said = _from_first(said)
    if failure is not None:
        raise failure
    if said:
        raise _ERRORS[said["kind"]](said["words"])
    return result


def _from_first(content: dict[str, str]) -> dict[str, str]:
    """The content that the first process gives, in every process."""
    text = json.dumps({name: value[: MESSAGE_BYTES // 8] for name, value in content.items()}).encode()
    buffer = np.zeros(MESSAGE_BYTES, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
    return json.loads(received.rstrip(b"\0"))


def of_all(value: int) -> list[int]:
    """The values that each process gives, in the order of the processes."""
    if not several():
        return [value]
    return np.asarray(multihost_utils.process_allgather(np.asarray(value, np.int32))).ravel().tolist()


@contextlib.contextmanager
def noticing_lost_ones(kept: Callable[[], str]) -> Iterator[None]:
    """Reports a failed communication as the loss of a process; `kept` says what a later run finds.

    Raises:
      LostProcessError: another process has ended.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not several() or not any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat")):
            raise
        raise LostProcessError(
            f"another process of this run has ended or cannot be reached; {kept()}, with any number of processes "
            f"({_first_line(error)})"
        ) from error


def leave() -> bool:
    """Parts from the other processes after work that all have finished; returns whether this one is to go on alone."""
    goes_on = first()
    if several():
        jax.distributed.shutdown()
    return goes_on


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
