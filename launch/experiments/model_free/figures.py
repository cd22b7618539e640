"""Figures of a model-free experiment: paths under the mean actions, the learned loss, an animation."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
import ml3_jax
from launch.curves import LEARNED
from launch.experiment import Trained
from launch.figures import rollouts, style, trajectories

SEED = 20261  # of the policy and the sample in the figure of the loss
PLAIN = "plain_tuned_adam"
UPDATES, ANIMATED = (0, 2, 5, 20), (0, 5, 20)  # numbers of updates before a drawn path
TASKS = 3
GRID = np.linspace(-1.5, 1.5, 301)  # the mean of the policy, in limits
SAMPLED = 0.5  # the sampled action, in limits
ADVANTAGES = (-2.0, 0.0, 2.0)


def draw(trained: Trained, problem: ml3_jax.Problem, env: envs.GoalEnv, folder: pathlib.Path) -> None:
    """Writes all figures of an experiment. `problem` is the `control.recording_problem` on env."""
    paths = rollouts.record(trained, problem, TASKS, plain=PLAIN, updates=UPDATES)
    rows = {style.label(LEARNED): paths.learned, style.label(PLAIN): paths.plain}
    title = "Paths of the {body} under mean actions, new goals and policies"
    rollouts.draw_in_plane(folder / "trajectories.png", env, paths, rows, title, postures=False)
    first = jax.tree.map(lambda leaf: leaf[0], paths.tasks)
    draw_loss = _draw_loss if trained.experiment.config.loss == "guided" else _draw_loss_over_shifts
    draw_loss(folder / "loss.png", problem, trained, first, env)
    rollouts.draw_animation(folder / "adapted.gif", env, paths, ANIMATED, "The {body}")


def _draw_loss(path: pathlib.Path, problem: ml3_jax.Problem, trained: Trained, task: Any, env: envs.GoalEnv) -> None:
    """Draws the loss of the first sample of the first task over one coordinate of the policy's mean."""
    key, step = jax.random.key(SEED), jnp.zeros((), jnp.int32)
    params = problem.init(key, task)
    assert problem.collect is not None
    data = problem.collect(params, task, None, key, step)
    seen = np.asarray(problem.observe(params, data, None, key, step))[0]
    size = env.action_size
    advantage_at, action_at, mean_at = len(seen) - 3 * size - 1, len(seen) - 3 * size, len(seen) - 2 * size

    def curve(axis: int, advantage: float) -> np.ndarray:
        rows = np.tile(seen, (len(GRID), 1))
        rows[:, advantage_at], rows[:, action_at:mean_at], rows[:, mean_at : mean_at + size] = advantage, 0.0, 0.0
        rows[:, action_at + axis], rows[:, mean_at + axis] = SAMPLED, GRID
        apply = jax.vmap(trained.experiment.learned_loss.apply, (None, 0))
        return np.asarray(apply(trained.loss_params, jnp.asarray(rows)[:, None]))

    trajectories.over_action(
        path,
        GRID,
        {f"mean of action {axis + 1}": np.array([curve(axis, a) for a in ADVANTAGES]) for axis in range(min(size, 2))},
        [f"advantage {advantage:+.0f}" for advantage in ADVANTAGES],
        title=f"The learned loss of the policy's mean at the start,\nfor a sampled action {SAMPLED}; other actions are 0",
    )


def _draw_loss_over_shifts(
    path: pathlib.Path, problem: ml3_jax.Problem, trained: Trained, task: Any, env: envs.GoalEnv
) -> None:
    """Draws the learned and the plain loss of a first batch over a shift of one coordinate of the policy's mean."""
    found = {
        f"shift of the mean of action {axis + 1}": losses_over_shifts(problem, trained, task, axis)
        for axis in range(min(env.action_size, 2))
    }
    trajectories.over_action(
        path,
        GRID,
        found,
        ["learned loss", "plain loss (policy gradient)"],
        title="The losses of a first batch, over a shift of the policy's mean at all of its states",
    )


def losses_over_shifts(problem: ml3_jax.Problem, trained: Trained, task: Any, axis: int) -> np.ndarray:
    """The learned and the plain loss [2, P] of a first batch on `GRID`, as shifts of one coordinate of the policy's mean.

    They are integrals of their slopes, from the first shift on: a policy gradient has a slope that is not that of its value.
    """
    key, step = jax.random.key(SEED), jnp.zeros((), jnp.int32)
    params = problem.init(key, task)
    collect, plain_loss = problem.collect, problem.plain_loss
    assert collect is not None
    assert plain_loss is not None
    data = collect(params, task, None, key, step)
    layers = params["mean"]["params"]
    last = max(layers, key=lambda name: int(name.rpartition("_")[2]))  # its bias is added to the mean

    def losses(shift: jax.Array) -> jax.Array:
        layer = {**layers[last], "bias": layers[last]["bias"].at[axis].add(shift)}
        moved = {**params, "mean": {"params": {**layers, last: layer}}}
        learned = trained.experiment.learned_loss.apply(trained.loss_params, problem.observe(moved, data, None, key, step))
        return jnp.stack([learned, plain_loss(moved, data, None, key, step)])

    slopes = np.asarray(jax.jit(jax.vmap(jax.jacrev(losses)))(jnp.asarray(GRID)), dtype=np.float64)  # [P, 2]
    parts = np.diff(GRID)[:, None] * (slopes[1:] + slopes[:-1]) / 2
    return np.concatenate([np.zeros((1, 2)), np.cumsum(parts, axis=0)]).T
