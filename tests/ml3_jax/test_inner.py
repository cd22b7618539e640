"""The inner loop: its meta-gradient in closed form, its cut gradients, and the keys and steps of its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml3_jax import inner, inner_gradient
from ml3_jax.types import GRADIENT_MODES, Problem
from tests.ml3_jax import toys

RATE, PHI, START, TARGET = 0.2, 0.5, 3.0, 1.0


def quadratic_segment(
    steps: int, objective: str = "last", gradient: str = "mixed", problem: Problem | None = None, rate: float = RATE
):
    """phi -> the objective of `steps` inner steps of SGD on the quadratic."""
    optimizer = optax.sgd(rate)
    problem = problem or toys.quadratic(START, TARGET)
    segment = inner.make_segment(problem, toys.scaled_square(), optimizer, steps=steps, gradient=gradient, objective=objective)

    def objective_of(phi: jax.Array) -> jax.Array:
        task = problem.sample_task(toys.KEY, None)
        params = problem.init(toys.KEY, task)
        keys = inner.split_keys(toys.KEY)
        return segment(phi, params, optimizer.init(params), task, None, keys, jnp.zeros((), jnp.int32))[0]

    return objective_of


def by_mode(*args, phi: float = PHI, **options):
    """{gradient mode: (objective, d objective/d phi)} of `quadratic_segment`, from one compilation."""

    @jax.jit
    def all_modes(phi):
        return {mode: jax.value_and_grad(quadratic_segment(*args, gradient=mode, **options))(phi) for mode in GRADIENT_MODES}

    return all_modes(jnp.asarray(phi))


def test_meta_gradient_of_one_step_on_a_quadratic():
    # M = phi e^2 / 2, so theta' - t = e - RATE phi e = (1 - RATE phi) e, and with the task loss e'^2 / 2
    # L = (1 - RATE phi)^2 e^2 / 2  and  dL/dphi = -RATE (1 - RATE phi) e^2.
    error = START - TARGET
    for value, slope in by_mode(1).values():
        np.testing.assert_allclose(value, 0.5 * (1 - RATE * PHI) ** 2 * error**2, rtol=1e-6)
        np.testing.assert_allclose(slope, -RATE * (1 - RATE * PHI) * error**2, rtol=1e-6)


def test_meta_gradient_of_the_mean_over_three_steps_on_a_quadratic():
    # After k steps L_k = c^{2k} e^2 / 2 with c = 1 - RATE phi, so dL_k/dphi = -RATE k c^{2k - 1} e^2; the objective is
    # the mean over k = 1, 2, 3.
    error, shrink = START - TARGET, 1 - RATE * PHI
    k = np.arange(1, 4)
    for value, slope in by_mode(3, "mean").values():
        np.testing.assert_allclose(value, np.mean(0.5 * shrink ** (2 * k) * error**2), rtol=1e-6)
        np.testing.assert_allclose(slope, np.mean(-RATE * k * shrink ** (2 * k - 1) * error**2), rtol=1e-6)


def test_no_gradient_passes_through_collected_data():
    # collect gives x = 1 + theta. With e = theta - t: M = phi x^2 e^2 / 2, e' = (1 - RATE phi x^2) e. After two steps
    # e2 = (1 - RATE phi x1^2)(1 - RATE phi x0^2) e0. The gradient treats x1 = 1 + theta1(phi) as a constant:
    # de2/dphi = -RATE [x1^2 (1 - RATE phi x0^2) + x0^2 (1 - RATE phi x1^2)] e0.
    rate, phi, start, target = 0.05, 0.5, 2.0, 0.5
    problem = toys.quadratic(start, target)._replace(
        collect=lambda params, task, context, key, step: (task, 1.0 + params),
        observe=lambda params, data, context, key, step: jnp.stack([params * data[1], data[0].target * data[1]])[None],
    )
    e0, x0 = start - target, 1.0 + start
    e1 = (1 - rate * phi * x0**2) * e0
    x1 = 1.0 + target + e1
    e2 = (1 - rate * phi * x1**2) * e1
    slope = -rate * (x1**2 * (1 - rate * phi * x0**2) + x0**2 * (1 - rate * phi * x1**2)) * e0
    for value, gradient_of_phi in by_mode(2, problem=problem, rate=rate, phi=phi).values():
        np.testing.assert_allclose(value, 0.5 * e2**2, rtol=1e-5)
        np.testing.assert_allclose(gradient_of_phi, e2 * slope, rtol=1e-5)


def test_gradient_with_respect_to_the_parameters_of_collect_is_exactly_zero():
    problem = toys.stream()
    task = toys.Stream(jnp.asarray(2.0), jnp.zeros(4), jnp.asarray(2.0))

    def drawn(cut: bool, params: jax.Array) -> jax.Array:
        collect = inner.collected if cut else lambda problem, *args: problem.collect(*args)
        return jnp.sum(collect(problem, params, task, None, toys.KEY, jnp.zeros((), jnp.int32)).x)

    @jax.jit
    def slopes(params):
        return [jax.grad(lambda p, cut=cut: drawn(cut, p))(params) for cut in (True, False)]

    cut, uncut = slopes(jnp.asarray(0.3))
    assert cut == 0.0
    assert uncut != 0.0


@pytest.mark.parametrize("objective", ["last", "mean"])
def test_all_modes_have_one_gradient_for_task_context_and_values_that_the_problem_closes_over(objective: str):
    points, loss, task, params, loss_params = toys.start()
    optimizer = optax.sgd(0.1)

    def objective_of(mode: str, closed_over: jax.Array, y: jax.Array, context: jax.Array, loss_params) -> jax.Array:
        def observe(params, task, context, key, step):
            return closed_over * context * points.observe(params, task, context, key, step)

        problem = points._replace(
            observe=observe, task_loss=lambda *args: closed_over * points.task_loss(*args) + jnp.mean(args[1].y ** 2)
        )
        segment = inner.make_segment(problem, loss, optimizer, steps=2, gradient=mode, objective=objective)
        keys, age = inner.split_keys(toys.KEY), jnp.zeros((), jnp.int32)
        return segment(loss_params, params, optimizer.init(params), task._replace(y=y), context, keys, age)[0]

    @jax.jit
    def slopes(closed_over):
        at = (closed_over, task.y, jnp.ones(()), loss_params)
        return [jax.grad(functools.partial(objective_of, mode), argnums=(0, 1, 2, 3))(*at) for mode in GRADIENT_MODES]

    @jax.jit
    def forward(closed_over):
        return jax.jacfwd(lambda x: objective_of("remat", x, task.y, jnp.ones(()), loss_params))(closed_over)

    mixed, *others = slopes(jnp.asarray(1.5))
    assert all(np.all(toys.flat(slope) != 0.0) for slope in mixed)
    for other in others:
        toys.assert_close(other, mixed)
    toys.assert_close(forward(jnp.asarray(1.5)), mixed[0])
    # Under vmap the closed-over value has an axis.
    by_value = jax.jit(jax.vmap(slopes))(jnp.asarray([1.5, 2.0]))
    toys.assert_close(toys.item(by_value, 0), [mixed, *others])


def test_all_modes_take_parameters_of_another_dtype_than_the_task_loss():
    points, loss, task, params, loss_params = toys.start()
    optimizer, half = optax.sgd(0.1), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def slope(mode: str):
        segment = inner.make_segment(points, loss, optimizer, steps=2, gradient=mode, objective="mean")
        keys, age = inner.split_keys(toys.KEY), jnp.zeros((), jnp.int32)
        return jax.grad(lambda phi: segment(phi, half, optimizer.init(half), task, None, keys, age)[0])(loss_params)

    mixed, *others = jax.jit(lambda: [slope(mode) for mode in GRADIENT_MODES])()
    for other in others:
        toys.assert_close(other, mixed, rtol=0.05, atol=0.01)  # bfloat16 has 8 bits


@pytest.mark.parametrize("objective", ["last", "mean"])
def test_collect_and_a_mean_task_loss_run_once_an_inner_step_and_under_nested_once_more_in_the_backward_pass(objective: str):
    calls: dict[tuple[str, str], list[int]] = {}
    stream = toys.stream()

    def watched(mode: str) -> Problem:
        def noted(name: str, function):
            seen = calls[mode, name] = []

            def call(*args):
                jax.debug.callback(lambda _: seen.append(1), args[0])
                return function(*args)

            return call

        return stream._replace(collect=noted("collect", stream.collect), task_loss=noted("task_loss", stream.task_loss))

    @jax.jit
    def slopes(phi):
        modes = GRADIENT_MODES
        return [jax.grad(quadratic_segment(3, objective, mode, watched(mode)))(phi) for mode in modes]

    assert np.all(np.asarray(jax.block_until_ready(slopes(jnp.asarray(PHI)))) != 0.0)
    jax.effects_barrier()
    once = {"collect": 3, "task_loss": 3 if objective == "mean" else 1}
    twice = {"collect": 6, "task_loss": 6 if objective == "mean" else 1}
    assert {key: len(seen) for key, seen in calls.items()} == {
        (mode, name): count for mode in GRADIENT_MODES for name, count in (twice if mode == "nested" else once).items()
    }


def test_collect_and_observe_of_a_step_share_a_key_of_their_own():
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
    jax.block_until_ready(jax.jit(quadratic_segment(3, problem=watched))(jnp.asarray(PHI)))
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


def test_a_segment_is_the_loop_written_out_by_hand():
    problem, loss, task, start, loss_params = toys.start()
    optimizer = optax.adam(0.05, eps_root=1e-8)
    segment = inner.make_segment(problem, loss, optimizer, steps=3, gradient="mixed", objective="last")

    def scanned(phi):
        keys = inner.split_keys(toys.KEY)
        return segment(phi, start, optimizer.init(start), task, None, keys, jnp.zeros((), jnp.int32))

    def by_hand(phi):
        params, opt_state = start, optimizer.init(start)
        for step in range(3):
            now = jnp.asarray(step, jnp.int32)
            grads = jax.grad(lambda p, s=now: loss.apply(phi, problem.observe(p, task, None, toys.KEY, s)))(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return problem.task_loss(params, task, None, toys.KEY), (params, opt_state)

    @jax.jit
    def both(phi):
        return [jax.value_and_grad(function, has_aux=True)(phi) for function in (scanned, by_hand)]

    made, expected = both(loss_params)
    toys.assert_close(made, expected, rtol=1e-4)


def test_the_mixed_gradient_is_differentiable_under_vmap(x64: None):
    problem, loss, _, *drawn = toys.start()
    params, loss_params = jax.tree.map(lambda p: p.astype(jnp.float64), drawn)
    inner_loss = inner.observed_loss(problem, loss)
    mixed = inner_gradient.make_inner_gradient(inner_loss, "mixed")
    step = jnp.zeros((), jnp.int32)

    def energy(gradient_fn, phi, theta, task):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient_fn(phi, theta, task, None, toys.KEY, step)))

    def slopes(gradient_fn, task):
        return jax.grad(lambda phi, theta: energy(gradient_fn, phi, theta, task), argnums=(0, 1))(loss_params, params)

    @jax.jit
    def both(keys):
        tasks = jax.vmap(lambda key: problem.sample_task(key, None))(keys)
        plain = jax.grad(inner_loss, argnums=1)
        batched = jax.vmap(lambda task: slopes(mixed, task))(tasks)
        return batched, jax.lax.map(lambda task: slopes(plain, task), tasks)

    batched, alone = both(jax.random.split(toys.KEY, 3))
    toys.assert_close(batched, alone, rtol=1e-10, atol=1e-12)


def test_the_task_loss_replaces_a_missing_plain_loss():
    problem, _, task, params, _ = toys.start()
    args = (None, params, task, None, toys.KEY, jnp.zeros((), jnp.int32))
    assert problem.plain_loss is not None
    assert inner.plain_loss(problem)(*args) == problem.plain_loss(*args[1:])
    without = inner.plain_loss(problem._replace(plain_loss=None))(*args)
    assert without == problem.task_loss(params, task, None, toys.KEY)
    assert without != inner.plain_loss(problem)(*args)


def test_unknown_modes_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="gradient: expected one of 'mixed', 'nested', 'remat', 'reverse', got 'forward'"):
        inner_gradient.make_inner_gradient(lambda *args: jnp.zeros(()), "forward")
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
