"""Checks on every supported Python, each in a fresh virtual environment.

pip install -e '.[dev]' && nox           # tests on all Pythons, linters
nox -s tests-3.13 slow-3.13 mutation    # some sessions alone; arguments after -- go to the last command
"""

import pathlib
import re

import nox

PYTHONS = ("3.11", "3.12", "3.13")
nox.options.sessions = ("tests", "lint")
nox.options.default_venv_backend = "venv"


def _test_command() -> list[str]:
    """The README's test command: the last line of its second shell block."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", pathlib.Path("README.md").read_text(), re.MULTILINE | re.DOTALL)
    return blocks[1].splitlines()[-1].split()


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The README's test command with the versions that pip chooses."""
    session.install("-e", ".[test]")
    session.run("python", "-c", "import jax, sys; print(f'Python {sys.version}, jax {jax.__version__}')")
    session.run(*_test_command(), *session.posargs)


@nox.session(python=PYTHONS)
def slow(session: nox.Session) -> None:
    """The tests that are marked slow."""
    session.install("-e", ".[test]")
    session.run(*_test_command(), "-m", "slow", *session.posargs)


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """The linter and the type checker."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("pyright")


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """The documentation site, in build/site."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=PYTHONS[0])
def mutation(session: nox.Session) -> None:
    """Faults that the tests must notice."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.mutation.mutate", "--count=20", "--at-least=18", *session.posargs)
