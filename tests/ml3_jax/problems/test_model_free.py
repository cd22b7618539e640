"""Model-free control on a point on a line, whose returns and policy gradient are worked out by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import ml3_jax
from ml3_jax.problems import model_free
from tests.ml3_jax import toys

HORIZON, ROLLOUTS = 3, 4
GOAL = jnp.array([0.6])


class Point(struct.PyTreeNode):
    """What an environment's state holds here."""

    obs: jax.Array  # [1]
    goal: jax.Array  # [1]


class Line:
    """x' = x + speed action; it clips actions to +-0.5."""

    name = "line"
    observation_size = 1
    action_size = 1
    action_limit = 0.5

    def __init__(self, speed: jax.Array | float = 0.1):
        self.speed = speed

    def state_at(self, x: jax.Array, goal: jax.Array) -> Point:
        return Point(x, goal)

    def step(self, state: Point, action: jax.Array) -> Point:
        return state.replace(obs=state.obs + self.speed * jnp.clip(action, -0.5, 0.5))


LINE = Line()


def apply(params: dict[str, jax.Array], x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    return params["gain"] * (goal - x) + params["offset"], params["log_std"]


POLICY = model_free.GaussianPolicy(
    lambda key: {"gain": jnp.array([0.3]), "offset": 0.1 * jax.random.normal(key, (1,)), "log_std": jnp.array([-0.5])}, apply
)


def make(system: Any = LINE, policy: Any = POLICY, **options: Any) -> ml3_jax.Problem:
    given = {
        "sample_start": lambda key: 0.1 * jax.random.normal(key, (1,)),
        "sample_goal": lambda key: GOAL + 0.1 * jax.random.normal(key, (1,)),
        "reward": lambda x, action, following, goal: -jnp.sum((following - goal) ** 2),
        "evaluate": lambda states, goal: {"distance": jnp.abs(states[-1] - goal)[0]},
        "horizon": HORIZON,
        "rollouts": ROLLOUTS,
        "inputs": lambda x, goal: x / 2.0,
    }
    return model_free.make_problem(system, policy, **{**given, **options})


PROBLEM = make()
FEATURES = len(model_free.FEATURES)  # one column each here
STEP = jnp.zeros((), jnp.int32)


def drawn(problem: ml3_jax.Problem = PROBLEM):
    task_key, init_key, key = jax.random.split(toys.KEY, 3)
    task = problem.sample_task(task_key, None)
    params = problem.init(init_key, task)
    assert problem.collect is not None
    return params, problem.collect(params, task, None, key, STEP), key


def test_the_columns_are_what_their_names_say():
    params, task, key = drawn()
    seen = np.asarray(PROBLEM.observe(params, task, None, key, jnp.int32(3))).reshape(ROLLOUTS, HORIZON, FEATURES)
    states, actions, rewards = (np.asarray(leaf) for leaf in jax.tree.leaves(task.samples))
    np.testing.assert_allclose(states[:, 1:], states[:, :-1] + 0.05 * np.clip(actions, -1, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rewards, -((states[:, 1:, 0] - task.goal[0]) ** 2), rtol=1e-5)
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    centred = (to_go - to_go.mean(axis=0)) * 4 / 3
    gain, offset, goal = (np.asarray(value) for value in (params["gain"], params["offset"], task.goal))
    mean = gain * (goal - states[:, :-1]) + offset
    std = np.exp(-0.5)
    log_prob = -0.5 * ((actions - mean) / std) ** 2 + 0.5 - 0.5 * np.log(2 * np.pi)
    expected = [
        states[:, :-1, 0] / 2.0,
        np.full((ROLLOUTS, HORIZON), task.goal[0]),
        np.full((ROLLOUTS, HORIZON), 3 / 4),
        rewards,
        centred / np.sqrt(np.mean(centred**2)),
        log_prob[..., 0],
        actions[..., 0],
        mean[..., 0],
        np.full((ROLLOUTS, HORIZON), std),
    ]
    for column, name in enumerate(model_free.FEATURES):
        np.testing.assert_allclose(seen[..., column], expected[column], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_gradient_goes_through_the_policy_s_outputs_alone():
    params, task, key = drawn()
    slopes = jax.jacobian(lambda p: PROBLEM.observe(p, task, None, key, STEP))(params)
    for column, name in enumerate(model_free.FEATURES):
        live = any(np.any(np.asarray(leaf)[:, column] != 0) for leaf in jax.tree.leaves(slopes))
        assert live == (name in ("log_prob", "std", "mean")), name
    assert PROBLEM.collect is not None
    collect = PROBLEM.collect
    through = jax.jacobian(lambda p: collect(p, task, None, key, STEP).samples.actions)(params)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(through))


def test_the_plain_loss_is_minus_the_return_and_its_gradient_the_policy_gradient():
    params, task, key = drawn()
    assert PROBLEM.plain_loss is not None
    value, slope = jax.value_and_grad(PROBLEM.plain_loss)(params, task, None, key, STEP)
    samples = task.samples
    np.testing.assert_allclose(value, -np.mean(np.sum(samples.rewards, axis=1)), rtol=1e-5)
    advantage = model_free.advantages(model_free.returns_to_go(samples.rewards, 1.0))
    gain, offset, goal = (np.asarray(value) for value in (params["gain"], params["offset"], task.goal))
    mean = gain * (goal - np.asarray(samples.states[:, :-1])) + offset
    # d log p / d offset = (action - mean) / std^2.
    score = (np.asarray(samples.actions) - mean)[..., 0] / np.exp(-1.0)
    np.testing.assert_allclose(slope["offset"][0], -np.mean(advantage * score), rtol=1e-4)


def test_the_policy_gradient_is_that_of_the_expected_return():
    # One step from 0 to the goal 0.6 without clipping: E[R] = -E[(0.05 a - 0.6)^2], a ~ N(m, s^2), so that
    # dE[R]/dm = -2 (0.05 m - 0.6) 0.05. advantages divides by their deviation, which the test multiplies back.
    params = {"gain": jnp.zeros(1), "offset": jnp.array([0.2]), "log_std": jnp.array([-3.0])}
    problem = make(horizon=1, rollouts=20000, sample_start=lambda key: jnp.zeros(1), sample_goal=lambda key: GOAL)
    assert problem.collect is not None
    assert problem.plain_loss is not None
    task = problem.collect(params, problem.sample_task(toys.KEY, None), None, toys.KEY, STEP)
    slope = jax.grad(problem.plain_loss)(params, task, None, toys.KEY, STEP)["offset"][0]
    spread = np.std(task.samples.rewards)
    np.testing.assert_allclose(-slope * spread, 2 * (0.6 - 0.05 * 0.2) * 0.05, rtol=0.03)


def test_returns_to_go_by_hand():
    np.testing.assert_allclose(model_free.returns_to_go(jnp.array([[1.0, 2.0, 4.0]]), 0.5), [[3.0, 4.0, 4.0]])


def test_a_single_trajectory_keeps_its_return():
    np.testing.assert_allclose(model_free.advantages(jnp.array([[1.0, 2.0]])), [[1.0, 2.0]])


def test_advantages_may_be_over_staying_where_it_is():
    made = make(rest_baseline=True, discount=0.9)
    params, task, key = drawn(made)
    seen = np.asarray(made.observe(params, task, None, key, STEP)).reshape(ROLLOUTS, HORIZON, FEATURES)
    states, rewards = np.asarray(task.samples.states), np.asarray(task.samples.rewards)
    over = np.zeros((ROLLOUTS, HORIZON))
    for time in range(HORIZON):
        discounts = 0.9 ** np.arange(HORIZON - time)
        stays = -((states[:, time] - np.asarray(task.goal)) ** 2).sum(axis=-1)
        over[:, time] = (discounts * (rewards[:, time:] - stays[:, None])).sum(axis=1)
    centred = (over - over.mean(axis=0)) * 4 / 3
    expected = centred / np.sqrt(np.mean(centred**2))
    np.testing.assert_allclose(seen[..., model_free.FEATURES.index("return_to_go")], expected, rtol=1e-3, atol=1e-4)


def test_over_staying_where_it_is_the_policy_gradient_is_the_same_and_varies_less():
    # Starts and goals that differ are what it takes away; horizon 1 makes a return the reward of one step.
    def slopes(rest_baseline: bool):
        made = make(rest_baseline=rest_baseline, horizon=1, sample_start=lambda key: jax.random.normal(key, (1,)))
        assert made.plain_loss is not None
        params, task, _ = drawn(made)
        plain_loss = made.plain_loss

        def one(key: jax.Array) -> jax.Array:
            assert made.collect is not None
            data = made.collect(params, task, None, key, STEP)
            to_go = model_free.returns_to_go(data.samples.rewards, 1.0)
            if rest_baseline:
                to_go += (data.samples.states[:, :1, 0] - task.goal[0]) ** 2
            # advantages divides by their deviation, another number for each of the two.
            deviation = jnp.sqrt(jnp.mean(((to_go - to_go.mean(axis=0, keepdims=True)) * 4 / 3) ** 2))
            return deviation * jax.grad(plain_loss)(params, data, None, key, STEP)["offset"][0]

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(toys.KEY, 20_000)))

    without, over = slopes(False), slopes(True)
    error = np.hypot(without.std(), over.std()) / np.sqrt(20_000)
    np.testing.assert_allclose(over.mean(), without.mean(), atol=4 * error)
    assert over.std() < 0.5 * without.std()


def test_shared_samples_are_judged_by_the_policy_gradient_s_loss():
    shared = make(share_samples=True)
    params, task, key = drawn(shared)
    assert shared.collected_loss is not None
    assert shared.plain_loss is not None
    judged = jax.value_and_grad(shared.collected_loss)(params, task, None)
    descended = jax.value_and_grad(shared.plain_loss)(params, task, None, key, STEP)
    jax.tree.map(np.testing.assert_array_equal, judged, descended)
    assert make().collected_loss is None
    assert make(share_samples=True, extra_loss=lambda act, extra: jnp.zeros(())).collected_loss is None


def test_log_prob_is_that_of_all_actions_that_were_drawn():
    params, task, key = drawn()
    assert PROBLEM.log_prob is not None
    seen = PROBLEM.observe(params, task, None, key, STEP)
    column = model_free.FEATURES.index("log_prob")
    np.testing.assert_allclose(PROBLEM.log_prob(params, task, None, key, STEP), np.sum(seen[:, column]), rtol=1e-5)


def test_with_extra_the_task_loss_clones_and_nothing_else_sees_it():
    def clone(act, extra: jax.Array) -> jax.Array:
        return jnp.mean((act(jnp.zeros(1))[0] - extra) ** 2)

    problem = make(extra=lambda goal: 2.0 * goal, extra_loss=clone)
    params, task, key = drawn(problem)
    mean = params["gain"] * task.goal + params["offset"]
    np.testing.assert_allclose(problem.task_loss(params, task, None, key), (mean - 2 * task.goal)[0] ** 2, rtol=1e-5)
    blind = task.replace(extra=jnp.full(1, jnp.nan))
    for look in (problem.observe, problem.plain_loss, problem.log_prob):
        assert look is not None
        toys.assert_same(look(params, task, None, key, STEP), look(params, blind, None, key, STEP))


@pytest.mark.parametrize("collect_gradient", ["cut", "score"])
def test_every_leaf_of_a_learned_loss_has_a_meta_gradient(collect_gradient: str):
    learner = ml3_jax.make_meta_learner(
        PROBLEM,
        ml3_jax.losses.mlp((5,), "tanh", bias=True),
        inner_optimizer=optax.sgd(0.1),
        meta_optimizer=optax.sgd(1.0),
        num_tasks=4,
        inner_steps=2,
        collect_gradient=collect_gradient,
    )
    state = learner.init(toys.KEY)
    after, metrics = learner.step(state)
    assert np.isfinite(metrics.task_loss)
    for before, now in zip(jax.tree.leaves(state.loss_params), jax.tree.leaves(after.loss_params), strict=True):
        assert np.all(np.isfinite(now))
        assert np.any(before != now)


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_an_unscaled_task_loss_has_the_gradient_of_its_expected_value(discount: float):
    problem = make(rollouts=20000, discount=discount, rest_baseline=True, scaled_task_loss=False)
    params, task, key = drawn(problem)
    # The noise of actions follows from the key alone: differences of values are of one and the same noise.
    value, slope = jax.value_and_grad(problem.task_loss)(params, task, None, key)
    assert value > 0
    for name in params:
        ahead, behind = (problem.task_loss({**params, name: params[name] + h}, task, None, key) for h in (0.02, -0.02))
        np.testing.assert_allclose(slope[name][0], (ahead - behind) / 0.04, rtol=0.1, atol=0.003, err_msg=name)


def test_with_the_score_function_the_meta_gradient_is_that_of_the_expected_return():
    problem = make(
        horizon=2,
        rollouts=2,
        sample_goal=lambda key: GOAL,
        sample_start=lambda key: jnp.zeros(1),
        scaled_task_loss=False,
        features=("return_to_go", "log_prob"),
    )

    def apply(weight: jax.Array, features: jax.Array) -> jax.Array:
        advantage, log_prob = features.T
        return -weight * jnp.mean(advantage * log_prob)

    def meta_step(collect_gradient: str, weight: float) -> tuple[float, float]:
        """(task loss, its meta-gradient) over 40,000 tasks."""
        learner = ml3_jax.make_meta_learner(
            problem,
            ml3_jax.LearnedLoss(lambda key, features: jnp.array(weight), apply),
            inner_optimizer=optax.sgd(1.0),
            meta_optimizer=optax.sgd(1.0),
            num_tasks=40000,
            inner_steps=3,
            collect_gradient=collect_gradient,
        )
        state = learner.init(toys.KEY)
        after, metrics = learner.step(state)
        return float(metrics.task_loss), float(state.loss_params - after.loss_params)

    ahead, behind = (meta_step("cut", 0.3 + h)[0] for h in (0.05, -0.05))
    exact = (ahead - behind) / 0.1  # of one and the same noise
    np.testing.assert_allclose(meta_step("score", 0.3)[1], exact, rtol=0.1)
    assert abs(meta_step("cut", 0.3)[1] / exact - 1.0) > 0.25  # the bias of the default


def test_evaluate_reports_return_and_what_was_asked_for():
    params, task, key = drawn()
    values = PROBLEM.evaluate(params, task, None, key)
    assert set(values) == {"return", "distance"}
    assert values["return"] < 0 < values["distance"]
    assert PROBLEM.samples_per_step == HORIZON * ROLLOUTS


def test_an_evaluation_is_of_the_mean_actions():
    params, task, key = drawn()
    wild = {**params, "log_std": jnp.array([3.0])}
    toys.assert_same(PROBLEM.evaluate(params, task, None, key), PROBLEM.evaluate(wild, task, None, key))


def test_each_task_has_the_system_of_its_own_dynamics():
    problem = make(Line, sample_dynamics=lambda key: jax.random.uniform(key, minval=0.2, maxval=0.4))
    tasks = jax.vmap(problem.sample_task, (0, None))(jax.random.split(toys.KEY, 3), None)
    assert len(set(np.asarray(tasks.dynamics).tolist())) == 3
    assert problem.collect is not None
    params = POLICY.init(toys.KEY)
    data = jax.vmap(problem.collect, (None, 0, None, None, None))(params, tasks, None, toys.KEY, STEP)
    states = np.asarray(data.samples.states)
    moved = states[:, :, 1:] - states[:, :, :-1]
    pushed = 0.5 * np.clip(np.asarray(data.samples.actions), -1, 1)
    wanted = np.asarray(tasks.dynamics)[:, None, None, None] * pushed
    np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=1e-6)


def test_bad_input_is_refused():
    for options, words in (
        ({"horizon": 0}, "horizon: expected at least 1, got 0"),
        ({"rollouts": 0}, "rollouts: expected at least 1, got 0"),
        ({"discount": 1.5}, r"discount: expected a number in \(0, 1\], got 1.5"),
        ({"features": ("state", "speed")}, "features: expected some of state, goal"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    wide = POLICY._replace(apply=lambda params, x, goal: (jnp.zeros(2), jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"policy: expected a mean of shape \(1,\), the action of line, got \(2,\)"):
        make(policy=wide)
    task = PROBLEM.sample_task(toys.KEY, None)
    with pytest.raises(ValueError, match="collect comes before observe"):
        PROBLEM.observe(PROBLEM.init(toys.KEY, task), task, None, toys.KEY, STEP)
