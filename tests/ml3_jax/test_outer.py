"""The outer loop: the meta-gradient against finite differences, equivalences, lives, traces, and bad input."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util

import ml3_jax
from ml3_jax import chunks
from tests.ml3_jax import toys

MODES = ("mixed", "remat", "reverse")
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
    """A learner for tests that ask nothing special of it, so that they share its compilations."""
    return toys.learner(PROBLEM, inner_steps=4, unroll=unroll, meta_optimizer=optax.adam(1e-2))


def lives_of(state: ml3_jax.MetaState) -> ml3_jax.Lives:
    assert state.lives is not None
    return state.lives


def task_of(state: ml3_jax.MetaState, i: int):
    return jax.tree.map(lambda x: x[i], lives_of(state).task)


@pytest.mark.parametrize(
    ("inner", "objective", "unroll"),
    [("sgd", "last", None), ("momentum", "mean", 2), ("adam", "mean", None), ("adam", "last", 2)],
)
def test_meta_gradient_matches_finite_differences_in_every_mode(inner: str, objective: str, unroll: int | None, x64: None):
    # With SGD of rate 1 outside, phi - phi' is the meta-gradient; the task loss that a step reports is the objective at
    # phi. Central differences of width h are off by O(h^2) = 1e-10 and by rounding / h = 1e-11, relative to O(1).
    learners = {
        mode: toys.learner(
            PROBLEM,
            inner_optimizer=INNER[inner],
            meta_optimizer=optax.sgd(1.0),
            num_tasks=2,
            inner_steps=4 if unroll else 3,
            unroll=unroll,
            objective=objective,
            gradient=mode,
        )
        for mode in MODES
    }
    meta = learners["mixed"]
    start = meta.init(toys.KEY)
    start = start.replace(loss_params=double(start.loss_params))
    if unroll:  # go on to the middle of the lives
        after, _ = meta.step(start)
        start = after.replace(loss_params=start.loss_params)
    gradients = {
        mode: toys.flat(start.loss_params) - toys.flat(learner.step(start)[0].loss_params) for mode, learner in learners.items()
    }
    np.testing.assert_allclose(gradients["mixed"], gradients["reverse"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradients["remat"], gradients["reverse"], rtol=1e-9, atol=1e-12)

    phi, unravel = flatten_util.ravel_pytree(start.loss_params)
    width = 1e-5

    def objective_at(moved: jax.Array) -> jax.Array:
        return meta.step(start.replace(loss_params=unravel(moved)))[1].task_loss

    shifts = width * jnp.eye(phi.size)
    up, down = jax.vmap(objective_at)(phi[None] + jnp.concatenate([shifts, -shifts])).reshape(2, -1)
    differences = np.asarray((up - down) / (2 * width))
    assert np.all(np.isfinite(differences))
    assert np.linalg.norm(differences) > 1e-3
    np.testing.assert_allclose(gradients["mixed"], differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("inner", "objective"), [("sgd", "last"), ("momentum", "mean"), ("adam", "last")])
def test_every_leaf_of_phi_is_alive(inner: str, objective: str):
    # The last bias too: the softplus after it makes the slope in theta depend on it.
    meta = toys.learner(PROBLEM, inner_optimizer=INNER[inner], meta_optimizer=optax.sgd(1.0), objective=objective)
    before = meta.init(toys.KEY)
    after, metrics = meta.step(before)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), before.loss_params, after.loss_params)
    for path, leaf in jax.tree.leaves_with_path(moved):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0.0), path
    np.testing.assert_allclose(metrics.meta_grad_norm, np.linalg.norm(toys.flat(moved)), rtol=1e-4)


def test_one_meta_step_on_the_quadratic_is_the_closed_form():
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
    state, metrics = meta.step(meta.init(toys.KEY))
    np.testing.assert_allclose(state.loss_params, phi + b * a * (1 - a * phi) * error**2, rtol=1e-6)
    np.testing.assert_allclose(metrics.task_loss, 0.5 * (1 - a * phi) ** 2 * error**2, rtol=1e-6)
    np.testing.assert_allclose(metrics.meta_grad_norm, a * (1 - a * phi) * error**2, rtol=1e-6)
    assert (int(metrics.skipped), int(state.step)) == (0, 1)


@pytest.mark.parametrize("unroll", [None, 2])
def test_run_is_that_many_steps(unroll: int | None):
    meta = shared(unroll)
    start = meta.init(toys.KEY)
    state, rows = start, []
    for _ in range(4):
        state, metrics = meta.step(state)
        rows.append(metrics)
    fused, metrics = meta.run(start, 4)
    toys.assert_close(fused, state)
    toys.assert_close(metrics, jax.tree.map(lambda *xs: jnp.stack(xs), *rows))
    assert metrics.task_loss.shape == metrics.meta_grad_norm.shape == metrics.skipped.shape == (4,)


def test_a_run_in_two_parts_is_the_run_in_one():
    meta = shared(2)
    start = meta.init(toys.KEY)
    whole, metrics = meta.run(start, 4)
    half, first = meta.run(start, 2)
    again, second = meta.run(half, 2)
    toys.assert_close(again, whole)
    toys.assert_close(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second), metrics)


def test_compiled_is_eager():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), num_tasks=2, inner_steps=2)
    start = meta.init(toys.KEY)
    compiled, metrics = jax.jit(meta.step)(start)
    with jax.disable_jit():
        eager, eager_metrics = meta.step(start)
    toys.assert_close(compiled, eager)
    toys.assert_close(metrics, eager_metrics)


def test_seeds_under_vmap_are_the_seeds_one_by_one():
    meta = shared(2)
    keys = jax.random.split(toys.KEY, 2)
    together, metrics = jax.vmap(lambda key: meta.run(meta.init(key), 4))(keys)
    for i in range(2):
        alone, alone_metrics = meta.run(meta.init(keys[i]), 4)
        toys.assert_close(jax.tree.map(lambda x, i=i: x[i], (together, metrics)), (alone, alone_metrics), rtol=1e-4)


def test_seeds_sharded_over_two_devices_are_the_seeds_on_one():
    script = textwrap.dedent(
        """
        import json
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from tests.ml3_jax import toys

        jax.config.update("jax_disable_most_optimizations", True)
        meta = toys.learner(toys.stream(), inner_steps=2)
        train = lambda key: meta.run(meta.init(key), 3)[0].loss_params
        keys = jax.random.split(toys.KEY, 2)
        mesh = jax.make_mesh((2,), ("seeds",), axis_types=(AxisType.Auto,))
        spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("seeds")))
        sharded = jax.jit(jax.vmap(train))(spread)
        mapped = jax.jit(jax.shard_map(jax.vmap(train), mesh=mesh, in_specs=PartitionSpec("seeds"),
                                       out_specs=PartitionSpec("seeds"), check_vma=False))(spread)
        one = jax.vmap(train)(keys)
        print(json.dumps({
            "devices": [len(jax.tree.leaves(x)[0].sharding.device_set) for x in (sharded, mapped, one)],
            "numbers": [toys.flat(x).tolist() for x in (sharded, mapped, one)],
        }))
        """
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == [2, 2, 1]
    sharded, mapped, one = (np.asarray(x) for x in result["numbers"])
    np.testing.assert_allclose(sharded, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mapped, one, rtol=1e-5, atol=1e-6)


def test_tasks_sharded_over_an_axis_are_the_mean_over_it():
    # A meta-optimizer that averages gradients over a named axis makes one learner of several: each sees its own tasks, and
    # all take the step of the mean gradient. Under vmap with that axis name, phi' must be phi minus the mean of the steps
    # that the learners take alone.
    def averaged(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        def update(updates, state, params=None):
            return inner.update(jax.lax.pmean(updates, "shards"), state, params)

        return optax.GradientTransformation(inner.init, update)

    alone = toys.learner(toys.stream(), meta_optimizer=optax.sgd(0.5))
    joined = toys.learner(toys.stream(), meta_optimizer=averaged(optax.sgd(0.5)))
    start = alone.init(toys.KEY)
    keys = jax.random.split(toys.KEY, 2)
    after = jax.vmap(lambda key: joined.step(start.replace(key=key))[0].loss_params, axis_name="shards")(keys)
    steps = jax.vmap(lambda key: alone.step(start.replace(key=key))[0].loss_params)(keys)
    np.testing.assert_array_equal(toys.flat(jax.tree.map(lambda x: x[0] - x[1], after)), 0.0)
    toys.assert_close(jax.tree.map(lambda x: x[0], after), jax.tree.map(lambda x: jnp.mean(x, axis=0), steps))
    assert np.any(toys.flat(jax.tree.map(lambda x: x[0] - x[1], steps)) != 0.0)


def test_task_i_does_not_leak_into_task_j():
    meta = shared(2)
    start = meta.init(toys.KEY)
    lives = lives_of(start)
    moved = lives.replace(task=jax.tree.map(lambda x: x.at[1].add(1.0), lives.task))
    (one, _), (other, _) = meta.step(start), meta.step(start.replace(lives=moved))
    for j in range(3):
        left, right = (toys.flat(jax.tree.map(lambda x, j=j: x[j], lives_of(s).params)) for s in (one, other))
        assert np.array_equal(left, right) == (j != 1)


def test_lives_are_their_own_tasks_and_starts():
    state = shared(2).init(toys.KEY)
    assert len({toys.flat(task_of(state, i)).tobytes() for i in range(3)}) == 3
    assert len(np.unique(np.asarray(lives_of(state).params["in"])[:, 0])) == 3


def test_lives_end_after_inner_steps_and_begin_anew():
    # inner_steps 6, unroll 2: three segments a life. With spread ages the first lives of tasks 0, 1, 2, 3 end after 1, 2, 3
    # and 1 segments; a life that has come to its end is drawn anew before the next segment, and then lasts 6 steps.
    meta = toys.learner(PROBLEM, num_tasks=4, inner_steps=6, unroll=2)
    state = meta.init(toys.KEY)
    ages, tasks = [], []
    for _ in range(6):
        state, _ = meta.step(state)
        ages.append(np.asarray(lives_of(state).age).tolist())
        tasks.append([toys.flat(task_of(state, i)).tobytes() for i in range(4)])
    assert ages == [[2, 2, 2, 2], [2, 4, 4, 2], [4, 2, 6, 4], [6, 4, 2, 6], [2, 6, 4, 2], [4, 2, 6, 4]]
    changed = [[tasks[k][i] != tasks[k - 1][i] for i in range(4)] for k in range(1, 6)]
    assert changed == [[age == 2 for age in row] for row in ages[1:]]


def test_ages_that_are_not_spread_end_together():
    meta = toys.learner(PROBLEM, num_tasks=3, inner_steps=4, unroll=2, spread_ages=False)
    state = meta.init(toys.KEY)
    ages = []
    for _ in range(3):
        state, _ = meta.step(state)
        ages.append(np.asarray(lives_of(state).age).tolist())
    assert ages == [[2, 2, 2], [4, 4, 4], [2, 2, 2]]


def test_an_optimizee_that_diverged_is_drawn_anew_and_no_other():
    meta = toys.learner(PROBLEM, num_tasks=3, inner_steps=6, unroll=2, spread_ages=False)
    state, _ = meta.step(meta.init(toys.KEY))
    lives = lives_of(state)
    broken = lives.replace(params={**lives.params, "out": lives.params["out"].at[1, 0].set(jnp.inf)})
    (expected, _), (after, metrics) = meta.step(state), meta.step(state.replace(lives=broken))
    assert int(metrics.skipped) == 0
    assert np.asarray(lives_of(after).age).tolist() == [4, 2, 4]
    assert np.all(np.isfinite(toys.flat(lives_of(after).params)))
    for i in (0, 2):
        left, right = (jax.tree.map(lambda x, i=i: x[i], lives_of(s).params) for s in (expected, after))
        toys.assert_same(left, right)


def test_a_life_in_segments_takes_the_steps_of_a_whole_one():
    # With phi held still (rate 0) two segments of 2 steps lead where one of 4 leads from the same life and keys would, on
    # a problem whose observe asks for neither key: compare with adapt, which takes the 4 steps at once.
    loss = toys.smooth_loss()
    inner = optax.adam(0.05, eps_root=1e-8)
    meta = toys.learner(
        PROBLEM, loss, inner_optimizer=inner, meta_optimizer=optax.sgd(0.0), inner_steps=4, unroll=2, spread_ages=False
    )
    start = meta.init(toys.KEY)
    state, _ = meta.run(start, 2)
    for i in range(3):
        params = jax.tree.map(lambda x, i=i: x[i], lives_of(start).params)
        adapted = ml3_jax.adapt(
            PROBLEM, loss, start.loss_params, task_of(start, i), None, toys.KEY, optimizer=inner, steps=4, params=params
        )
        toys.assert_close(jax.tree.map(lambda x, i=i: x[i], lives_of(state).params), adapted.params)


def test_tasks_with_typed_keys_and_integers_live_on():
    problem = PROBLEM._replace(
        sample_task=lambda key, context: (PROBLEM.sample_task(key, context), key, jnp.asarray(3, jnp.int32)),
        init=lambda key, task: PROBLEM.init(key, task[0]),
        observe=lambda params, task, context, key, step: PROBLEM.observe(params, task[0], context, task[1], step),
        task_loss=lambda params, task, context, key: PROBLEM.task_loss(params, task[0], context, key),
    )
    meta = toys.learner(problem, inner_steps=4, unroll=2, meta_optimizer=optax.adam(1e-2))
    state, _ = meta.run(meta.init(toys.KEY), 4)
    expected, _ = shared(2).run(shared(2).init(toys.KEY), 4)
    toys.assert_close(state.loss_params, expected.loss_params)


def test_step_traces_once():
    observe, calls = toys.counting(PROBLEM.observe)
    meta = toys.learner(PROBLEM._replace(observe=observe), inner_steps=4, unroll=2)
    state, _ = meta.step(meta.init(toys.KEY))
    traced = len(calls)
    assert traced > 0
    for _ in range(3):
        state, _ = meta.step(state)
    assert len(calls) == traced


def test_a_weakly_typed_optimizee_does_not_compile_a_step_twice():
    def init(key, task):
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), PROBLEM.init(key, task))

    meta = toys.learner(PROBLEM._replace(init=init), inner_steps=4, unroll=2)
    before = meta.init(toys.KEY)
    after, _ = meta.step(before)
    assert [leaf.aval for leaf in jax.tree.leaves(before)] == [leaf.aval for leaf in jax.tree.leaves(after)]


def test_the_mean_objective_computes_its_task_loss_once_a_step():
    calls = []

    def task_loss(params, task, context, key):
        jax.debug.callback(lambda _: calls.append(1), jax.tree.leaves(params)[0])
        return PROBLEM.task_loss(params, task, context, key)

    meta = toys.learner(PROBLEM._replace(task_loss=task_loss), inner_steps=4, num_tasks=3, objective="mean")
    state = meta.init(toys.KEY)
    jax.block_until_ready(meta.step(state))
    jax.effects_barrier()
    calls.clear()
    jax.block_until_ready(meta.step(state))
    jax.effects_barrier()
    assert len(calls) == 3 * 4


def test_run_traces_once_for_each_length():
    observe, calls = toys.counting(toys.stream().observe)
    meta = toys.learner(toys.stream()._replace(observe=observe))
    state, _ = meta.run(meta.init(toys.KEY), 2)
    traced = len(calls)
    for _ in range(3):
        state, _ = meta.run(state, 2)
    assert len(calls) == traced
    meta.run(state, 3)
    assert len(calls) > traced


def test_a_state_may_be_used_twice_unless_it_is_donated():
    kept, given = shared(), toys.learner(PROBLEM, inner_steps=4, meta_optimizer=optax.adam(1e-2), donate=True)
    start = kept.init(toys.KEY)
    first, _ = kept.step(start)
    toys.assert_same(first, kept.step(start)[0])
    away = jax.tree.map(lambda x: x.copy(), start)
    toys.assert_close(given.step(away)[0], first)
    assert all(x.is_deleted() for x in jax.tree.leaves(away.loss_params))


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    meta = shared()
    once, twice, other = (meta.run(meta.init(key), 4) for key in (toys.KEY, toys.KEY, jax.random.key(8)))
    toys.assert_same(once, twice)
    left, right = (toys.flat(s.loss_params["params"]["Dense_0"]["kernel"]) for s in (once[0], other[0]))
    assert np.all(left != right)


def test_every_meta_step_draws_new_tasks():
    meta = toys.learner(toys.stream(), meta_optimizer=optax.sgd(0.0))
    _, metrics = meta.run(meta.init(toys.KEY), 5)
    assert len(np.unique(np.asarray(metrics.task_loss))) == 5


def refreshing() -> ml3_jax.Problem:
    """Counts its refreshes in the context, which is the target of every task."""
    problem = toys.quadratic()
    return problem._replace(
        sample_task=lambda key, context: toys.Target(context, context),
        refresh=lambda context, loss_params, params, tasks, key: context + jnp.sum(jnp.ones_like(params)) / 3,
    )


@pytest.mark.parametrize(("steps", "refreshed"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_run_refreshes_before_its_steps_0_r_2r(steps: int, refreshed: int):
    meta = toys.learner(refreshing(), toys.scaled_square(), inner_steps=1, refresh_every=2)
    start = meta.init(toys.KEY, jnp.zeros(()))
    state, metrics = meta.run(start, steps)
    assert float(state.context) == refreshed
    assert metrics.task_loss.shape == (steps,)
    # The target of step k is the number of refreshes before it, so its loss is proportional to (3 - that number)^2.
    targets = 1 + np.arange(steps) // 2
    by_steps = start
    for k in range(steps):
        by_steps = meta.refresh(by_steps) if k % 2 == 0 else by_steps
        assert float(by_steps.context) == targets[k]
        by_steps, alone = meta.step(by_steps)
        np.testing.assert_allclose(metrics.task_loss[k], alone.task_loss, rtol=1e-5)
    toys.assert_close(state, by_steps)


def test_refresh_gets_the_optimizees_that_the_last_step_left():
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
    state, _ = meta.step(meta.init(toys.KEY))
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
    ({"gradient": "forward"}, "gradient: expected one of 'mixed', 'remat', 'reverse', got 'forward'"),
    ({"objective": "best"}, "objective: expected one of 'last', 'mean', got 'best'"),
    ({"estimator": "reinforce"}, "estimator: expected one of backprop, es or a function, got 'reinforce'"),
    ({"refresh_every": 2}, "refresh_every=2 was given, but the problem has no refresh function: leave it out"),
    ({"refresh_every": 0}, "refresh_every: expected a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SIZES)
def test_bad_options_are_refused_with_what_was_expected_and_what_came(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        toys.learner(PROBLEM, **options)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "2"])
def test_a_bad_number_of_steps_is_refused(num_steps):
    meta = toys.learner(PROBLEM)
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match=f"num_steps: expected a whole number of at least 1, got {num_steps!r}"):
        meta.run(state, num_steps)


def test_refresh_of_a_problem_without_one_is_refused():
    meta = toys.learner(PROBLEM)
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match="this problem has no refresh function"):
        meta.refresh(state)


def test_an_observe_of_the_wrong_rank_is_refused_with_its_shape():
    problem = PROBLEM._replace(observe=lambda *args: PROBLEM.observe(*args)[:, 0])
    with pytest.raises(ValueError, match=r"features of shape \[N, F\] \(rank 2\), but observe returned shape \(8,\)"):
        toys.learner(problem).init(toys.KEY)


def test_an_observe_that_changes_its_shape_is_refused():
    # It gives one feature more in every trace but the first, as an observe that reads a flag from outside would.
    traces: list[int] = []

    def observe(params, task, context, key, step):
        traces.append(1)
        features = PROBLEM.observe(params, task, context, key, step)
        return features if len(traces) == 1 else jnp.concatenate([features, features[:, :1]], axis=-1)

    meta = toys.learner(PROBLEM._replace(observe=observe))
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match=r"observe changed the shape of what it returns: \(8, 3\) .* \(8, 4\) now"):
        meta.step(state)


def test_one_learner_serves_contexts_of_two_sizes():
    # The samples stand in the context, so what observe returns has as many rows as the context.
    problem = toys.quadratic()._replace(
        observe=lambda params, task, context, key, step: jnp.stack([params * context, task.target * context], axis=-1)
    )
    meta = toys.learner(problem, toys.scaled_square())
    starts = [meta.init(toys.KEY, jnp.ones(size)) for size in (2, 5)]
    # With ones everywhere the mean over samples does not depend on their number.
    toys.assert_close(meta.step(starts[0])[0].loss_params, meta.step(starts[1])[0].loss_params)


def test_a_task_loss_that_is_no_scalar_is_refused():
    problem = PROBLEM._replace(task_loss=lambda params, task, context, key: task.extra)
    meta = toys.learner(problem)
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match=r"task_loss must return a scalar, got shape \(8,\): reduce it"):
        meta.step(state)


@pytest.mark.parametrize("act", ["step", "run"])
def test_adam_without_eps_root_is_named_as_the_cause_of_a_meta_gradient_that_is_not_finite(act: str):
    problem = toys.quadratic(start=1.0, target=1.0)
    problem = problem._replace(task_loss=lambda params, task, context, key: params)
    bare, rooted = (
        toys.learner(problem, toys.scaled_square(), inner_optimizer=optax.adam(0.1, eps_root=eps)) for eps in (0.0, 1e-8)
    )

    def go(meta: ml3_jax.MetaLearner):
        state = meta.init(toys.KEY)
        return meta.step(state) if act == "step" else meta.run(state, 2)

    with pytest.raises(ValueError, match=r"meta-gradient of the first meta-step has norm nan.*eps_root > 0"):
        go(bare)
    assert np.all(np.asarray(go(rooted)[1].skipped) == 0)


def test_a_diverging_inner_loop_is_named_as_such():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), inner_optimizer=optax.sgd(1e30), inner_steps=4)
    state = meta.init(toys.KEY)
    with pytest.raises(ValueError, match=r"the task loss after the first inner steps is (inf|nan).*inner step size"):
        meta.step(state)


def test_a_training_that_goes_on_skips_what_is_not_finite_and_raises_nothing():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), inner_optimizer=optax.sgd(1e30), inner_steps=4)
    resumed = meta.init(toys.KEY).replace(step=jnp.asarray(5, jnp.int32))
    after, metrics = meta.step(resumed)
    assert int(metrics.skipped) == 1
    toys.assert_same(after.loss_params, resumed.loss_params)


def test_under_a_transformation_the_check_of_the_first_step_is_left_out():
    meta = toys.learner(toys.quadratic(), toys.scaled_square(), inner_optimizer=optax.sgd(1e30), inner_steps=4)
    _, metrics = jax.jit(lambda key: meta.step(meta.init(key)))(toys.KEY)
    assert int(metrics.skipped) == 1


@pytest.mark.parametrize("unroll", [None, 2])
@pytest.mark.parametrize("estimator", ["backprop", "es"])
def test_an_auxiliary_loss_is_in_the_meta_gradient_and_not_in_the_task_loss(unroll: int | None, estimator: str, monkeypatch):
    def ridge(loss_params, task, context, key):
        del task, context, key
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(loss_params))

    monkeypatch.setattr(chunks, "chunk_size", lambda *args, **kwargs: 2)  # several chunks, the last one smaller
    made = {"inner_steps": 4, "unroll": unroll, "meta_optimizer": optax.sgd(1.0), "num_tasks": 5, "estimator": estimator}
    plain, with_ridge = toys.learner(PROBLEM, **made), toys.learner(PROBLEM, **made, auxiliary_loss=ridge)
    state = plain.init(toys.KEY)
    (without, metrics), (beside, own) = plain.step(state), with_ridge.step(state)
    np.testing.assert_allclose(own.task_loss, metrics.task_loss, rtol=1e-4)
    # With SGD of rate 1 outside, what the ridge adds to an update is minus phi; for mirrored noise, its projection on it.
    for before, a, b in zip(*(jax.tree.leaves(s.loss_params) for s in (state, without, beside)), strict=True):
        if estimator == "backprop":
            np.testing.assert_allclose(b - a, -before, atol=1e-5)
        else:
            assert np.any(np.abs(b - a) > 1e-3)
    if unroll:
        toys.assert_same(lives_of(beside).params, lives_of(without).params)


def test_an_auxiliary_loss_sees_each_task_with_a_key_of_its_own():
    seen = []

    def of_task(loss_params, task, context, key):
        del context
        jax.debug.callback(lambda *what: seen.append(what), jax.tree.leaves(task), jax.random.uniform(key))
        return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(loss_params))

    learner = toys.learner(PROBLEM, inner_steps=2, num_tasks=3, auxiliary_loss=of_task)
    learner.step(learner.init(toys.KEY))
    jax.effects_barrier()
    assert len({float(key) for _, key in seen}) == 3
    assert len({b"".join(np.asarray(leaf).tobytes() for leaf in task) for task, _ in seen}) == 3


def test_an_auxiliary_loss_that_is_no_scalar_is_refused():
    learner = toys.learner(PROBLEM, inner_steps=2, auxiliary_loss=lambda *args: jnp.zeros(2))
    with pytest.raises(ValueError, match=r"auxiliary_loss must return a scalar, got shape \(2,\)"):
        learner.step(learner.init(toys.KEY))
