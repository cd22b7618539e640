"""inverse_dynamics as the launches run it: its recordings, its scenarios, its figures, and what it refuses before training."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs.arm
import envs.excitation
import envs.rigid_body
from launch import experiments, meta_test, meta_train
from launch.errors import UsageError
from launch.experiments.inverse_dynamics import arm as inverse_dynamics
from launch.experiments.inverse_dynamics import recordings

SMALL = {
    "arm": "reacher",
    "loads": 3,
    "inner_steps": 4,
    "unroll": 2,
    "batch_size": 5,
    "num_tasks": 2,
    "hidden": (4,),
    "optimizee_hidden": (4,),
    "test_motions": 2,
    "test_samples": 3,
    "pretrain_steps": 2,
}


@pytest.fixture(scope="module")
def experiment():
    return experiments.build("inverse_dynamics", SMALL)


def test_the_recordings_are_those_of_the_loaded_arm(experiment):
    recorder = inverse_dynamics.make_recorder(experiment.config, envs.arm.load("reacher"))
    quiet = recorder._replace(noise=envs.excitation.Noise())
    runs = recordings.record(quiet, jax.random.key(3), 2)
    drawn = runs.about
    torques_of = jax.jit(jax.vmap(envs.rigid_body.inverse_dynamics, (None, 0, 0, 0)))
    assert runs.stream.q.shape == (2, 20, 2)
    assert runs.extra.shape == (2, 6, 2, 2)
    for row in range(2):
        arm = envs.rigid_body.with_load(recorder.arm, drawn.mass[row], drawn.offset[row])
        for measured, torques in ((runs.stream, runs.stream.torque), (runs.test, runs.test.torque)):
            true = torques_of(arm, measured.q[row], measured.v[row], measured.a[row])
            np.testing.assert_allclose(torques[row], true, rtol=1e-4, atol=1e-7)
        inertia = jax.vmap(envs.rigid_body.mass_matrix, (None, 0))(arm, runs.test.q[row])
        np.testing.assert_allclose(runs.extra[row], inertia, rtol=1e-4)
    away = np.abs(np.asarray(runs.stream.q) - np.asarray(recorder.arm.home))
    assert away.max() <= experiment.config.workspace


def test_a_library_does_not_depend_on_how_many_are_recorded_at_once(experiment):
    recorder = inverse_dynamics.make_recorder(experiment.config, envs.arm.load("reacher"))
    many = recordings.record(recorder, jax.random.key(4), recordings.AT_ONCE + 1)
    assert many.extra.shape[0] == recordings.AT_ONCE + 1
    assert len(np.unique(np.asarray(many.extra[:, 0, 0, 0]))) == recordings.AT_ONCE + 1


def test_noise_is_on_what_is_measured_and_not_on_what_is_judged(experiment):
    arm = envs.arm.load("reacher")
    recorder = inverse_dynamics.make_recorder(experiment.config, arm, load_mass=0.0)
    runs = recordings.record(recorder, jax.random.key(5), 1)
    for measured, exact in ((runs.stream, False), (runs.test, True)):
        motion = [leaf[0] for leaf in (measured.q, measured.v, measured.a)]
        off = jax.vmap(envs.rigid_body.inverse_dynamics, (None, 0, 0, 0))(arm, *motion) - measured.torque[0]
        assert bool(np.abs(off).max() < 1e-6) == exact


def test_scenarios_are_other_networks_arms_and_motions(experiment):
    scenarios = inverse_dynamics.scenarios(experiment)
    assert set(scenarios) == {"", "plain_network", "other_arm", "whole_range"}
    key = jax.random.key(6)
    drawn = {name: scenario.draw_tasks(key, 2) for name, scenario in scenarios.items()}
    factors = {name: inverse_dynamics.describe(tasks)[0]["link_masses"] for name, tasks in drawn.items()}
    assert factors[""] == [1.0, 1.0]
    assert all(0.7 <= factor <= 1.3 for factor in factors["other_arm"])
    assert factors["other_arm"] != [1.0, 1.0]
    home = np.asarray(envs.arm.load("reacher").home)
    assert np.abs(np.asarray(drawn["whole_range"].test.q) - home).max() > experiment.config.workspace
    problem_for = scenarios[""].problem_for
    assert problem_for is not None
    with pytest.raises(UsageError, match="--steps: expected at most 4, the mini-batches of one pass"):
        problem_for(5)


def test_a_report_says_of_each_task_what_it_carries(experiment):
    scenario = inverse_dynamics.scenarios(experiment)[""]
    assert scenario.describe is not None
    for seed in (8, 9):  # draws of one size, one after the other
        tasks = scenario.draw_tasks(jax.random.key(seed), 2)
        for row, said in enumerate(scenario.describe(tasks)):
            arm = envs.rigid_body.with_load(envs.arm.load("reacher"), said["mass"], jnp.asarray(said["offset"]))
            inertia = jax.vmap(envs.rigid_body.mass_matrix, (None, 0))(arm, tasks.test.q[row])
            np.testing.assert_allclose(tasks.extra[row], inertia, rtol=1e-4)


def test_env_steps_are_the_samples_that_were_recorded(experiment):
    assert inverse_dynamics.env_steps(experiment, 7) == inverse_dynamics.env_steps(experiment, 8) == 3 * 4 * 5


def test_without_extra_the_task_loss_is_the_torque_s():
    experiment = experiments.build("inverse_dynamics", {**SMALL, "extra": False})
    task = experiment.problem.sample_task(jax.random.key(1), experiment.context)
    params = experiment.problem.init(jax.random.key(2), task)
    other = task.replace(extra=2 * task.extra, test=jax.tree.map(lambda leaf: 2 * leaf, task.test))
    key = jax.random.key(3)
    args = (experiment.context, key)
    assert experiment.problem.task_loss(params, task, *args) == experiment.problem.task_loss(params, other, *args)


def task_loss_of(**overrides: Any) -> float:
    """The task loss of a network, of an arm whose joints carry inertias of very different sizes."""
    experiment = experiments.build("inverse_dynamics", {**SMALL, "arm": "sawyer", **overrides})
    task = experiment.problem.sample_task(jax.random.key(1), experiment.context)
    params = experiment.problem.init(jax.random.key(2), task)
    return float(experiment.problem.task_loss(params, task, experiment.context, jax.random.key(3)))


@pytest.mark.parametrize(("extra", "share"), [(True, 0.1), (False, 1.0)])
def test_the_task_loss_counts_joints_alike_as_far_as_the_config_says(extra: bool, share: float):
    in_units, alike = (task_loss_of(extra=extra, by_joint=value) for value in (0.0, 1.0))
    assert abs(alike / in_units - 1.0) > 0.1  # or the shares could not be told apart
    np.testing.assert_allclose(task_loss_of(extra=extra), (1 - share) * in_units + share * alike, rtol=1e-5)
    np.testing.assert_allclose(task_loss_of(extra=extra, by_joint=0.5), (in_units + alike) / 2, rtol=1e-5)


@pytest.mark.parametrize("control", ["pretrain", "maml"])
def test_a_control_does_not_depend_on_what_shapes_the_learned_loss(control: str):
    made = []
    for overrides in ({}, {"extra": False}, {"by_joint": 0.0}):
        experiment = experiments.build("inverse_dynamics", {**SMALL, **overrides})
        train = getattr(inverse_dynamics.scenarios(experiment)[""], control)
        made.append(train(jax.random.key(4)))
    for other in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, made[0], other)


@pytest.mark.slow
def test_a_run_folder_has_both_errors_of_all_joints_and_their_figures(tmp_path: pathlib.Path):
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    folder = tmp_path / "run"
    arguments = ["meta_train", "--experiment=inverse_dynamics", f"--workdir={folder}", "--meta_steps=2", *flags]
    assert meta_train.main([*arguments, "--config.log_every=1", "--config.save_every=1"]) == 0
    content = meta_test.measure(folder, tasks=2)
    assert content["unit"] == "N m"
    assert set(content["other_metrics"]) == {"inertia", "inertia_by_joint", "torque_rmse_shoulder", "torque_rmse_elbow"}
    assert content["env_steps"]["learned"] == [0, 5, 10, 15, 20]
    assert set(content["tasks"][0]) == {"mass", "offset", "link_masses"}
    assert {"errors.png", "joints.png"} <= {path.name for path in folder.iterdir()}


def test_an_arm_is_read_from_a_model_s_file(tmp_path: pathlib.Path):
    path = tmp_path / "arm.xml"
    path.write_text(envs.arm.mjcf(envs.arm.load("reacher")))
    arm = recordings.load_arm(str(path), ("shoulder", "elbow"))
    assert arm.joint_names == ("shoulder", "elbow")
    with pytest.raises(UsageError, match=r"config field 'arm': .*arm\.xml: MJCF: joints \['wrist'\]: expected hinges"):
        experiments.build("inverse_dynamics", {**SMALL, "arm": str(path), "joints": ("shoulder", "wrist")})
    path.write_text("<mujoco/>")
    with pytest.raises(UsageError, match=r"config field 'arm': .*arm\.xml: MJCF"):
        experiments.build("inverse_dynamics", {**SMALL, "arm": str(path)})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"arm": "sawer"}, "config field 'arm': expected one of iiwa, sawyer, reacher or the path of an MJCF, got 'sawer'"),
        ({"load_mass": 1e8}, "load: mass .* kg at .* m from the hand makes the inertia matrix ill-conditioned"),
        ({"band": (0.1,)}, "config field 'band': expected the least and the greatest frequency"),
        ({"band": (0.1, 9.0)}, "option band: expected at most 5 Hz"),
    ],
)
def test_what_cannot_be_recorded_is_refused(overrides: dict, words: str):
    with pytest.raises(UsageError, match=words):
        experiments.build("inverse_dynamics", {**SMALL, **overrides})


def test_measurements_that_are_not_finite_are_refused_by_name(experiment):
    recorder = inverse_dynamics.make_recorder(experiment.config, envs.arm.load("reacher"))
    runs = recordings.record(recorder, jax.random.key(7), 2)
    torque = runs.stream.torque.at[1, 3, 0].set(jnp.nan)
    broken = runs.replace(stream=runs.stream.replace(torque=torque))
    words = "run 1, stream: measured torque: expected finite numbers, got nan at sample 3 of joint shoulder"
    with pytest.raises(ValueError, match=words):
        recordings.check(recorder, broken)


def test_a_share_of_no_torque_limit_is_refused():
    arm = envs.arm.load("reacher")
    free = dataclasses.replace(arm, torque_limit=jnp.array([jnp.inf, 1.0]))
    with pytest.raises(UsageError, match="joints shoulder have none"):
        recordings.noise_of(free, q=0.0, v=0.0, a=0.0, torque=0.01)
    np.testing.assert_array_equal(recordings.noise_of(free, q=0.0, v=0.0, a=0.0, torque=0.0).torque, [0.0, 0.0])
