"""Persistent evolution strategies, and all estimators against the exact gradient in expectation, in one or more unrolls."""

import functools
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import chunks, estimators, persistent
from ml3_jax.checkpoint import Checkpoints
from ml3_jax.optimizers import learned_sgd
from ml3_jax.types import PersistentInnerState
from tests.ml3_jax import toys

RATE, PHI, START, TARGET = 0.3, 0.8, 3.0, 1.0
SIGMA, WINDOWS = 0.2, 3
ERROR, FACTOR = START - TARGET, 1.0 - RATE * PHI  # an inner step multiplies the error by 1 - RATE phi
PES = estimators.persistent_evolution_strategy(SIGMA, 4)
ESTIMATORS = {"backprop": "backprop", "es": estimators.evolution_strategy(SIGMA, 4), "pes": PES}

# The meta-optimizer of a phi that stays: its state is the last meta-gradient.
KEEPS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def learner(problem: ml3_jax.Problem | None = None, loss: ml3_jax.LearnedLoss | None = None, **options: Any):
    """`toys.learner` on the quadratic, with pes, unrolls of one inner step and phi at PHI."""
    settings = {
        "inner_optimizer": optax.sgd(RATE),
        "meta_optimizer": KEEPS,
        "num_tasks": 16,
        "inner_steps": WINDOWS,
        "unroll": 1,
        "estimator": PES,
    }
    settings |= options
    if settings["unroll"] not in (None, settings["inner_steps"]):
        settings.setdefault("staggered_resets", False)
    return toys.learner(problem or toys.quadratic(START, TARGET), loss or toys.scaled_square(PHI), **settings)


def gradients(meta: ml3_jax.MetaLearner, steps: int, seeds: int) -> np.ndarray:
    """[seeds, steps, numbers of phi]: the meta-gradients of the first meta-steps."""

    def of_seed(key: jax.Array) -> jax.Array:
        def step(state: ml3_jax.MetaState, _: None) -> tuple[ml3_jax.MetaState, jax.Array]:
            after = meta.step(state)[0]
            return after, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(after.opt_state)])

        return jax.lax.scan(step, meta.init(key), length=steps)[1]

    return np.asarray(jax.jit(jax.vmap(of_seed))(jax.random.split(toys.KEY, seeds)))


def inner_state_of(state: ml3_jax.MetaState) -> PersistentInnerState:
    assert isinstance(state.inner_state, PersistentInnerState)
    return state.inner_state


def assert_expected(samples: np.ndarray, expected: Any, precision: float) -> None:
    """The mean of samples [S, ...] is within 4 standard errors, each at most `precision` of the largest expected number."""
    expected = np.broadcast_to(expected, samples.shape[1:])
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(error <= precision * np.max(np.abs(expected))), error
    assert np.all(np.abs(samples.mean(axis=0) - expected) < 4 * error + 1e-9), (samples.mean(axis=0), expected, error)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_one_unroll_each_estimator_is_the_exact_gradient_in_expectation(name: str, x64: None):
    # Two inner steps: L = ERROR^2 u^4 / 2 with u = 1 - RATE (phi + SIGMA e) = FACTOR - b e, b = RATE SIGMA, e ~ N(0, 1).
    # E[u^4] = FACTOR^4 + 6 FACTOR^2 b^2 + 3 b^4, and dFACTOR/dphi = -RATE. Backpropagation does not smooth: b = 0.
    b = 0.0 if name == "backprop" else RATE * SIGMA
    exact = -RATE * ERROR**2 / 2 * (4 * FACTOR**3 + 12 * FACTOR * b**2)
    found = gradients(learner(inner_steps=2, unroll=None, estimator=ESTIMATORS[name]), steps=1, seeds=3000)
    assert_expected(found, exact, precision=0.02)


@functools.cache
def smoothed() -> np.ndarray:
    """[WINDOWS] the exact gradient of the smoothed task loss after each unroll of one step.

    With e_1, ..., e_t ~ N(0, 1) drawn for each unroll, L_t = ERROR^2 / 2 prod_i (FACTOR - RATE SIGMA e_i)^2. The factors are
    independent: E[L_t] = ERROR^2 / 2 s^t with s = FACTOR^2 + (RATE SIGMA)^2, and ds/dphi = -2 RATE FACTOR.
    """
    s, t = FACTOR**2 + (RATE * SIGMA) ** 2, np.arange(1, WINDOWS + 1)
    return ERROR**2 / 2 * t * s ** (t - 1) * -2 * RATE * FACTOR


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_several_unrolls_only_pes_is_the_exact_gradient_in_expectation(name: str, x64: None):
    # Truncated, an estimator takes the error after earlier unrolls as a constant: ERROR FACTOR^(t - 1). Its gradient is
    # then -RATE FACTOR ERROR^2 FACTOR^(2 (t - 1)), which smoothing with one e does not change.
    t = np.arange(1, WINDOWS + 1)
    truncated = -RATE * FACTOR * ERROR**2 * FACTOR ** (2 * (t - 1))
    expected = smoothed() if name == "pes" else truncated
    found = gradients(learner(estimator=ESTIMATORS[name]), steps=2 * WINDOWS, seeds=2000)[..., 0]
    assert_expected(found, np.tile(expected, 2), precision=0.02)  # the second inner loop starts from no perturbation again
    assert np.all(truncated[1:] / smoothed()[1:] < 0.6)  # 30 standard errors from the exact ones


@pytest.mark.parametrize("name", ["es", "pes"])
def test_of_a_learned_initialisation_and_step_size_the_estimate_is_exact_in_expectation(name: str, x64: None):
    # L_t = (theta - TARGET)^2 / 2 (1 - exp(rho))^(2 t) after t steps. Here es has one unroll of all three steps, and pes three
    # of one step each, whose mean is that of the objective "mean". Smoothing changes the gradient by O(sigma^2).
    span, objective = (1, "last") if name == "pes" else (None, "mean")
    options: dict[str, Any] = {"learn_init": True, "inner_optimizer": learned_sgd(RATE), "unroll": span, "objective": objective}
    narrow = {"es": estimators.evolution_strategy, "pes": estimators.persistent_evolution_strategy}[name](0.02, 4)
    options |= {"estimator": narrow, "meta_optimizer": KEEPS, "num_tasks": 16, "inner_steps": WINDOWS}
    options |= {"staggered_resets": False} if span else {}
    meta = toys.learner(toys.quadratic(START, TARGET), None, **options)
    found = gradients(meta, steps=2 * WINDOWS if span else 1, seeds=1500).mean(axis=1)  # [seeds, (theta, rho)]
    powers, kept = 2 * np.arange(1, WINDOWS + 1), 1.0 - RATE
    of_start = ERROR * np.mean(kept**powers)
    of_rate = ERROR**2 / 2 * np.mean(powers * kept ** (powers - 1)) * -RATE
    assert_expected(found, np.array([of_start, of_rate]), precision=0.05)


def fixed_points() -> tuple[ml3_jax.Problem, ml3_jax.LearnedLoss]:
    """`points` with one task and one first optimizee, and one first phi."""
    problem, loss, task, params, loss_params = toys.start()
    problem = problem._replace(sample_task=lambda key, context: task, init=lambda key, task: params)
    return problem, loss._replace(init=lambda key, features: loss_params)


def test_pes_is_the_gradient_of_the_whole_inner_loop_for_a_network_momentum_and_the_mean_over_steps(optimized: None):
    # Four steps in two unrolls: the mean of both gradients is that of the mean objective over all four steps. Smoothing with
    # sigma = 0.01 changes it by less than the sampling error.
    options: dict[str, Any] = {"inner_optimizer": optax.sgd(0.1, momentum=0.9), "inner_steps": 4, "objective": "mean"}
    parts = fixed_points()
    exact, short = (
        gradients(learner(*parts, **options, estimator="backprop", num_tasks=1, unroll=unroll), 4 // unroll, 1).mean(
            axis=(0, 1)
        )
        for unroll in (4, 2)
    )
    pes = estimators.persistent_evolution_strategy(0.01, 8)
    found = gradients(learner(*parts, **options, unroll=2, estimator=pes), steps=2, seeds=100).mean(axis=1)
    assert exact.size == 21
    assert_expected(found, exact, precision=0.02)
    assert np.linalg.norm(short - exact) > 0.4 * np.linalg.norm(exact)
    assert np.linalg.norm(found.mean(axis=0) - exact) < 0.1 * np.linalg.norm(exact)


def random_targets() -> ml3_jax.Problem:
    return toys.quadratic()._replace(
        sample_task=lambda key, context: toys.Target(*[jax.random.uniform(key)] * 2),
        init=lambda key, task: 3.0 + jax.random.uniform(key),
    )


def test_each_copy_goes_its_own_way_and_perturbations_add_up_until_the_reset():
    meta, starts = learner(random_targets(), num_tasks=3, inner_steps=2), []
    state = meta.init(toys.KEY)
    before = inner_state_of(state)
    assert before.particles.params.shape == (3, 4, 2)
    for number in range(3):
        state, _ = meta.step(state)
        after = inner_state_of(state)
        noise = after.particles.shift - before.particles.shift
        copies, target = before.particles.params, before.task.target
        if number in (0, 2):  # fresh inner loops
            noise, target = after.particles.shift, after.task.target
            starts.append(target + (after.params - target) / FACTOR)
            copies = jnp.broadcast_to(starts[-1][:, None, None], copies.shape)
        phi = PHI + SIGMA * jnp.stack([noise, -noise], axis=-1)
        target = target[:, None, None]
        toys.assert_close(after.particles.params, target + (1.0 - RATE * phi) * (copies - target), rtol=1e-5)
        assert len(np.unique(noise)) == noise.size == 12  # independent between tasks and between pairs
        before = after
    assert np.all(starts[0] != starts[1])


def test_the_task_loss_and_the_carried_optimizees_are_those_without_perturbation():
    options: dict[str, Any] = {"num_tasks": 3, "inner_steps": 4, "unroll": 2}
    made = []
    for estimator in ("pes", "backprop"):
        meta = learner(toys.stream(), estimator=estimator, **options)
        state, metrics = meta.run(meta.init(toys.KEY), 3)
        assert state.inner_state is not None
        made.append((metrics.task_loss, state.inner_state.params, state.inner_state.age))
    toys.assert_close(*made)


def test_in_one_unroll_of_one_task_pes_is_es_with_the_same_draws(x64: None):
    made = []
    for strategy in (estimators.evolution_strategy, estimators.persistent_evolution_strategy):
        options: dict[str, Any] = {"inner_steps": 2, "unroll": 2, "num_tasks": 1, "estimator": strategy(0.1, 3)}
        meta = toys.learner(toys.points(), **options)
        made.append(meta.run(meta.init(toys.KEY), 2))
    toys.assert_close(*made, rtol=1e-9)


def test_run_is_that_many_steps_also_after_a_checkpoint_and_with_donated_memory(tmp_path: pathlib.Path):
    options: dict[str, Any] = {"inner_steps": 4, "unroll": 2, "meta_optimizer": optax.adam(1e-2), "estimator": "pes"}
    meta, given = (toys.learner(toys.stream(), **options, donate=donate) for donate in (False, True))
    start = meta.init(toys.KEY)
    uninterrupted, _ = meta.run(start, 3)
    stepped = jax.tree.map(lambda leaf: leaf.copy(), start)
    for _ in range(3):
        stepped, _ = given.step(stepped)
    toys.assert_close(stepped, uninterrupted, atol=1e-5)
    first, _ = meta.step(start)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, first)
    found = checkpoints.restore_latest(meta.init(jax.random.key(0)))
    checkpoints.close()
    assert found is not None
    toys.assert_same(found[1], first)
    toys.assert_close(meta.run(found[1], 2)[0], uninterrupted, atol=1e-5)


def test_vmapped_seeds_are_the_seeds_one_by_one():
    meta = learner(toys.stream(), num_tasks=2)
    keys = jax.random.split(toys.KEY, 2)
    batched = jax.vmap(lambda key: meta.run(meta.init(key), 2))(keys)
    for i in range(2):
        toys.assert_close(toys.item(batched, i), meta.run(meta.init(keys[i]), 2), rtol=1e-4)


def test_the_gradient_of_a_loop_without_derivative_is_the_smoothed_one(x64: None):
    # M = phi theta moves theta by -RATE phi, whatever the rounded error beside it. The task loss is the sign of theta:
    # after t unrolls theta ~ N(1 - RATE t phi, t (RATE SIGMA)^2), and E[sign] = 2 Phi(mean / sd) - 1.
    problem = toys.quadratic()._replace(
        init=lambda key, task: jnp.ones(()),
        observe=lambda params, task, context, key, step: jnp.stack([params, jnp.round(params)])[None],
        task_loss=lambda params, task, context, key: jnp.sign(params) * jnp.argmax(jnp.stack([params - 9.0, 0.0 * params])),
    )
    phi = 1.5
    loss = toys.scaled_square(phi)._replace(apply=lambda phi, features: phi * features[0, 0] + jnp.sign(features[0, 1]))
    t = np.arange(1, WINDOWS + 1)
    mean, deviation = 1.0 - RATE * t * phi, np.sqrt(t) * RATE * SIGMA
    density = np.exp(-0.5 * (mean / deviation) ** 2) / np.sqrt(2 * np.pi)
    exact = 2 * density / deviation * -RATE * t
    found = gradients(learner(problem, loss, estimator=estimators.persistent_evolution_strategy(SIGMA, 16)), WINDOWS, 1000)
    assert exact[1] < -0.5
    assert_expected(found[:, 1, 0], exact[1], precision=0.05)
    assert not np.any(gradients(learner(problem, loss, estimator="backprop"), WINDOWS, 1))


LINE_SEARCHES = {
    "backtracking": optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    "lbfgs": optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(5)),
}


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_an_inner_optimizer_with_a_while_loop_is_carried(name: str):
    options: dict[str, Any] = {"inner_optimizer": LINE_SEARCHES[name], "inner_steps": 4, "unroll": 2, "num_tasks": 3}
    meta = learner(toys.points(), toys.smooth_loss(), **options)
    state, metrics = meta.run(meta.init(toys.KEY), 3)
    assert not np.any(metrics.skipped)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
    chex.assert_tree_all_finite(inner_state_of(state).particles)


def test_an_auxiliary_loss_is_credited_to_the_last_perturbation_alone(monkeypatch: pytest.MonkeyPatch):
    # phi^2 / 2: (phi + SIGMA e)^2 / 2 less the mirrored one is 2 SIGMA phi e. Its estimate is phi times the mean of e^2.
    monkeypatch.setattr(chunks, "chunk_size", lambda *args, **options: 2)
    options: dict[str, Any] = {"num_tasks": 3, "inner_steps": 4}
    plain, ridge = (learner(**options, auxiliary_loss=term) for term in (None, lambda phi, task, context, key: 0.5 * phi**2))
    state = plain.init(toys.KEY)
    for _ in range(3):
        (after, metrics), (added, own) = plain.step(state), ridge.step(state)
        noise = inner_state_of(after).particles.shift - inner_state_of(state).particles.shift
        np.testing.assert_allclose(toys.flat(added.opt_state) - toys.flat(after.opt_state), PHI * jnp.mean(noise**2), rtol=1e-3)
        toys.assert_close(own.task_loss, metrics.task_loss)
        state = after


def test_a_copy_that_diverged_resets_its_inner_loop_and_no_other():
    meta = learner(toys.points(), toys.smooth_loss(), num_tasks=3, inner_steps=4)
    state, _ = meta.step(meta.init(toys.KEY))
    current = inner_state_of(state)
    params = {**current.particles.params, "out": current.particles.params["out"].at[1, 2, 0, 0].set(jnp.inf)}
    broken = current.replace(particles=current.particles.replace(params=params))
    (expected, _), (after, metrics) = meta.step(state), meta.step(state.replace(inner_state=broken))
    assert int(metrics.skipped) == 0
    assert np.asarray(inner_state_of(after).age).tolist() == [2, 1, 2]
    chex.assert_tree_all_finite(inner_state_of(after).particles)
    for i in (0, 2):  # task 1 changes the result of no other
        toys.assert_same(*(toys.item(inner_state_of(s), i) for s in (expected, after)))


def losing_negative(phi: float) -> ml3_jax.LearnedLoss:
    """The scaled square of a loss parameter that must be positive."""
    return toys.scaled_square(phi)._replace(apply=lambda phi, features: jnp.sqrt(phi) * jnp.mean(features**2))


def test_a_task_with_a_copy_that_is_not_finite_is_left_out_or_the_update_is_skipped():
    # Of one pair, phi - SIGMA |e| is negative where |e| > 1.
    pes, phi = estimators.persistent_evolution_strategy(1.0, 1), 1.0
    options: dict[str, Any] = {"num_tasks": 8, "estimator": pes, "meta_optimizer": optax.sgd(1e-3)}
    leaving = learner(loss=losing_negative(phi), non_finite_tasks="leave_out", **options)
    start = leaving.init(toys.KEY)
    state, metrics = leaving.step(start)
    lost = np.abs(np.asarray(inner_state_of(state).particles.shift)) > 1.0
    assert 0 < lost.sum() < 8
    assert (int(metrics.left_out), int(metrics.skipped)) == (lost.sum(), 0)
    assert 0 < abs(float(state.loss_params) - phi) < 0.1
    state, metrics = leaving.run(state, 3)
    assert np.isfinite(state.loss_params)
    skipping = learner(loss=losing_negative(phi), **options)
    with pytest.raises(ValueError, match="meta-gradient of the first meta-step has norm nan"):
        skipping.step(start)
    assert "a perturbed copy of the optimizee is not finite" in skipping.diagnose(start)


def test_without_a_broken_task_leaving_out_changes_nothing():
    made = []
    for choice in ("skip_update", "leave_out"):
        meta = learner(random_targets(), num_tasks=3, non_finite_tasks=choice)
        made.append(meta.run(meta.init(toys.KEY), 3))
    toys.assert_close(*made)


def test_a_state_without_the_copies_is_refused():
    meta = learner()
    for estimator, got in (("es", 0), (estimators.persistent_evolution_strategy(SIGMA, 2), 2)):
        with pytest.raises(
            ValueError, match=f'expected 4 pairs of perturbed optimizees a task for estimator="pes", got {got}:'
        ):
            meta.step(learner(estimator=estimator).init(toys.KEY))


def test_copies_of_one_unroll_are_not_carried():
    refreshing = toys.quadratic()._replace(refresh=lambda context, *_: context)
    meta = learner(refreshing, inner_steps=2, unroll=2, refresh_every=1)
    state, _ = meta.run(meta.init(toys.KEY, ()), 2)
    assert type(state.inner_state) is ml3_jax.InnerState


def test_shapes_of_perturbations_are_those_of_phi_for_each_pair():
    shift = persistent.shift_like({"w": jnp.zeros((2, 3), jnp.bfloat16)}, 5)
    assert (shift["w"].shape, shift["w"].dtype) == ((5, 2, 3), jnp.bfloat16)


def test_meta_training_by_pes_beats_the_untrained_loss_by_half(optimized: None):
    inner, loss = optax.sgd(0.1), ml3_jax.losses.mlp(hidden=(16, 16))
    options: dict[str, Any] = {"num_tasks": 8, "inner_steps": 8, "unroll": 4, "meta_optimizer": optax.adam(1e-2)}
    pes = estimators.persistent_evolution_strategy(0.1, 8)
    meta = toys.learner(toys.points(), loss, inner_optimizer=inner, estimator=pes, objective="mean", **options)
    start = meta.init(toys.KEY)
    state, metrics = meta.run(start, 100)
    assert int(jnp.sum(metrics.skipped)) == 0

    def held_out(loss_params: Any) -> float:
        def one(key: jax.Array) -> jax.Array:
            task = toys.points().sample_task(key, None)
            return ml3_jax.adapt(toys.points(), loss, loss_params, task, None, key, optimizer=inner, steps=8).trace["mse"][-1]

        return float(jnp.mean(jax.vmap(one)(jax.random.split(jax.random.key(99), 64))))

    assert held_out(state.loss_params) < 0.5 * held_out(start.loss_params)
