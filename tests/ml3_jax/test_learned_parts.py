"""A learned initialisation and learned step sizes, alone and with a learned loss: MAML, Meta-SGD and all of them."""

import functools
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util

import ml3_jax
from ml3_jax import chunks, sharding, unroll
from ml3_jax.checkpoint import Checkpoints
from ml3_jax.optimizers import LearnedOptimizer, learned_adam, learned_sgd, step_sizes
from ml3_jax.types import GRADIENT_MODES, MetaParams
from tests.ml3_jax import toys

PROBLEM = toys.points()
FIXED = optax.sgd(0.1)
EVERYTHING: dict[str, Any] = {"learn_init": True, "inner_optimizer": learned_sgd(0.1, per="parameter")}
# What is learned: arguments of `toys.learner`.
PARTS: dict[str, dict[str, Any]] = {
    "MAML": {"loss": None, "learn_init": True},
    "Meta-SGD": {"loss": None, **EVERYTHING},
    "step sizes": {"loss": None, "inner_optimizer": learned_adam(0.1, per="layer")},
    "loss and step size": {"inner_optimizer": learned_sgd(0.1)},
    "loss and initialisation": {"learn_init": True},
    "everything": EVERYTHING,
}


def double(tree: Any) -> Any:
    """The floating-point leaves of a tree in float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def phi_of(state: ml3_jax.MetaState) -> MetaParams:
    return MetaParams(state.loss_params, state.init_params, state.optimizer_params)


def with_phi(state: ml3_jax.MetaState, phi: MetaParams) -> ml3_jax.MetaState:
    return state.replace(loss_params=phi.loss_params, init_params=phi.init_params, optimizer_params=phi.optimizer_params)


def inner_state_of(state: ml3_jax.MetaState) -> ml3_jax.InnerState:
    assert state.inner_state is not None
    return state.inner_state


def meta_gradient(meta: ml3_jax.MetaLearner, state: ml3_jax.MetaState) -> MetaParams:
    """The meta-gradient of a learner whose meta-optimizer is SGD of rate 1."""
    after, _ = meta.step(state)
    return jax.tree.map(lambda a, b: a - b, phi_of(state), phi_of(after))


def keeping_tasks() -> ml3_jax.Problem:
    """`points` whose state keeps the tasks of the last meta-step: its refresh reads them."""
    return PROBLEM._replace(refresh=lambda context, loss_params, params, tasks, key: context)


@functools.cache
def carrying(name: str = "everything", **options: Any) -> ml3_jax.MetaLearner:
    """A learner with two unrolls an inner loop, and SGD of rate 1 outside."""
    settings: dict[str, Any] = {"inner_steps": 4, "unroll": 2, "meta_optimizer": optax.sgd(1.0)}
    return toys.learner(PROBLEM, **{**settings, **PARTS[name], **options})


def maml_in_plain_jax(params: Any, sizes: Any, tasks: toys.Points, steps: int) -> tuple[Any, Any]:
    """The gradient of the mean task loss after SGD with step sizes like params: MAML's, and that of Meta-SGD's step sizes."""

    def objective(params: Any, sizes: Any) -> jax.Array:
        def after_adaptation(task: toys.Points) -> jax.Array:
            adapted = params
            for _ in range(steps):
                slopes = jax.grad(lambda p: jnp.mean((toys.network(p, task.x) - task.y) ** 2))(adapted)
                adapted = jax.tree.map(lambda p, size, slope: p - size * slope, adapted, sizes, slopes)
            return jnp.mean((toys.network(adapted, task.x) - task.extra) ** 2)

        return jnp.mean(jax.vmap(after_adaptation)(tasks))

    return jax.jit(jax.grad(objective, argnums=(0, 1)))(params, sizes)


def test_the_meta_gradient_is_that_of_maml_in_plain_jax(x64: None):
    options = {**PARTS["MAML"], "inner_steps": 2, "meta_optimizer": optax.sgd(1.0)}
    meta = toys.learner(keeping_tasks(), **options)
    state = meta.init(toys.KEY)
    found, tasks = meta_gradient(meta, state), inner_state_of(meta.step(state)[0]).task
    sizes = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), state.init_params)
    expected, _ = maml_in_plain_jax(state.init_params, sizes, tasks, steps=2)
    assert found.loss_params is None
    assert found.optimizer_params is None
    toys.assert_close(found.init_params, expected, rtol=1e-10, atol=1e-12)


def test_the_meta_gradient_is_that_of_meta_sgd_in_plain_jax(x64: None):
    meta = toys.learner(keeping_tasks(), **PARTS["Meta-SGD"], inner_steps=2, meta_optimizer=optax.sgd(1.0))
    state = meta.init(toys.KEY)
    found, tasks = meta_gradient(meta, state), inner_state_of(meta.step(state)[0]).task
    sizes = step_sizes(state.optimizer_params)
    of_init, of_sizes = maml_in_plain_jax(state.init_params, sizes, tasks, steps=2)
    toys.assert_close(found.init_params, of_init, rtol=1e-10, atol=1e-12)
    of_logarithms = jax.tree.map(lambda slope, size: slope * size, of_sizes, sizes)  # d size / d log size = size
    toys.assert_close(found.optimizer_params["log_step_size"], of_logarithms, rtol=1e-10, atol=1e-12)


def value_alone(objective: Any, phi: Any, key: jax.Array) -> Any:
    """An estimator without a gradient, for finite differences."""
    return objective(phi), jax.tree.map(jnp.zeros_like, phi)


@pytest.mark.parametrize(
    ("inner", "objective", "span", "modes"),
    [
        (learned_sgd(0.1, per="parameter"), "mean", 2, GRADIENT_MODES),
        (learned_adam(0.05, per="layer"), "last", None, ("mixed",)),
    ],
    ids=["sgd", "adam"],
)
def test_the_meta_gradient_of_all_parts_matches_finite_differences(
    inner: LearnedOptimizer, objective: str, span: int | None, modes: Any, x64: None
):
    # As in test_outer. In several unrolls the state is one where task 1 is carried and the other two are newborn.
    options: dict[str, Any] = {"learn_init": True, "inner_optimizer": inner, "meta_optimizer": optax.sgd(1.0)}
    options |= {"inner_steps": 4, "unroll": span, "objective": objective}
    meta = toys.learner(PROBLEM, **options)
    start = meta.init(toys.KEY)
    start = with_phi(start, double(phi_of(start)))
    if span:
        start = with_phi(meta.step(start)[0], phi_of(start))
    gradients = {mode: meta_gradient(toys.learner(PROBLEM, **options, gradient=mode), start) for mode in modes}
    for gradient in gradients.values():
        toys.assert_close(gradient, gradients["mixed"], rtol=1e-9, atol=1e-12)
    chex.assert_tree_all_finite(gradients["mixed"])
    for path, leaf in jax.tree.leaves_with_path(gradients["mixed"]):
        assert np.any(leaf != 0.0), path  # every leaf of the loss, the initialisation and the step sizes is alive

    flat, unravel = flatten_util.ravel_pytree(phi_of(start))
    forward, width = toys.learner(PROBLEM, **options, estimator=value_alone), 1e-5

    def objective_at(moved: jax.Array) -> jax.Array:
        return forward.step(with_phi(start, unravel(moved)))[1].task_loss

    shifts = width * jnp.eye(flat.size)
    up, down = jax.vmap(objective_at)(flat[None] + jnp.concatenate([shifts, -shifts])).reshape(2, -1)
    found = np.asarray(flatten_util.ravel_pytree(gradients["mixed"])[0])
    np.testing.assert_allclose(found, (up - down) / (2 * width), rtol=1e-5, atol=1e-8)


def test_a_large_optimizee_has_the_same_meta_gradient(x64: None, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {**EVERYTHING, "inner_steps": 4, "meta_optimizer": optax.sgd(1.0)}
    small, *large = (toys.learner(PROBLEM, **options, gradient=mode) for mode in ("reverse", "mixed", "nested"))
    state = small.init(toys.KEY)
    state = with_phi(state, double(phi_of(state)))
    expected = meta_gradient(small, state)
    monkeypatch.setattr(unroll, "LARGE_BYTES", 0)
    for meta in large:
        toys.assert_close(meta_gradient(meta, state), expected, rtol=1e-9, atol=1e-12)


def test_in_a_short_unroll_only_newborn_optimizees_feed_the_gradient_of_the_initialisation():
    # After one meta-step tasks 0 and 2 are at their end, and task 1 is half way.
    meta = carrying()
    state, _ = meta.step(meta.init(toys.KEY))
    current = inner_state_of(state)
    assert (current.age == current.end).tolist() == [True, False, True]

    def moved(task: int) -> MetaParams:
        shifted = jax.tree.map(lambda leaf: leaf.at[task].add(0.1), current.params)
        return meta_gradient(meta, state.replace(inner_state=current.replace(params=shifted)))

    found = meta_gradient(meta, state)
    assert np.any(toys.flat(found.init_params) != 0.0)
    toys.assert_same(moved(0), found)  # it is reset: its parameters do not matter
    carried = moved(1)
    toys.assert_close(carried.init_params, found.init_params, rtol=1e-4)
    for name in ("loss_params", "optimizer_params"):
        assert np.any(np.abs(toys.flat(getattr(carried, name)) - toys.flat(getattr(found, name))) > 1e-4), name


def test_without_a_newborn_optimizee_the_gradient_of_the_initialisation_is_zero():
    meta = carrying(staggered_resets=False)
    state, _ = meta.step(meta.init(toys.KEY))
    found = meta_gradient(meta, state)
    assert not np.any(toys.flat(found.init_params))
    assert np.all(toys.flat(found.optimizer_params) != 0.0)
    newborn = meta_gradient(meta, meta.step(state)[0])
    assert np.any(toys.flat(newborn.init_params) != 0.0)


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_every_inner_loop_starts_from_the_latest_initialisation(estimator: str):
    # With an inner step size of 0 an optimizee stays at its start.
    frozen: dict[str, Any] = {"inner_optimizer": optax.sgd(0.0), "estimator": estimator, "meta_optimizer": optax.sgd(0.1)}
    meta = carrying("MAML", **frozen)
    first = meta.init(toys.KEY)
    second, _ = meta.step(first)
    third, _ = meta.step(second)
    assert np.any(toys.flat(first.init_params) != toys.flat(second.init_params))
    for task, start in ((0, second), (1, first), (2, second)):
        toys.assert_same(toys.item(inner_state_of(third).params, task), start.init_params)


@pytest.mark.parametrize("name", PARTS)
def test_a_state_has_the_learned_parts_and_none_for_fixed_ones(name: str):
    options = PARTS[name]
    meta = carrying(name)
    state = meta.init(toys.KEY)
    assert (state.loss_params is None) == ("loss" in options)
    assert (state.init_params is None) == ("learn_init" not in options)
    assert (state.optimizer_params is None) == ("inner_optimizer" not in options)
    if state.init_params is not None:  # one draw for all tasks
        for task in range(3):
            toys.assert_same(toys.item(inner_state_of(state).params, task), state.init_params)
    else:
        assert len(np.unique(np.asarray(inner_state_of(state).params["in"])[:, 0])) == 3
    run, metrics = meta.run(state, 3)
    assert metrics.skipped.tolist() == metrics.dead.tolist() == [0, 0, 0]
    for _ in range(3):
        state, last = meta.step(state)
    toys.assert_close(run, state, rtol=1e-4)
    toys.assert_close(metrics.meta_grad_norm[-1], last.meta_grad_norm, rtol=1e-4)


def test_the_norm_of_the_meta_gradient_is_over_all_parts():
    meta = carrying()
    state = meta.init(toys.KEY)
    found = meta_gradient(meta, state)
    np.testing.assert_allclose(meta.step(state)[1].meta_grad_norm, np.linalg.norm(toys.flat(found)), rtol=1e-4)


def test_a_meta_gradient_that_explodes_changes_no_part():
    meta, usual = carrying(max_meta_grad_norm=1e-6), carrying()
    state = usual.step(usual.init(toys.KEY))[0]
    after, metrics = meta.step(state)
    assert int(metrics.skipped) == 1
    toys.assert_same(phi_of(after), phi_of(state))
    toys.assert_same(after.opt_state, state.opt_state)


def test_seeds_together_are_the_seeds_alone():
    meta = carrying(meta_optimizer=optax.adam(1e-2))
    starts = [meta.init(key) for key in jax.random.split(toys.KEY, 2)]
    together, _ = meta.run_seeds(sharding.stack(starts), 2)
    for index, start in enumerate(starts):
        toys.assert_close(sharding.unstack(together, index), meta.run(start, 2)[0], rtol=1e-3, atol=1e-5)


def test_a_resumed_meta_training_is_the_uninterrupted_one(tmp_path: pathlib.Path):
    meta = carrying(meta_optimizer=optax.adam(1e-2))
    half, _ = meta.run(meta.init(toys.KEY), 2)
    expected, _ = meta.run(half, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, half)
    found = checkpoints.restore_latest(meta.init(jax.random.key(1)))
    checkpoints.close()
    assert found is not None
    toys.assert_same(meta.run(found[1], 2)[0], expected)


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_tasks_in_chunks_are_the_tasks_at_once(estimator: str, monkeypatch: pytest.MonkeyPatch):
    learners = []
    for size in (3, 2):
        monkeypatch.setattr(chunks, "chunk_size", lambda *args, size=size, **kwargs: size)
        meta = toys.learner(PROBLEM, **EVERYTHING, inner_steps=4, unroll=2, estimator=estimator)
        learners.append(meta.step(meta.init(toys.KEY)))
    toys.assert_close(*learners, rtol=1e-3, atol=1e-5)


def test_leaving_out_tasks_that_are_not_finite_changes_nothing_if_all_are():
    usual, leaving = carrying(), carrying(non_finite_tasks="leave_out")
    state = usual.step(usual.init(toys.KEY))[0]
    (expected, _), (found, metrics) = usual.step(state), leaving.step(state)
    assert int(metrics.left_out) == 0
    toys.assert_close(phi_of(found), phi_of(expected), rtol=1e-4, atol=1e-5)


def test_three_steps_trace_once():
    optimizer = toys.traced_at_most(optax.adam(1e-2), 1)
    meta = toys.learner(PROBLEM, **EVERYTHING, inner_steps=4, unroll=2, meta_optimizer=optimizer)
    state = meta.init(toys.KEY)
    for _ in range(3):
        state, _ = meta.step(state)


def test_each_part_can_have_a_meta_optimizer_of_its_own():
    labels = MetaParams("loss", "init", "step sizes")
    rates: dict[Any, Any] = {"loss": optax.sgd(0.0), "init": optax.sgd(1.0), "step sizes": optax.sgd(0.0)}
    meta = carrying(meta_optimizer=optax.multi_transform(rates, labels))
    before = meta.init(toys.KEY)
    after, _ = meta.step(before)
    toys.assert_same((after.loss_params, after.optimizer_params), (before.loss_params, before.optimizer_params))
    assert np.all(toys.flat(after.init_params) != toys.flat(before.init_params))


@pytest.mark.parametrize("name", ["Meta-SGD", "everything"])
def test_adapt_and_baseline_take_the_steps_of_the_inner_loop(name: str):
    # `points` reads neither key nor number of the step.
    meta = carrying(name, meta_optimizer=optax.sgd(0.0), staggered_resets=False, unroll=4, inner_steps=8)
    start = meta.init(toys.KEY)
    state, _ = meta.step(start)
    how = {"optimizer": learned_sgd(0.1, "parameter").make(start.optimizer_params), "steps": 4, "params": start.init_params}
    task = toys.item(inner_state_of(state).task, 0)
    if name == "everything":
        found = ml3_jax.adapt(PROBLEM, toys.smooth_loss(), start.loss_params, task, None, toys.KEY, **how).params
    else:
        found = ml3_jax.baseline(PROBLEM, task, None, toys.KEY, **how).params
    toys.assert_close(found, toys.item(inner_state_of(state).params, 0), rtol=1e-4)


def test_the_score_function_has_an_effect_in_one_step_from_a_learned_initialisation():
    # Data of the first inner step depend on the initialisation.
    def log_prob(params: Any, task: Any, context: Any, key: jax.Array, step: jax.Array) -> jax.Array:
        return -jnp.sum((task.x - 1.0 - params - 0.1 * step) ** 2) / (2.0 * 0.3**2)

    problem = toys.stream()._replace(log_prob=log_prob)
    options: dict[str, Any] = {"loss": None, "learn_init": True, "inner_steps": 1, "meta_optimizer": optax.sgd(1.0)}
    cut, score = (toys.learner(problem, **options, collect_gradient=how) for how in ("cut", "score"))
    state = cut.init(toys.KEY)
    assert abs(meta_gradient(cut, state).init_params - meta_gradient(score, state).init_params) > 1e-3


def test_diagnose_names_the_part_that_is_not_finite():
    meta = carrying()
    state = meta.init(toys.KEY)
    nan = functools.partial(jax.tree.map, lambda leaf: leaf * jnp.nan)
    assert "all terms" in meta.diagnose(state)
    assert meta.diagnose(state.replace(init_params=nan(state.init_params))) == "the learned initialisation is not finite"
    words = "the parameters of the inner optimizer are not finite"
    assert meta.diagnose(state.replace(optimizer_params=nan(state.optimizer_params))) == words


def test_diagnose_names_the_plain_loss():
    problem = PROBLEM._replace(plain_loss=lambda params, task, context, key, step: jnp.log(-jnp.abs(params["in"][0])))
    meta = toys.learner(problem, None, learn_init=True)
    assert meta.diagnose(meta.init(toys.KEY)) == "task 0, inner step 0 (of 3): the plain loss is not finite"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_params": None}, "expected parameters as init_params, got None: this learner learns the loss and the init"),
        ({"loss_params": None}, "expected parameters as loss_params, got None"),
        ({"optimizer_params": {}}, "expected None as optimizer_params, got parameters: .* take the state from its init"),
    ],
)
def test_the_state_of_another_learner_is_refused(change: dict[str, Any], words: str):
    meta = carrying("loss and initialisation")
    with pytest.raises(ValueError, match=words):
        meta.step(meta.init(toys.KEY).replace(**change))


@pytest.mark.parametrize("name", ["MAML", "step sizes", "everything"])
def test_all_parts_are_saved_and_restored(name: str, tmp_path: pathlib.Path):
    meta, loss = carrying(name), None if "loss" in PARTS[name] else toys.smooth_loss()
    state = meta.init(toys.KEY)
    others = {"init_params": state.init_params, "optimizer_params": state.optimizer_params}
    ml3_jax.save(tmp_path / "parts", loss, state.loss_params, **others)
    found, params = ml3_jax.restore_parts(tmp_path / "parts")
    toys.assert_same(params, phi_of(state))
    assert (found is None) == (loss is None)
    if loss is None:
        with pytest.raises(ValueError, match="and no learned loss: read it with restore_parts"):
            ml3_jax.restore(tmp_path / "parts")
    else:
        toys.assert_same(ml3_jax.restore(tmp_path / "parts")[1], state.loss_params)
        ml3_jax.save(tmp_path / "loss", loss, state.loss_params)
        toys.assert_same(ml3_jax.restore_parts(tmp_path / "loss")[1], MetaParams(state.loss_params, None, None))


def test_the_best_parts_are_kept_by_validation():
    options = PARTS["Meta-SGD"]
    meta = carrying("Meta-SGD", meta_optimizer=optax.sgd(0.05))
    how = {"optimizer": options["inner_optimizer"], "steps": 4, "num_tasks": 2}
    validate = ml3_jax.make_validation(PROBLEM, None, "mse", toys.KEY, **how)
    trained = ml3_jax.train(meta, meta.init(toys.KEY), 4, every=2, validate=validate)
    assert trained.best is None
    value = validate(None, trained.best_init_params, trained.best_optimizer_params)
    assert trained.best_value is not None
    np.testing.assert_allclose(value, trained.best_value, rtol=1e-5)
