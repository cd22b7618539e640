"""Model-based control: columns and gradients by hand, inputs of each function, refreshes, bad input, and learning."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax import dynamics
from ml3_jax.inner import collected
from ml3_jax.problems import model_based, model_learning
from ml3_jax.problems.model_based import ControlTask, Observed, Policy, Refresh, Tasks, make_problem
from ml3_jax.problems.model_learning import ModelContext
from ml3_jax.rollout import Trajectory
from tests.ml3_jax import toys

HORIZON = 3
LIMIT = 2.0
STEP = jnp.asarray(0, jnp.int32)
ENSEMBLE = dynamics.make_ensemble(2, 1, members=2, hidden=(4,), fitting=dynamics.Fitting(batch_size=8, steps=3))
TASK = ControlTask(start=jnp.asarray([0.0, 0.0]), goal=jnp.asarray([3.0]))
GAINS = jnp.asarray([1.0, 0.5])  # the first two actions are clipped
SMALL_GAINS = jnp.asarray([0.2, 0.3])  # no action is clipped
FIRST_CLIPPED = jnp.asarray([0.4, 0.5])  # the first action alone is clipped
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
    """A system that must not be stepped."""

    def step(self, state: Moving, action: jax.Array) -> Moving:
        raise AssertionError("the real system was stepped")


@jax.custom_jvp
def without_derivative(x: jax.Array) -> jax.Array:
    return x


@without_derivative.defjvp
def refuse(primals: Any, tangents: Any) -> Any:
    raise AssertionError("a gradient went through the real system")


class Opaque(DoubleIntegrator):
    """A system that must not be differentiated."""

    def step(self, state: Moving, action: jax.Array) -> Moving:
        return super().step(state, without_derivative(action))


class Linear(NamedTuple):
    """A context with the model x' = a x + b u, without clipping."""

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
    """The mean squared distance, and a little of the actions; extra [1] is a position to be near at step 1."""
    on_the_way = 0.0 if extra is None else 10.0 * (states[1, 0] - extra[0]) ** 2
    return jnp.mean((states[1:, 0] - goal) ** 2) + 0.01 * jnp.mean(actions**2) + on_the_way


def evaluate(states: jax.Array, goal: jax.Array) -> dict[str, jax.Array]:
    return {"final_distance": distance(states[-1], goal), "speed": jnp.abs(states[-1, 1])}


TASKS = Tasks(
    sample_start=lambda key: 0.1 * jax.random.normal(key, (2,)),
    sample_goal=lambda key: jax.random.uniform(key, (1,), minval=0.3),
    cost=cost,
    evaluate=evaluate,
    horizon=HORIZON,
    distance=distance,
)


def control(
    system: DoubleIntegrator | None = None, predict: Any = by_matrices, policy: Policy = POLICY, tasks: Tasks = TASKS, **options
) -> ml3_jax.Problem:
    """`options` are those of `Observed` and of make_problem."""
    observed = Observed(**{f.name: options.pop(f.name) for f in dataclasses.fields(Observed) if f.name in options})
    return make_problem(system or DoubleIntegrator(), policy, predict, tasks, observed=observed, **options)


def learned(ensemble: dynamics.Ensemble, *, rollouts: int, **options: Any) -> ml3_jax.Problem:
    """The problem with a learned model and its refits."""
    refresh = Refresh(lambda c, new, key: model_learning.refit(ensemble, c, new, key), rollouts=rollouts, exploration=0.2)
    return control(predict=model_learning.predict_fn(ensemble), refresh=refresh, **options)


@functools.cache
def learned_context(seed: int = 0) -> ModelContext:
    """The first context of a learned model, with 4 rollouts."""
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


def look(problem: ml3_jax.Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, context, task) -> features [T, F] and their Jacobian [T, F, P], compiled."""

    def features(params: jax.Array, context: Any, task: ControlTask = TASK) -> tuple[jax.Array, jax.Array]:
        found = observed(problem, params, context, task)
        return found, found

    def swapped(*args: Any) -> tuple[jax.Array, jax.Array]:
        jacobian, found = jax.jacrev(features, has_aux=True)(*args)
        return found, jacobian

    return jax.jit(swapped)


def weighted_actions(features: jax.Array, jacobian: jax.Array) -> np.ndarray:
    """d(sum_t 0.7 p_t^2 + 0.4 v_t + w_t a_t)/d(params), [P]: every state, and each action with a weight of its own."""
    p, dp, dv, da = features[:, 0], jacobian[:, 0], jacobian[:, 1], jacobian[:, -1]
    return np.asarray(1.4 * p @ dp + 0.4 * jnp.sum(dv, axis=0) + STEP_WEIGHTS @ da)


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


def test_each_column_is_the_feature_of_its_name_and_the_action_is_before_clipping():
    names = ("state", "goal", "time", "final_distance")
    # p / 2, v / 4, goal, t / 3, |2.75 - 3|, action
    expected = [[0.0, 0.0, 3.0, 0.0, 0.25, 3.0], [0.25, 0.25, 3.0, 1 / 3, 0.25, 2.0], [0.75, 0.5, 3.0, 2 / 3, 0.25, 0.5]]
    for adapt_on, context in (("model", EXACT), ("real", WRONG)):
        problem = control(features=names, state_scale=jnp.asarray([2.0, 4.0]), adapt_on=adapt_on)
        found = jax.jit(functools.partial(observed, problem))(GAINS, context)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_columns_come_in_the_order_asked_for():
    found = jax.jit(functools.partial(observed, control(features=("final_distance", "time", "state"))))(GAINS, EXACT)
    expected = np.concatenate([np.full((3, 1), 0.25), [[0.0], [1 / 3], [2 / 3]], STATES[:-1], ACTIONS], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    default = jax.eval_shape(functools.partial(observed, control()), GAINS, EXACT)
    chex.assert_shape(default, (HORIZON, 2 + 1 + 1))  # state, goal and action


def test_the_losses_see_the_action_before_clipping():
    problem = control()

    @jax.jit
    def losses(extra: jax.Array) -> list[jax.Array]:
        outer = [problem.task_loss(GAINS, TASK.replace(extra=e), EXACT, toys.KEY) for e in (None, extra)]
        return [plain(problem, GAINS, EXACT), *outer]

    # ((0.5 - 3)^2 + (1.5 - 3)^2 + (2.75 - 3)^2) / 3 + 0.01 (9 + 4 + 0.25) / 3 = 2.854167 + 0.044167, and for the last
    # 10 (0.5 - 0.2)^2 more with a position on the way
    np.testing.assert_allclose(losses(jnp.asarray([0.2])), [2.898333, 2.898333, 2.898333 + 0.9], rtol=1e-5)


@pytest.mark.parametrize("adapt_on", model_based.ADAPT_ON)
def test_detached_a_learned_loss_reaches_the_policy_through_its_actions_alone(adapt_on: str):
    names = ("state", "goal", "final_distance")
    system = Opaque() if adapt_on == "real" else None
    _, jacobian = look(control(system, features=names, detach_states=True, adapt_on=adapt_on))(GAINS, EXACT)
    # da_t at the visited states: goal - p and -v
    np.testing.assert_allclose(jacobian[:, -1], [[3.0, 0.0], [2.5, -1.0], [1.5, -2.0]], rtol=1e-6)
    np.testing.assert_array_equal(jacobian[:, :-1], 0.0)


@pytest.mark.usefixtures("x64")
def test_not_detached_a_learned_loss_reaches_the_policy_through_states_and_actions():
    task, context = wide((TASK, EXACT))

    def loss(detach_states: bool, params: jax.Array) -> jax.Array:
        problem = control(features=("state", "final_distance"), detach_states=detach_states)
        features = observed(problem, params, context, task)
        states = 0.7 * jnp.sum(features[:, 0] ** 2) + 0.4 * jnp.sum(features[:, 1])
        return states + STEP_WEIGHTS.astype(features.dtype) @ features[:, -1] + features[0, 2] ** 2

    attached, detached = (functools.partial(loss, detach) for detach in (False, True))
    value, gradients = jax.jit(attached), jax.jit(lambda params: (jax.grad(attached)(params), jax.grad(detached)(params)))
    for gains in wide((FIRST_CLIPPED, SMALL_GAINS)):
        found, without_states = gradients(gains)
        np.testing.assert_allclose(found, slope(value, gains), rtol=1e-7)
        assert np.all(np.abs(found - without_states) > 0.1)


@pytest.mark.usefixtures("x64")
def test_the_plain_loss_keeps_both_ways_with_and_without_detached_states():
    params, task, context = wide((SMALL_GAINS, TASK, EXACT))
    choices = [{"detach_states": detach, "adapt_on": on} for detach in (False, True) for on in model_based.ADAPT_ON]

    def loss(params: jax.Array, choice: dict[str, Any]) -> jax.Array:
        return plain(control(**choice), params, context, task)

    expected = slope(jax.jit(functools.partial(loss, choice=choices[0])), params)
    assert np.all(np.abs(expected) > 0.01)
    # The model is exact, so the derivatives along real states are the same.
    found = jax.jit(lambda params: [jax.grad(loss)(params, choice) for choice in choices])(params)
    for gradient in found:
        np.testing.assert_allclose(gradient, expected, rtol=1e-7)


def test_on_real_states_the_derivatives_are_the_models():
    on_real, in_model = look(control(adapt_on="real")), look(control())

    @jax.jit
    def real_states(gains: jax.Array) -> jax.Array:
        system, start, goal = DoubleIntegrator(), TASK.start, TASK.goal

        def act(x: jax.Array, key: jax.Array) -> jax.Array:
            del key
            return feedback(gains, x, goal)

        return model_learning.real_rollout(system, act, start, goal, toys.KEY, horizon=HORIZON).states

    for gains in (FIRST_CLIPPED, SMALL_GAINS):
        features, jacobian = (np.asarray(x, float) for x in on_real(gains, WRONG))
        states = np.asarray(real_states(gains), float)
        np.testing.assert_allclose(features[:, :2], states[:-1], rtol=1e-6)
        imagined = np.asarray(in_model(gains, WRONG)[0])
        assert np.all(np.abs(imagined[1:, :2] - features[1:, :2]).max(axis=0) > 0.05)  # the model is another system
        dstates, dactions = along(states, np.asarray(gains, float), 3.0, WRONG)
        np.testing.assert_allclose(jacobian[:, :2], dstates[:-1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(jacobian[:, -1], dactions[:, 0], rtol=1e-4, atol=1e-6)
        of_the_system = weighted_actions(*in_model(gains, EXACT))
        assert np.all(np.abs(weighted_actions(*on_real(gains, WRONG)) - of_the_system) > 0.02)


def test_recorded_states_are_constants():
    with pytest.raises(AssertionError, match="went through the real system"):  # the check itself works
        jax.grad(lambda u: Opaque().step(Moving(TASK.start, TASK.goal), u).obs[0])(jnp.ones(1))
    problem = control(Opaque(), adapt_on="real")

    def recorded(params: jax.Array) -> jax.Array:
        return jnp.sum(collected(problem, params, TASK, WRONG, toys.KEY, STEP).states)

    np.testing.assert_array_equal(jax.jit(jax.grad(recorded))(SMALL_GAINS), [0.0, 0.0])


def test_the_samples_of_a_step_are_those_of_the_real_system():
    assert control().samples_per_step == 0
    assert control().collect is None
    assert control(adapt_on="real", tasks=dataclasses.replace(TASKS, horizon=5)).samples_per_step == 5


def test_in_the_model_only_the_evaluation_steps_the_real_system():
    problem = control(Untouchable())
    for function in (observed, plain):
        jax.eval_shape(functools.partial(function, problem), GAINS, EXACT)
    args = (GAINS, TASK, EXACT, toys.KEY)
    jax.eval_shape(problem.task_loss, *args)
    with pytest.raises(AssertionError, match="the real system was stepped"):
        jax.eval_shape(problem.evaluate, *args)
    with pytest.raises(AssertionError, match="the real system was stepped"):
        jax.eval_shape(functools.partial(observed, control(Untouchable(), adapt_on="real")), GAINS, EXACT)


def test_on_real_states_the_task_loss_is_still_the_models():
    real, task_loss = control(adapt_on="real"), jax.jit(control().task_loss)
    task = collected(real, GAINS, TASK, WRONG, toys.KEY, STEP)
    found = jax.jit(real.task_loss)(GAINS, task, WRONG, toys.KEY)
    toys.assert_same(found, task_loss(GAINS, TASK, WRONG, toys.KEY))
    assert found != task_loss(GAINS, TASK, EXACT, toys.KEY)
    jax.eval_shape(control(Untouchable(), adapt_on="real").task_loss, GAINS, task, WRONG, toys.KEY)


@pytest.mark.parametrize("adapt_on", model_based.ADAPT_ON)
def test_extra_reaches_the_task_loss_alone(adapt_on: str):
    tasks = dataclasses.replace(TASKS, extra=jnp.asarray([0.4]))
    problem = control(tasks=tasks, adapt_on=adapt_on, features=model_based.FEATURES)
    task = problem.sample_task(toys.KEY, EXACT)
    np.testing.assert_allclose(task.extra, [0.4])

    @jax.jit
    def looks(task: ControlTask) -> tuple[Any, jax.Array]:
        blind = (
            problem.init(toys.KEY, task),
            observed(problem, GAINS, EXACT, task),
            plain(problem, GAINS, EXACT, task),
            problem.evaluate(GAINS, task, EXACT, toys.KEY),
            collected(problem, GAINS, task, EXACT, toys.KEY, STEP).states,
        )
        return blind, problem.task_loss(GAINS, task, EXACT, toys.KEY)

    (seen, loss), (unseen, spoilt) = looks(task), looks(task.replace(extra=jnp.asarray([jnp.nan])))
    toys.assert_same(seen, unseen)
    assert np.isfinite(loss)
    assert np.isnan(spoilt)


def test_the_evaluation_is_of_the_real_system():
    evaluate = jax.jit(control().evaluate)
    for context in (EXACT, WRONG, jax.tree.map(lambda leaf: leaf * jnp.nan, WRONG)):
        report = evaluate(GAINS, TASK, context, toys.KEY)
        np.testing.assert_allclose([report["final_distance"], report["speed"]], [0.25, 2.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": dataclasses.replace(TASKS, horizon=0)}, "horizon: expected a whole number of at least 1, got 0"),
        ({"adapt_on": "dream"}, "adapt_on: expected one of 'model', 'real', got 'dream'"),
        ({"features": ("state", "speed")}, r"features: expected some of state, goal, .*, got \('state', 'speed'\)"),
        ({"features": ()}, "features: expected some of state"),
        (
            {"features": ("final_distance",), "tasks": dataclasses.replace(TASKS, distance=None)},
            '"final_distance" needs distance=',
        ),
        (
            {"refresh": Refresh(lambda c, t, k: c, rollouts=0)},
            r"refresh\.rollouts: expected a whole number of at least 1, got 0",
        ),
        ({"state_scale": jnp.ones(3)}, r"state_scale: expected shape \(2,\), got \(3,\)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        control(**options)


# Refreshes ---------------------------------------------------------------------------------------------------------------

# A policy with a constant action, so that an action identifies its policy.
PUSH = Policy(lambda key: jax.random.uniform(key, (1,), minval=0.5, maxval=1.0), lambda params, x, goal: params)


def refreshed(params: jax.Array, rollouts: int) -> Callable[[float], tuple[Trajectory, ControlTask]]:
    """exploration -> the rollouts that a refit gets, and the tasks of the refresh; compiled."""

    @jax.jit
    def run(exploration: Any) -> tuple[Trajectory, ControlTask]:
        refresh = Refresh(lambda context, trajectories, key: trajectories, rollouts, exploration)
        problem = control(policy=PUSH, refresh=refresh)
        tasks = jax.vmap(problem.sample_task, in_axes=(0, None))(jax.random.split(toys.KEY, len(params)), None)
        assert problem.refresh is not None
        return problem.refresh(EXACT, None, params, tasks, toys.KEY), tasks

    return run


def test_a_refresh_takes_turns_between_current_and_fresh_policies():
    current = jnp.asarray([[0.1], [0.2], [0.3]])
    trajectories, tasks = refreshed(current, rollouts=5)(0.0)
    chex.assert_shape([trajectories.states, trajectories.actions], [(5, HORIZON + 1, 2), (5, HORIZON, 1)])
    pushes = np.asarray(trajectories.actions)[:, :, 0] / LIMIT
    np.testing.assert_allclose(pushes, pushes[:, :1] * np.ones((1, HORIZON)))
    starts = np.asarray(tasks.start)
    whose = np.argmax(
        np.all(np.asarray(trajectories.states)[:, None, 0] == starts[None], axis=-1), axis=1
    )  # the task of each rollout
    np.testing.assert_array_equal(trajectories.states[:, 0], starts[whose])
    assert set(whose) == {0, 1, 2}
    # A current policy has the action of its task; a fresh one has an action of its own, at least 0.5.
    np.testing.assert_allclose(pushes[::2, 0], np.asarray(current)[whose[::2], 0], rtol=1e-6)
    assert pushes[1::2].min() >= 0.5
    assert pushes[1, 0] != pushes[3, 0]


def test_the_exploration_noise_has_the_size_asked_for_and_is_clipped_with_the_action():
    explore = refreshed(jnp.zeros((1, 1)), rollouts=400)
    noise = np.asarray(explore(0.1)[0].actions)[::2, :, 0] / LIMIT  # the current policy's action is 0
    # standard error of a standard deviation: 0.1 / sqrt(2 * 600) = 0.003
    np.testing.assert_allclose(noise.std(), 0.1, atol=0.015)
    np.testing.assert_allclose(noise.mean(), 0.0, atol=0.02)
    assert len(np.unique(noise)) == noise.size
    assert np.abs(explore(3.0)[0].actions).max() == LIMIT


# Two tasks and one inner step; compiled once for the tests that follow.
META = toys.learner(learned(ENSEMBLE, rollouts=4), num_tasks=2, inner_steps=1, refresh_every=2)


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
    # The first refresh equals META.refresh, so it comes before any step.
    first = META.refresh(state).context
    np.testing.assert_allclose(ran.context.buffer.states[4:8], first.buffer.states[4:8], rtol=1e-5)  # two programs
    np.testing.assert_allclose(ran.context.log.horizon_error[0], first.log.horizon_error[0], rtol=1e-3)
    chex.assert_tree_all_finite(metrics.task_loss)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
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
    assert state.inner_state is not None
    lives = state.inner_state.replace(params=jnp.full_like(state.inner_state.params, jnp.nan))
    after = META.refresh(state.replace(inner_state=lives)).context
    assert int(after.buffer.count) == 8
    chex.assert_tree_all_finite((after.model, after.buffer))
    # Half of the rollouts are of current policies: copies of a known rollout replace them.
    copied = [bool(np.array_equal(rows, context.buffer.states[0])) for rows in after.buffer.states[4:8]]
    assert sum(copied) == 2


# Meta-training -------------------------------------------------------------------------------------------------------------

LOSS = ml3_jax.losses.action_target(1, hidden=(4,))


@pytest.mark.parametrize("adapt_on", model_based.ADAPT_ON)
def test_every_leaf_of_the_loss_has_a_meta_gradient_and_no_gradient_goes_through_the_system(adapt_on: str):
    problem = control(Opaque(), adapt_on=adapt_on)
    meta = toys.learner(problem, LOSS, num_tasks=2, inner_steps=2, meta_optimizer=optax.sgd(1.0))
    state = meta.init(toys.KEY, WRONG)
    after, metrics = meta.step(state)
    assert int(metrics.skipped) == 0
    gradient = jax.tree.map(lambda old, new: old - new, state.loss_params, after.loss_params)
    chex.assert_tree_all_finite(gradient)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-6


def test_vmapped_tasks_equal_single_ones_and_task_i_does_not_leak_into_task_j():
    problem, optimizer = control(adapt_on="real"), optax.sgd(0.1)
    loss_params = LOSS.init(toys.KEY, 4)
    keys = jax.random.split(toys.KEY, 3)
    tasks = jax.vmap(problem.sample_task, in_axes=(0, None))(keys, WRONG)

    def adapted(task: ControlTask, key: jax.Array) -> ml3_jax.Adaptation:
        return ml3_jax.adapt(problem, LOSS, loss_params, task, WRONG, key, optimizer=optimizer, steps=2)

    all_adapted = jax.jit(jax.vmap(adapted))
    together = all_adapted(tasks, keys)
    one = jax.jit(adapted)(jax.tree.map(lambda leaf: leaf[1], tasks), keys[1])
    toys.assert_close(jax.tree.map(lambda leaf: leaf[1], together), one, rtol=1e-5)
    moved = all_adapted(tasks.replace(goal=tasks.goal.at[0].set(jnp.nan)), keys)
    assert np.isnan(moved.params[0]).all()
    toys.assert_same(jax.tree.map(lambda leaf: leaf[1:], moved), jax.tree.map(lambda leaf: leaf[1:], together))


def test_meta_training_on_a_learned_model_halves_the_real_distance():
    horizon = 5
    fitting = dynamics.Fitting(batch_size=64, steps=200, learning_rate=1e-2)
    ensemble = dynamics.make_ensemble(2, 1, members=1, hidden=(16,), fitting=fitting)
    policy = Policy(lambda key: 0.1 * jax.random.normal(key, (2,)), feedback)
    tasks = dataclasses.replace(TASKS, horizon=horizon)
    problem = learned(ensemble, rollouts=8, policy=policy, tasks=tasks, detach_states=True)
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
    held_out = jax.vmap(problem.sample_task, in_axes=(0, None))(keys, context)

    @jax.jit
    def final(loss_params: Any) -> jax.Array:
        def one(task: ControlTask, key: jax.Array) -> jax.Array:
            found = ml3_jax.adapt(problem, loss, loss_params, task, trained.context, key, optimizer=optimizer, steps=2)
            return found.trace["final_distance"]

        return jnp.mean(jax.vmap(one)(held_out, keys), axis=0)  # [3] m

    # measured: 1.005, 0.722, 0.711 m before and 1.005, 0.364, 0.089 m after meta-training
    before, after = final(untrained.loss_params), final(trained.loss_params)
    assert after[-1] < 0.5 * before[-1]
    assert after[-1] < 0.5 * after[0]
