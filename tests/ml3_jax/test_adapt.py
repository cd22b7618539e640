"""Meta-test: `adapt` and `baseline` against loops written out by hand, their common draws, and bad input."""

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
PROBLEM, LOSS, TASK, PARAMS, LOSS_PARAMS = toys.start()


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


@pytest.mark.parametrize(("run", "optimizer"), [(adapted, optax.adam(0.05)), (plain, optax.sgd(0.1, momentum=0.9))])
def test_the_scan_is_the_loop_written_out_by_hand(run: Callable, optimizer: optax.GradientTransformation):
    def descended(params, step):
        if run is plain:
            assert PROBLEM.plain_loss is not None
            return PROBLEM.plain_loss(params, TASK, None, toys.KEY, step)
        return LOSS.apply(LOSS_PARAMS, PROBLEM.observe(params, TASK, None, toys.KEY, step))

    @jax.jit
    def by_hand(params):
        opt_state = optimizer.init(params)
        history = [PROBLEM.task_loss(params, TASK, None, toys.KEY)]
        for step in range(3):
            updates, opt_state = optimizer.update(jax.grad(descended)(params, step), opt_state, params)
            params = optax.apply_updates(params, updates)
            history.append(PROBLEM.task_loss(params, TASK, None, toys.KEY))
        return params, jnp.stack(history)

    params, history = by_hand(PARAMS)
    out = run(optimizer=optimizer, params=PARAMS)
    toys.assert_close(out.params, params)
    np.testing.assert_allclose(out.trace["mse"], history, rtol=1e-5)
    assert np.all(np.isfinite(history))  # Adam needs no eps_root at meta-test


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
    task = jax.jit(problem.sample_task)(toys.KEY, None)
    loss_params = LOSS.init(toys.KEY, 2)
    jax.block_until_ready(adapted(problem, task, loss_params=loss_params))
    jax.block_until_ready(plain(problem, task))
    jax.effects_barrier()
    assert len(seen["observe"]) == 3
    assert sorted(seen["observe"]) == sorted(seen["plain_loss"])
    assert len({str(key) for _, key in seen["observe"]}) == 3


@RUNS
def test_given_params_replace_the_drawn_ones_alone(run: Callable):
    start = jax.tree.map(jnp.ones_like, PARAMS)
    given = run(params=start)
    np.testing.assert_allclose(given.trace["mse"][0], PROBLEM.task_loss(start, TASK, None, toys.KEY), rtol=1e-6)
    assert given.trace["mse"][0] != run().trace["mse"][0]


@RUNS
def test_another_key_draws_another_start(run: Callable):
    toys.assert_same(run(), run())
    assert run().trace["mse"][0] != run(key=jax.random.key(8)).trace["mse"][0]


@RUNS
def test_extra_is_never_needed(run: Callable):
    blind = TASK._replace(extra=jnp.full_like(TASK.extra, jnp.nan))
    seen, unseen = run(), run(task=blind)
    toys.assert_same(seen.params, unseen.params)
    assert np.all(np.isnan(unseen.trace["mse"]))  # evaluate alone reads it


def test_tasks_and_step_sizes_under_vmap_are_one_by_one():
    keys, rates = jax.random.split(toys.KEY, 2), jnp.asarray([0.01, 0.1])

    def one(key, rate):
        task = PROBLEM.sample_task(key, None)
        return adapted(task=task, key=key, optimizer=optax.sgd(rate), steps=2).trace["mse"]

    @jax.jit
    def both(keys, rates):
        batched = jax.vmap(jax.vmap(one, in_axes=(0, None)), in_axes=(None, 0))(keys, rates)
        return batched, jax.lax.map(lambda rate: jax.lax.map(lambda key: one(key, rate), keys), rates)

    batched, alone = both(keys, rates)
    assert batched.shape == (2, 2, 3)
    np.testing.assert_allclose(batched, alone, rtol=1e-4)


def test_compiled_is_eager():
    problem = toys.quadratic()
    task = problem.sample_task(toys.KEY, None)
    compiled = plain(problem, task, steps=2)
    with jax.disable_jit():
        eager = plain(problem, task, steps=2)
    toys.assert_close(compiled, eager)


@RUNS
def test_equal_calls_trace_once(run: Callable):
    optimizer = toys.traced_at_most(RATE, 1)
    first = run(optimizer=optimizer)
    for key in jax.random.split(toys.KEY, 2):
        run(optimizer=optimizer, key=key)
    toys.assert_same(first, run(optimizer=optimizer))


def test_a_loss_restored_from_its_spec_adapts_to_the_same_bits():
    again = ml3_jax.losses.from_spec(LOSS.spec or {})
    out = ml3_jax.adapt(PROBLEM, again, LOSS_PARAMS, TASK, None, toys.KEY, optimizer=RATE, steps=3)
    toys.assert_same(out, adapted())


def test_baseline_without_plain_loss_descends_the_task_loss():
    problem = PROBLEM._replace(plain_loss=None)
    blind = TASK._replace(extra=TASK.y)
    toys.assert_close(plain(problem, blind).params, plain(PROBLEM, blind).params)
    assert np.any(toys.flat(plain(problem).params) != toys.flat(plain(PROBLEM).params))


@pytest.mark.parametrize(("run", "traced"), [(adapted, False), (plain, True)])
def test_between_evaluations_the_trace_repeats_the_earlier_one(run: Callable, traced: bool):
    every = run(steps=5)
    some = jax.jit(lambda n: run(steps=5, evaluate_every=n))(3) if traced else run(steps=5, evaluate_every=3)
    np.testing.assert_allclose(toys.flat(some.params), toys.flat(every.params), rtol=1e-6)
    np.testing.assert_allclose(some.trace["mse"], every.trace["mse"][np.array([0, 0, 0, 3, 3, 5])], rtol=1e-6)


def test_an_update_that_is_not_evaluated_does_not_run_the_evaluation():
    ran = []

    def evaluate(params, task, context, key):
        jax.debug.callback(lambda: ran.append(1))
        return PROBLEM.evaluate(params, task, context, key)

    problem = PROBLEM._replace(evaluate=evaluate)
    tasks = jax.tree.map(lambda x: jnp.stack([x, x]), TASK)
    trace = jax.vmap(lambda task: plain(problem, task, steps=5, evaluate_every=jnp.int32(5)).trace)(tasks)
    jax.block_until_ready(trace)
    jax.effects_barrier()
    assert len(ran) == 2  # start and end; a callback without arguments runs once for all tasks


@RUNS
@pytest.mark.parametrize("every", [0, -1, 1.5, True, jnp.int32(0), jnp.float32(2.0)])
def test_a_bad_number_of_updates_between_evaluations_is_refused(run: Callable, every: Any):
    with pytest.raises(ValueError, match="evaluate_every: expected a whole number of at least 1"):
        run(evaluate_every=every)


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
