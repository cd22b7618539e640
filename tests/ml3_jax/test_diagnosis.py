"""`diagnose` names the task, the inner step and the term that is not finite."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import ml3_jax
from ml3_jax import diagnosis
from tests.ml3_jax import toys

PLAIN = toys.quadratic()


def root_of_zero(x: jax.Array) -> jax.Array:
    """0, with a derivative that is not finite."""
    return jnp.sqrt(0.0 * x)


def late(step: jax.Array, bad: Any, good: Any) -> jax.Array:
    """Broken from the inner step 1 on."""
    return jnp.where(step >= 1, bad, good)


def collecting() -> ml3_jax.Problem:
    def collect(params: Any, task: toys.Target, context: Any, key: Any, step: jax.Array) -> toys.Target:
        return task._replace(target=late(step, jnp.nan, task.target))

    return PLAIN._replace(collect=collect)


def observing() -> ml3_jax.Problem:
    def observe(params: Any, task: toys.Target, context: Any, key: Any, step: jax.Array) -> jax.Array:
        return jnp.stack([params, late(step, jnp.inf, task.target)])[None]

    return PLAIN._replace(observe=observe)


def with_step() -> ml3_jax.Problem:
    """The quadratic with the number of the step as a feature."""

    def observe(params: Any, task: toys.Target, context: Any, key: Any, step: jax.Array) -> jax.Array:
        return jnp.stack([params, task.target, step.astype(jnp.float32)])[None]

    return PLAIN._replace(observe=observe)


def losing(broken: Callable[[jax.Array], jax.Array]) -> ml3_jax.LearnedLoss:
    """A learned loss that adds a broken term from the inner step 1 on."""

    def apply(phi: jax.Array, features: jax.Array) -> jax.Array:
        prediction, target, step = features[0]
        chosen = jnp.where(step >= 1, prediction, 1.0)
        return 0.5 * phi * (prediction - target) ** 2 + jnp.where(step >= 1, broken(chosen), 0.0)

    return ml3_jax.LearnedLoss(lambda key, features: jnp.asarray(0.5), apply)


def judged(value: Callable[[jax.Array], jax.Array]) -> ml3_jax.Problem:
    return PLAIN._replace(task_loss=lambda params, task, context, key: value(params))


LAST = "inner step 2"  # the objective is that of the last of three
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "collect": ({"problem": collecting()}, f"inner step 1 (of 3): {diagnosis.TERMS[0]}"),
    "observe": ({"problem": observing()}, f"inner step 1 (of 3): {diagnosis.TERMS[1]}"),
    "loss": (
        {"problem": with_step(), "loss": losing(lambda x: jnp.log(-jnp.abs(x)))},
        f"inner step 1 (of 3): {diagnosis.TERMS[2]}",
    ),
    "gradient": ({"problem": with_step(), "loss": losing(root_of_zero)}, f"inner step 1 (of 3): {diagnosis.TERMS[3]}"),
    "update": ({"inner_optimizer": optax.scale(jnp.inf)}, f"inner step 0 (of 3): {diagnosis.TERMS[4]}"),
    "task loss": ({"problem": judged(lambda x: jnp.log(-jnp.abs(x)))}, f"{LAST} (of 3): {diagnosis.TERMS[5]}"),
    "mean task loss": (
        {"problem": judged(lambda x: jnp.log(-jnp.abs(x))), "objective": "mean"},
        f"inner step 0 (of 3): {diagnosis.TERMS[5]}",
    ),
    "slope": ({"problem": judged(root_of_zero)}, f"{LAST} (of 3): {diagnosis.TERMS[6]}"),
    "carried": ({"problem": observing(), "inner_steps": 4, "unroll": 2}, f"inner step 1 (of 4): {diagnosis.TERMS[1]}"),
}


def learner(**options: Any) -> ml3_jax.MetaLearner:
    return toys.learner(**{"problem": PLAIN, "loss": toys.scaled_square(), "num_tasks": 2, **options})


@pytest.mark.parametrize("name", CASES)
def test_the_first_term_that_is_not_finite_is_named(name: str):
    options, words = CASES[name]
    meta = learner(**options)
    assert meta.diagnose(meta.init(toys.KEY)) == f"task 0, {words} is not finite"


def test_the_task_is_named():
    def sample_task(key: jax.Array, context: Any) -> toys.Target:
        target = jax.random.uniform(key)
        return toys.Target(jnp.where(target < context, jnp.nan, target), target)

    meta = learner(problem=PLAIN._replace(sample_task=sample_task), num_tasks=8)
    found = {meta.diagnose(meta.init(toys.KEY, jnp.asarray(limit)))[:6] for limit in (0.1, 0.2, 0.3, 0.5, 1.0)}
    assert "task 0" in found
    assert len(found) > 1


def test_a_derivative_of_the_inner_steps_is_named_with_its_cause():
    problem = PLAIN._replace(init=lambda key, task: task.target)  # a gradient of zero from the first step on
    meta = learner(problem=problem, inner_optimizer=optax.adam(0.1))
    words = meta.diagnose(meta.init(toys.KEY))
    assert words.startswith("task 0: the derivative of the inner steps is not finite, and all their terms are.")
    assert "eps_root > 0" in words
    words = meta.diagnose(meta.init(toys.KEY), operation=True)
    assert re.search(
        r"The first operation that is not finite: div at .*transform\.py:.* makes an infinity of 0\.5 and 0$", words
    )


@pytest.mark.parametrize("gradient", ml3_jax.types.GRADIENT_MODES)
def test_the_operation_is_named_on_request(gradient: str):
    meta = learner(problem=with_step(), loss=losing(root_of_zero), gradient=gradient)
    words = meta.diagnose(meta.init(toys.KEY), operation=True)
    assert f"{diagnosis.TERMS[3]} is not finite. The first operation that is not finite: div at {__file__}:" in words


def test_inner_loops_that_cannot_be_differentiated_are_diagnosed_too():
    options: dict[str, Any] = {"inner_optimizer": optax.lbfgs(), "estimator": "es"}
    meta = learner(**options)
    assert meta.diagnose(meta.init(toys.KEY)) == diagnosis.NOTHING
    meta = learner(problem=judged(lambda x: jnp.log(-jnp.abs(x) - 1.0)), **options)
    assert diagnosis.TERMS[5] in meta.diagnose(meta.init(toys.KEY), operation=True)


def test_a_finite_meta_step_is_called_finite():
    meta = learner(unroll=1)
    state, _ = meta.run(meta.init(toys.KEY), 2)
    assert meta.diagnose(state) == diagnosis.NOTHING
    broken = state.replace(loss_params=jnp.asarray(jnp.nan))
    assert meta.diagnose(broken) == "the parameters of the learned loss are not finite"
