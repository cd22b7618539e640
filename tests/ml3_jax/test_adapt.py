"""Meta-test: `adapt` and `baseline` against loops written out by hand, their pairing, and bad input."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from tests.ml3_jax import toys

RATE = optax.sgd(0.1)
PROBLEM, LOSS = toys.points(), toys.smooth_loss()
TASK = PROBLEM.sample_task(toys.KEY, None)
LOSS_PARAMS = LOSS.init(toys.KEY, 3)


def adapted(problem=PROBLEM, task: Any = TASK, key=toys.KEY, loss_params=LOSS_PARAMS, **options) -> ml3_jax.Adaptation:
    settings = {"optimizer": RATE, "steps": 3, **options}
    return ml3_jax.adapt(problem, LOSS, loss_params, task, None, key, **settings)


def plain(problem=PROBLEM, task: Any = TASK, key=toys.KEY, **options) -> ml3_jax.Adaptation:
    return ml3_jax.baseline(problem, task, None, key, **{"optimizer": RATE, "steps": 3, **options})


RUNS = pytest.mark.parametrize("run", [adapted, plain])


def test_adapt_on_a_quadratic_is_the_closed_form():
    # Each step of rate a on phi e^2 / 2 multiplies the error by 1 - a phi: 2 * 0.9^k with a = 0.2, phi = 0.5.
    problem = toys.quadratic(3.0, 1.0)
    out = ml3_jax.adapt(
        problem,
        toys.scaled_square(),
        jnp.asarray(0.5),
        problem.sample_task(toys.KEY, None),
        None,
        toys.KEY,
        optimizer=optax.sgd(0.2),
        steps=4,
    )
    np.testing.assert_allclose(out.trace["error"], 2 * 0.9 ** np.arange(5), rtol=1e-6)
    np.testing.assert_allclose(out.params, 1 + 2 * 0.9**4, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.05)])
@RUNS
def test_the_scan_is_the_loop_written_out_by_hand(run: Callable, optimizer: optax.GradientTransformation):
    start = PROBLEM.init(toys.KEY, TASK)

    def descended(params, step):
        if run is plain:
            assert PROBLEM.plain_loss is not None
            return PROBLEM.plain_loss(params, TASK, None, toys.KEY, step)
        return LOSS.apply(LOSS_PARAMS, PROBLEM.observe(params, TASK, None, toys.KEY, step))

    params, opt_state = start, optimizer.init(start)
    history = [PROBLEM.task_loss(params, TASK, None, toys.KEY)]
    slope = jax.jit(jax.grad(descended))
    for step in range(3):
        updates, opt_state = optimizer.update(slope(params, step), opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(PROBLEM.task_loss(params, TASK, None, toys.KEY))
    out = run(optimizer=optimizer, params=start)
    toys.assert_close(out.params, params)
    np.testing.assert_allclose(out.trace["mse"], np.asarray(history), rtol=1e-5)


def test_adapt_and_baseline_start_alike_and_see_the_same_data():
    learned, classical = adapted(), plain()
    assert learned.trace["mse"][0] == classical.trace["mse"][0]
    assert learned.trace["mse"][-1] != classical.trace["mse"][-1]
    seen: dict[str, list] = {"observe": [], "plain_loss": []}
    problem = toys.stream()

    def noted(name: str) -> Callable:
        function = getattr(problem, name)

        def watched(params, task, context, key, step):
            jax.debug.callback(lambda x, s, k: seen[name].append((int(s), k.tolist())), task.x, step, jax.random.key_data(key))
            return function(params, task, context, key, step)

        return watched

    # collect depends on the parameter: keep it still, so that both see data of the same parameter.
    problem = problem._replace(observe=noted("observe"), plain_loss=noted("plain_loss"))
    task = problem.sample_task(toys.KEY, None)
    loss_params = LOSS.init(toys.KEY, 2)
    jax.block_until_ready(adapted(problem, task, loss_params=loss_params))
    jax.block_until_ready(plain(problem, task))
    jax.effects_barrier()
    assert len(seen["observe"]) == 3
    assert sorted(seen["observe"]) == sorted(seen["plain_loss"])
    assert len({str(key) for _, key in seen["observe"]}) == 3


@RUNS
def test_params_given_replace_the_draw_and_nothing_else(run: Callable):
    drawn = run(steps=1)
    start = jax.tree.map(jnp.ones_like, drawn.params)
    given = run(steps=1, params=start)
    assert given.trace["mse"][0] == PROBLEM.task_loss(start, TASK, None, toys.KEY)
    assert given.trace["mse"][0] != drawn.trace["mse"][0]


@RUNS
def test_another_key_draws_another_start(run: Callable):
    toys.assert_same(run(), run())
    assert run().trace["mse"][0] != run(key=jax.random.key(8)).trace["mse"][0]


@RUNS
def test_extra_is_never_needed(run: Callable):
    blind = TASK._replace(extra=jnp.full_like(TASK.extra, jnp.nan))
    seen, unseen = run(), run(task=blind)
    toys.assert_same(seen.params, unseen.params)
    assert np.all(np.isnan(unseen.trace["mse"]))  # evaluate reads it, and nothing else


@RUNS
def test_tasks_and_step_sizes_under_vmap_are_one_by_one(run: Callable):
    keys = jax.random.split(toys.KEY, 3)
    tasks = jax.vmap(lambda key: PROBLEM.sample_task(key, None))(keys)
    rates = jnp.asarray([0.01, 0.1])

    def one(task, key, rate):
        return run(task=task, key=key, optimizer=optax.sgd(rate), steps=2).trace["mse"]

    by_rate = jax.vmap(jax.vmap(one, in_axes=(0, 0, None)), in_axes=(None, None, 0))
    together = jax.jit(by_rate)(tasks, keys, rates)
    assert together.shape == (2, 3, 3)
    for r, rate in enumerate((0.01, 0.1)):
        optimizer = optax.sgd(rate)
        for i in range(3):
            task = jax.tree.map(lambda x, i=i: x[i], tasks)
            alone = run(task=task, key=keys[i], optimizer=optimizer, steps=2).trace["mse"]
            np.testing.assert_allclose(together[r, i], alone, rtol=1e-4)


@RUNS
def test_compiled_is_eager(run: Callable):
    compiled = run(steps=2)
    with jax.disable_jit():
        eager = run(steps=2)
    toys.assert_close(compiled, eager)


@RUNS
def test_equal_calls_trace_once(run: Callable):
    task_loss, calls = toys.counting(PROBLEM.evaluate)
    problem = PROBLEM._replace(evaluate=task_loss)
    first = run(problem)
    traced = len(calls)
    assert traced > 0
    for key in jax.random.split(toys.KEY, 3):
        run(problem, key=key)
    assert len(calls) == traced
    toys.assert_same(first, run(problem))


def test_a_loss_restored_from_its_spec_adapts_to_the_same_bits():
    again = ml3_jax.losses.from_spec(LOSS.spec or {})
    out = ml3_jax.adapt(PROBLEM, again, LOSS_PARAMS, TASK, None, toys.KEY, optimizer=RATE, steps=3)
    toys.assert_same(out, adapted())


def test_baseline_without_plain_loss_descends_the_task_loss():
    problem = PROBLEM._replace(plain_loss=None)
    blind = TASK._replace(extra=TASK.y)
    toys.assert_close(plain(problem, blind).params, plain(PROBLEM, blind).params)
    assert np.any(toys.flat(plain(problem).params) != toys.flat(plain(PROBLEM).params))


@RUNS
@pytest.mark.parametrize("traced", [False, True])
def test_between_evaluations_the_trace_repeats_the_earlier_one(run: Callable, traced: bool):
    every = run(steps=5)
    some = jax.jit(lambda n: run(steps=5, evaluate_every=n))(3) if traced else run(steps=5, evaluate_every=3)
    np.testing.assert_allclose(toys.flat(some.params), toys.flat(every.params), rtol=1e-6)
    for name, values in every.trace.items():
        np.testing.assert_allclose(some.trace[name], values[jnp.array([0, 0, 0, 3, 3, 5])], rtol=1e-6)


def test_an_update_that_is_not_evaluated_does_not_run_the_evaluation():
    ran = []

    def evaluate(params, task, context, key):
        jax.debug.callback(lambda: ran.append(1))
        return PROBLEM.evaluate(params, task, context, key)

    problem = PROBLEM._replace(evaluate=evaluate)
    tasks = jax.vmap(PROBLEM.sample_task, (0, None))(jax.random.split(toys.KEY, 2), None)
    trace = jax.vmap(lambda task: plain(problem, task, steps=5, evaluate_every=jnp.int32(5)).trace)(tasks)
    jax.block_until_ready(trace)
    jax.effects_barrier()
    assert len(ran) == 2  # start and end; a callback without arguments runs once for all tasks


@RUNS
@pytest.mark.parametrize("every", [0, -1, 1.5, True, jnp.int32(0), jnp.float32(2.0)])
def test_a_bad_number_of_updates_between_evaluations_is_refused(run: Callable, every: Any):
    with pytest.raises(ValueError, match="evaluate_every: expected a whole number of at least 1"):
        run(evaluate_every=every)


def test_adam_without_eps_root_is_fine_at_meta_test():
    out = adapted(optimizer=optax.adam(0.05))
    assert np.all(np.isfinite(out.trace["mse"]))


@RUNS
@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3", float("nan")])
def test_a_bad_number_of_steps_is_refused(run: Callable, steps: Any):
    with pytest.raises(ValueError, match=f"steps: expected a whole number of at least 1, got {steps!r}"):
        run(steps=steps)


def test_a_loss_meta_trained_for_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match=r"initialised for 2 features a sample, but .* shape \(8, 3\), which has 3"):
        adapted(loss_params=LOSS.init(toys.KEY, 2))


def test_an_observe_of_the_wrong_rank_is_refused():
    problem = PROBLEM._replace(observe=lambda *args: PROBLEM.observe(*args)[..., None])
    with pytest.raises(ValueError, match=r"\[N, F\] \(rank 2\), but observe returned shape \(8, 3, 1\)"):
        adapted(problem)


def test_a_plain_loss_that_is_no_scalar_is_refused():
    problem = PROBLEM._replace(plain_loss=lambda params, task, context, key, step: task.y)
    with pytest.raises(ValueError, match=r"plain_loss must return a scalar, got shape \(8,\): reduce it"):
        plain(problem)
