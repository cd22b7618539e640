"""The model-free experiments: what they count, what they refuse, which systems and policies they are tested on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from envs.reacher import Reacher
from launch import experiments, meta_test, meta_train
from launch.errors import UsageError
from launch.evaluation import evaluate, ppo
from launch.experiment import Reference, Trained
from launch.experiments.model_free import common, context_policy, figures, reacher, reacher_expert, trajectory_optimization
from launch.experiments.model_free import scenarios as family
from launch.runs import single_run
from ml3_jax.problems import policy_gradient

HIDDEN = {"num_tasks": 2, "hidden": (4,), "policy_hidden": (4,), "rollouts": 2, "inner_steps": 2, "unroll": 2}
SMALL = {**HIDDEN, "goal": "visible"}
EXPERT = {**SMALL, "expert_goals": 2, "expert_starts": 1}
PAPER, PULL = ({**HIDDEN, "loss": loss} for loss in ("paper", "summary_pull"))
EITHER = pytest.mark.parametrize(("name", "small"), [("reacher_mfrl", SMALL), ("reacher_expert", EXPERT)])


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("reacher_mfrl", SMALL),
        ("reacher_expert", EXPERT),
        *(("reacher_mfrl", {**HIDDEN, "loss": loss}) for loss in common.LOSSES),
    ],
)
def test_a_meta_step_moves_every_leaf_of_the_loss(name: str, small: dict):
    experiment = experiments.build(name, small)
    state = experiment.meta.init(jax.random.key(0), experiment.context)
    after, metrics = experiment.meta.step(state)
    assert np.isfinite(metrics.task_loss)
    assert metrics.meta_grad_norm > 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.loss_params, after.loss_params)
    still = [jax.tree_util.keystr(path) for path, moves in jax.tree.leaves_with_path(moved) if not moves]
    # A constant added to a loss moves nothing.
    assert still == (["['loss']['params']['Dense_1']['bias']"] if small.get("loss") == "paper" else [])


def test_env_steps_count_what_the_inner_steps_and_the_task_losses_sample():
    # 2 tasks, 2 rollouts of 50 steps, 2 inner steps and (for a mean objective) 2 task losses a meta-step, and the targets'.
    experiment = experiments.build("reacher_mfrl", SMALL)
    assert common.env_steps(experiment, 3) == 3 * 2 * 100 * 5
    without = experiments.build("reacher_mfrl", {**SMALL, "target_weight": 0.0})
    assert common.env_steps(without, 3) == 3 * 2 * 100 * 4
    last = experiments.build("reacher_mfrl", {**SMALL, "objective": "last"})
    assert common.env_steps(last, 3) == 3 * 2 * 100 * 4
    # Where an update is judged by what the next one learns from, one more is all that the task losses take.
    shared = experiments.build("reacher_mfrl", {**SMALL, "reuse_rollouts": True})
    assert common.env_steps(shared, 3) == 3 * 2 * 100 * 4
    # An expert's actions are compared with, and nothing is sampled for it.
    assert common.env_steps(experiments.build("reacher_expert", EXPERT), 3) == 3 * 2 * 100 * 2


def test_the_reward_is_the_papers_form_in_links():
    experiment = experiments.build("reacher_mfrl", SMALL)
    env = reacher.make_env(experiment.config)
    reward = reacher.reward(experiment.config, env)
    x = jnp.zeros(4)  # the tip is at (0.2, 0)
    value = reward(x, jnp.array([0.5, -3.0]), x, jnp.array([0.2, 0.05]))  # half a link away; the second action is clipped to 1
    np.testing.assert_allclose(value, -0.5 + 0.1 / (0.5 + 0.1) - 0.01 * 1.5, rtol=1e-5)


def test_policies_start_at_their_deviation_and_keep_the_least():
    config = experiments.build("reacher_mfrl", SMALL).config
    env = reacher.make_env(config)
    policy = common.make_policy(reacher.ROBOT, config, env)
    params = policy.init(jax.random.key(0))
    x, goal = jnp.zeros(4), jnp.zeros(2)
    np.testing.assert_allclose(np.exp(policy.apply(params, x, goal)[1]), 0.5, rtol=1e-5)
    quiet = {**params, "log_std": jnp.full(2, -30.0)}
    np.testing.assert_allclose(np.exp(policy.apply(quiet, x, goal)[1]), 0.2, rtol=1e-5)


def test_scenarios_are_other_goals_motors_and_policies():
    experiment = experiments.build("reacher_mfrl", SMALL)
    scenarios = experiments.find("reacher_mfrl").scenarios(experiment)
    assert set(scenarios) == {"", "shifted", "shifted_goals", "mjx", *reacher.POLICIES}
    key = jax.random.key(2)
    gears = np.asarray(scenarios["shifted"].draw_tasks(key, 200).dynamics)
    assert gears.min() >= 200 / 3
    assert gears.max() <= 600
    np.testing.assert_allclose(np.log(gears).mean(), np.log(200), atol=0.1)
    near, far = (np.asarray(scenarios[name].draw_tasks(key, 200).goal) for name in ("", "shifted_goals"))
    assert np.linalg.norm(far - [0.2, 0], axis=1).min() > 0.02
    assert np.linalg.norm(far - [0.2, 0], axis=1).mean() > 1.5 * np.linalg.norm(near - [0.2, 0], axis=1).mean()
    task = jax.tree.map(lambda leaf: leaf[0], scenarios["policy_4x256_relu"].draw_tasks(key, 1))
    layers = scenarios["policy_4x256_relu"].problem.init(key, task)["mean"]["params"]
    assert [layers[f"Dense_{i}"]["kernel"].shape[1] for i in range(5)] == [256, 256, 256, 256, 2]


def test_the_ants_other_goals_lie_farther_out():
    experiment = experiments.build("ant_mfrl", SMALL)
    scenarios = experiments.find("ant_mfrl").scenarios(experiment)
    assert scenarios[""].problem is scenarios["shifted_goals"].problem  # compiled once
    assert scenarios["shifted_goals"].on_request  # the default fits into a quarter of an hour
    for name, radius in (("", 2.0), ("shifted_goals", 3.0)):
        draw_goals = jax.jit(lambda key, scenario=scenarios[name]: scenario.draw_tasks(key, 20).goal)
        goals = np.asarray(draw_goals(jax.random.key(2)))
        np.testing.assert_allclose(np.linalg.norm(goals, axis=1), radius, rtol=1e-5)
        assert np.ptp(np.arctan2(goals[:, 1], goals[:, 0])) > 3.0


def test_an_expert_ends_at_its_goal_and_follows_the_system():
    env = reacher.make_env(experiments.build("reacher_mfrl", SMALL).config)
    reward = reacher.reward(experiments.build("reacher_mfrl").config, env)
    goal = env.sample_goal(jax.random.key(5))
    start = env.sample_start(jax.random.key(6))
    found = jax.jit(lambda key: trajectory_optimization.optimise(env, reward, start, goal, key, horizon=50))(jax.random.key(7))
    np.testing.assert_allclose(found.states[0], start)
    after = jax.vmap(env.dynamics)(found.states, env.action_limit * found.actions)
    np.testing.assert_allclose(found.states[1:], after[:-1], rtol=1e-5, atol=1e-5)
    assert env.distance(after[-1], goal) < 0.01
    rewards = jax.vmap(reward, (0, 0, 0, None))(found.states, found.actions, after, goal)
    np.testing.assert_allclose(found.total, np.sum(rewards), rtol=1e-4, atol=1e-3)


def test_the_expert_task_loss_is_the_distance_to_its_actions():
    experiment = experiments.build("reacher_expert", EXPERT)
    problem, context, key = experiment.problem, experiment.context, jax.random.key(1)
    task = problem.sample_task(key, context)
    assert any(np.all(np.asarray(task.goal) == goal) for goal in np.asarray(context.goals))
    params = problem.init(key, task)
    policy = common.make_policy(reacher.ROBOT, experiment.config, reacher.make_env(experiment.config))
    states, actions = (np.asarray(leaf).reshape(50, -1) for leaf in (task.extra.states, task.extra.actions))
    mean = np.asarray(jax.vmap(lambda x: policy.apply(params, x, task.goal)[0])(states))
    np.testing.assert_allclose(
        problem.task_loss(params, task, context, key), np.mean(np.sum((mean - actions) ** 2, -1)), rtol=1e-5
    )
    without = experiments.build("reacher_expert", {**EXPERT, "extra": False})
    assert without.context is None
    assert without.problem.sample_task(key, None).extra is None


@EITHER
def test_targets_are_worth_what_the_policy_that_acts_on_them_is(name: str, small: dict):
    experiment = experiments.build(name, {**small, "hidden": (), "target_scale": 1.0, "target_weight": 0.5})
    problem, context, key = experiment.problem, experiment.context, jax.random.key(3)
    task = problem.sample_task(key, context)
    # A policy of the same inputs without a hidden layer; beside them the loss sees updates, k / (k + 1), which end at 1.
    config = dataclasses.replace(experiment.config, policy_hidden=(), policy_std=experiment.config.target_std)
    env = reacher.make_env(config)
    policy_problem = common.make_problem(
        reacher.ROBOT, config, env, extra_loss=None if context is None else reacher_expert.clone
    )
    params = policy_problem.init(key, task)
    dense = params["mean"]["params"]["Dense_0"]
    loss_params = experiment.meta.init(key, context).loss_params
    loss_params = jax.tree.map(jnp.zeros_like, loss_params)
    kernel = loss_params["params"]["Dense_0"]["kernel"].at[: env.observation_size + 4, :2].set(dense["kernel"])
    bias = loss_params["params"]["Dense_0"]["bias"].at[:2].set(dense["bias"] - 0.25)
    loss_params = {"params": {"Dense_0": {"kernel": kernel.at[-1, :2].set(0.25), "bias": bias}}}
    worth = common.target_return(reacher.ROBOT, config, env, reacher_expert.clone if context is not None else None)
    run_key = jax.random.key(4)
    np.testing.assert_allclose(
        worth(loss_params, task, context, run_key),
        0.5 * policy_problem.task_loss(params, task, context, run_key),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rollouts": 0}, "'rollouts' must be at least 1, got 0"),
        ({"physics": "spring"}, "closed_form"),
        ({"policy_std": 0.1}, r"policy_std: expected more than policy_least_std = 0\.2, got 0\.1"),
        ({"goal_range": 3.5}, "goal_range: expected at most"),
        ({"target_weight": 1.0, "loss": "paper"}, "'target_weight' must be 0 unless loss is \"guided\", got 1.0"),
        ({"target_weight": -1.0}, r"'target_weight' must be at least 0, got -1\.0"),
        ({"target_std": 0.0}, "'target_std' must be above 0"),
        ({"discount": 1.5}, r"'discount' must be at most 1, got 1\.5"),
        ({"collect_gradient": "scor"}, "did you mean 'score'"),
    ],
)
def test_bad_input_is_refused_before_any_training(overrides: dict, words: str):
    with pytest.raises(UsageError, match=words):
        experiments.build("reacher_mfrl", {**SMALL, **overrides})


def test_goals_farther_out_end_where_joints_can_turn():
    wide = experiments.build("reacher_mfrl", {**SMALL, "goal_range": 2.5})
    assert {"", "shifted_goals"} <= set(reacher.scenarios(wide))
    widest = experiments.build("reacher_mfrl", {**SMALL, "goal_range": 3.0})
    assert "shifted_goals" not in reacher.scenarios(widest)


def test_the_score_function_s_task_loss_is_not_scaled():
    # The gradient of the first is of size 1 or so, that of the second as the returns are.
    norms = []
    for collect_gradient in ("cut", "score"):
        problem = experiments.build("reacher_mfrl", {**SMALL, "collect_gradient": collect_gradient}).problem
        task, key = problem.sample_task(jax.random.key(0), None), jax.random.key(1)
        gradient = jax.grad(problem.task_loss)(problem.init(key, task), task, None, key)
        norms.append(float(optax.tree.norm(gradient)))
    assert norms[1] > 10.0 * norms[0]


def test_rewards_that_are_not_finite_are_named():
    config = experiments.build("reacher_mfrl", SMALL).config
    broken = reacher.ROBOT._replace(objective=lambda config, env: lambda x, action, following, goal: jnp.log(-jnp.sum(x**2)))
    with pytest.raises(UsageError, match=r"expected finite numbers, got (nan|-inf) at step 0 of rollout 0"):
        common.definition("broken", "", reacher.ReacherConfig, broken, reacher.scenarios).build(config)


def test_the_full_size_yields_to_what_is_asked_for():
    for goal in common.GOALS:
        config = experiments.build("ant_mfrl", {"size": "full", "goal": goal, "num_tasks": 2}).config
        assert (config.rollouts, config.meta_steps, config.meta_lr) == (32, 2000, 1e-3)
    config = experiments.build("reacher_mfrl", {"size": "full", "num_tasks": 8}).config
    assert (config.rollouts, config.num_tasks, config.meta_steps) == (32, 8, 2000)
    assert experiments.build("reacher_mfrl").config.rollouts == 4
    # Set by hand wins, also where it is what the other size has.
    asked = experiments.build("reacher_mfrl", {"size": "full", "rollouts": 4, "num_tasks": 16}).config
    assert (asked.rollouts, asked.num_tasks, asked.meta_steps) == (4, 16, 2000)


def test_ppo_is_trained_on_the_system_of_each_task(tmp_path, monkeypatch):
    experiment = experiments.build("reacher_mfrl", SMALL)
    env = reacher.make_env(experiment.config)
    assert isinstance(env, Reacher)
    dynamics = {
        "sample_dynamics": lambda key: jax.random.uniform(key, (2,), minval=100.0, maxval=300.0),
        "system": env.with_gear,
    }
    settings = ppo.PPOSettings()
    scenario = family.scenario(reacher.ROBOT, experiment.config, env, "", dynamics=dynamics, ppo_settings=settings)
    given = []

    def kept(tasks, scenarios, folder, *, names, horizon, seed):
        given.append((tasks, names))
        return [ppo.Curve([0, 10 * (i + 1)], {"return": [0.0, i], "distance": [1.0, i]}, True) for i in range(len(tasks))]

    monkeypatch.setattr(ppo, "curves", kept)
    tasks = scenario.draw_tasks(jax.random.key(4), 3)
    assert scenario.reference is not None
    found = scenario.reference(tasks, tmp_path)
    (made, names), action = given[0], jnp.array([0.5, -0.5])
    for index, task in enumerate(made):
        state = task.reset(jax.random.key(1))
        system = env.with_gear(tasks.dynamics[index])
        wanted = system.dynamics(env.sample_start(jax.random.key(1)), env.action_limit * action)
        after = task.step(state, action).pipeline_state["inside"].obs
        np.testing.assert_allclose(after, wanted, rtol=1e-5)
        np.testing.assert_allclose(names[index]["task"]["dynamics"], tasks.dynamics[index])
    # On the evaluations of the longest run; one that ended earlier keeps its last value.
    assert found.env_steps == [0, 30]
    np.testing.assert_allclose(found.values["return"][:, -1], [0.0, 1.0, 2.0])
    few = dataclasses.replace(experiment.config, ppo_tasks=2)
    first = family.scenario(reacher.ROBOT, few, env, "", ppo_settings=settings).reference
    assert first is not None
    assert first(tasks.replace(dynamics=None), tmp_path).converged == [True, True]
    np.testing.assert_allclose([name["task"]["goal"] for name in given[1][1]], tasks.goal[:2], rtol=1e-6)


def test_goals_choose_the_loss_and_its_settings():
    chosen = {}
    for goal in common.GOALS:
        config = experiments.build("reacher_mfrl", {**HIDDEN, "goal": goal}).config
        chosen[goal] = config.loss, config.target_weight, config.meta_lr, config.inner_decay_steps
    assert chosen == {"hidden": ("summary_pull", 0.0, 1e-3, 30), "visible": ("guided", 10.0, 3e-3, 0)}
    assert experiments.build("reacher_mfrl", {**HIDDEN, "loss": "guided"}).config.target_weight == 10.0


@pytest.mark.parametrize(("name", "horizon"), [("reacher_mfrl", 50), ("ant_mfrl", 20)])
def test_hidden_goals_leave_no_trace_in_what_policy_and_loss_see(name: str, horizon: int):
    # Without its baseline at rest, which is a reward; a reward tells of the goal.
    experiment = experiments.build(name, {**PULL, "horizon": horizon, "rest_return_baseline": False})
    problem, key, step = experiment.problem, jax.random.key(0), jnp.zeros((), jnp.int32)
    collect = problem.collect
    assert collect is not None

    @jax.jit
    def seen(goal):
        task = problem.sample_task(key, None)
        params = problem.init(key, task)
        data = collect(params, task, None, key, step)
        moved = data.replace(goal=goal)
        return collect(params, moved, None, key, step).samples.actions, problem.observe(params, moved, None, key, step)

    (actions, near), (others, far) = seen(jnp.ones(2)), seen(-jnp.ones(2))
    np.testing.assert_array_equal(actions, others)
    np.testing.assert_array_equal(near, far)


def test_controls_take_the_rewards_from_the_learned_loss_alone():
    experiment = experiments.build("reacher_mfrl", PULL)
    scenarios = experiments.find("reacher_mfrl").scenarios(experiment)
    key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
    problem = experiment.problem
    task = problem.sample_task(key, None)
    params = problem.init(key, task)
    assert problem.collect is not None
    data = problem.collect(params, task, None, key, step)
    columns = {"reward": 2 * 7, "advantage": 2 * 7 + 3}
    seen = {name: scenarios[name].problem.observe(params, data, None, key, step) for name in ("", *family.CONTROLS)}
    assert np.all(seen["rewards_hidden"][..., columns["reward"]] == 0)
    assert np.all(seen["rewards_hidden"][..., columns["advantage"]] == 0)
    before, shuffled = (np.asarray(seen[name][..., columns["reward"]]) for name in ("", "rewards_shuffled"))
    assert np.any(before != shuffled)
    np.testing.assert_array_equal(np.sort(before.ravel()), np.sort(shuffled.ravel()))
    assert set(scenarios) == {"", "shifted", "shifted_goals", "mjx", *reacher.POLICIES, *family.CONTROLS}


@pytest.mark.parametrize("small", [PAPER, PULL])
def test_the_figure_of_an_update_rule_has_the_policy_gradient_beside_it(small: dict):
    experiment = experiments.build("reacher_mfrl", small)
    problem, config = experiment.problem, experiment.config
    task = problem.sample_task(jax.random.key(0), None)
    trained = Trained(experiment, experiment.meta.init(jax.random.key(1)).loss_params, {}, None)
    learned, plain = figures.losses_over_shifts(problem, trained, task, 1)
    # By hand: minus the mean of advantages times log-densities under the shifted mean.
    key, step = jax.random.key(figures.SEED), jnp.zeros((), jnp.int32)
    params = problem.init(key, task)
    assert problem.collect is not None
    samples = problem.collect(params, task, None, key, step).samples
    act = common.make_policy(reacher.ROBOT, config, reacher.make_env(config)).apply
    mean, log_std = jax.vmap(jax.vmap(lambda x: act(params, x, jnp.zeros(2))))(samples.states[:, :-1])
    advantage = policy_gradient.advantages(policy_gradient.returns_to_go(samples.rewards, config.discount))
    shifts = jnp.asarray(figures.GRID)[:, None] * jnp.array([[0.0, 1.0]])
    density = jax.vmap(lambda shift: policy_gradient.normal_log_prob(samples.actions, mean + shift[None, None], log_std))(
        shifts
    )
    expected = -np.mean(np.asarray(advantage[None] * density), axis=(1, 2))
    np.testing.assert_allclose(plain, expected - expected[0], rtol=1e-3, atol=1e-3)
    assert np.ptp(learned) > 0


def test_a_context_policy_acts_on_all_earlier_rewards_of_its_task_and_on_none_of_another():
    experiment = experiments.build("reacher_mfrl", HIDDEN)
    policy = context_policy.make(reacher.ROBOT, experiment.config, reacher.make_env(experiment.config))
    weights = policy.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    tasks = jax.vmap(lambda key: policy.problem.sample_task(key, None))(keys)
    found = context_policy.curves(policy, weights, tasks, keys, 3)
    assert {name: values.shape for name, values in found.items()} == {"return": (3, 4), "distance": (3, 4)}
    moved = context_policy.curves(policy, weights, tasks.replace(goal=tasks.goal.at[0].add(0.05)), keys, 3)
    np.testing.assert_array_equal(found["distance"][1:], moved["distance"][1:])
    blind = jax.tree.map(lambda leaf: jnp.zeros_like(leaf), weights["encoder"])
    forgetful = context_policy.curves(policy, {**weights, "encoder": blind}, tasks, keys, 3)
    np.testing.assert_allclose(forgetful["return"][:, 1], forgetful["return"][:, 2], rtol=1e-4)
    assert np.all(np.abs(found["return"][:, 1] / found["return"][:, 2] - 1) > 1e-4)


def test_a_context_policy_learns_from_its_lives():
    experiment = experiments.build("reacher_mfrl", HIDDEN)
    policy = context_policy.make(reacher.ROBOT, experiment.config, reacher.make_env(experiment.config))
    weights = context_policy.train(policy, jax.random.key(2), num_tasks=2, batches=2, steps=3)
    start = policy.init(jax.random.split(jax.random.key(2))[0])
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: np.any(a != b), weights, start)):
        assert leaf, path


@pytest.mark.slow
def test_a_meta_trained_loss_beats_itself_before_meta_training():
    experiment = experiments.build("reacher_mfrl", {"goal": "visible", "meta_steps": 200, "meta_decay_steps": 200})
    start = single_run.make_start(experiment, 0)
    state, _ = experiment.meta.run(start, 200)
    scenario = experiments.find("reacher_mfrl").scenarios(experiment)[""]
    drawn, _ = evaluate.draws(scenario, jax.random.key(3), 10)
    descend = evaluate.make_descent(scenario, experiment.learned_loss, "adam", 20)
    learned, untrained = (descend(0.02, drawn, phi, phi)["return"] for phi in (state.loss_params, start.loss_params))
    gain = learned[:, -1].mean() - untrained[:, -1].mean()
    assert learned[:, -1].mean() - learned[:, 0].mean() > 25.0
    assert gain > 10.0, gain


@pytest.mark.slow
@pytest.mark.parametrize("small", [SMALL, PAPER, PULL])
def test_meta_train_and_meta_test_end_to_end(small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    small = {**small, "context_steps": 2} if small is not SMALL else small
    given = [f"--config.{name}={value}" for name, value in small.items() if not isinstance(value, tuple)]
    arguments = ["--experiment=reacher_mfrl", f"--workdir={folder}", "--meta_steps=20", *given]
    assert meta_train.main(["meta_train", *arguments, "--config.pretrain_steps=2"]) == 0
    definition = experiments.find("reacher_mfrl")
    made = definition.scenarios

    def one_setting(experiment):
        scenario = made(experiment)[""]
        kept = Reference([0, 100, 200], {"return": np.zeros((2, 3)), "distance": np.ones((2, 3))}, [True, True])
        return {"": scenario._replace(reference=lambda tasks, where: kept)}

    monkeypatch.setattr(experiments, "find", lambda name: dataclasses.replace(definition, scenarios=one_setting))
    content = meta_test.measure(folder, tasks=2, steps=2)
    assert content["metric"] == "return"
    assert content["env_steps"]["learned"] == [0, 100, 200]
    assert {"ppo", "pretrained_tuned", "learned"} <= set(content["curves"])
    assert ("context_policy" in content["curves"]) == (small is not SMALL)
    assert set(content["schedule"]) == {"plain_tuned_sgd", "plain_tuned_adam", "pretrained_tuned", "maml"}
    targets = 1 if small is SMALL else 0
    assert content["cost"]["env_steps"] == 20 * 2 * 100 * (4 + targets)  # two updates, two task losses
    for picture in ("env_steps.png", "meta_test.png", "trajectories.png", "loss.png", "adapted.gif"):
        assert (folder / picture).stat().st_size > 1000
