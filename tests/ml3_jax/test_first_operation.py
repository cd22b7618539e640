"""`first_operation` names the operation that makes a number that is not finite, with its line."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ml3_jax.first_operation import first_operation


def quotient(x: jax.Array) -> jax.Array:
    return 1.0 / x


def in_scan(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, row: (carry - row, jnp.log(carry)), x, jnp.ones(4))[1].sum()


def in_while(x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, jnp.log(carry[1]) - 1), (0, x))[1]


def in_branch(x: jax.Array) -> jax.Array:
    return jax.lax.cond(x > 0, jnp.log, lambda y: 1.0 / (y - y), x)


def in_jit(x: jax.Array) -> jax.Array:
    return jax.jit(lambda y: jnp.sqrt(y))(x - 5.0)


def in_checkpoint(x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda y: jnp.sqrt(y - 5.0))(x)


@jax.custom_vjp
def ruled(x: jax.Array) -> jax.Array:
    return jnp.exp(x)


ruled.defvjp(lambda x: (jnp.exp(x), x), lambda x, ct: (ct / (x - x),))


def root(x: jax.Array) -> jax.Array:
    return jnp.sqrt(x)


def with_mask(x: jax.Array) -> jax.Array:
    return jnp.where(x > 1, -jnp.inf, x) + jnp.log(x - 2)


def with_constant(x: jax.Array) -> jax.Array:
    return x * jnp.nan


def scaled(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, row: (c * jnp.inf, row), x, None, length=2)[0]


def of_many(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.arange(5) - x).sum()


CASES: list[tuple[Callable[..., Any], float, str, str, str]] = [
    (quotient, 0.0, "div", "return 1.0 / x", "an infinity of 1 and 0"),
    (in_scan, 2.0, "log", "jax.lax.scan", "an infinity of 0"),
    (in_while, 0.5, "log", "jax.lax.while_loop", "nan of -1.69"),
    (in_branch, -1.0, "div", "jax.lax.cond", "an infinity of 1 and 0"),
    (in_jit, 1.0, "sqrt", "jax.jit(", "nan of -4"),
    (in_checkpoint, 1.0, "sqrt", "jax.checkpoint(", "nan of -4"),
    (jax.grad(root), 0.0, "div", "return jnp.sqrt(x)", "an infinity of 0.5 and 0"),
    (jax.grad(ruled), 1.0, "div", "", "an infinity of 1 and 0"),  # JAX keeps no source of a hand-written rule
    (scaled, 1.0, "mul", "c * jnp.inf", "an infinity of 1 and inf"),
    (with_mask, 1.5, "log", "-jnp.inf", "nan of -0.5"),
    (with_constant, 1.0, "mul", "jnp.nan", "nan of 1 and nan"),
    (of_many, 1.0, "log", "jnp.arange", "nan of float32[5] from -1 to 3"),
]


@pytest.mark.parametrize(("function", "x", "operation", "line", "makes"), CASES)
def test_the_operation_is_named_with_its_line(function: Callable[..., Any], x: float, operation: str, line: str, makes: str):
    said = first_operation(function, jnp.asarray(x))
    if not line:
        assert said == f"{operation} at an unknown line makes {makes}"
        return
    found = re.fullmatch(r"(\w+) at (.*?):(\d+)\S* \(.*\) makes (.*)", said)
    assert found, said
    assert (found[1], found[2], found[4]) == (operation, __file__, makes)
    assert line in pathlib.Path(__file__).read_text().splitlines()[int(found[3]) - 1]


@pytest.mark.parametrize("function", [in_scan, in_while, in_branch, in_jit, in_checkpoint, quotient, jax.grad(root), ruled])
def test_a_finite_function_has_none(function: Callable[..., Any]):
    assert first_operation(function, jnp.asarray(1e6 if function is in_while else 30.0)) == ""


def test_loops_are_evaluated_as_jax_does():
    def function(x: jax.Array) -> jax.Array:
        _, ys = jax.lax.scan(lambda c, row: (c + row, c * row), x, jnp.arange(3.0), reverse=True)
        return jnp.log(ys.sum() - 11.0)  # of 2x + (x + 2)

    assert first_operation(function, jnp.asarray(3.0)).endswith("makes an infinity of 0")
    empty = jax.lax.scan(lambda c, row: (c, row), 0.0, jnp.zeros(0))[1]
    assert first_operation(lambda x: jax.lax.scan(lambda c, row: (c, row), x, empty)[1].sum() + x, jnp.asarray(1.0)) == ""
