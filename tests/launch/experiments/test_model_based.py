"""The model-based control experiments: presets, bad input, what they count and which system they report on."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import experiments, meta_test, meta_train
from launch.errors import UsageError
from launch.evaluation import step_size_search
from launch.experiments import control
from launch.experiments.model_based import common, mountain_car, reacher
from ml3_jax import estimators

SMALL = {  # a meta-training of a few seconds
    "num_tasks": 2,
    "hidden": (4,),
    "policy_hidden": (4,),
    "model_hidden": (4,),
    "fit_steps": 5,
    "first_rollouts": 2,
    "refresh_rollouts": 2,
    "refresh_every": 2,
    "members": 1,
}
CONTROL = ["point_mass_mbrl", "reacher_mbrl", "mountain_car"]


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("protocol", ["default", "published"])
def test_a_meta_step_of_each_protocol_moves_the_loss(name: str, protocol: str):
    small = {key: value for key, value in SMALL.items() if protocol == "default" or key != "num_tasks"}
    experiment = experiments.build(name, {**small, "protocol": protocol})
    state = experiment.meta.init(jax.random.key(0), experiment.context)
    after, metrics = experiment.meta.run(state, 2)
    assert np.all(np.asarray(metrics.meta_grad_norm) > 0)
    pairs = zip(jax.tree.leaves(state.loss_params), jax.tree.leaves(after.loss_params), strict=True)
    assert all(np.any(a != b) for a, b in pairs)


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("protocol", ["default", "published"])
def test_meta_train_takes_each_protocol_as_it_is(name: str, protocol: str):
    config = meta_train.make_config(experiments.find(name), {"protocol": protocol}, None)
    assert config.meta_steps % config.refresh_every == 0
    assert config.save_every % config.log_every == 0


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_each_estimator_gets_the_settings_of_the_config(name: str):
    config = experiments.build("reacher_mbrl", {**SMALL, "estimator": name, "es_sigma": 0.1, "es_pairs": 3}).config
    made = common.meta_options(config)["estimator"]
    if name == "pes":
        assert made == estimators.persistent_evolution_strategy(0.1, 3)
    else:
        assert callable(made)


def test_the_published_reacher_is_the_released_codes():
    config = experiments.build("reacher_mbrl", {"protocol": "published"}).config
    assert (config.inner_lr, config.inner_steps, config.meta_lr, config.meta_steps) == (1e-4, 1, 1e-2, 3000)
    assert (config.loss, config.hidden, config.activation, config.action_limit) == ("mlp", (400, 400), "elu", 1.0)
    assert (config.first_rollouts, config.refresh_every, config.members, config.model_hidden) == (3, 300, 3, (100, 30))


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("reacher_mbrl", {"horizon": 0}, "'horizon' must be at least 1, got 0"),
        ("reacher_mbrl", {"members": 0}, "'members' must be at least 1, got 0"),
        ("reacher_mbrl", {"buffer_rollouts": 0}, "'buffer_rollouts' must be at least 1"),
        ("reacher_mbrl", {"buffer_rollouts": 3}, "'buffer_rollouts' must be at least refresh_rollouts = 16, got 3"),
        ("reacher_mbrl", {"buffer_rollouts": 20}, "expected at least 32, the rollouts of one refresh, got 20"),
        ("reacher_mbrl", {"goal_range": 2.9, "horizon": 10}, "goal_range: expected at most .* got 2.9"),
        ("point_mass_mbrl", {"goal_radius": 9.0}, "goal_radius: expected at most .* got 9"),
        ("mountain_car", {"horizon": 15}, "'horizon' must be at least 16, got 15"),
        ("mountain_car", {"adapt_on": "reality"}, "one of model, real"),
        ("mountain_car", {"log_every": 300}, "multiple of refresh_every = 200"),
    ],
)
def test_bad_input_is_refused_before_any_training(name: str, overrides: dict, words: str):
    with pytest.raises(UsageError, match=words):
        experiments.build(name, overrides)


def test_a_system_that_breaks_down_is_named_with_step_and_state(monkeypatch: pytest.MonkeyPatch):
    def broken(config: object, **options: object):
        env = reacher.envs.make("reacher")
        monkeypatch.setattr(env, "dynamics", lambda x, action: x / 0.0 * jnp.sum(action))
        return env

    robot = reacher.ROBOT._replace(make_env=broken)
    definition = common.definition("broken", "", reacher.ReacherConfig, robot, reacher.scenarios)
    with pytest.raises(UsageError, match=r"reacher: rollout 0: the state of step 1 is not finite.*before it the state was"):
        definition.build(reacher.ReacherConfig(unroll=2))


def test_unroll_follows_inner_steps():
    assert experiments.build("reacher_mbrl", {"inner_steps": 3, **SMALL}).config.unroll == 3


def test_the_equations_stand_in_for_the_simulator():
    experiment = experiments.build("reacher_mbrl", {**SMALL, "dynamics": "exact", "physics": "mjx"})
    assert experiment.context is None
    task = experiment.problem.sample_task(jax.random.key(0), None)
    params = experiment.problem.init(jax.random.key(1), task)
    assert np.isfinite(experiment.problem.task_loss(params, task, None, jax.random.key(2)))


def test_env_steps_count_the_rollouts_on_the_real_system():
    experiment = experiments.build("reacher_mbrl", SMALL)
    definition = experiments.find("reacher_mbrl")
    assert definition.env_steps is not None
    # 2 first rollouts, then 2 before each of the meta-steps 0, 2 and 4, of 65 steps each.
    assert definition.env_steps(experiment, 5) == 65 * (2 + 3 * 2)
    real = experiments.build("reacher_mbrl", {**SMALL, "adapt_on": "real"})
    # Beside them one rollout for each of 2 inner steps of 2 tasks.
    assert definition.env_steps(real, 5) == 65 * (2 + 3 * 2) + 5 * 2 * 2 * 65


def test_env_steps_count_the_inner_steps_that_a_meta_step_takes():
    experiment = experiments.build("reacher_mbrl", {**SMALL, "adapt_on": "real", "inner_steps": 4, "unroll": 1})
    definition = experiments.find("reacher_mbrl")
    assert definition.env_steps is not None
    assert definition.env_steps(experiment, 5) == 65 * (2 + 3 * 2) + 5 * 2 * 1 * 65  # one inner step a meta-step, not four


def test_the_pretrained_control_sees_the_goals_of_meta_training_and_not_the_tested_ones(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(control.pretraining, "pretrain", lambda problem, *args, **options: seen.append(problem))
    experiment = experiments.build("point_mass_mbrl", SMALL)
    scenarios = experiments.find("point_mass_mbrl").scenarios(experiment)
    keys = jax.random.split(jax.random.key(0), 50)
    for scenario in scenarios.values():
        assert scenario.pretrain is not None
        scenario.pretrain(jax.random.key(0))
    assert len(seen) == len(scenarios)
    for problem in (experiment.problem, *seen):
        assert np.all(np.asarray(jax.vmap(lambda key, p=problem: p.sample_task(key, None).goal)(keys))[:, 0] > 0)
    assert np.all(np.asarray(scenarios[""].draw_tasks(keys[0], 50).goal)[:, 0] < 0)


def test_mountain_car_s_task_loss_is_the_way_that_is_left():
    config = experiments.build("mountain_car", {"excess_weight": 0.0}).config
    env = mountain_car.make_env(config)
    cost = mountain_car.cost(config, env)
    goal, extra = jnp.array([0.5, 1.0375]), jnp.array(mountain_car.WAYPOINT)
    still = jnp.tile(jnp.array([[-0.55, 0.0]]), (36, 1))
    # Without the goal on the way: 1.05 to go. With it: 0.397 to it, and from there 1.447 but for the part exp(-0.397 / 0.1)
    # that counts as passed.
    np.testing.assert_allclose(cost(still, jnp.zeros((35, 1)), goal, None), 1.05, rtol=1e-6)
    passed = np.exp(-3.97)
    expected = 0.397 + passed * 1.05 + (1 - passed) * 1.447
    np.testing.assert_allclose(cost(still, jnp.zeros((35, 1)), goal, extra), expected, rtol=1e-5)
    there = still.at[10].set(jnp.array([-0.947, 0.0])).at[30].set(jnp.array([0.5, 0.3]))
    np.testing.assert_allclose(cost(there, jnp.zeros((35, 1)), goal, extra), 0.0, atol=1e-6)


@pytest.mark.slow
def test_meta_test_measures_with_the_model_that_meta_training_left(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    definition = experiments.find("mountain_car")
    # A short search: which step size is best is no matter here.
    monkeypatch.setattr(step_size_search, "FIRST", -2)
    monkeypatch.setattr(step_size_search, "LOWEST", -2)
    monkeypatch.setattr(step_size_search, "HIGHEST", 0)
    overrides = {**SMALL, "meta_steps": 2}
    config = meta_train.make_config(definition, overrides, None)
    meta_train.train(definition, config, 0, tmp_path / "run")
    content = meta_test.measure(tmp_path / "run", tasks=2, steps=1)
    capsys.readouterr()
    assert json.loads((tmp_path / "run" / "meta_test.json").read_text()) == content
    assert set(content["curves"]) >= {"learned", "untrained", "plain_tuned_sgd", "plain_tuned_adam", "pretrained_tuned"}
    assert content["env_steps"]["learned"] == [0, 0]  # it adapts in the model
    assert content["cost"]["env_steps"] == 35 * (2 + 2)
    for name in ("phase_portrait.png", "model_error.png", "loss.png", "adapted.gif"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
