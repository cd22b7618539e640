"""Figures of a trained model-free experiment: paths of the mean actions, the learned loss, an animation.

What is computed stands here; `launch.trajectories` and `launch.animations` draw it, `launch.plots` what meta_test.json holds.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import animations, plot_style, trajectories
from launch.evaluation import LEARNED
from launch.experiments import control_figures, sampling
from launch.experiments.base import Experiment
from ml3_jax.rollout import rollout

SEED = 20261  # of the policy whose sample the loss is shown at
PLAIN = "plain_tuned_adam"
UPDATES = (0, 2, 5, 20)
TASKS = 3
GRID = np.linspace(-1.5, 1.5, 301)  # of the policy's mean, in limits
SAMPLED = 0.5  # the action that was taken, in limits
ADVANTAGES = (-2.0, 0.0, 2.0)
MOVING = 20.0  # frames a second


def draw(
    plant: sampling.Plant,
    experiment: Experiment,
    loss_params: Any,
    results: dict[str, Any],
    folder: pathlib.Path,
    *,
    env: envs.GoalEnv,
) -> None:
    """Writes all figures of an experiment.

    Args:
      plant: the experiment's description.
      experiment: it.
      loss_params: the meta-trained loss.
      results: what meta_test.json holds.
      folder: where the pictures go.
      env: the system that is shown.
    """
    problem = recording_problem(plant, experiment.config, env)
    paths = control_figures.real_paths(
        problem, experiment, loss_params, results["step_size"][PLAIN], TASKS, plain_name="adam", updates=UPDATES
    )
    tasks, goals = paths.tasks, paths.goals
    states = {plot_style.label(LEARNED): paths.learned, plot_style.label(PLAIN): paths.plain}
    _draw_in_plane(folder / "trajectories.png", states, goals, env)
    _draw_loss(folder / "loss.png", problem, experiment, loss_params, jax.tree.map(lambda leaf: leaf[0], tasks), env)
    shown = {trajectories.in_words(k): states[plot_style.label(LEARNED)][0, UPDATES.index(k)] for k in UPDATES if k != 2}
    shown = {name: one for name, one in shown.items() if np.isfinite(one).all()}
    if shown:
        fps = min(MOVING, 1 / env.dt)
        body = env.sketch(states[plot_style.label(LEARNED)][0, 0, 0], goals[0]).body
        title = f"The {body}, learned loss; {animations.pace(env.dt, fps)}"
        animations.save_gif(folder / "adapted.gif", env, shown, goals[0], title=title, fps=round(fps))


def recording_problem(plant: sampling.Plant, config: Any, env: envs.GoalEnv) -> ml3_jax.Problem:
    """The problem of a config whose evaluate returns {"states": [T + 1, S]} of the mean actions from one start."""
    policy = sampling.make_policy(plant, config, env)

    def record(params: Any, task: Any, context: Any, key: Array) -> dict[str, Array]:
        del context

        def act(x: Array, key: Array) -> Array:
            del key
            return env.action_limit * jnp.clip(policy.apply(params, x, task.goal)[0], -1.0, 1.0)

        start = env.state_at(env.sample_start(key), task.goal)
        return {"states": rollout(act, env.step, start, key, horizon=config.horizon, observation_fn=lambda s: s.obs).states}

    return sampling.make_problem(plant, config, env)._replace(evaluate=record)


def _draw_in_plane(path: pathlib.Path, states: dict[str, np.ndarray], goals: np.ndarray, env: envs.GoalEnv) -> None:
    def points(all_states: np.ndarray) -> np.ndarray:
        flat = all_states.reshape(-1, all_states.shape[-1])
        return np.array([env.sketch(x, goals[0]).point for x in flat]).reshape(*all_states.shape[:-1], 2)

    def ends(all_states: np.ndarray) -> np.ndarray:
        return np.asarray(env.distance(jnp.asarray(all_states[:, :, -1]), jnp.asarray(goals)[:, None]))

    first = next(iter(states.values()))[:, 0, 0]
    sketches = [env.sketch(x, goal) for x, goal in zip(first, goals, strict=True)]
    trajectories.in_plane(
        path,
        {name: points(values) for name, values in states.items()},
        {name: ends(values) for name, values in states.items()},
        np.array([sketch.goal for sketch in sketches]),
        UPDATES,
        names=sketches[0].axes,
        unit=env.distance_unit,
        title=f"Paths of the {sketches[0].body}'s mean actions, goals and policies never seen",
    )


def _draw_loss(
    path: pathlib.Path, problem: ml3_jax.Problem, experiment: Experiment, loss_params: Any, task: Any, env: envs.GoalEnv
) -> None:
    """The loss of one sample at the start of the first task as one coordinate of the policy's mean runs over `GRID`."""
    key, step = jax.random.key(SEED), jnp.zeros((), jnp.int32)
    params = problem.init(key, task)
    assert problem.collect is not None
    data = problem.collect(params, task, experiment.context, key, step)
    seen = np.asarray(problem.observe(params, data, experiment.context, key, step))[0]
    size = env.action_size
    advantage_at, action_at, mean_at = len(seen) - 3 * size - 1, len(seen) - 3 * size, len(seen) - 2 * size

    def curve(axis: int, advantage: float) -> np.ndarray:
        rows = np.tile(seen, (len(GRID), 1))
        rows[:, advantage_at], rows[:, action_at:mean_at], rows[:, mean_at : mean_at + size] = advantage, 0.0, 0.0
        rows[:, action_at + axis], rows[:, mean_at + axis] = SAMPLED, GRID
        return np.asarray(jax.vmap(experiment.learned_loss.apply, (None, 0))(loss_params, jnp.asarray(rows)[:, None]))

    trajectories.over_action(
        path,
        GRID,
        {f"mean of action {axis + 1}": np.array([curve(axis, a) for a in ADVANTAGES]) for axis in range(min(size, 2))},
        [f"advantage {advantage:+.0f}" for advantage in ADVANTAGES],
        title="The learned loss of the policy's mean at the start, "
        f"when\nthe action {SAMPLED} was sampled; other actions are 0",
    )
