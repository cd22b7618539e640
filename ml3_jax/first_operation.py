"""The first operation of a function that makes a number that is not finite out of finite ones.

`jax.debug_nans` stops at any NaN, also at one that is there on purpose, and names no operation of a backward pass. Here the
jaxpr is evaluated one operation at a time, so each has its line of source.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

_MOST_VALUES = 3  # of an argument, in the words


# (closed jaxpr, its arguments) -> its outputs
Evaluate = Callable[[jex_core.ClosedJaxpr, Sequence[Any]], list[Any]]


class _FoundError(Exception):
    """The words about the operation; it ends the evaluation."""


def first_operation(function: Callable[..., Any], *args: Any) -> str:
    """Evaluates function(*args) and names the first operation that makes NaN or infinity out of finite numbers.

    Args:
      function: any function that JAX can trace. A gradient's backward pass comes after its forward pass.
      *args: pytrees of concrete arrays.

    Returns:
      Such as "log at losses.py:12 (apply) makes nan of -0.3". If each of them has an argument that is not finite, such as a
      constant, the first that passes it on. Empty if all numbers are finite.
    """
    closed = jax.make_jaxpr(function)(*args)
    passed_on: list[str] = []
    try:
        _evaluate(closed, jax.tree.leaves(args), passed_on)
    except _FoundError as found:
        return str(found)
    return passed_on[0] if passed_on else ""


def _evaluate(closed: jex_core.ClosedJaxpr, args: Sequence[Any], passed_on: list[str]) -> list[Any]:
    """The outputs of a jaxpr, one operation after the other.

    Args:
      closed: the jaxpr.
      args: its arguments.
      passed_on: gets the words about operations that are not finite because their arguments are not.

    Raises:
      _FoundError: an operation is not finite, and its arguments are.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else known[atom]

    def evaluate(inner: jex_core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        return _evaluate(inner, args, passed_on)

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _nested(equation, inputs, evaluate)
        if outputs is None:
            outputs = _bind(equation, inputs)
            bad = [output for output in outputs if not _finite(output)]
            if bad:
                _judge(equation, inputs, bad[0], passed_on)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _nested(equation: jex_core.JaxprEqn, inputs: list[Any], evaluate: Evaluate) -> list[Any] | None:
    """The outputs of a loop, a branch or a call; None for any other operation."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, inputs, evaluate)
    if name == "while":
        return _while(params, inputs, evaluate)
    if name == "cond":
        branches = params["branches"]
        return evaluate(branches[min(max(int(inputs[0]), 0), len(branches) - 1)], inputs[1:])
    called = [value for value in params.values() if isinstance(value, (jex_core.ClosedJaxpr, jex_core.Jaxpr))]
    if len(called) != 1:
        return None
    inner = called[0] if isinstance(called[0], jex_core.ClosedJaxpr) else jex_core.ClosedJaxpr(called[0], [])
    # A call, such as of jit, checkpoint or a function with its own derivative, passes its arguments on. The names of these
    # primitives depend on the version of JAX.
    outer = [_shape(atom) for atom in (*equation.invars, *equation.outvars)]
    return evaluate(inner, inputs) if outer == [_shape(var) for var in (*inner.jaxpr.invars, *inner.jaxpr.outvars)] else None


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())  # a token has none


def _bind(equation: jex_core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    found: Any = equation.primitive.get_bind_params(equation.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # depends on the version of JAX
    made = equation.primitive.bind(*functions, *inputs, **params)
    return list(made) if equation.primitive.multiple_results else [made]


def _judge(equation: jex_core.JaxprEqn, inputs: list[Any], bad: Any, passed_on: list[str]) -> None:
    """Raises _FoundError if an operation with a bad output has finite arguments; else notes it, if it has a source."""
    finite, source = all(map(_finite, inputs)), source_info_util.summarize(equation.source_info)
    if not finite and (passed_on or not source):
        return
    made = "nan" if bool(jnp.isnan(bad).any()) else "an infinity"
    of = " and ".join(map(_values, inputs)) or "nothing"
    words = f"{equation.primitive.name} at {source or 'an unknown line'} makes {made} of {of}"
    if finite:
        raise _FoundError(words)
    passed_on.append(words)


def _scan(equation: jex_core.JaxprEqn, inputs: list[Any], evaluate: Evaluate) -> list[Any]:
    """The loop, from the shapes of its values: how its parameters say what is carried depends on the version of JAX."""
    params, inner = equation.params, equation.params["jaxpr"]
    num_slices = sum(_shape(atom) != _shape(var) for atom, var in zip(equation.invars, inner.jaxpr.invars, strict=True))
    num_carry = sum(_shape(atom) == _shape(var) for atom, var in zip(equation.outvars, inner.jaxpr.outvars, strict=True))
    num_consts = len(inputs) - num_carry - num_slices
    consts, carry, slices = inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    length = params["length"]
    rows: list[list[Any]] = [[] for _ in range(length)]
    for i in reversed(range(length)) if params["reverse"] else range(length):
        made = evaluate(inner, [*consts, *carry, *(x[i] for x in slices)])
        carry, rows[i] = made[:num_carry], made[num_carry:]
    if not length:
        return [*carry, *(jnp.zeros((0, *kind.shape), kind.dtype) for kind in inner.out_avals[num_carry:])]
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]


def _while(params: dict[str, Any], inputs: list[Any], evaluate: Evaluate) -> list[Any]:
    of_cond, of_body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = inputs[:of_cond], inputs[of_cond:of_body], inputs[of_body:]
    while bool(evaluate(params["cond_jaxpr"], [*cond_consts, *carry])[0]):
        carry = evaluate(params["body_jaxpr"], [*body_consts, *carry])
    return carry


def _finite(value: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(value), jnp.inexact) or bool(jnp.isfinite(value).all())


def _values(value: Any) -> str:
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
        return "a key"
    array = np.asarray(value)
    if array.size > _MOST_VALUES:
        return f"{array.dtype}{list(array.shape)} from {array.min():.3g} to {array.max():.3g}"
    return ", ".join(f"{number:.3g}" for number in array.ravel())
