"""The outer loop: the meta-gradient against finite differences, equivalences, resets, traces, and bad input."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util

import ml3_jax
from ml3_jax import chunks, estimators
from ml3_jax.types import GRADIENT_MODES
from tests.ml3_jax import toys

INNER = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps_root=1e-8),
}
PROBLEM = toys.points()


def double(tree):
    """The floating-point leaves of a tree in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@functools.cache
def shared(unroll: int | None = None) -> ml3_jax.MetaLearner:
    """A learner for tests without options of their own, so that they share its compilations."""
    return toys.learner(PROBLEM, inner_steps=4, unroll=unroll, meta_optimizer=optax.adam(1e-2))


@functools.cache
def first(unroll: int | None = None) -> ml3_jax.MetaState:
    """The first state of `shared`."""
    return shared(unroll).init(toys.KEY)


@functools.cache
def frozen() -> ml3_jax.MetaLearner:
    """A learner whose phi stays, and whose inner loops of 4 steps are all reset at the same meta-step."""
    options = {"inner_steps": 4, "unroll": 2, "staggered_resets": False}
    return toys.learner(PROBLEM, inner_optimizer=INNER["adam"], meta_optimizer=optax.sgd(0.0), **options)


def inner_state_of(state: ml3_jax.MetaState) -> ml3_jax.InnerState:
    assert state.inner_state is not None
    return state.inner_state


def value_alone(objective, loss_params, key):
    """An estimator without a gradient, for finite differences."""
    return objective(loss_params), jax.tree.map(jnp.zeros_like, loss_params)


@pytest.mark.parametrize(
    ("inner", "objective", "unroll", "modes"),
    [
        ("sgd", "last", None, ("mixed",)),
        ("momentum", "mean", 2, GRADIENT_MODES),
        ("adam", "last", 2, ("mixed", "nested", "remat")),
    ],
)
def test_meta_gradient_matches_finite_differences(inner: str, objective: str, unroll: int | None, modes, x64: None):
    # With SGD of rate 1 outside, phi - phi' is the meta-gradient; the task loss that a step reports is the objective at
    # phi. Central differences of width h are off by O(h^2) = 1e-10 and by rounding / h = 1e-11, relative to O(1).
    options = {"inner_optimizer": INNER[inner], "meta_optimizer": optax.sgd(1.0), "num_tasks": 2, "inner_steps": 4}
    options |= {"objective": objective, "unroll": unroll}
    meta = toys.learner(PROBLEM, **options)
    start = meta.init(toys.KEY)
    start = start.replace(loss_params=double(start.loss_params))
    if unroll:  # from the middle of the inner loops
        start = meta.step(start)[0].replace(loss_params=start.loss_params)
    gradients = {}
    for mode in modes:
        learner = meta if mode == "mixed" else toys.learner(PROBLEM, **options, gradient=mode)
        after, metrics = learner.step(start)
        gradients[mode] = jax.tree.map(lambda a, b: np.asarray(a - b), start.loss_params, after.loss_params)
        np.testing.assert_allclose(metrics.meta_grad_norm, np.linalg.norm(toys.flat(gradients[mode])), rtol=1e-6)
        toys.assert_close(gradients[mode], gradients["mixed"], rtol=1e-9, atol=1e-12)
    chex.assert_tree_all_finite(gradients["mixed"])
    for path, leaf in jax.tree.leaves_with_path(gradients["mixed"]):
        assert np.any(leaf != 0.0), path  # every leaf of phi is alive

    phi, unravel = flatten_util.ravel_pytree(start.loss_params)
    width = 1e-5
    forward = toys.learner(PROBLEM, **options, estimator=value_alone)

    def objective_at(moved: jax.Array) -> jax.Array:
        return forward.step(start.replace(loss_params=unravel(moved)))[1].task_loss

    shifts = width * jnp.eye(phi.size)
    up, down = jax.vmap(objective_at)(phi[None] + jnp.concatenate([shifts, -shifts])).reshape(2, -1)
    differences = np.asarray((up - down) / (2 * width))
    assert np.linalg.norm(differences) > 1e-3
    np.testing.assert_allclose(toys.flat(gradients["mixed"]), differences, rtol=1e-5, atol=1e-8)


def test_one_meta_step_on_the_quadratic_is_the_closed_form_compiled_and_eager():
    # As in test_inner: dL/dphi = -a (1 - a phi) e^2; with the outer rate b, phi' = phi + b a (1 - a phi) e^2. Both tasks
    # are the same, so their mean is each of them.
    a, b, phi, error = 0.2, 0.3, 0.5, 2.0
    meta = toys.learner(
        toys.quadratic(3.0, 1.0),
        toys.scaled_square(phi),
        inner_optimizer=optax.sgd(a),
        meta_optimizer=optax.sgd(b),
        num_tasks=2,
        inner_steps=1,
    )
    start = meta.init(toys.KEY)
    state, metrics = meta.step(start)
    np.testing.assert_allclose(state.loss_params, phi + b * a * (1 - a * phi) * error**2, rtol=1e-6)
    np.testing.assert_allclose(metrics.task_loss, 0.5 * (1 - a * phi) ** 2 * error**2, rtol=1e-6)
    np.testing.assert_allclose(metrics.meta_grad_norm, a * (1 - a * phi) * error**2, rtol=1e-6)
    assert (int(metrics.skipped), int(state.step)) == (0, 1)
    with jax.disable_jit():
        toys.assert_close(meta.step(start), (state, metrics))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_large_meta_gradient_of_half_precision_is_finite(dtype: Any):
    # e = 2 - 0.1 phi 2 = 1.9, J = scale e^2 / 2 with dJ/dphi = -0.2 scale e = -380: its square exceeds float16's 65504.
    problem = toys.quadratic()._replace(task_loss=lambda params, task, context, key: 500.0 * (params - task.extra) ** 2)
    loss = toys.scaled_square()._replace(init=lambda key, features: jnp.asarray(0.5, dtype))
    meta = toys.learner(problem, loss, inner_steps=1, num_tasks=1, meta_optimizer=optax.sgd(1e-4))
    state, metrics = meta.step(meta.init(toys.KEY))
    assert state.loss_params.dtype == dtype
    assert not metrics.skipped
    np.testing.assert_allclose(metrics.meta_grad_norm, 380.0, rtol=0.01)


def test_run_is_that_many_steps_in_one_part_or_in_two():
    meta, start = shared(2), first(2)
    state, rows = start, []
    for _ in range(4):
        state, metrics = meta.step(state)
        rows.append(metrics)
    half, one = meta.run(start, 2)
    fused, two = meta.run(half, 2)
    toys.assert_close(fused, state)
    metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, two)
    toys.assert_close(metrics, jax.tree.map(lambda *xs: jnp.stack(xs), *rows))
    assert one.task_loss.shape == one.meta_grad_norm.shape == one.skipped.shape == (2,)


def test_vmapped_seeds_are_the_seeds_one_by_one():
    meta = toys.learner(toys.stream(), toys.scaled_square(), inner_steps=2)
    keys = jax.random.split(toys.KEY, 2)
    batched = jax.vmap(lambda key: meta.step(meta.init(key)))(keys)
    for i in range(2):
        toys.assert_close(toys.item(batched, i), meta.step(meta.init(keys[i])), rtol=1e-4)


def test_tasks_sharded_over_an_axis_are_the_mean_over_it():
    # A meta-optimizer that averages gradients over a named axis makes one learner of several. Each has its own tasks, and
    # all take the step of the mean gradient. Under vmap with that axis name, phi' must be phi minus the mean of the steps
    # that the learners take alone.
    def averaged(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        def update(updates, state, params=None):
            return inner.update(jax.lax.pmean(updates, "shards"), state, params)

        return optax.GradientTransformation(inner.init, update)

    alone, joined = (
        toys.learner(toys.stream(), toys.scaled_square(), meta_optimizer=optimizer, inner_steps=1)
        for optimizer in (optax.sgd(0.5), averaged(optax.sgd(0.5)))
    )
    start = alone.init(toys.KEY)
    keys = jax.random.split(toys.KEY, 2)
    after = jax.vmap(lambda key: joined.step(start.replace(key=key))[0].loss_params, axis_name="shards")(keys)
    steps = jax.vmap(lambda key: alone.step(start.replace(key=key))[0].loss_params)(keys)
    toys.assert_same(toys.item(after, 0), toys.item(after, 1))
    toys.assert_close(toys.item(after, 0), jax.tree.map(lambda x: jnp.mean(x, axis=0), steps))
    assert np.any(toys.flat(toys.item(steps, 0)) != toys.flat(toys.item(steps, 1)))


def test_task_i_does_not_change_the_result_of_task_j():
    meta, start = shared(2), first(2)
    current = inner_state_of(start)
    moved = current.replace(task=jax.tree.map(lambda x: x.at[1].add(1.0), current.task))
    (one, _), (other, _) = meta.step(start), meta.step(start.replace(inner_state=moved))
    for j in range(3):
        left, right = (toys.flat(toys.item(inner_state_of(s).params, j)) for s in (one, other))
        assert np.array_equal(left, right) == (j != 1)


def test_each_inner_loop_has_a_task_and_a_start_of_its_own():
    current = inner_state_of(first(2))
    assert len({toys.flat(toys.item(current.task, i)).tobytes() for i in range(3)}) == 3
    assert len(np.unique(np.asarray(current.params["in"])[:, 0])) == 3


def test_inner_loops_are_reset_after_inner_steps_at_staggered_meta_steps():
    # inner_steps 4, unroll 2: two unrolls an inner loop. The first inner loops of tasks 0, 1, 2 end after 1, 2 and 1
    # unrolls. An inner loop at its end is reset before the next unroll, and then takes 4 steps.
    meta, state = shared(2), first(2)
    ages, tasks = [], []
    for _ in range(5):
        state, _ = meta.step(state)
        ages.append(np.asarray(inner_state_of(state).age).tolist())
        tasks.append([toys.flat(toys.item(inner_state_of(state).task, i)).tobytes() for i in range(3)])
    assert ages == [[2, 2, 2], [2, 4, 2], [4, 2, 4], [2, 4, 2], [4, 2, 4]]
    changed = [[tasks[k][i] != tasks[k - 1][i] for i in range(3)] for k in range(1, 5)]
    assert changed == [[age == 2 for age in row] for row in ages[1:]]


def test_without_staggered_resets_an_inner_loop_in_two_unrolls_takes_the_steps_of_a_full_one():
    # phi stays (rate 0) and observe reads neither key nor number of the step: adapt takes the same 4 steps at once.
    meta = frozen()
    start = meta.init(toys.KEY)
    state, ages = start, []
    for _ in range(2):
        state, _ = meta.step(state)
        ages.append(np.asarray(inner_state_of(state).age).tolist())
    reset, _ = meta.step(state)
    assert [*ages, np.asarray(inner_state_of(reset).age).tolist()] == [[2, 2, 2], [4, 4, 4], [2, 2, 2]]

    def adapted(params: Any, task: Any) -> Any:
        how = {"optimizer": INNER["adam"], "steps": 4, "params": params}
        return ml3_jax.adapt(PROBLEM, toys.smooth_loss(), start.loss_params, task, None, toys.KEY, **how).params

    before = inner_state_of(start)
    toys.assert_close(inner_state_of(state).params, jax.vmap(adapted)(before.params, before.task), rtol=1e-4)


def test_an_optimizee_that_diverged_is_reset_and_no_other():
    meta = frozen()
    state, _ = meta.step(meta.init(toys.KEY))
    current = inner_state_of(state)
    broken = current.replace(params={**current.params, "out": current.params["out"].at[1, 0].set(jnp.inf)})
    (expected, _), (after, metrics) = meta.step(state), meta.step(state.replace(inner_state=broken))
    assert int(metrics.skipped) == 0
    assert np.asarray(inner_state_of(after).age).tolist() == [4, 2, 4]
    chex.assert_tree_all_finite(inner_state_of(after).params)
    for i in (0, 2):
        toys.assert_same(*(toys.item(inner_state_of(s).params, i) for s in (expected, after)))


def test_tasks_with_typed_keys_and_integers_are_carried():
    plain = toys.quadratic()
    problem = plain._replace(
        sample_task=lambda key, context: (plain.sample_task(key, context), key, jnp.asarray(3, jnp.int32)),
        init=lambda key, task: plain.init(key, task[0]),
        observe=lambda params, task, context, key, step: plain.observe(params, task[0], context, task[1], step),
        task_loss=lambda params, task, context, key: plain.task_loss(params, task[0], context, key),
    )
    metas = [toys.learner(p, toys.scaled_square(), inner_steps=4, unroll=2) for p in (problem, plain)]
    states = [meta.init(toys.KEY) for meta in metas]
    for _ in range(3):
        states = [meta.step(state)[0] for meta, state in zip(metas, states, strict=True)]
    toys.assert_close(states[0].loss_params, states[1].loss_params)
    keys = jax.random.key_data(inner_state_of(states[0]).task[1])
    assert len(np.unique(keys, axis=0)) == 3


def test_step_traces_once_for_a_weakly_typed_optimizee():
    problem = toys.quadratic()._replace(init=lambda key, task: jnp.full((), 0.1))
    optimizer = toys.traced_at_most(optax.sgd(0.1), 1)
    meta = toys.learner(problem, toys.scaled_square(), inner_steps=2, unroll=1, meta_optimizer=optimizer)
    before = state = meta.init(toys.KEY)
    for _ in range(3):
        state, _ = meta.step(state)
    assert [leaf.aval for leaf in jax.tree.leaves(before)] == [leaf.aval for leaf in jax.tree.leaves(state)]


def test_run_traces_once_for_each_length():
    optimizer = toys.traced_at_most(optax.sgd(0.1), 1)
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), meta_optimizer=optimizer)
    state = meta.init(toys.KEY)
    for _ in range(3):
        state, _ = meta.run(state, 2)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        meta.run(state, 3)


def test_a_state_can_be_used_twice_unless_it_is_donated():
    kept, given = (toys.learner(toys.quadratic(), toys.scaled_square(), inner_steps=1, donate=d) for d in (False, True))
    start = kept.init(toys.KEY)
    after, _ = kept.step(start)
    toys.assert_same(after, kept.step(start)[0])
    away = jax.tree.map(lambda x: x.copy(), start)
    toys.assert_close(given.step(away)[0], after)
    assert all(x.is_deleted() for x in jax.tree.leaves(away.loss_params))


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    meta = shared()
    once, twice, other = (meta.step(meta.init(key)) for key in (toys.KEY, toys.KEY, jax.random.key(8)))
    toys.assert_same(once, twice)
    left, right = (toys.flat(s.loss_params["params"]["Dense_0"]["kernel"]) for s in (once[0], other[0]))
    assert np.all(left != right)


def test_every_meta_step_draws_new_tasks():
    losses = [shared().step(first().replace(step=jnp.asarray(n, jnp.int32)))[1].task_loss for n in range(4)]
    assert len(np.unique(np.asarray(losses))) == 4


def refreshing() -> ml3_jax.Problem:
    """Counts its refreshes in the context, which is the target of every task."""
    problem = toys.quadratic()
    return problem._replace(
        sample_task=lambda key, context: toys.Target(context, context),
        refresh=lambda context, loss_params, params, tasks, key: context + jnp.sum(jnp.ones_like(params)) / 3,
    )


def test_run_refreshes_before_its_steps_0_r_2r():
    meta = toys.learner(refreshing(), toys.scaled_square(), inner_steps=1, refresh_every=2)
    start = meta.init(toys.KEY, jnp.zeros(()))
    by_steps, states, losses = start, [], []
    for k in range(5):
        by_steps = meta.refresh(by_steps) if k % 2 == 0 else by_steps
        # The target of step k is the number of refreshes before it.
        assert float(by_steps.context) == 1 + k // 2
        by_steps, alone = meta.step(by_steps)
        states.append(by_steps)
        losses.append(alone.task_loss)
    for steps in (1, 2, 5):  # a rest, a block, blocks and a rest
        state, metrics = meta.run(start, steps)
        np.testing.assert_allclose(metrics.task_loss, np.asarray(losses[:steps]), rtol=1e-5)
        toys.assert_close(state, states[steps - 1])


def test_refresh_gets_the_optimizees_of_the_last_step():
    problem = toys.quadratic()._replace(
        sample_task=lambda key, context: toys.Target(jnp.asarray(1.0), jnp.asarray(1.0)),
        refresh=lambda context, loss_params, params, tasks, key: (params, tasks.target, loss_params),
    )
    phi = 0.5
    meta = toys.learner(problem, toys.scaled_square(phi), inner_optimizer=optax.sgd(0.2), inner_steps=1, refresh_every=1)
    context = (jnp.zeros(3), jnp.zeros(3), jnp.zeros(()))
    start = meta.init(toys.KEY, context)
    toys.assert_close(meta.refresh(start).context, (jnp.full(3, 3.0), jnp.ones(3), jnp.asarray(phi)))
    state, _ = meta.step(start)
    toys.assert_same(state.context, context)  # step never refreshes
    # One step from 3 towards 1: 1 + (1 - 0.2 * 0.5) * 2 = 2.8.
    toys.assert_close(meta.refresh(state).context, (jnp.full(3, 2.8), jnp.ones(3), state.loss_params))


def test_a_step_whose_meta_gradient_is_not_finite_is_skipped():
    meta = shared()
    state, _ = meta.step(first())
    broken = state.replace(loss_params=jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), state.loss_params))
    after, metrics = meta.step(broken)
    assert int(metrics.skipped) == 1
    toys.assert_same((after.loss_params, after.opt_state), (broken.loss_params, broken.opt_state))
    assert int(after.step) == int(broken.step) + 1


def test_meta_training_beats_the_untrained_loss_by_half():
    loss = ml3_jax.losses.mlp(hidden=(16, 16))
    inner = optax.sgd(0.1)
    meta = toys.learner(PROBLEM, loss, inner_optimizer=inner, meta_optimizer=optax.adam(3e-3), num_tasks=8, inner_steps=6)
    start = meta.init(toys.KEY)
    state, metrics = meta.run(start, 400)
    assert int(jnp.sum(metrics.skipped)) == 0

    def held_out(loss_params) -> float:
        def one(key: jax.Array) -> jax.Array:
            task = PROBLEM.sample_task(key, None)
            return ml3_jax.adapt(PROBLEM, loss, loss_params, task, None, key, optimizer=inner, steps=6).trace["mse"][-1]

        return float(jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(99), 64))))

    assert held_out(state.loss_params) < 0.5 * held_out(start.loss_params)


BAD_SIZES = [
    ({"num_tasks": 0}, "num_tasks: expected a whole number of at least 1, got 0"),
    ({"num_tasks": 2.5}, "num_tasks: expected a whole number of at least 1, got 2.5"),
    ({"num_tasks": True}, "num_tasks: expected a whole number of at least 1, got True"),
    ({"inner_steps": -1}, "inner_steps: expected a whole number of at least 1, got -1"),
    ({"inner_steps": "3"}, "inner_steps: expected a whole number of at least 1, got '3'"),
    ({"inner_steps": float("nan")}, "inner_steps: expected a whole number of at least 1, got nan"),
    ({"unroll": 0}, "unroll: expected a whole number of at least 1, got 0"),
    (
        {"unroll": 4, "inner_steps": 6},
        r"unroll must divide inner_steps, got unroll=4 .*=6: choose one of \[1, 2, 3, 6\]",
    ),
    ({"gradient": "forward"}, "gradient: expected one of 'mixed', 'nested', 'remat', 'reverse', got 'forward'"),
    ({"objective": "best"}, "objective: expected one of 'last', 'mean', got 'best'"),
    ({"estimator": "reinforce"}, "estimator: expected one of backprop, es, pes or a function, got 'reinforce'"),
    ({"refresh_every": 2}, "refresh_every=2 was given, but the problem has no refresh function: leave it out"),
    ({"refresh_every": 0}, "refresh_every: expected a whole number of at least 1, got 0"),
    (
        {"estimator": "es", "gradient": "remat"},
        r'gradient="remat" has no effect with estimator="es".*leave gradient at "mixed"',
    ),
    (
        {"estimator": estimators.persistent_evolution_strategy(0.1), "gradient": "nested"},
        r'gradient="nested" has no effect with estimator="pes".*leave gradient at "mixed"',
    ),
    ({"staggered_resets": False}, "staggered_resets=False has no effect with unroll == inner_steps"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SIZES)
def test_a_bad_option_is_refused_with_the_expected_and_the_given_value(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        toys.learner(PROBLEM, **options)


def test_the_score_term_is_refused_where_it_has_no_effect():
    problem = toys.stream()._replace(log_prob=lambda params, task, context, key, step: params)
    for name in ("es", "pes"):
        with pytest.raises(ValueError, match=f'collect_gradient="score" has no effect with estimator="{name}"'):
            toys.learner(problem, estimator=name, collect_gradient="score")
    with pytest.raises(ValueError, match='collect_gradient="score" has no effect with unroll=1'):
        toys.learner(problem, unroll=1, collect_gradient="score")


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "2"])
def test_a_bad_number_of_meta_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps: expected a whole number of at least 1, got {num_steps!r}"):
        shared().run(first(), num_steps)


def test_refresh_of_a_problem_without_one_is_refused():
    with pytest.raises(ValueError, match="this problem has no refresh function"):
        shared().refresh(first())


def test_an_observe_of_the_wrong_rank_is_refused_with_its_shape():
    problem = PROBLEM._replace(observe=lambda *args: PROBLEM.observe(*args)[:, 0])
    with pytest.raises(ValueError, match=r"features of shape \[N, F\] \(rank 2\), but observe returned shape \(8,\)"):
        toys.learner(problem).init(toys.KEY)


def test_an_observe_that_changes_its_shape_is_refused():
    # It gives one feature more in every trace but the first, as an observe that reads a global flag would.
    traces: list[int] = []

    def observe(params, task, context, key, step):
        traces.append(1)
        features = PROBLEM.observe(params, task, context, key, step)
        return features if len(traces) == 1 else jnp.concatenate([features, features[:, :1]], axis=-1)

    meta = toys.learner(PROBLEM._replace(observe=observe))
    state = jax.eval_shape(meta.init, toys.KEY)
    with pytest.raises(ValueError, match=r"observe changed the shape of its features: \(8, 3\) .* \(8, 4\) now"):
        jax.eval_shape(meta.step, state)


def test_one_learner_serves_contexts_of_two_sizes():
    # The context holds the samples, so the features have as many rows as the context.
    problem = toys.quadratic()._replace(
        observe=lambda params, task, context, key, step: jnp.stack([params * context, task.target * context], axis=-1)
    )
    meta = toys.learner(problem, toys.scaled_square(), inner_steps=1)
    starts = [meta.init(toys.KEY, jnp.ones(size)) for size in (2, 5)]
    # The samples are all one: the mean over them does not depend on their number.
    toys.assert_close(meta.step(starts[0])[0].loss_params, meta.step(starts[1])[0].loss_params)


def test_a_task_loss_that_is_no_scalar_is_refused():
    meta = toys.learner(PROBLEM._replace(task_loss=lambda params, task, context, key: task.extra))
    state = jax.eval_shape(meta.init, toys.KEY)
    with pytest.raises(ValueError, match=r"task_loss must return a scalar, got shape \(8,\): reduce it"):
        jax.eval_shape(meta.step, state)


def test_adam_without_eps_root_is_named_as_the_cause_of_a_meta_gradient_that_is_not_finite():
    problem = toys.quadratic(start=1.0, target=1.0)
    problem = problem._replace(task_loss=lambda params, task, context, key: params)
    bare, rooted = (
        toys.learner(problem, toys.scaled_square(), inner_optimizer=optax.adam(0.1, eps_root=eps), inner_steps=1)
        for eps in (0.0, 1e-8)
    )
    state = bare.init(toys.KEY)
    message = r"meta-gradient of the first meta-step has norm nan.*eps_root > 0"
    with pytest.raises(ValueError, match=message):
        bare.step(state)
    with pytest.raises(ValueError, match=message):
        bare.run(state, 2)
    assert int(rooted.step(state)[1].skipped) == 0


def test_an_inner_loop_that_diverges_is_refused_at_the_first_concrete_meta_step_and_skipped_elsewhere():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), inner_optimizer=optax.sgd(1e30), inner_steps=4)
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match=r"the task loss after the first inner steps is (inf|nan).*inner step size"):
        meta.step(state)
    _, metrics = jax.jit(meta.step)(state)  # traced values cannot be checked
    assert int(metrics.skipped) == 1
    resumed = state.replace(step=jnp.asarray(5, jnp.int32))
    after, metrics = meta.step(resumed)
    assert int(metrics.skipped) == 1
    toys.assert_same(after.loss_params, resumed.loss_params)


@pytest.mark.parametrize(("unroll", "estimator"), [(1, "backprop"), (None, "es")])
def test_an_auxiliary_loss_is_in_the_meta_gradient_and_not_in_the_task_loss(unroll: int | None, estimator: str, monkeypatch):
    def ridge(loss_params, task, context, key):
        del task, context, key
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(loss_params))

    monkeypatch.setattr(chunks, "chunk_size", lambda *args, **kwargs: 2)  # two chunks, the last one smaller
    made = {"inner_steps": 2, "unroll": unroll, "meta_optimizer": optax.sgd(1.0), "num_tasks": 3, "estimator": estimator}
    plain, with_ridge = (
        toys.learner(toys.stream(), toys.scaled_square(), **made, auxiliary_loss=loss) for loss in (None, ridge)
    )
    state = plain.init(toys.KEY)
    (without, metrics), (added, own) = plain.step(state), with_ridge.step(state)
    np.testing.assert_allclose(own.task_loss, metrics.task_loss, rtol=1e-4)
    # With SGD of rate 1 outside, the ridge adds -phi to an update; for mirrored noise, the projection of -phi on it.
    for before, a, b in zip(*(jax.tree.leaves(s.loss_params) for s in (state, without, added)), strict=True):
        if estimator == "backprop":
            np.testing.assert_allclose(b - a, -before, atol=1e-5)
        else:
            assert np.any(np.abs(b - a) > 1e-3)
    if unroll:
        toys.assert_same(inner_state_of(added).params, inner_state_of(without).params)


def test_an_auxiliary_loss_gets_each_task_with_a_key_of_its_own():
    seen = []

    def of_task(loss_params, task, context, key):
        del context
        jax.debug.callback(lambda *what: seen.append(what), task.slope, jax.random.uniform(key))
        return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(loss_params))

    learner = toys.learner(toys.stream(), toys.scaled_square(), inner_steps=1, auxiliary_loss=of_task)
    jax.block_until_ready(learner.step(learner.init(toys.KEY)))
    jax.effects_barrier()
    assert len({float(slope) for slope, _ in seen}) == len({float(key) for _, key in seen}) == 3


def test_an_auxiliary_loss_that_is_no_scalar_is_refused():
    learner = toys.learner(PROBLEM, inner_steps=2, auxiliary_loss=lambda *args: jnp.zeros(2))
    state = jax.eval_shape(learner.init, toys.KEY)
    with pytest.raises(ValueError, match=r"auxiliary_loss must return a scalar, got shape \(2,\)"):
        jax.eval_shape(learner.step, state)
