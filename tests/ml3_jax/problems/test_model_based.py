"""Model-based control: columns and gradients by hand, who sees what, refreshes, bad input, and that it learns."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import dynamics
from ml3_jax.inner import collected
from ml3_jax.problems import model_based, model_learning
from ml3_jax.problems.model_based import ControlTask, Policy, Refresh, make_problem
from ml3_jax.problems.model_learning import ModelContext
from ml3_jax.rollout import Trajectory
from tests.ml3_jax import toys

HORIZON = 3
LIMIT = 2.0
STEP = jnp.asarray(0, jnp.int32)
ENSEMBLE = dynamics.make_ensemble(2, 1, members=2, hidden=(4,), batch_size=8, fit_steps=3)
TASK = ControlTask(start=jnp.asarray([0.0, 0.0]), goal=jnp.asarray([3.0]))
GAINS = jnp.asarray([1.0, 0.5])  # bold: the first actions are clipped
SMALL_GAINS = jnp.asarray([0.2, 0.3])  # no action on the way is clipped
FIRST_CLIPPED = jnp.asarray([0.4, 0.5])  # the first action alone is
STEP_WEIGHTS = jnp.asarray([1.0, 2.0, 3.0])  # of each step's action in `weighted_actions`


class Moving(NamedTuple):
    """State of `DoubleIntegrator`."""

    obs: jax.Array  # [2] m, m/s
    goal: jax.Array  # [1] m


class DoubleIntegrator:
    """A mass on a line, pushed to a position: v' = v + u / 2, p' = p + v' / 2, with u clipped to +-2."""

    name = "double_integrator"
    observation_size = 2
    action_size = 1
    action_limit = LIMIT

    def state_at(self, x: jax.Array, goal: jax.Array) -> Moving:
        return Moving(x, goal)

    def step(self, state: Moving, action: jax.Array) -> Moving:
        velocity = state.obs[1] + 0.5 * jnp.clip(action[0], -LIMIT, LIMIT)
        return state._replace(obs=jnp.stack([state.obs[0] + 0.5 * velocity, velocity]))


class Untouchable(DoubleIntegrator):
    """One that must not be stepped."""

    def step(self, state: Moving, action: jax.Array) -> Moving:
        raise AssertionError("the real system was stepped")


@jax.custom_jvp
def without_derivative(x: jax.Array) -> jax.Array:
    return x


@without_derivative.defjvp
def refuse(primals: Any, tangents: Any) -> Any:
    raise AssertionError("a gradient went through the real system")


class Opaque(DoubleIntegrator):
    """One that must not be differentiated."""

    def step(self, state: Moving, action: jax.Array) -> Moving:
        return super().step(state, without_derivative(action))


class Linear(NamedTuple):
    """A context whose model is x' = a x + b u, without any clipping of its own."""

    a: jax.Array  # [2, 2]
    b: jax.Array  # [2, 1]


EXACT = Linear(jnp.asarray([[1.0, 0.5], [0.0, 1.0]]), jnp.asarray([[0.25], [0.5]]))
WRONG = Linear(jnp.asarray([[0.9, 0.3], [-0.2, 0.8]]), jnp.asarray([[0.1], [0.7]]))


def by_matrices(context: Linear, x: jax.Array, action: jax.Array) -> jax.Array:
    return context.a @ x + context.b @ action


def feedback(params: jax.Array, x: jax.Array, goal: jax.Array) -> jax.Array:
    """a = g (goal - p) - d v with the parameters (g, d)."""
    return params[0] * (goal - x[:1]) - params[1] * x[1:]


POLICY = Policy(lambda key: jnp.stack([0.5, 0.2]) + 0.1 * jax.random.normal(key, (2,)), feedback)


def distance(x: jax.Array, goal: jax.Array) -> jax.Array:
    return jnp.abs(x[0] - goal[0])


def cost(states: jax.Array, actions: jax.Array, goal: jax.Array, extra: Any) -> jax.Array:
    """The mean squared distance, and a little of the actions; extra, [1], is a position to be near on the way."""
    on_the_way = 0.0 if extra is None else 10.0 * (states[1, 0] - extra[0]) ** 2
    return jnp.mean((states[1:, 0] - goal) ** 2) + 0.01 * jnp.mean(actions**2) + on_the_way


def evaluate(states: jax.Array, goal: jax.Array) -> dict[str, jax.Array]:
    return {"final_distance": distance(states[-1], goal), "speed": jnp.abs(states[-1, 1])}


def control(system: DoubleIntegrator | None = None, predict: Any = by_matrices, **options: Any) -> ml3_jax.Problem:
    settings: dict[str, Any] = {
        "policy": POLICY,
        "sample_start": lambda key: 0.1 * jax.random.normal(key, (2,)),
        "sample_goal": lambda key: jax.random.uniform(key, (1,), minval=0.3),
        "cost": cost,
        "evaluate": evaluate,
        "horizon": HORIZON,
        "distance": distance,
        **options,
    }
    return make_problem(system or DoubleIntegrator(), settings.pop("policy"), predict, **settings)


def learned(**options: Any) -> ml3_jax.Problem:
    """The problem with a learned model that is refitted."""
    refresh = Refresh(lambda c, rollouts, key: model_learning.refit(ENSEMBLE, c, rollouts, key), rollouts=4, exploration=0.2)
    return control(predict=model_learning.predict_fn(ENSEMBLE), **{"refresh": refresh, **options})


@functools.cache
def learned_context(seed: int = 0) -> ModelContext:
    """Its first context, with 4 rollouts."""
    return model_learning.initial_context(
        DoubleIntegrator(),
        ENSEMBLE,
        lambda key: jax.random.normal(key, (2,)),
        1,
        jax.random.key(seed),
        horizon=HORIZON,
        rollouts=4,
        capacity=40,
    )


def observed(problem: ml3_jax.Problem, params: jax.Array, context: Any, task: ControlTask = TASK) -> jax.Array:
    return problem.observe(params, collected(problem, params, task, context, toys.KEY, STEP), context, toys.KEY, STEP)


def plain(problem: ml3_jax.Problem, params: jax.Array, context: Any, task: ControlTask = TASK) -> jax.Array:
    assert problem.plain_loss is not None
    data = collected(problem, params, task, context, toys.KEY, STEP)
    return problem.plain_loss(params, data, context, toys.KEY, STEP)


def recorded(problem: ml3_jax.Problem, params: jax.Array) -> jax.Array:
    """The real states that an inner step sees."""
    return collected(problem, params, TASK, WRONG, toys.KEY, STEP).states


def weighted_actions(features: jax.Array) -> jax.Array:
    """A loss whose gradient is known: every state, and each step's action with a weight of its own."""
    return 0.7 * jnp.sum(features[:, 0] ** 2) + 0.4 * jnp.sum(features[:, 1]) + STEP_WEIGHTS @ features[:, -1]


def wide(tree: Any) -> Any:
    """In float64, under the `x64` fixture."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def slope(function: Callable[[jax.Array], jax.Array], at: jax.Array, size: float = 1e-5) -> np.ndarray:
    """Central differences, for float64."""
    shifts = size * np.eye(len(at))
    return np.asarray([(float(function(at + s)) - float(function(at - s))) / (2 * size) for s in shifts])


def along(states: np.ndarray, params: np.ndarray, goal: float, model: Linear) -> tuple[np.ndarray, np.ndarray]:
    """d(states)/d(params) and d(actions)/d(params) by hand, [T + 1, 2, P] and [T, 1, P], with a model's Jacobians.

    With a = g (goal - p) - d v: da = (-g, -d) dx + (goal - p, -v), and dx' = A dx + B LIMIT [|a| < 1] da.
    """
    a, b = np.asarray(model.a, float), np.asarray(model.b, float)
    dx, dstates, dactions = np.zeros((2, 2)), [np.zeros((2, 2))], []
    for p, v in states[:-1]:
        action = params[0] * (goal - p) - params[1] * v
        da = -params[None] @ dx + np.asarray([[goal - p, -v]])
        dx = a @ dx + b @ da * LIMIT * (abs(action) < 1)
        dstates.append(dx)
        dactions.append(da)
    return np.stack(dstates), np.stack(dactions)


# GAINS from rest at 0 to 3, with the exact model:
# a0 = 3, clipped to 1, u = 2: v = 1, p = 0.5; a1 = 2.5 - 0.5 = 2, clipped, u = 2: v = 2, p = 1.5; a2 = 1.5 - 1 = 0.5,
# u = 1: v = 2.5, p = 2.75
STATES = np.asarray([[0.0, 0.0], [0.5, 1.0], [1.5, 2.0], [2.75, 2.5]])
ACTIONS = np.asarray([[3.0], [2.0], [0.5]])


def test_columns_are_what_their_names_say_and_the_loss_sees_the_action_before_clipping():
    names = ("state", "goal", "time", "final_distance")
    problem = control(features=names, state_scale=jnp.asarray([2.0, 4.0]))
    # p / 2, v / 4, goal, t / 3, |2.75 - 3|, action
    expected = [[0.0, 0.0, 3.0, 0.0, 0.25, 3.0], [0.25, 0.25, 3.0, 1 / 3, 0.25, 2.0], [0.75, 0.5, 3.0, 2 / 3, 0.25, 0.5]]
    np.testing.assert_allclose(observed(problem, GAINS, EXACT), expected, rtol=1e-6)
    real = control(features=names, state_scale=jnp.asarray([2.0, 4.0]), adapt_on="real")
    np.testing.assert_allclose(observed(real, GAINS, WRONG), expected, rtol=1e-6)


def test_columns_come_in_the_order_asked_for():
    found = observed(control(features=("final_distance", "time", "state")), GAINS, EXACT)
    expected = np.concatenate([np.full((3, 1), 0.25), [[0.0], [1 / 3], [2 / 3]], STATES[:-1], ACTIONS], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert observed(control(), GAINS, EXACT).shape == (HORIZON, 2 + 1 + 1)  # state and goal, unless told otherwise


def test_the_losses_see_the_action_before_clipping():
    # ((0.5 - 3)^2 + (1.5 - 3)^2 + (2.75 - 3)^2) / 3 + 0.01 (9 + 4 + 0.25) / 3 = 2.854167 + 0.044167
    for value in (plain(control(), GAINS, EXACT), control().task_loss(GAINS, TASK, EXACT, toys.KEY)):
        np.testing.assert_allclose(value, 2.898333, rtol=1e-5)
    # and 10 (0.5 - 0.2)^2 more with a position on the way
    nearby = TASK.replace(extra=jnp.asarray([0.2]))
    np.testing.assert_allclose(control().task_loss(GAINS, nearby, EXACT, toys.KEY), 2.898333 + 0.9, rtol=1e-5)


@pytest.mark.parametrize("adapt_on", model_based.ADAPT_ON)
def test_detached_a_learned_loss_reaches_the_policy_through_its_actions_alone(adapt_on: str):
    names = ("state", "goal", "final_distance")
    problem = control(features=names, detach_states=True, adapt_on=adapt_on)
    # d(sum_t w_t a_t) at the states as visited: w . (goal - p) = 3 + 2 * 2.5 + 3 * 1.5 and -w . v = -(2 + 6)
    found = jax.grad(lambda params: weighted_actions(observed(problem, params, EXACT)))(GAINS)
    np.testing.assert_allclose(found, [12.5, -8.0], rtol=1e-6)
    # a loss of everything but the action gives nothing
    silent = jax.grad(lambda params: jnp.sum(observed(problem, params, EXACT)[:, :-1] ** 2))(GAINS)
    np.testing.assert_array_equal(silent, [0.0, 0.0])


@pytest.mark.parametrize("gains", [FIRST_CLIPPED, SMALL_GAINS], ids=["clipped", "unclipped"])
@pytest.mark.usefixtures("x64")
def test_not_detached_a_learned_loss_reaches_the_policy_through_states_and_actions(gains: jax.Array):
    names = ("state", "final_distance")
    params, task, context = wide((gains, TASK, EXACT))

    def loss(params: jax.Array, detach_states: bool) -> jax.Array:
        features = observed(control(features=names, detach_states=detach_states), params, context, task)
        return weighted_actions(features) + features[0, 2] ** 2

    found = jax.grad(loss)(params, False)
    np.testing.assert_allclose(found, slope(lambda params: loss(params, False), params), rtol=1e-7)
    assert np.all(np.abs(found - jax.grad(loss)(params, True)) > 0.1)


@pytest.mark.parametrize("detach_states", [False, True])
@pytest.mark.usefixtures("x64")
def test_the_plain_loss_keeps_both_ways_whether_the_learned_loss_does_or_not(detach_states: bool):
    params, task, context = wide((SMALL_GAINS, TASK, EXACT))

    def loss(params: jax.Array, adapt_on: str) -> jax.Array:
        return plain(control(detach_states=detach_states, adapt_on=adapt_on), params, context, task)

    expected = slope(lambda params: loss(params, "model"), params)
    assert np.all(np.abs(expected) > 0.01)
    # along real states too: where the model is exact, they are the same
    for adapt_on in model_based.ADAPT_ON:
        np.testing.assert_allclose(jax.grad(loss)(params, adapt_on), expected, rtol=1e-7)


@pytest.mark.parametrize("gains", [FIRST_CLIPPED, SMALL_GAINS], ids=["clipped", "unclipped"])
def test_on_real_states_the_derivatives_are_the_models(gains: jax.Array):
    problem = control(adapt_on="real")
    features = np.asarray(observed(problem, gains, WRONG), float)
    real = model_learning.real_rollout(
        DoubleIntegrator(), lambda x, key: feedback(gains, x, TASK.goal), TASK.start, TASK.goal, toys.KEY, horizon=HORIZON
    )
    np.testing.assert_allclose(features[:, :2], real.states[:-1], rtol=1e-6)
    in_model = np.asarray(observed(control(), gains, WRONG))
    assert np.all(np.abs(in_model[1:, :2] - features[1:, :2]).max(axis=0) > 0.05)  # the model is another system
    dstates, dactions = along(np.asarray(real.states, float), np.asarray(gains, float), 3.0, WRONG)
    # weighted_actions: 1.4 p dp + 0.4 dv + w da
    expected = 1.4 * features[:, 0] @ dstates[:-1, 0] + 0.4 * dstates[:-1, 1].sum(axis=0) + STEP_WEIGHTS @ dactions[:, 0]
    found = jax.grad(lambda params: weighted_actions(observed(problem, params, WRONG)))(gains)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    of_the_system = jax.grad(lambda params: weighted_actions(observed(control(), params, EXACT)))(gains)
    assert np.all(np.abs(found - of_the_system) > 0.02)


@pytest.mark.parametrize("detach_states", [False, True])
def test_on_real_states_no_gradient_goes_through_the_system(detach_states: bool):
    problem = control(Opaque(), adapt_on="real", detach_states=detach_states)
    with pytest.raises(AssertionError, match="went through the real system"):  # it would be noticed
        jax.grad(lambda u: Opaque().step(Moving(TASK.start, TASK.goal), u).obs[0])(jnp.ones(1))
    meta = toys.learner(problem, num_tasks=2, inner_steps=2)
    _, metrics = meta.step(meta.init(toys.KEY, WRONG))
    assert float(metrics.meta_grad_norm) > 1e-4
    assert np.isfinite(metrics.meta_grad_norm)
    # the recorded states are constants to whoever reads them
    detached = jax.grad(lambda params: jnp.sum(recorded(problem, params)))(SMALL_GAINS)
    np.testing.assert_array_equal(detached, [0.0, 0.0])


def test_the_samples_of_a_step_are_those_of_the_real_system():
    assert control().samples_per_step == 0
    assert control().collect is None
    assert control(adapt_on="real", horizon=5).samples_per_step == 5


def test_in_the_model_only_the_evaluation_steps_the_real_system():
    problem = control(Untouchable())
    task = problem.sample_task(toys.KEY, EXACT)
    params = problem.init(toys.KEY, task)
    assert np.all(np.isfinite(observed(problem, params, EXACT, task)))
    assert np.isfinite(plain(problem, params, EXACT, task))
    assert np.isfinite(problem.task_loss(params, task, EXACT, toys.KEY))
    with pytest.raises(AssertionError, match="the real system was stepped"):
        problem.evaluate(params, task, EXACT, toys.KEY)
    with pytest.raises(AssertionError, match="the real system was stepped"):
        observed(control(Untouchable(), adapt_on="real"), params, EXACT, task)


def test_on_real_states_the_task_loss_is_still_the_models():
    task = collected(control(adapt_on="real"), GAINS, TASK, WRONG, toys.KEY, STEP)
    found = control(Untouchable(), adapt_on="real").task_loss(GAINS, task, WRONG, toys.KEY)
    toys.assert_same(found, control().task_loss(GAINS, TASK, WRONG, toys.KEY))
    assert found != control().task_loss(GAINS, TASK, EXACT, toys.KEY)


@pytest.mark.parametrize("adapt_on", model_based.ADAPT_ON)
def test_extra_reaches_the_task_loss_alone(adapt_on: str):
    problem = control(extra=jnp.asarray([0.4]), adapt_on=adapt_on, features=model_based.FEATURES)
    task = problem.sample_task(toys.KEY, EXACT)
    np.testing.assert_allclose(task.extra, [0.4])
    blind = task.replace(extra=jnp.asarray([jnp.nan]))
    toys.assert_same(problem.init(toys.KEY, task), problem.init(toys.KEY, blind))
    toys.assert_same(observed(problem, GAINS, EXACT, task), observed(problem, GAINS, EXACT, blind))
    toys.assert_same(plain(problem, GAINS, EXACT, task), plain(problem, GAINS, EXACT, blind))
    toys.assert_same(
        problem.evaluate(GAINS, task, EXACT, toys.KEY),
        problem.evaluate(GAINS, blind, EXACT, toys.KEY),
    )
    if problem.collect is not None:
        seen, unseen = (problem.collect(GAINS, t, EXACT, toys.KEY, STEP) for t in (task, blind))
        toys.assert_same(seen.replace(extra=None), unseen.replace(extra=None))
    assert np.isfinite(problem.task_loss(GAINS, task, EXACT, toys.KEY))
    assert np.isnan(problem.task_loss(GAINS, blind, EXACT, toys.KEY))


def test_the_evaluation_is_of_the_real_system():
    for context in (EXACT, WRONG, jax.tree.map(lambda leaf: leaf * jnp.nan, WRONG)):
        report = control().evaluate(GAINS, TASK, context, toys.KEY)
        np.testing.assert_allclose([report["final_distance"], report["speed"]], [0.25, 2.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: expected at least 1 step, got 0"),
        ({"adapt_on": "dream"}, "adapt_on: expected one of 'model', 'real', got 'dream'"),
        ({"features": ("state", "speed")}, r"features: expected some of state, goal, .*, got \('state', 'speed'\)"),
        ({"features": ()}, "features: expected some of state"),
        ({"features": ("final_distance",), "distance": None}, '"final_distance" needs distance='),
    ],
)
def test_choices_that_make_no_problem_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        control(**options)


# What a refresh does -------------------------------------------------------------------------------------------------------

# A policy that pushes the same way all along, so that an action tells whose it was.
PUSH = Policy(lambda key: jax.random.uniform(key, (1,), minval=0.5, maxval=1.0), lambda params, x, goal: params)


def refreshed(params: jax.Array, rollouts: int, exploration: float = 0.0) -> tuple[Trajectory, ControlTask]:
    """What a refresh gives to the refit, and the tasks that it had."""
    problem = control(policy=PUSH, refresh=Refresh(lambda context, trajectories, key: trajectories, rollouts, exploration))
    tasks = jax.vmap(problem.sample_task, in_axes=(0, None))(jax.random.split(toys.KEY, len(params)), None)
    assert problem.refresh is not None
    return problem.refresh(EXACT, None, params, tasks, toys.KEY), tasks


def test_a_refresh_takes_turns_between_current_and_fresh_policies():
    current = jnp.asarray([[0.1], [0.2], [0.3]])
    trajectories, tasks = refreshed(current, rollouts=5)
    assert trajectories.states.shape == (5, HORIZON + 1, 2)
    assert trajectories.actions.shape == (5, HORIZON, 1)
    pushes = np.asarray(trajectories.actions)[:, :, 0] / LIMIT
    np.testing.assert_allclose(pushes, pushes[:, :1] * np.ones((1, HORIZON)))
    starts = np.asarray(tasks.start)
    whose = np.argmax(np.all(np.asarray(trajectories.states)[:, None, 0] == starts[None], axis=-1), axis=1)  # the task of each
    np.testing.assert_array_equal(trajectories.states[:, 0], starts[whose])
    assert set(whose) == {0, 1, 2}
    # current policies push as their own task's does; fresh ones by 0.5 and more, each in its own way
    np.testing.assert_allclose(pushes[::2, 0], np.asarray(current)[whose[::2], 0], rtol=1e-6)
    assert pushes[1::2].min() >= 0.5
    assert pushes[1, 0] != pushes[3, 0]


def test_the_noise_of_a_refresh_has_the_size_that_was_asked_for_and_is_clipped_with_the_action():
    trajectories, _ = refreshed(jnp.zeros((1, 1)), rollouts=400, exploration=0.1)
    noise = np.asarray(trajectories.actions)[::2, :, 0] / LIMIT  # the current policy does nothing
    # standard error of a standard deviation: 0.1 / sqrt(2 * 600) = 0.003
    np.testing.assert_allclose(noise.std(), 0.1, atol=0.015)
    np.testing.assert_allclose(noise.mean(), 0.0, atol=0.02)
    assert len(np.unique(noise)) == noise.size
    loud, _ = refreshed(jnp.zeros((1, 1)), rollouts=20, exploration=3.0)
    assert np.abs(loud.actions).max() == LIMIT


# Of two tasks and one inner step; compiled once for the tests that follow.
META = toys.learner(learned(), num_tasks=2, inner_steps=1, refresh_every=2)


def test_a_refresh_adds_its_rollouts_and_changes_the_model():
    context = learned_context()
    state = META.init(toys.KEY, context)
    toys.assert_same(state.context, context)
    after = META.refresh(state)
    assert int(after.context.buffer.count) == 4 + 4
    assert np.all(np.abs(np.asarray(after.context.buffer.states[4:8])).max(axis=(1, 2)) > 0)
    assert not np.asarray(after.context.buffer.states[8:]).any()
    for new, old in zip(jax.tree.leaves(after.context.model), jax.tree.leaves(context.model), strict=True):
        assert np.any(np.asarray(new) != np.asarray(old))
    toys.assert_same(after.replace(context=None), state.replace(context=None))


def test_a_run_refreshes_before_its_steps_0_r_and_2r():
    state = META.init(toys.KEY, learned_context())
    ran, metrics = META.run(state, 6)
    assert int(ran.context.log.fits) == 3
    np.testing.assert_array_equal(model_learning.learning_curve(ran.context.log)["rollouts"], [8, 12, 16])
    assert metrics.task_loss.shape == (6,)
    # the first of them is the one that refresh alone does, and so before any step
    first = META.refresh(state).context
    toys.assert_same(ran.context.buffer.states[4:8], first.buffer.states[4:8])
    np.testing.assert_allclose(ran.context.log.horizon_error[0], first.log.horizon_error[0], rtol=1e-3)
    assert np.all(np.isfinite(metrics.task_loss))
    assert not np.any(metrics.skipped)
    assert len(np.unique(np.asarray(ran.context.log.horizon_error[:3, 0]))) == 3


def test_a_refresh_may_be_vmapped_over_seeds():
    states = [META.init(jax.random.key(seed), learned_context(seed)) for seed in (0, 1)]
    together = jax.vmap(META.refresh)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)).context
    for seed, state in enumerate(states):
        one, alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together), META.refresh(state).context
        toys.assert_close((one.buffer, one.model), (alone.buffer, alone.model), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.log.horizon_error[0], alone.log.horizon_error[0], rtol=1e-3)


def test_a_policy_that_is_not_finite_poisons_neither_buffer_nor_model():
    context = learned_context()
    state = META.init(toys.KEY, context)
    assert state.lives is not None
    lives = state.lives.replace(params=jnp.full_like(state.lives.params, jnp.nan))
    after = META.refresh(state.replace(lives=lives)).context
    assert int(after.buffer.count) == 8
    assert np.isfinite(toys.flat((after.model, after.buffer))).all()
    # half of the rollouts were those of current policies, and are copies of a known one; the others are fresh policies'
    copied = [bool(np.array_equal(rows, context.buffer.states[0])) for rows in after.buffer.states[4:8]]
    assert sum(copied) == 2


# Meta-training on it -------------------------------------------------------------------------------------------------------

LOSSES = {"action_target": ml3_jax.losses.action_target(1, hidden=(4,)), "mlp": toys.smooth_loss()}


@pytest.mark.parametrize(
    ("loss", "adapt_on", "estimator"),
    [
        ("action_target", "model", "backprop"),
        ("action_target", "real", "backprop"),
        ("action_target", "model", "es"),
        ("mlp", "model", "backprop"),
    ],
)
def test_every_leaf_of_the_loss_has_a_finite_meta_gradient_that_is_not_zero(loss: str, adapt_on: str, estimator: str):
    settings: dict[str, Any] = {"num_tasks": 2, "inner_steps": 2, "estimator": estimator, "meta_optimizer": optax.sgd(1.0)}
    meta = toys.learner(control(adapt_on=adapt_on), LOSSES[loss], **settings)
    state = meta.init(toys.KEY, WRONG)
    after, metrics = meta.step(state)
    assert int(metrics.skipped) == 0
    gradient = jax.tree.map(lambda old, new: old - new, state.loss_params, after.loss_params)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))
        assert np.abs(leaf).max() > 1e-6


@pytest.mark.parametrize(("adapt_on", "detach_states"), [("model", True), ("real", False)])
def test_vmapped_tasks_are_as_single_ones_and_task_i_does_not_leak_into_task_j(adapt_on: str, detach_states: bool):
    problem = control(adapt_on=adapt_on, detach_states=detach_states)
    loss, optimizer = LOSSES["action_target"], optax.sgd(0.1)
    loss_params = loss.init(toys.KEY, 4)
    keys = jax.random.split(toys.KEY, 3)
    tasks = jax.vmap(problem.sample_task, in_axes=(0, None))(keys, WRONG)

    def adapted(task: ControlTask, key: jax.Array) -> ml3_jax.Adaptation:
        return ml3_jax.adapt(problem, loss, loss_params, task, WRONG, key, optimizer=optimizer, steps=2)

    together = jax.vmap(adapted)(tasks, keys)
    one = adapted(jax.tree.map(lambda leaf: leaf[1], tasks), keys[1])
    toys.assert_close(jax.tree.map(lambda leaf: leaf[1], together), one, rtol=1e-5)
    moved = jax.vmap(adapted)(tasks.replace(goal=tasks.goal.at[0].set(jnp.nan)), keys)
    assert np.isnan(moved.params[0]).all()
    toys.assert_same(jax.tree.map(lambda leaf: leaf[1:], moved), jax.tree.map(lambda leaf: leaf[1:], together))


def test_meta_training_on_a_learned_model_halves_the_real_distance():
    horizon = 5
    ensemble = dynamics.make_ensemble(2, 1, members=1, hidden=(16,), batch_size=64, fit_steps=200, learning_rate=1e-2)
    refresh = Refresh(lambda c, rollouts, key: model_learning.refit(ensemble, c, rollouts, key), rollouts=8, exploration=0.2)
    policy = Policy(lambda key: 0.1 * jax.random.normal(key, (2,)), feedback)
    problem = control(
        predict=model_learning.predict_fn(ensemble), policy=policy, refresh=refresh, horizon=horizon, detach_states=True
    )
    system, optimizer = DoubleIntegrator(), optax.sgd(0.3)
    context = model_learning.initial_context(
        system, ensemble, lambda key: 0.1 * jax.random.normal(key, (2,)), 1, toys.KEY, horizon=horizon, rollouts=8, capacity=64
    )
    loss = ml3_jax.losses.action_target(1, hidden=(16,))
    settings: dict[str, Any] = {"num_tasks": 8, "inner_steps": 2, "refresh_every": 40}
    meta = toys.learner(problem, loss, inner_optimizer=optimizer, meta_optimizer=optax.adam(1e-2), **settings)
    untrained = meta.init(toys.KEY, context)
    trained, _ = meta.run(untrained, 80)
    keys = jax.random.split(jax.random.key(1), 16)
    tasks = jax.vmap(problem.sample_task, in_axes=(0, None))(keys, context)

    def final(loss_params: Any) -> np.ndarray:
        def one(task: ControlTask, key: jax.Array) -> jax.Array:
            found = ml3_jax.adapt(problem, loss, loss_params, task, trained.context, key, optimizer=optimizer, steps=2)
            return found.trace["final_distance"]

        return np.asarray(jax.vmap(one)(tasks, keys)).mean(axis=0)  # [3] m

    # measured: 1.005, 0.722, 0.711 m before and 1.005, 0.364, 0.089 m after meta-training
    before, after = final(untrained.loss_params), final(trained.loss_params)
    assert after[-1] < 0.5 * before[-1]
    assert after[-1] < 0.5 * after[0]
