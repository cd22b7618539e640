"""Models of supervised problems as two functions: flax.linen, flax.nnx and equinox modules, or the functions themselves."""

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ml3_jax.types import Params

InitFn = Callable[[jax.Array, jax.Array], Params]  # (key, inputs [N, ...]) -> params
ApplyFn = Callable[[Params, jax.Array], jax.Array]  # (params, inputs [N, ...]) -> predictions [N, P]
# A flax.linen module, a flax.nnx or equinox module, a function key -> such a module, or (init, apply).
Model = Any

_NO_STATE = (
    "the inner loop trains parameters alone, and would change or lose the rest. Use layers without state (LayerNorm or "
    "GroupNorm for BatchNorm, no dropout), or pass init(key, inputs) and apply(params, inputs) that close over the state"
)


def model_functions(model: Model) -> tuple[InitFn, ApplyFn]:
    """(init, apply) of a model: init(key, inputs) -> params, apply(params, inputs) -> predictions.

    Args:
      model: a flax.linen module; a function from a key to a flax.nnx or equinox module, which draws new parameters for every
        optimizee; such a module itself, whose parameters all optimizees then start from; or a pair (init, apply). An equinox
        module takes one sample, the others take all of them.

    Raises:
      ValueError: the model is none of these, or it has state besides its parameters. A linen module is checked by its init.
    """
    if isinstance(model, nn.Module):
        return _linen(model)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(part) for part in model):
        return _pair(*model)
    if _is_module(model):
        warnings.warn(
            f"every optimizee starts from the parameters of this {type(model).__name__}: pass a function from a key to a "
            "module, for example lambda key: Model(rngs=nnx.Rngs(key)), to draw new ones",
            stacklevel=3,
        )
        return _from_factory(lambda key: model)
    if callable(model):
        return _from_factory(model)
    raise ValueError(
        "model: expected a flax.linen module, a function from a key to a flax.nnx or equinox module, such a module, or a pair "
        f"(init, apply) of functions, got {type(model).__name__}"
    )


def _is_module(model: Any) -> bool:
    return isinstance(model, nnx.Module) or _is_equinox(model)


def _is_equinox(model: Any) -> bool:
    equinox = sys.modules.get("equinox")  # whoever passes a module of it has imported it
    return equinox is not None and isinstance(model, equinox.Module)


def _check_collections(name: str, variables: Mapping[str, Any]) -> None:
    state = sorted(set(variables) - {"params"})
    if state:
        raise ValueError(f"model: {name} has the collections {', '.join(state)} besides params: {_NO_STATE}")


def _pair(init_fn: InitFn, apply_fn: ApplyFn) -> tuple[InitFn, ApplyFn]:
    """The pair, with a check for the collections of a linen module: (module.init, module.apply) is a pair too."""

    def init(key: jax.Array, inputs: jax.Array) -> Params:
        params = init_fn(key, inputs)
        if isinstance(params, Mapping) and "params" in params:
            _check_collections("(init, apply)", params)
        return params

    return init, apply_fn


def _linen(module: nn.Module) -> tuple[InitFn, ApplyFn]:
    def init(key: jax.Array, inputs: jax.Array) -> Params:
        variables = module.init(key, inputs)
        _check_collections(type(module).__name__, variables)
        return variables

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(module.apply(params, inputs))

    return init, apply


def _from_factory(factory: Callable[[jax.Array], Any]) -> tuple[InitFn, ApplyFn]:
    """The functions of a module that a function draws; its structure is that of one drawn with a fixed key."""
    drawn = factory(jax.random.key(0))
    if isinstance(drawn, nnx.Module):
        return _nnx(factory, drawn)
    if _is_equinox(drawn):
        return _equinox(factory, drawn)
    raise ValueError(
        f"model: expected a function from a key to a flax.nnx or equinox module, but it returned {type(drawn).__name__}"
    )


def _nnx(factory: Callable[[jax.Array], Any], drawn: nnx.Module) -> tuple[InitFn, ApplyFn]:
    graph, _, rest = nnx.split(drawn, nnx.Param, ...)
    state = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)})
    if state:
        raise ValueError(f"model: {type(drawn).__name__} has variables of type {', '.join(state)} besides Param: {_NO_STATE}")

    def init(key: jax.Array, inputs: jax.Array) -> Params:
        del inputs
        return nnx.to_pure_dict(nnx.state(factory(key), nnx.Param))

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(nnx.merge(graph, nnx.State(params))(inputs))

    return init, apply


def _equinox(factory: Callable[[jax.Array], Any], drawn: Any) -> tuple[InitFn, ApplyFn]:
    equinox = sys.modules["equinox"]
    index = equinox.nn.StateIndex
    if any(isinstance(leaf, index) for leaf in jax.tree.leaves(drawn, is_leaf=lambda leaf: isinstance(leaf, index))):
        raise ValueError(f"model: {type(drawn).__name__} has an equinox.nn.State: {_NO_STATE}")
    rest = equinox.partition(drawn, equinox.is_inexact_array)[1]

    def init(key: jax.Array, inputs: jax.Array) -> Params:
        del inputs
        return equinox.filter(factory(key), equinox.is_inexact_array)

    def apply(params: Params, inputs: jax.Array) -> jax.Array:
        return jnp.asarray(jax.vmap(equinox.combine(params, rest))(inputs))

    return init, apply
