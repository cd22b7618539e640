"""Any optax optimizer trains optimizees and learned losses, also one that asks for the value of the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from tests.ml3_jax import toys

START, TARGET = 3.0, 1.0  # error 2
PROBLEM = toys.quadratic(START, TARGET)
OPTIMIZERS: dict[str, Any] = {
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "momo": optax.contrib.momo(0.1),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
    "MultiSteps of polyak_sgd": optax.MultiSteps(optax.polyak_sgd(), 2),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "backtracking": optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    "lbfgs": optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(5)),
}
LOOPS = ("backtracking", "lbfgs")  # a while loop, which backpropagation cannot pass


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizee_and_a_learned_loss_are_trained(name: str):
    optimizer = OPTIMIZERS[name]
    task = PROBLEM.sample_task(toys.KEY, None)
    trained = ml3_jax.baseline(PROBLEM, task, None, toys.KEY, optimizer=optimizer, steps=4)
    assert abs(trained.trace["error"][-1]) < abs(trained.trace["error"][0])
    for estimator in ("es",) if name in LOOPS else ("backprop", "es"):
        meta = toys.learner(PROBLEM, toys.scaled_square(), inner_optimizer=optimizer, estimator=estimator)
        _, metrics = meta.run(meta.init(toys.KEY), 2)
        assert np.all(np.isfinite(metrics.task_loss))
    meta = toys.learner(PROBLEM, toys.scaled_square(), meta_optimizer=optimizer)
    _, metrics = meta.run(meta.init(toys.KEY), 4)
    assert metrics.task_loss[-1] < metrics.task_loss[0]
    assert not np.any(metrics.skipped)


def test_the_value_that_an_inner_optimizer_reads_is_in_the_meta_gradient():
    # M = phi e^2 / 2 has the gradient phi e. Polyak's step M / (phi e)^2 = 1 / (2 phi) halves e for every phi.
    options: dict[str, Any] = {"inner_optimizer": optax.polyak_sgd(), "inner_steps": 1, "num_tasks": 1}
    for mode in ml3_jax.types.GRADIENT_MODES:
        meta = toys.learner(PROBLEM, toys.scaled_square(2.0), gradient=mode, **options)
        _, metrics = meta.step(meta.init(toys.KEY))
        np.testing.assert_allclose(metrics.task_loss, 0.5, rtol=1e-6)
        np.testing.assert_allclose(metrics.meta_grad_norm, 0.0, atol=1e-6)


def test_a_side_effect_of_a_loss_is_not_repeated_for_an_optimizer_that_reads_no_value():
    counts = {}
    for name, optimizer in (("adam", optax.adam(0.1)), ("polyak_sgd", optax.polyak_sgd())):
        seen: list[int] = []

        def plain_loss(params: Any, task: Any, context: Any, key: Any, step: jax.Array, seen: list[int] = seen) -> jax.Array:
            jax.debug.callback(lambda s: seen.append(int(s)), step)
            return 0.5 * (params - task.target) ** 2

        problem, task = PROBLEM._replace(plain_loss=plain_loss), PROBLEM.sample_task(toys.KEY, None)
        jax.block_until_ready(ml3_jax.baseline(problem, task, None, toys.KEY, optimizer=optimizer, steps=3))
        jax.effects_barrier()
        counts[name] = sorted(seen)
    assert counts["adam"] == counts["polyak_sgd"] == [0, 1, 2]  # adapt has the value beside the gradient


def test_a_meta_optimizer_reads_the_objective():
    # One step of size 0.1: e = 2 (1 - 0.1 phi), J = e^2 / 2, dJ/dphi = -0.2 e. Polyak: phi + J / (0.2 e) = phi + e / 0.4.
    meta_optimizer = optax.polyak_sgd(max_learning_rate=1e3)
    meta = toys.learner(PROBLEM, toys.scaled_square(0.5), meta_optimizer=meta_optimizer, inner_steps=1, num_tasks=2)
    state, _ = meta.step(meta.init(toys.KEY))
    np.testing.assert_allclose(state.loss_params, 0.5 + 1.9 / 0.4, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "words"), [(jnp.complex64, "two real arrays"), (jnp.int32, "move what is not trained into the task")]
)
def test_parameters_that_cannot_be_descended_are_refused(dtype: Any, words: str):
    def init(key: jax.Array, task: Any) -> Any:
        return {"w": jnp.zeros((), dtype)}

    problem, task = PROBLEM._replace(init=init), PROBLEM.sample_task(toys.KEY, None)
    with pytest.raises(ValueError, match=rf"init\['w'\]: expected real floating-point parameters, got .*{words}"):
        ml3_jax.baseline(problem, task, None, toys.KEY, optimizer=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match=r"init\['w'\]: expected real floating-point"):
        toys.learner(problem, toys.scaled_square()).init(toys.KEY)
    loss = toys.scaled_square()._replace(init=lambda key, features: jnp.ones((), dtype))
    with pytest.raises(ValueError, match="the learned loss's init: expected real floating-point"):
        toys.learner(PROBLEM, loss).init(toys.KEY)


def test_forward_mode_is_refused_in_gradient_mode_mixed_and_works_in_the_others():
    def forward(objective: Any, loss_params: Any, key: jax.Array) -> Any:
        return objective(loss_params), jax.jacfwd(lambda phi: objective(phi)[0])(loss_params)

    norms = []
    for mode, estimator in (("remat", forward), ("reverse", forward), ("reverse", "backprop")):
        meta = toys.learner(PROBLEM, toys.scaled_square(), gradient=mode, estimator=estimator, objective="mean")
        norms.append(float(meta.step(meta.init(toys.KEY))[1].meta_grad_norm))
    np.testing.assert_allclose(norms[:2], norms[2], rtol=1e-5)
    meta = toys.learner(PROBLEM, toys.scaled_square(), estimator=forward)
    with pytest.raises(TypeError, match=r'choose gradient="remat" or "reverse" for jax\.jvp and jax\.jacfwd'):
        meta.step(meta.init(toys.KEY))
