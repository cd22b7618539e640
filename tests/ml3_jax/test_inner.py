"""The inner loop: its meta-gradient in closed form, what is cut, and which keys and steps its parts are given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml3_jax import inner
from ml3_jax.types import Problem
from tests.ml3_jax import toys

MODES = ("mixed", "remat", "reverse")
RATE, PHI, START, TARGET = 0.2, 0.5, 3.0, 1.0


def quadratic_segment(steps: int, objective: str = "last", gradient: str = "mixed", problem: Problem | None = None):
    """phi -> the objective of `steps` inner steps of SGD on the quadratic."""
    optimizer = optax.sgd(RATE)
    problem = problem or toys.quadratic(START, TARGET)
    segment = inner.make_segment(problem, toys.scaled_square(), optimizer, steps=steps, gradient=gradient, objective=objective)

    def objective_of(phi: jax.Array) -> jax.Array:
        task = problem.sample_task(toys.KEY, None)
        params = problem.init(toys.KEY, task)
        keys = inner.split_keys(toys.KEY)
        return segment(phi, params, optimizer.init(params), task, None, keys, jnp.zeros((), jnp.int32))[0]

    return objective_of


@pytest.mark.parametrize("gradient", MODES)
def test_meta_gradient_of_one_step_on_a_quadratic(gradient: str):
    # M = phi e^2 / 2, so theta' - t = e - RATE phi e = (1 - RATE phi) e, and with the task loss e'^2 / 2
    # L = (1 - RATE phi)^2 e^2 / 2  and  dL/dphi = -RATE (1 - RATE phi) e^2.
    error = START - TARGET
    value, slope = jax.value_and_grad(quadratic_segment(1, gradient=gradient))(jnp.asarray(PHI))
    np.testing.assert_allclose(value, 0.5 * (1 - RATE * PHI) ** 2 * error**2, rtol=1e-6)
    np.testing.assert_allclose(slope, -RATE * (1 - RATE * PHI) * error**2, rtol=1e-6)


@pytest.mark.parametrize("gradient", MODES)
def test_meta_gradient_of_the_mean_over_three_steps_on_a_quadratic(gradient: str):
    # After k steps L_k = c^{2k} e^2 / 2 with c = 1 - RATE phi, so dL_k/dphi = -RATE k c^{2k - 1} e^2; the objective is
    # the mean over k = 1, 2, 3.
    error, shrink = START - TARGET, 1 - RATE * PHI
    value, slope = jax.value_and_grad(quadratic_segment(3, "mean", gradient))(jnp.asarray(PHI))
    k = np.arange(1, 4)
    np.testing.assert_allclose(value, np.mean(0.5 * shrink ** (2 * k) * error**2), rtol=1e-6)
    np.testing.assert_allclose(slope, np.mean(-RATE * k * shrink ** (2 * k - 1) * error**2), rtol=1e-6)


@pytest.mark.parametrize("gradient", MODES)
def test_no_gradient_passes_through_collected_data(gradient: str):
    # collect gives x = 1 + theta. With e = theta - t: M = phi x^2 e^2 / 2, e' = (1 - RATE phi x^2) e. After two steps
    # e2 = (1 - RATE phi x1^2)(1 - RATE phi x0^2) e0, in which x1 = 1 + theta1(phi) is a number as far as the gradient
    # is concerned: de2/dphi = -RATE [x1^2 (1 - RATE phi x0^2) + x0^2 (1 - RATE phi x1^2)] e0.
    rate, phi, start, target = 0.05, 0.5, 2.0, 0.5
    problem = toys.quadratic(start, target)._replace(
        collect=lambda params, task, context, key, step: (task, 1.0 + params),
        observe=lambda params, data, context, key, step: jnp.stack([params * data[1], data[0].target * data[1]])[None],
    )
    optimizer = optax.sgd(rate)
    segment = inner.make_segment(problem, toys.scaled_square(), optimizer, steps=2, gradient=gradient, objective="last")

    def objective_of(phi):
        task, params = problem.sample_task(toys.KEY, None), jnp.asarray(start)
        keys = inner.split_keys(toys.KEY)
        return segment(phi, params, optimizer.init(params), task, None, keys, jnp.zeros((), jnp.int32))[0]

    e0, x0 = start - target, 1.0 + start
    e1 = (1 - rate * phi * x0**2) * e0
    x1 = 1.0 + target + e1
    e2 = (1 - rate * phi * x1**2) * e1
    slope = -rate * (x1**2 * (1 - rate * phi * x0**2) + x0**2 * (1 - rate * phi * x1**2)) * e0
    value, gradient_of_phi = jax.value_and_grad(objective_of)(jnp.asarray(phi))
    np.testing.assert_allclose(value, 0.5 * e2**2, rtol=1e-5)
    np.testing.assert_allclose(gradient_of_phi, e2 * slope, rtol=1e-5)


def test_gradient_with_respect_to_what_collect_read_is_exactly_zero():
    problem = toys.stream()
    task = toys.Stream(jnp.asarray(2.0), jnp.zeros(4), jnp.asarray(2.0))

    def drawn(cut: bool, params: jax.Array) -> jax.Array:
        collect = inner.collected if cut else lambda problem, *args: problem.collect(*args)
        return jnp.sum(collect(problem, params, task, None, toys.KEY, jnp.zeros((), jnp.int32)).x)

    slopes = {cut: jax.grad(lambda p, cut=cut: drawn(cut, p))(jnp.asarray(0.3)) for cut in (True, False)}
    assert slopes[True] == 0.0
    assert slopes[False] != 0.0  # the gradient that is cut is there to be cut


def test_mixed_mode_cuts_the_gradient_to_task_and_context():
    problem = toys.points()._replace(
        observe=lambda params, task, context, key, step: context * toys.points().observe(params, task, context, key, step)
    )
    loss = toys.smooth_loss()
    task = problem.sample_task(toys.KEY, None)
    params = problem.init(toys.KEY, task)
    loss_params = loss.init(toys.KEY, 3)
    optimizer = optax.sgd(0.1)
    segment = inner.make_segment(problem, loss, optimizer, steps=2, gradient="mixed", objective="last")

    def objective_of(y: jax.Array, context: jax.Array, loss_params) -> jax.Array:
        seen = task._replace(y=y)
        keys = inner.split_keys(toys.KEY)
        age = jnp.zeros((), jnp.int32)
        return segment(loss_params, params, optimizer.init(params), seen, context, keys, age)[0]

    d_y, d_context, d_phi = jax.jit(jax.grad(objective_of, argnums=(0, 1, 2)))(task.y, jnp.ones(()), loss_params)
    assert np.all(toys.flat((d_y, d_context)) == 0.0)
    assert np.all(toys.flat(d_phi) != 0.0)


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("objective", ["last", "mean"])
def test_collect_runs_once_an_inner_step_and_never_on_the_way_back(gradient: str, objective: str):
    calls: list[int] = []
    problem = toys.stream()
    collect = problem.collect
    assert collect is not None

    def watched(params, task, context, key, step):
        jax.debug.callback(lambda s: calls.append(int(s)), step)
        return collect(params, task, context, key, step)

    objective_of = quadratic_segment(3, objective, gradient, problem._replace(collect=watched))
    slope = jax.block_until_ready(jax.jit(jax.grad(objective_of))(jnp.asarray(PHI)))
    jax.effects_barrier()
    assert sorted(calls) == [0, 1, 2]
    assert slope != 0.0


def test_collect_and_observe_of_a_step_share_a_key_that_no_other_step_and_no_task_loss_has():
    seen: dict[str, dict[int, tuple]] = {"collect": {}, "observe": {}, "task_loss": {}}

    def note(name: str, key: jax.Array, step: jax.Array | int) -> None:
        def write(data, step):
            seen[name][int(step)] = tuple(np.ravel(data).tolist())

        jax.debug.callback(write, jax.random.key_data(key), step)

    problem = toys.quadratic()

    def collect(params, task, context, key, step):
        note("collect", key, step)
        return task

    def observe(params, task, context, key, step):
        note("observe", key, step)
        return problem.observe(params, task, context, key, step)

    def task_loss(params, task, context, key):
        note("task_loss", key, 0)
        return problem.task_loss(params, task, context, key)

    watched = problem._replace(collect=collect, observe=observe, task_loss=task_loss)
    jax.block_until_ready(quadratic_segment(3, problem=watched)(jnp.asarray(PHI)))
    jax.effects_barrier()
    assert set(seen["collect"]) == {0, 1, 2}
    assert seen["collect"] == seen["observe"]
    assert len({*seen["collect"].values(), *seen["task_loss"].values()}) == 4


def test_steps_are_numbered_on_from_the_age_of_the_optimizee():
    steps: list[int] = []
    problem = toys.quadratic()

    def observe(params, task, context, key, step):
        jax.debug.callback(lambda s: steps.append(int(s)), step)
        return problem.observe(params, task, context, key, step)

    optimizer = optax.sgd(RATE)
    segment = inner.make_segment(
        problem._replace(observe=observe), toys.scaled_square(), optimizer, steps=2, gradient="mixed", objective="last"
    )
    task, params = problem.sample_task(toys.KEY, None), jnp.asarray(START)
    keys = inner.split_keys(toys.KEY)
    out = segment(jnp.asarray(PHI), params, optimizer.init(params), task, None, keys, jnp.asarray(4, jnp.int32))
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert sorted(steps) == [4, 5]


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.05, eps_root=1e-8)])
def test_segment_is_the_loop_written_out_by_hand(optimizer: optax.GradientTransformation):
    problem, loss = toys.points(), toys.smooth_loss()
    task = problem.sample_task(toys.KEY, None)
    start = problem.init(toys.KEY, task)
    loss_params = loss.init(toys.KEY, 3)
    segment = inner.make_segment(problem, loss, optimizer, steps=4, gradient="mixed", objective="last")

    def scanned(phi):
        keys = inner.split_keys(toys.KEY)
        return segment(phi, start, optimizer.init(start), task, None, keys, jnp.zeros((), jnp.int32))

    def by_hand(phi):
        params, opt_state = start, optimizer.init(start)
        for step in range(4):
            now = jnp.asarray(step, jnp.int32)
            grads = jax.grad(lambda p, s=now: loss.apply(phi, problem.observe(p, task, None, toys.KEY, s)))(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return problem.task_loss(params, task, None, toys.KEY), (params, opt_state)

    (value, lived), gradient = jax.jit(jax.value_and_grad(scanned, has_aux=True))(loss_params)
    (expected, expected_lived), expected_gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(loss_params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    toys.assert_close(lived, expected_lived)
    toys.assert_close(gradient, expected_gradient, rtol=1e-4)


@pytest.mark.parametrize("gradient", MODES)
def test_inner_gradient_is_differentiable_under_vmap(gradient: str, x64: None):
    problem, loss = toys.points(), toys.smooth_loss()
    tasks = jax.vmap(lambda key: problem.sample_task(key, None))(jax.random.split(toys.KEY, 3))
    params = problem.init(toys.KEY, tasks)
    loss_params = jax.tree.map(lambda p: p.astype(jnp.float64), loss.init(toys.KEY, 3))
    inner_loss = inner.observed_loss(problem, loss)
    inner_gradient = inner.make_inner_gradient(inner_loss, gradient)
    step = jnp.zeros((), jnp.int32)

    def energy(gradient_fn, phi, theta, task):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient_fn(phi, theta, task, None, toys.KEY, step)))

    def slopes(gradient_fn, task):
        return jax.grad(lambda phi, theta: energy(gradient_fn, phi, theta, task), argnums=(0, 1))(loss_params, params)

    together = jax.jit(jax.vmap(lambda task: slopes(inner_gradient, task)))(tasks)
    plain = jax.jit(lambda task: slopes(jax.grad(inner_loss, argnums=1), task))
    for i in range(3):
        alone = plain(jax.tree.map(lambda x, i=i: x[i], tasks))
        toys.assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-10, atol=1e-12)


def test_the_task_loss_stands_in_for_a_missing_plain_loss():
    problem = toys.points()
    task = problem.sample_task(toys.KEY, None)
    params = problem.init(toys.KEY, task)
    args = (None, params, task, None, toys.KEY, jnp.zeros((), jnp.int32))
    assert problem.plain_loss is not None
    assert inner.plain_loss(problem)(*args) == problem.plain_loss(*args[1:])
    without = inner.plain_loss(problem._replace(plain_loss=None))(*args)
    assert without == problem.task_loss(params, task, None, toys.KEY)
    assert without != inner.plain_loss(problem)(*args)


def test_unknown_modes_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="gradient: expected one of 'mixed', 'remat', 'reverse', got 'forward'"):
        inner.make_inner_gradient(lambda *args: jnp.zeros(()), "forward")
    with pytest.raises(ValueError, match="objective: expected one of 'last', 'mean', got 'best'"):
        quadratic_segment(1, objective="best")


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape():
    vector = toys.scaled_square()._replace(apply=lambda phi, features: phi * features[0])
    loss = inner.observed_loss(toys.quadratic(), vector)
    task = toys.quadratic().sample_task(toys.KEY, None)
    with pytest.raises(ValueError, match=r"apply must return a scalar, got shape \(2,\): reduce it"):
        loss(jnp.asarray(PHI), jnp.asarray(START), task, None, toys.KEY, jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match=r"task_loss must return a scalar, got shape \(1,\)"):
        quadratic_segment(1, problem=toys.quadratic()._replace(task_loss=lambda p, t, c, k: p[None]))(jnp.asarray(PHI))
