"""Rollouts of trained policies on a real system, for the figures of control experiments.

`record` computes them once; `draw_in_plane` and `draw_animation` hand them to `trajectories` and `animations` as arrays.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import optimizers
from launch.curves import LEARNED
from launch.experiment import Trained
from launch.figures import animations, style, trajectories
from launch.runtime import thread_pool

SEED = 20260  # of the drawn tasks and initialisations; not used by meta-training and meta-test


class Paths(NamedTuple):
    """States of the real system on M tasks after U numbers of updates, with either loss."""

    tasks: Any  # [M, ...]
    goals: np.ndarray  # [M, G]
    updates: tuple[int, ...]  # U
    learned: np.ndarray  # [M, U, T + 1, S]
    plain: np.ndarray  # [M, U, T + 1, S]

    def after(self, updates: int) -> np.ndarray:
        """The first task's states with the learned loss, [T + 1, S]."""
        return self.learned[0, self.updates.index(updates)]


def record(trained: Trained, problem: ml3_jax.Problem, count: int, *, plain: str, updates: tuple[int, ...]) -> Paths:
    """Runs both losses on the same tasks.

    Args:
      trained: the experiment.
      problem: a problem with an evaluate that returns {"states": [T + 1, S]}.
      count: M.
      plain: the curve of the plain loss: "plain_tuned_sgd" or "plain_tuned_adam".
      updates: U numbers of updates.
    """
    config, context = trained.experiment.config, trained.experiment.context
    task_key, run_key = jax.random.split(jax.random.key(SEED))
    tasks = jax.vmap(problem.sample_task, (0, None))(jax.random.split(task_key, count), None)
    steps, drawn = max(updates), jnp.array(updates)

    def by_learned_loss(task: Any, key: Array) -> ml3_jax.Adaptation:
        optimizer = optimizers.inner(config.inner_optimizer, config.inner_lr, decay_steps=config.inner_decay_steps)
        loss, loss_params = trained.experiment.learned_loss, trained.loss_params
        return ml3_jax.adapt(problem, loss, loss_params, task, context, key, optimizer=optimizer, steps=steps)

    def by_plain_loss(task: Any, key: Array) -> ml3_jax.Adaptation:
        name, step_size = plain.removeprefix("plain_tuned_"), trained.results["step_size"][plain]
        optimizer = optimizers.inner(name, step_size, decay_steps=config.inner_decay_steps)
        return ml3_jax.baseline(problem, task, context, key, optimizer=optimizer, steps=steps)

    def run(descend: Callable[[Any, Array], ml3_jax.Adaptation], _: Any) -> np.ndarray:
        states = jax.jit(jax.vmap(lambda task, key: descend(task, key).trace["states"][drawn]))
        return np.asarray(states(tasks, jax.random.split(run_key, count)))

    # In parallel: compiling a simulator takes longer than running it.
    by_learned, by_plain = thread_pool.run(run, (by_learned_loss, by_plain_loss), most=2)
    return Paths(tasks, np.asarray(tasks.goal), updates, by_learned, by_plain)


def distances(env: envs.GoalEnv, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The distance of every state [M, U, T + 1, S] from its task's goal, [M, U, T + 1]."""
    return np.asarray(env.distance(jnp.asarray(states), jnp.asarray(goals)[:, None, None]))


def draw_in_plane(
    path: pathlib.Path, env: envs.GoalEnv, paths: Paths, rows: dict[str, np.ndarray], title: str, *, postures: bool
) -> None:
    """Draws the paths of the point that the environment's sketch follows, a row for each loss.

    Args:
      path: the picture.
      env: the system.
      paths: the tasks and the numbers of updates.
      rows: {a loss in words: [M, U, T + 1, S]}.
      title: the subject; {body} stands for the system in words.
      postures: whether the body is drawn at starts and goals.
    """
    sketches = sketch_starts(env, paths)
    shown = None
    if postures:
        starts, wanted = (np.array([getattr(s, name) for s in sketches]) for name in ("segments", "goal_segments"))
        shown = trajectories.Postures(starts, wanted, sketches[0].body)
    trajectories.in_plane(
        path,
        {name: _points(env, states, paths.goals[0]) for name, states in rows.items()},
        {name: distances(env, states, paths.goals)[..., -1] for name, states in rows.items()},
        np.array([sketch.goal for sketch in sketches]),
        paths.updates,
        names=sketches[0].axes,
        unit=env.distance_unit,
        title=title.format(body=sketches[0].body),
        postures=shown,
    )


def sketch_starts(env: envs.GoalEnv, paths: Paths) -> list[envs.Sketch]:
    """The sketch of each task's start."""
    return [env.sketch(x, goal) for x, goal in zip(paths.learned[:, 0, 0], paths.goals, strict=True)]


def _points(env: envs.GoalEnv, states: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The followed point in each state [..., S]: [..., 2]."""
    flat = states.reshape(-1, states.shape[-1])
    return np.array([env.sketch(x, goal).point for x in flat]).reshape(*states.shape[:-1], 2)


def draw_animation(path: pathlib.Path, env: envs.GoalEnv, paths: Paths, updates: Sequence[int], words: str) -> None:
    """Animates the first task after some numbers of updates, without diverged rollouts. Writes nothing if all diverged.

    `words` is the subject; {body} stands for the system in words.
    """
    shown = {trajectories.in_words(k): paths.after(k) for k in updates if np.isfinite(paths.after(k)).all()}
    if not shown:
        return
    fps = min(20, round(1 / env.dt))
    title = f"{words.format(body=sketch_starts(env, paths)[0].body)}, {style.label(LEARNED)}; {animations.pace(env.dt, fps)}"
    animations.save_gif(path, env, shown, paths.goals[0], title=title, fps=fps)
