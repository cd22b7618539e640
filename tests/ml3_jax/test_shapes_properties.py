"""Problems of random shapes: every gradient mode computes the same meta-gradient, however the tasks are split up."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ml3_jax
from ml3_jax.problems import supervised
from tests.ml3_jax import toys

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.slow]
INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05, eps_root=1e-8),
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A supervised problem of some shape, a loss, and the sizes of its meta-training."""
    inner_steps = draw(st.integers(1, 7))
    return {
        "inputs": draw(st.integers(1, 3)),
        "outputs": draw(st.integers(1, 3)),
        "samples": draw(st.integers(1, 5)),
        "widths": draw(st.lists(st.integers(1, 4), max_size=2)),
        "hidden": draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)),
        "optimizer": draw(st.sampled_from(sorted(INNER))),
        "num_tasks": draw(st.integers(1, 3)),
        "inner_steps": inner_steps,
        "unroll": draw(st.sampled_from([n for n in range(1, inner_steps + 1) if inner_steps % n == 0])),
        "objective": draw(st.sampled_from(["last", "mean"])),
    }


def make_problem(case: dict[str, Any]) -> ml3_jax.Problem:
    def sample_task(key: jax.Array, context: Any) -> supervised.SupervisedTask:
        del context
        drawn = jax.random.normal(key, (2, case["samples"], case["inputs"] + case["outputs"]))
        train, test = (supervised.Examples(half[:, : case["inputs"]], half[:, case["inputs"] :]) for half in drawn)
        return supervised.SupervisedTask(train=train, test=test, extra=None)

    sizes = [case["inputs"], *case["widths"], case["outputs"]]

    def init(key: jax.Array, inputs: jax.Array) -> list[jax.Array]:
        del inputs
        keys = jax.random.split(key, len(sizes) - 1)
        return [jax.random.normal(k, shape) for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)]

    def apply(params: list[jax.Array], x: jax.Array) -> jax.Array:
        *body, last = params
        for layer in body:
            x = jnp.tanh(x @ layer)
        return x @ last

    return supervised.make_problem((init, apply), sample_task, inner_steps=case["inner_steps"])


def trained(case: dict[str, Any], gradient: str) -> tuple[Any, ml3_jax.Metrics]:
    """Loss parameters after three meta-steps of gradient descent, and the metrics."""
    loss = ml3_jax.losses.mlp(hidden=tuple(case["hidden"]))

    def init(key: jax.Array, features: Any) -> Any:  # flax makes parameters of 32 bits
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), loss.init(key, features))

    learner = ml3_jax.make_meta_learner(
        make_problem(case),
        loss._replace(init=init),
        inner_optimizer=INNER[case["optimizer"]](),
        meta_optimizer=optax.sgd(1e-2),
        gradient=gradient,
        **{name: case[name] for name in ("num_tasks", "inner_steps", "unroll", "objective")},
    )
    state, metrics = learner.run(learner.init(toys.KEY), 3)
    return state.loss_params, metrics


@settings(derandomize=True, database=None, deadline=None, max_examples=8)
@given(case=cases())
def test_gradient_modes_agree_on_problems_of_any_shape(case: dict[str, Any]):
    expected, metrics = trained(case, "reverse")
    assert not metrics.skipped.any()
    for gradient in ("mixed", "nested", "remat"):
        loss_params, others = trained(case, gradient)
        toys.assert_close(loss_params, expected, rtol=1e-9, atol=1e-11)
        toys.assert_close(others, metrics)  # in float32
