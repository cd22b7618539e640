"""The baseline PPO: its task equals that of the learned loss, its curve ends when it is flat, and curves are kept."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from launch.evaluation import ppo
from launch.runtime import devices

HORIZON = 4
GOAL = jnp.array([0.1, 0.15])
SETTINGS = ppo.PPOSettings(
    env_steps=64,
    most_env_steps=128,
    evaluations=2,
    num_envs=4,
    unroll_length=4,
    batch_size=4,
    num_minibatches=1,
    num_updates_per_batch=1,
    hidden=(4,),
)


def make_task() -> ppo.OneTask:
    env = envs.make("reacher", goal_space="tip")
    return ppo.OneTask(
        env,
        GOAL,
        sample_start=env.sample_start,
        inputs=lambda x, goal: jnp.concatenate([x, goal]),
        reward=lambda x, action, following, goal: -env.distance(following, goal) - jnp.sum(jnp.abs(action)),
        distance=env.distance,
        horizon=HORIZON,
    )


def played(monkeypatch: pytest.MonkeyPatch, returns: list[float]) -> list[tuple[int, int]]:
    """Replaces brax.training by evaluations with these returns, 64 steps apart.

    Returns the (env_steps, evaluations) of each run.
    """
    runs = []

    def train(task, settings, env_steps, evaluations, evaluated, *, horizon, seed):
        runs.append((env_steps, evaluations))
        for index, value in enumerate(returns):
            evaluated(64 * index, {"eval/episode_reward": value, "eval/episode_distance_at_end": 0.1})

    monkeypatch.setattr(ppo, "_train", train)
    return runs


def test_a_task_has_the_rewards_and_states_of_the_system():
    env, task = envs.make("reacher", goal_space="tip"), make_task()
    state = task.reset(jax.random.key(1))
    inside = env.state_at(env.sample_start(jax.random.key(1)), GOAL)
    action = jnp.array([0.5, -2.0])
    for time in range(1, HORIZON + 1):
        state = task.step(state, action)
        inside = env.step(inside, env.action_limit * jnp.array([0.5, -1.0]))
        distance = env.distance(jnp.asarray(inside.obs), GOAL)
        np.testing.assert_allclose(np.asarray(state.obs), np.concatenate([np.asarray(inside.obs), GOAL]), rtol=1e-6)
        np.testing.assert_allclose(state.reward, -distance - 2.5, rtol=1e-6)
        np.testing.assert_allclose(state.metrics["distance_at_end"], distance if time == HORIZON else 0.0, rtol=1e-6)
    assert (task.observation_size, task.action_size) == (6, 2)


def test_the_wrappers_of_brax_reset_a_task_after_each_episode():
    from brax.envs import training

    task = make_task()
    wrapped = training.wrap(task, episode_length=HORIZON)
    state = wrapped.reset(jax.random.split(jax.random.PRNGKey(0), 2))
    first = np.asarray(state.obs)
    step = jax.jit(wrapped.step)
    episodes = []
    for _ in range(2):
        rewards, ends = [], []
        for _ in range(HORIZON):
            state = step(state, jnp.full((2, 2), 0.7))
            rewards.append(np.asarray(state.reward))
            ends.append(np.asarray(state.metrics["distance_at_end"]))
        np.testing.assert_array_equal(np.asarray(state.obs), first)
        assert np.all(np.asarray(ends)[-1] > 0)
        episodes.append(rewards)
    # The second episode is the first again, the system's state included.
    np.testing.assert_allclose(episodes[1], episodes[0], rtol=1e-6)


def test_a_curve_is_flat_if_its_best_value_gains_less_than_a_tenth_in_the_last_fifth():
    rising = np.linspace(0.0, 1.0, 41)
    assert not ppo.is_flat(rising.tolist())
    assert ppo.is_flat(np.minimum(2.0 * rising, 1.0).tolist())
    assert ppo.is_flat((1.0 - np.exp(-6.0 * rising)).tolist())
    assert not ppo.is_flat(np.where(rising < 0.9, 0.0, 1.0).tolist())
    assert not ppo.is_flat(np.where(rising < 0.95, rising, 0.8).tolist())  # it rose to the end and fell
    assert ppo.is_flat(np.where(rising < 0.7, rising, 0.5).tolist())  # it stayed low


@pytest.mark.slow
def test_curves_are_kept_and_not_computed_twice(tmp_path, monkeypatch):
    task, folder = make_task(), tmp_path / "ppo"

    def found(seed: int = 0, settings: ppo.PPOSettings = SETTINGS):
        return ppo.curves([task], settings, folder, names=[{"goal": [0.1, 0.15]}], horizon=HORIZON, seed=seed)

    first = found()
    assert first[0].env_steps[0] == 0
    assert first[0].env_steps[-1] >= SETTINGS.env_steps
    assert all(len(values) == len(first[0].env_steps) and np.all(np.isfinite(values)) for values in first[0].values.values())
    calls = []
    monkeypatch.setattr(ppo, "train", lambda *args, **kwargs: calls.append(kwargs) or first[0])
    assert found() == first
    assert not calls
    found(seed=1)  # another seed is another curve
    (folder / next(folder.iterdir()).name).write_text("{")  # a damaged file is computed again
    found()
    found(seed=1)
    assert len(calls) == 2
    assert all(json.loads(path.read_text())["about"]["horizon"] == HORIZON for path in folder.iterdir())


def test_curves_are_in_the_order_of_tasks_with_different_seeds_whichever_ends_first(tmp_path, monkeypatch):
    tasks, names = [make_task() for _ in range(3)], [{"goal": index} for index in range(3)]
    second_done = threading.Event()
    monkeypatch.setattr(devices, "cores", lambda: 2)

    def train(task, settings, *, horizon, seed, stop):
        if task is tasks[0]:
            assert second_done.wait(timeout=30)  # fails if the runs are sequential
        second_done.set()
        return ppo.Curve([0, seed], {"return": [0.0, float(tasks.index(task))]}, True)

    monkeypatch.setattr(ppo, "train", train)
    found = ppo.curves(tasks, SETTINGS, tmp_path / "ppo", names=names, horizon=HORIZON, seed=7)
    assert [curve.env_steps[-1] for curve in found] == [7, 8, 9]
    assert [curve.values["return"][-1] for curve in found] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="one for each of 3 tasks, got 2"):
        ppo.curves(tasks, SETTINGS, tmp_path / "ppo", names=names[:2], horizon=HORIZON, seed=7)


def test_a_curve_that_diverged_is_kept_as_null_and_read_as_nan(tmp_path, monkeypatch):
    runs = played(monkeypatch, [1.0, float("nan"), 3.0])
    for _ in range(2):  # trained once, then read
        (curve,) = ppo.curves([make_task()], SETTINGS, tmp_path, names=[{"goal": 0}], horizon=HORIZON, seed=0)
        assert curve.env_steps == [0, 64]
        np.testing.assert_array_equal(curve.values["return"], [1.0, np.nan])
        assert not curve.flat
    assert len(runs) == 1
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["values"]["return"] == [1.0, None]


@pytest.mark.slow
def test_a_stopped_run_ends_at_its_next_evaluation():
    stop = threading.Event()
    stop.set()
    with pytest.raises(ppo.StoppedError):
        ppo.train(make_task(), SETTINGS, horizon=HORIZON, seed=0, stop=stop)


def test_a_run_ends_when_its_curve_is_flat(monkeypatch):
    settings = ppo.PPOSettings(env_steps=10 * 64, most_env_steps=40 * 64, evaluations=11)
    rising = [*range(15), *[15.0] * 30]
    runs = played(monkeypatch, rising)
    curve = ppo.train(make_task(), settings, horizon=HORIZON, seed=0)
    assert runs == [(40 * 64, 41)]  # the distance of evaluations is that of the least run
    assert curve.flat
    assert curve.values["return"] == rising[: len(curve.env_steps)]
    assert ppo.is_flat(curve.values["return"])
    assert not ppo.is_flat(curve.values["return"][:-1])


def test_a_run_takes_at_least_env_steps_and_ends_at_most_env_steps(monkeypatch):
    played(monkeypatch, [0.0] * 100)
    short = ppo.train(make_task(), ppo.PPOSettings(env_steps=640, most_env_steps=64, evaluations=11), horizon=HORIZON, seed=0)
    assert short.flat
    assert short.env_steps[-1] == 640  # a most_env_steps below env_steps has no effect
    rare = ppo.train(make_task(), ppo.PPOSettings(env_steps=640, most_env_steps=640, evaluations=21), horizon=HORIZON, seed=0)
    assert rare.flat  # brax.training made fewer evaluations, further apart
    assert rare.env_steps[-1] == 640
    played(monkeypatch, [*range(100)])
    steep = ppo.train(make_task(), ppo.PPOSettings(env_steps=640, most_env_steps=1300, evaluations=11), horizon=HORIZON, seed=0)
    assert not steep.flat
    assert steep.env_steps[-1] == 1344
