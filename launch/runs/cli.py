"""The command line of the entry points: flags in, exit code out. Misuse is one line on stderr and exit code 2.

`meta_train` and `meta_test` each hand `main` a function that defines their flags and one that does the work.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import config as config_lib
from launch.errors import TrainingError, UsageError, unknown
from launch.runs import processes, stopping
from launch.runtime import devices
from ml3_jax import aliases

EXIT_OK = 0
EXIT_FAILED = 1  # the file system, the memory or the meta-training failed
EXIT_MISUSE = 2  # absl's own exit code is 1, like that of a crash
MAX_SEED = 2**32 - 1
_CONFIG_FLAG = re.compile(r"^--?(?:no)?config\.([^=]*)")
_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")
_WORDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "string": "text"}


def main(
    define: Callable[[flags.FlagValues, list[str]], None],
    run: Callable[[flags.FlagValues], None],
    usage: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags, runs, and reports errors in words.

    Args:
      define: defines the entry point's flags on a fresh FlagValues, given argv.
      run: does the work, given the parsed flags.
      usage: the text that --help prints above the flags.
      argv: the command line with the program's name first; None: that of the process.

    Returns:
      The exit code: one of the constants EXIT_*, or 128 + the number of the signal that stopped the run.
    """
    for name in ("absl", "asyncio", "concurrent.futures"):  # Orbax and its threads log here; it raises its errors as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = list(sys.argv if argv is None else argv)
    if argv is None:  # Only a process of its own may choose its devices and its hooks.
        _keep_threads_quiet()
    try:
        parsed = flags.FlagValues()
        define(parsed, [argument for argument in arguments if argument not in _HELP])
        if any(argument in _HELP for argument in arguments[1:]):
            print(f"{usage}\n" + "\n".join(f"  --{name}: {parsed[name].help}" for name in parsed))
            return EXIT_OK
        _parse(parsed, arguments)
        if argv is None:
            devices.one_per_core(processes.on_this_machine(parsed, os.environ))
        processes.join(parsed)
        run(parsed)
    except processes.LostProcessError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)  # the end of an interpreter waits for the other processes
    except (UsageError, TrainingError, OSError) as error:  # an OSError, such as a full disk, is no defect of the code
        if processes.first():  # each process has the same error
            print(f"error: {error}", file=sys.stderr)
        return EXIT_MISUSE if isinstance(error, UsageError) else EXIT_FAILED
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"[Oo]ut of memory.*", str(error)) or re.search(r"RESOURCE_EXHAUSTED.*", str(error))
        if found is None:
            raise
        print(f"error: {found[0]} Choose fewer tasks, shorter unrolls or smaller networks", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, stopping.Stopped) else signal.SIGINT
        if not processes.first():
            return stopping.exit_code(number)
        words = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        print(f"\n{words}; {interrupt}" if str(interrupt) else f"\n{words}", file=sys.stderr)
        return stopping.exit_code(number)
    return EXIT_OK


def _keep_threads_quiet() -> None:
    """Prints no traceback of a thread or a closing file that failed to write: the main thread names the file and the cause.

    On a full disk the writer of TensorBoard files dies in its thread and again when the process ends, and a callback of Orbax
    finds its event loop closed.
    """

    def is_late(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

    def is_known(error: BaseException | None) -> bool:
        return isinstance(error, OSError) or is_late(error)

    of_thread, ignored, uncaught = threading.excepthook, sys.unraisablehook, sys.excepthook
    threading.excepthook = lambda found: None if is_known(found.exc_value) else of_thread(found)
    sys.unraisablehook = lambda found: None if is_known(found.exc_value) else ignored(found)
    sys.excepthook = lambda kind, error, trace: None if is_late(error) else uncaught(kind, error, trace)


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of a text flag, read before the flags that depend on it are defined; None if it is missing."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string(name, None, "", flag_values=values)
    try:
        values(argv, known_only=True)
    except flags.Error as error:
        raise UsageError(f"--{name} needs a value: pass --{name}=VALUE") from error
    return values[name].value


def define_config(values: flags.FlagValues, config: config_lib.Config, argv: Sequence[str]) -> None:
    """Defines --config.FIELD for each config field that argv sets; `config_overrides` reads them.

    The types of the fields of `config`, the experiment's default config, decide how values are parsed.

    Raises:
      UsageError: argv sets a field that the config does not have.
    """
    known = config_lib.names(type(config))
    for argument in argv[1:]:
        if re.match(r"^--?config(=|$)", argument):
            raise UsageError(f"--config takes one field at a time, as --config.{known[0]}=VALUE, got {argument}")
        found = _CONFIG_FLAG.match(argument)
        name = found.group(1) if found else known[0]
        if aliases.CONFIG_FIELDS.get(name) in known:
            new = aliases.CONFIG_FIELDS[name]
            raise UsageError(f"config field '{name}' is called '{new}' since 0.2: pass --config.{new}=VALUE")
        if name not in known:
            raise UsageError(unknown("config field", name, known))
    twin = config_lib.mutable_twin(config)
    config_flags.DEFINE_config_dataclass("config", twin, flag_values=values, sys_argv=list(argv))
    values["config"].help = f"An experiment's settings, one --config.FIELD=VALUE each: {', '.join(known)}"


def config_overrides(values: flags.FlagValues) -> dict[str, Any]:
    """The config fields that the command line set, with their values."""
    return config_flags.get_override_values(values["config"]) if "config" in values else {}


def require(values: flags.FlagValues, name: str, example: str) -> str:
    """The value of a flag that must not be missing or empty.

    Raises:
      UsageError: it is missing or empty.
    """
    value = values[name].value
    if not value:
        raise UsageError(f"--{name} is missing: pass --{name}={example}")
    return value


def define_bounded(
    values: flags.FlagValues, name: str, default: int | None, description: str, *, low: int = 1, high: int | None = None
) -> None:
    """Defines a whole-number flag. The parser refuses values out of bounds."""
    flags.DEFINE_integer(name, default, description, flag_values=values)
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"

    def check(value: int | None) -> bool:
        if value is not None and (value < low or (high is not None and value > high)):
            raise UsageError(f"--{name} must be {bounds}, got {value}")
        return True

    flags.register_validator(name, check, flag_values=values)


def _parse(values: flags.FlagValues, argv: list[str]) -> None:
    values.set_gnu_getopt(True)  # flags may follow a stray word, so that the error names the stray word
    try:
        rest = values(argv)
    except flags.Error as error:
        raise _misuse(values, error) from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument '{rest[1]}': flags are written --NAME=VALUE")


def _misuse(values: flags.FlagValues, error: flags.Error) -> UsageError:
    """The complaint of absl about the command line, in the words of this project."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname.split("=")[0]
        if name.startswith("config."):
            return UsageError(f"--{name} needs --experiment=NAME before its fields are known")
        return UsageError(unknown("flag", f"--{name}", [f"--{known}" for known in values if known != "config"]))
    found = re.match(r"flag --([^=]+)=(.*?): ", str(error), re.DOTALL)
    if isinstance(error, flags.IllegalFlagValueError) and found:
        name, value = found.group(1), found.group(2)
        if name.startswith("config."):
            field = name.removeprefix("config.")
            twin: Any = values["config"].default
            return UsageError(f"config field '{field}' must be {config_lib.expected(type(twin), field)}, got '{value}'")
        kind = values[name].flag_type() if name in values else ""
        return UsageError(f"--{name} must be {_WORDS.get(kind, kind)}, got '{value}'")
    missing = re.match(r"Missing value for flag (\S+)", str(error))
    if missing:
        return UsageError(f"{missing.group(1)} needs a value: pass {missing.group(1)}=VALUE")
    return UsageError(str(error))
