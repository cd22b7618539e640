"""Model-free control of a point on a line, with returns and policy gradient derived by hand."""

import dataclasses
import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import ml3_jax
from ml3_jax.problems import model_free, policy_gradient
from tests.ml3_jax import toys

HORIZON, ROLLOUTS = 3, 4
GOAL = jnp.array([0.6])


class Point(struct.PyTreeNode):
    """An environment's state."""

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


TASKS = model_free.Tasks(
    sample_start=lambda key: 0.1 * jax.random.normal(key, (1,)),
    sample_goal=lambda key: GOAL + 0.1 * jax.random.normal(key, (1,)),
    reward=lambda x, action, following, goal: -jnp.sum((following - goal) ** 2),
    evaluate=lambda states, goal: {"distance": jnp.abs(states[-1] - goal)[0]},
)
FIXED = dataclasses.replace(TASKS, sample_start=lambda key: jnp.zeros(1), sample_goal=lambda key: GOAL)
SAMPLING = model_free.Sampling(horizon=HORIZON, rollouts=ROLLOUTS)
RETURN = model_free.FEATURES.index("return_to_go")


def make(system: Any = LINE, policy: Any = POLICY, tasks: Any = TASKS, sampling: Any = SAMPLING, **options: Any):
    options = {"inputs": lambda x, goal: x / 2.0, **options}
    return model_free.make_problem(system, policy, tasks, sampling, **options)


PROBLEM = make()
FEATURES = len(model_free.FEATURES)  # one column each here
STEP = jnp.zeros((), jnp.int32)


@functools.cache
def drawn(problem: ml3_jax.Problem = PROBLEM):
    """(an optimizee, a task with the samples of its first inner step, a key)."""

    @jax.jit
    def draw(key: jax.Array):
        task_key, init_key, key = jax.random.split(key, 3)
        task = problem.sample_task(task_key, None)
        params = problem.init(init_key, task)
        assert problem.collect is not None
        return params, problem.collect(params, task, None, key, STEP), key

    return draw(toys.KEY)


def test_each_column_is_the_feature_of_its_name():
    params, task, key = drawn()
    seen = np.asarray(jax.jit(PROBLEM.observe)(params, task, None, key, jnp.int32(3))).reshape(ROLLOUTS, HORIZON, FEATURES)
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


def test_more_features_are_the_next_state_the_time_and_advantages_of_other_discounts():
    sampling = dataclasses.replace(SAMPLING, credit_discounts=(0.5, 1.0))
    problem = make(sampling=sampling, features=("next_state", "time", "credits", "return_to_go"), trajectories=True)
    params, task, key = drawn()
    seen = np.asarray(jax.jit(problem.observe)(params, task, None, key, STEP))
    assert seen.shape == (ROLLOUTS, HORIZON, 5)
    samples = task.samples
    np.testing.assert_allclose(seen[..., 0], samples.states[:, 1:, 0] / 2.0, rtol=1e-6)
    np.testing.assert_allclose(seen[..., 1], np.broadcast_to([0, 1 / 3, 2 / 3], (ROLLOUTS, HORIZON)), rtol=1e-6)
    halved = policy_gradient.advantages(policy_gradient.returns_to_go(samples.rewards, 0.5))
    np.testing.assert_allclose(seen[..., 2], halved, rtol=1e-5)
    np.testing.assert_allclose(seen[..., 3], seen[..., 4], rtol=1e-6)


def test_a_hidden_goal_reaches_the_policy_and_the_features_by_the_rewards_alone():
    tasks = dataclasses.replace(TASKS, hidden_goal=True)
    problem = make(tasks=tasks, inputs=lambda x, goal: x + goal, features=("state", "reward", "mean"))
    params, task, key = drawn()
    seen = np.asarray(jax.jit(problem.observe)(params, task, None, key, STEP))
    elsewhere = task.replace(goal=task.goal + 5.0)
    np.testing.assert_array_equal(jax.jit(problem.observe)(params, elsewhere, None, key, STEP), seen)
    assert problem.collect is not None
    collect = jax.jit(problem.collect)
    here, there = (collect(params, one, None, key, STEP).samples for one in (task, elsewhere))
    np.testing.assert_array_equal(here.actions, there.actions)
    assert np.all(here.rewards != there.rewards)
    visible = drawn()[1].samples
    assert np.any(visible.actions != here.actions)


def test_features_of_a_hidden_goal_are_refused_by_name_and_left_out_by_default():
    tasks = dataclasses.replace(TASKS, hidden_goal=True)
    with pytest.raises(ValueError, match=r'tasks\.hidden_goal hides, got "goal": leave it out'):
        make(tasks=tasks, features=("state", "goal"))
    params, task, key = drawn()
    assert jax.eval_shape(make(tasks=tasks).observe, params, task, None, key, STEP).shape[-1] == FEATURES - 1


@pytest.mark.parametrize("discounts", [(0.5, 1.1), (0.0,)])
def test_credit_discounts_outside_0_to_1_are_refused(discounts: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"credit_discounts: expected a number in \(0, 1\]"):
        make(sampling=dataclasses.replace(SAMPLING, credit_discounts=discounts))


def test_the_gradient_goes_through_the_policy_s_outputs_alone():
    params, task, key = drawn()
    assert PROBLEM.collect is not None
    collect = PROBLEM.collect

    def seen_and_sampled(params: Any) -> Any:
        samples = collect(params, task, None, key, STEP).samples
        return PROBLEM.observe(params, task, None, key, STEP), samples.actions

    slopes, through = jax.jit(jax.jacobian(seen_and_sampled))(params)
    for column, name in enumerate(model_free.FEATURES):
        live = any(np.any(np.asarray(leaf)[:, column] != 0) for leaf in jax.tree.leaves(slopes))
        assert live == (name in ("log_prob", "std", "mean")), name
    chex.assert_trees_all_equal(through, jax.tree.map(jnp.zeros_like, through))


def test_the_plain_loss_is_minus_the_return_and_its_gradient_the_policy_gradient():
    params, task, key = drawn()
    assert PROBLEM.plain_loss is not None
    value, slope = jax.jit(jax.value_and_grad(PROBLEM.plain_loss))(params, task, None, key, STEP)
    samples = task.samples
    np.testing.assert_allclose(value, -np.mean(np.sum(samples.rewards, axis=1)), rtol=1e-5)
    advantage = policy_gradient.advantages(policy_gradient.returns_to_go(samples.rewards, 1.0))
    gain, offset, goal = (np.asarray(value) for value in (params["gain"], params["offset"], task.goal))
    mean = gain * (goal - np.asarray(samples.states[:, :-1])) + offset
    # d log p / d offset = (action - mean) / std^2.
    score = (np.asarray(samples.actions) - mean)[..., 0] / np.exp(-1.0)
    np.testing.assert_allclose(slope["offset"][0], -np.mean(advantage * score), rtol=1e-4)


def test_the_policy_gradient_is_that_of_the_expected_return():
    # One step from 0 to the goal 0.6 without clipping: E[R] = -E[(0.05 a - 0.6)^2], a ~ N(m, s^2), so that
    # dE[R]/dm = -2 (0.05 m - 0.6) 0.05. The advantages are divided by their scale; the test multiplies by it.
    params = {"gain": jnp.zeros(1), "offset": jnp.array([0.2]), "log_std": jnp.array([-3.0])}
    problem = make(tasks=FIXED, sampling=model_free.Sampling(horizon=1, rollouts=20000))

    @jax.jit
    def slope_and_scale(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert problem.collect is not None
        assert problem.plain_loss is not None
        task = problem.collect(params, problem.sample_task(key, None), None, key, STEP)
        slope = jax.grad(problem.plain_loss)(params, task, None, key, STEP)["offset"][0]
        return slope, jnp.std(task.samples.rewards)

    slope, scale = slope_and_scale(toys.KEY)
    np.testing.assert_allclose(-slope * scale, 2 * (0.6 - 0.05 * 0.2) * 0.05, rtol=0.03)


def test_returns_to_go_by_hand():
    np.testing.assert_allclose(policy_gradient.returns_to_go(jnp.array([[1.0, 2.0, 4.0]]), 0.5), [[3.0, 4.0, 4.0]])


def test_a_single_trajectory_keeps_its_return():
    returns = np.array([[1.0, 2.0]])
    for function in (policy_gradient.advantages, policy_gradient.centred_returns):
        np.testing.assert_allclose(function(jnp.asarray(returns)), returns)


def test_the_rest_return_baseline_is_the_return_of_staying_at_each_state():
    made = make(sampling=dataclasses.replace(SAMPLING, rest_return_baseline=True, discount=0.9))
    params, task, key = drawn(made)
    seen = np.asarray(jax.jit(made.observe)(params, task, None, key, STEP)).reshape(ROLLOUTS, HORIZON, FEATURES)
    states, rewards = np.asarray(task.samples.states), np.asarray(task.samples.rewards)
    over = np.zeros((ROLLOUTS, HORIZON))
    for time in range(HORIZON):
        discounts = 0.9 ** np.arange(HORIZON - time)
        stays = -((states[:, time] - np.asarray(task.goal)) ** 2).sum(axis=-1)
        over[:, time] = (discounts * (rewards[:, time:] - stays[:, None])).sum(axis=1)
    centred = (over - over.mean(axis=0)) * 4 / 3
    np.testing.assert_allclose(seen[..., RETURN], centred / np.sqrt(np.mean(centred**2)), rtol=1e-3, atol=1e-4)


def test_the_rest_return_baseline_keeps_the_policy_gradient_and_lowers_its_variance():
    # It removes the differences between starts and goals. With horizon 1, a return is the reward of one step.
    tasks = dataclasses.replace(TASKS, sample_start=lambda key: jax.random.normal(key, (1,)))
    problems = [
        make(tasks=tasks, sampling=model_free.Sampling(horizon=1, rollouts=ROLLOUTS, rest_return_baseline=rest))
        for rest in (False, True)
    ]
    params, task, _ = drawn(problems[0])

    def slopes(key: jax.Array) -> list[jax.Array]:
        assert problems[0].collect is not None
        data = problems[0].collect(params, task, None, key, STEP)
        found = []
        for rest, made in enumerate(problems):
            returns = data.samples.rewards + rest * (data.samples.states[:, :1, 0] - task.goal[0]) ** 2
            # The advantages are divided by their scale, another number for each of the two.
            scale = jnp.sqrt(jnp.mean(((returns - returns.mean(axis=0, keepdims=True)) * 4 / 3) ** 2))
            assert made.plain_loss is not None
            found.append(scale * jax.grad(made.plain_loss)(params, data, None, key, STEP)["offset"][0])
        return found

    without, over = (np.asarray(x) for x in jax.jit(jax.vmap(slopes))(jax.random.split(toys.KEY, 20_000)))
    error = np.hypot(without.std(), over.std()) / np.sqrt(20_000)
    np.testing.assert_allclose(over.mean(), without.mean(), atol=4 * error)
    assert over.std() < 0.5 * without.std()


def test_reused_rollouts_are_judged_by_the_loss_of_the_policy_gradient():
    reusing = make(task_loss=model_free.TaskLoss(reuse_rollouts=True))
    params, task, key = drawn()
    assert reusing.reused_rollout_loss is not None
    assert reusing.plain_loss is not None
    judged = jax.jit(jax.value_and_grad(reusing.reused_rollout_loss))(params, task, None)
    chex.assert_trees_all_equal(judged, jax.jit(jax.value_and_grad(reusing.plain_loss))(params, task, None, key, STEP))
    assert PROBLEM.reused_rollout_loss is None
    cloning = model_free.TaskLoss(reuse_rollouts=True, extra_loss=lambda act, extra: jnp.zeros(()))
    assert make(task_loss=cloning).reused_rollout_loss is None


def test_log_prob_is_the_sum_over_all_sampled_actions():
    params, task, key = drawn()
    assert PROBLEM.log_prob is not None
    seen = jax.jit(PROBLEM.observe)(params, task, None, key, STEP)
    expected = np.sum(seen[:, model_free.FEATURES.index("log_prob")])
    np.testing.assert_allclose(jax.jit(PROBLEM.log_prob)(params, task, None, key, STEP), expected, rtol=1e-5)


def test_with_extra_the_task_loss_clones_and_nothing_else_sees_it():
    def clone(act, extra: jax.Array) -> jax.Array:
        return jnp.mean((act(jnp.zeros(1))[0] - extra) ** 2)

    tasks = dataclasses.replace(TASKS, extra=lambda goal: 2.0 * goal)
    problem = make(tasks=tasks, task_loss=model_free.TaskLoss(extra_loss=clone))
    params, task, key = drawn(problem)
    mean = params["gain"] * task.goal + params["offset"]
    np.testing.assert_allclose(problem.task_loss(params, task, None, key), (mean - 2 * task.goal)[0] ** 2, rtol=1e-5)

    @jax.jit
    def look(task: model_free.SamplingTask) -> Any:
        looks = (problem.observe, problem.plain_loss, problem.log_prob)
        return [look(params, task, None, key, STEP) for look in looks if look is not None]

    toys.assert_same(look(task), look(task.replace(extra=jnp.full(1, jnp.nan))))


def test_every_leaf_of_a_learned_loss_has_a_meta_gradient():
    loss = ml3_jax.losses.mlp((3,), "tanh", bias=True)
    learner = toys.learner(PROBLEM, loss, meta_optimizer=optax.sgd(1.0), num_tasks=2, inner_steps=2)
    state = learner.init(toys.KEY)
    after, metrics = learner.step(state)
    assert np.isfinite(metrics.task_loss)
    chex.assert_tree_all_finite(after.loss_params)
    moved = jax.tree.map(lambda before, now: bool(jnp.any(before != now)), state.loss_params, after.loss_params)
    assert jax.tree.all(moved)


def test_an_unscaled_task_loss_has_the_gradient_of_its_expected_value():
    sampling = model_free.Sampling(horizon=HORIZON, rollouts=20000, discount=0.8, rest_return_baseline=True)
    problem = make(sampling=sampling, task_loss=model_free.TaskLoss(scaled=False))
    params, task, key = drawn()

    @jax.jit
    def value_slopes_and_differences(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return problem.task_loss(params, task, None, key)

        # The noise of actions depends on the key alone: both values of a difference have the same noise.
        steps = {name: {**jax.tree.map(jnp.zeros_like, params), name: jnp.full(1, 0.02)} for name in params}
        moved = [jax.tree.map(lambda p, h, s=sign: p + s * h, params, step) for step in steps.values() for sign in (1, -1)]
        values = jax.lax.map(loss, jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved))
        return jax.value_and_grad(loss)(params), dict(zip(params, (values[::2] - values[1::2]) / 0.04, strict=True))

    (value, slopes), differences = value_slopes_and_differences(params)
    assert value > 0
    for name in params:
        np.testing.assert_allclose(slopes[name][0], differences[name], rtol=0.1, atol=0.003, err_msg=name)


def test_with_the_score_function_the_meta_gradient_is_that_of_the_expected_return():
    sampling, task_loss = model_free.Sampling(horizon=2, rollouts=2), model_free.TaskLoss(scaled=False)
    problem = make(tasks=FIXED, sampling=sampling, task_loss=task_loss, features=("return_to_go", "log_prob"))

    def apply(weight: jax.Array, features: jax.Array) -> jax.Array:
        advantage, log_prob = features.T
        return -weight * jnp.mean(advantage * log_prob)

    def meta_steps(collect_gradient: str, weights: tuple[float, ...]) -> np.ndarray:
        """(task loss, its meta-gradient) of each weight, over 40,000 tasks."""
        learner = ml3_jax.make_meta_learner(
            problem,
            ml3_jax.LearnedLoss(lambda key, features: jnp.zeros(()), apply),
            inner_optimizer=optax.sgd(1.0),
            meta_optimizer=optax.sgd(1.0),
            num_tasks=40000,
            inner_steps=3,
            collect_gradient=collect_gradient,
        )
        start, found = learner.init(toys.KEY), []
        for weight in weights:
            after, metrics = learner.step(start.replace(loss_params=jnp.asarray(weight)))
            found.append((float(metrics.task_loss), weight - float(after.loss_params)))
        return np.asarray(found)

    cut = meta_steps("cut", (0.35, 0.25, 0.3))
    exact = (cut[0, 0] - cut[1, 0]) / 0.1  # both have the same noise
    np.testing.assert_allclose(meta_steps("score", (0.3,))[0, 1], exact, rtol=0.1)
    assert abs(cut[2, 1] / exact - 1.0) > 0.25  # the bias of "cut"


def test_an_evaluation_reports_the_return_and_metrics_of_the_mean_actions():
    params, task, key = drawn()
    evaluate = jax.jit(PROBLEM.evaluate)
    values = evaluate(params, task, None, key)
    assert set(values) == {"return", "distance"}
    assert values["return"] < 0 < values["distance"]
    toys.assert_same(values, evaluate({**params, "log_std": jnp.array([3.0])}, task, None, key))
    assert PROBLEM.samples_per_step == HORIZON * ROLLOUTS


def test_each_task_has_the_system_of_its_own_dynamics():
    tasks = dataclasses.replace(TASKS, sample_dynamics=lambda key: jax.random.uniform(key, minval=0.2, maxval=0.4))
    problem = make(Line, tasks=tasks)

    @jax.jit
    @jax.vmap
    def collected(key: jax.Array) -> model_free.SamplingTask:
        assert problem.collect is not None
        return problem.collect(POLICY.init(toys.KEY), problem.sample_task(key, None), None, toys.KEY, STEP)

    data = collected(jax.random.split(toys.KEY, 3))
    assert len(set(np.asarray(data.dynamics).tolist())) == 3
    states = np.asarray(data.samples.states)
    moved = states[:, :, 1:] - states[:, :, :-1]
    pushed = 0.5 * np.clip(np.asarray(data.samples.actions), -1, 1)
    wanted = np.asarray(data.dynamics)[:, None, None, None] * pushed
    np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=1e-6)


def test_a_task_of_demonstrations_is_a_goal_with_its_own_extra():
    context = model_free.Demonstrations(jnp.arange(5.0)[:, None], {"actions": 10 * jnp.arange(5.0)})
    tasks = jax.vmap(PROBLEM.sample_task, (0, None))(jax.random.split(toys.KEY, 20), context)
    np.testing.assert_array_equal(tasks.extra["actions"], 10 * tasks.goal[:, 0])
    assert len(set(np.asarray(tasks.goal[:, 0]).tolist())) > 1


def test_the_keywords_of_version_0_2_make_the_same_problem_and_warn():
    def flat(**options: Any) -> ml3_jax.Problem:
        make_problem = cast(Any, model_free.make_problem)  # its type has the new keywords alone
        return make_problem(LINE, POLICY, **vars(TASKS), horizon=HORIZON, rollouts=ROLLOUTS, **options)

    params, task, _ = drawn()
    with pytest.warns(
        DeprecationWarning, match=r"\) is called (rest_return_baseline|reuse_rollouts|scaled|tasks|sampling|task_loss)="
    ):
        old = flat(share_samples=True, rest_baseline=True, scaled_task_loss=False, discount=0.9)
    new = make(
        sampling=dataclasses.replace(SAMPLING, discount=0.9, rest_return_baseline=True),
        task_loss=model_free.TaskLoss(scaled=False, reuse_rollouts=True),
    )
    assert old.reused_rollout_loss is not None
    assert new.reused_rollout_loss is not None
    toys.assert_same(old.reused_rollout_loss(params, task, None), new.reused_rollout_loss(params, task, None))
    with pytest.raises(TypeError, match="expected share_samples= or reuse_rollouts=, got both"):
        flat(share_samples=True, reuse_rollouts=True)


def test_bad_input_is_refused():
    for options, words in (
        ({"horizon": 0}, "horizon: expected a whole number of at least 1, got 0"),
        ({"rollouts": 0}, "rollouts: expected a whole number of at least 1, got 0"),
        ({"discount": 1.5}, r"discount: expected a number in \(0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            make(sampling=dataclasses.replace(SAMPLING, **options))
    with pytest.raises(ValueError, match="features: expected some of state, goal"):
        make(features=("state", "speed"))
    wide = POLICY._replace(apply=lambda params, x, goal: (jnp.zeros(2), jnp.zeros(2)))
    with pytest.raises(ValueError, match=r"policy: expected a mean of shape \(1,\), the action of line, got \(2,\)"):
        make(policy=wide)
    task = PROBLEM.sample_task(toys.KEY, None)
    with pytest.raises(ValueError, match="call collect before observe"):
        PROBLEM.observe(PROBLEM.init(toys.KEY, task), task, None, toys.KEY, STEP)
