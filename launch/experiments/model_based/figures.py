"""Figures of a trained control experiment: paths of the real system, the model's errors, an animation, the learned loss.

An experiment's `figures` calls `draw`. Here stands what is computed; `launch.trajectories` and `launch.animations` draw it.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch import animations, optimizers, plot_style, side_by_side, trajectories
from launch.evaluation import LEARNED
from launch.experiments import control
from launch.experiments.base import Experiment
from ml3_jax.problems import model_learning

SEED = 20260  # of the tasks and initialisations that are drawn; neither meta-training nor meta-test uses it
PLAIN = "plain_tuned_sgd"
UPDATES = (0, 1, 2, 5)  # whose paths are drawn
ANIMATED = (0, 1, 2)
TASKS, INITIALISATIONS = 3, 6  # drawn: tasks in the plane; initialisations where there is one task only
REACHED = 1e-3  # of one position that stops at its goal
WHEN = (0.0, 0.2, 0.5, 0.75)  # at which fractions of the horizon the loss is shown
GRID = np.linspace(-1.5, 1.5, 301)  # of an action, in limits


class Words(NamedTuple):
    """What an environment's coordinates are called."""

    positions: tuple[str, ...]
    actions: tuple[str, ...]
    position: str = "position"  # one of them
    velocity: str = "velocity"


WORDS = {
    "point_mass": Words(("x", "y"), ("acceleration along x", "acceleration along y")),
    "reacher": Words(
        ("shoulder, q1", "elbow, q2"), ("torque of the shoulder", "torque of the elbow"), "angle", "angular velocity"
    ),
    "mountain_car": Words(("position",), ("force on the car",)),
}


class Paths(NamedTuple):
    """What the real system did, on M tasks; U numbers of updates."""

    tasks: Any  # [M, ...]
    goals: np.ndarray  # [M, G]
    learned: np.ndarray  # [M, U, T + 1, S] with the learned loss
    plain: np.ndarray  # [M, U, T + 1, S] with the plain loss

    def rows(self, experiment: Experiment, step_size: float) -> dict[str, np.ndarray]:
        """The states of each loss, by its name in words."""
        learned = f"{plot_style.label(LEARNED)},\nstep size {experiment.config.inner_lr:.3g}"
        plain = plot_style.label(PLAIN).replace(", SGD, ", ", SGD,\n") + f" {step_size:.3g}"
        return {learned: self.learned, plain: self.plain}


def draw(
    robot: control.Robot,
    experiment: Experiment,
    loss_params: Any,
    results: dict[str, Any],
    folder: pathlib.Path,
    *,
    env: envs.GoalEnv,
) -> None:
    """Writes all figures of an experiment.

    Args:
      robot: the experiment's description.
      experiment: it, with the context that meta-training left.
      loss_params: the meta-trained loss.
      results: what meta_test.json holds.
      folder: where the pictures go.
      env: the real system that is shown.
    """
    step_size = results["step_size"][PLAIN]
    count = TASKS if env.position_size == 2 else INITIALISATIONS
    problem = recording_problem(robot, experiment.config, env)
    paths = real_paths(problem, experiment, loss_params, step_size, count)
    rows = paths.rows(experiment, step_size)
    if env.position_size == 2:
        _draw_in_plane(folder, rows, paths.goals, env)
    else:
        _draw_phase_portrait(folder, rows, paths.goals[0], env, robot.extra(experiment.config))
    if experiment.config.dynamics == "learned":
        _draw_model_error(folder / "model_error.png", experiment, env)
    _draw_animation(folder / "adapted.gif", paths, env)
    _draw_loss(folder / "loss.png", problem, experiment, loss_params, paths, env)


def recording_problem(robot: control.Robot, config: Any, env: envs.GoalEnv) -> ml3_jax.Problem:
    """The problem of a config whose evaluate returns {"states": [T + 1, S]} of the real system; arguments as of `draw`."""
    ensemble = control.make_ensemble(config, env) if config.dynamics == "learned" else None
    return control.make_problem(robot, config, env, ensemble=ensemble, evaluate=lambda states, goal: {"states": states})


def real_paths(
    problem: ml3_jax.Problem,
    experiment: Experiment,
    loss_params: Any,
    step_size: float,
    count: int,
    *,
    plain_name: str = "sgd",
    updates: tuple[int, ...] = UPDATES,
) -> Paths:
    """What the real system does after some updates, with either loss, on tasks of this module's own.

    Args:
      problem: of `recording_problem`.
      experiment: the experiment, with a trained context.
      loss_params: the meta-trained loss.
      step_size: of the plain loss's optimiser.
      count: M.
      plain_name: that optimiser.
      updates: U numbers of updates.
    """
    config = experiment.config
    task_key, run_key = jax.random.split(jax.random.key(SEED))
    tasks = jax.vmap(problem.sample_task, (0, None))(jax.random.split(task_key, count), None)
    optimizer, plain_optimizer = (
        optimizers.inner(config.inner_optimizer, config.inner_lr, decay_steps=config.inner_decay_steps),
        optimizers.inner(plain_name, step_size, decay_steps=config.inner_decay_steps),
    )
    steps, drawn = max(updates), jnp.array(updates)

    def by_learned_loss(task: Any, key: Array) -> ml3_jax.Adaptation:
        return ml3_jax.adapt(
            problem, experiment.learned_loss, loss_params, task, experiment.context, key, optimizer=optimizer, steps=steps
        )

    def by_plain_loss(task: Any, key: Array) -> ml3_jax.Adaptation:
        return ml3_jax.baseline(problem, task, experiment.context, key, optimizer=plain_optimizer, steps=steps)

    def recorded(descend: Callable[[Any, Array], ml3_jax.Adaptation], _: Any) -> np.ndarray:
        states = jax.jit(jax.vmap(lambda task, key: descend(task, key).trace["states"][drawn]))
        return np.asarray(states(tasks, jax.random.split(run_key, count)))

    # Side by side, as compiling a simulator takes longer than running it.
    learned, plain = side_by_side.run(recorded, (by_learned_loss, by_plain_loss), most=2)
    return Paths(tasks, np.asarray(tasks.goal), learned, plain)


def _distances(env: envs.GoalEnv, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """How far every state [M, U, T + 1, S] is from its task's goal: [M, U, T + 1]."""
    return np.asarray(env.distance(jnp.asarray(states), jnp.asarray(goals)[:, None, None]))


def _draw_in_plane(folder: pathlib.Path, rows: dict[str, np.ndarray], goals: np.ndarray, env: envs.GoalEnv) -> None:
    ends = {name: _distances(env, states, goals)[..., -1] for name, states in rows.items()}
    first = next(iter(rows.values()))[:, 0, 0]  # [M, S]
    sketches = [env.sketch(x, goal) for x, goal in zip(first, goals, strict=True)]
    body, postures = sketches[0].body, None
    linked = len(sketches[0].segments) > 0
    if linked:
        starts, wanted = (np.array([getattr(s, name) for s in sketches]) for name in ("segments", "goal_segments"))
        postures = trajectories.Postures(starts, wanted, body)
    trajectories.in_plane(
        folder / "trajectories.png",
        {name: _points(env, states, goals[0]) for name, states in rows.items()},
        ends,
        np.array([sketch.goal for sketch in sketches]),
        UPDATES,
        names=sketches[0].axes,
        unit=env.distance_unit,
        title=f"Paths of the {'tip of the ' if linked else ''}real {body}, goals and policies never seen",
        postures=postures,
    )
    if not linked:
        return
    first, second = WORDS[env.name].positions
    trajectories.in_plane(
        folder / "joint_trajectories.png",
        {name: states[..., :2] for name, states in rows.items()},
        ends,
        goals,
        UPDATES,
        names=(f"{first} ({env.distance_unit})", f"{second} ({env.distance_unit})"),
        unit=env.distance_unit,
        title=f"The same paths in the space of the {body}'s joints, where distances are measured",
    )


def _points(env: envs.GoalEnv, states: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Where the point whose path is drawn is in each state [..., S]: [..., 2]."""
    flat = states.reshape(-1, states.shape[-1])
    return np.array([env.sketch(x, goal).point for x in flat]).reshape(*states.shape[:-1], 2)


def _draw_phase_portrait(
    folder: pathlib.Path, rows: dict[str, np.ndarray], goal: np.ndarray, env: envs.GoalEnv, extra: Any
) -> None:
    goals = np.tile(goal, (INITIALISATIONS, 1))
    assert env.state_limits is not None
    trajectories.phase_portrait(
        folder / "phase_portrait.png",
        rows,
        {name: _distances(env, states, goals).min(axis=-1) for name, states in rows.items()},
        UPDATES,
        goal=float(goal[0]),
        wall=env.state_limits[0][0],
        extra=None if extra is None else np.asarray(extra),
        reached=REACHED,
        names=("position", f"velocity ({_per_second(env)})"),
        title="Position and velocity of the real car: it must swing back to climb",
    )


def _per_second(env: envs.GoalEnv) -> str:
    return f"{env.distance_unit or '1'}/s"


def _draw_model_error(path: pathlib.Path, experiment: Experiment, env: envs.GoalEnv) -> None:
    log, buffer = experiment.context.log, experiment.context.buffer
    curve = model_learning.learning_curve(log)
    if len(curve["rollouts"]) == 0:
        return
    words, size = WORDS[env.name], env.position_size
    errors = np.asarray(log.error_against_time)
    states = np.asarray(buffer.states)[: int(buffer.count)]
    still = np.sqrt(np.mean((states[:, 1:] - states[:, :1]) ** 2, axis=0))  # [T, S]

    def panel(what: str, unit: str, columns: slice) -> trajectories.ErrorPanel:
        names = words.positions if size > 1 else ("learned model",)
        named = dict(zip(names, errors[:, columns].T, strict=True))
        return trajectories.ErrorPanel(what.capitalize(), unit, named, _over_coordinates(still[:, columns]))

    fits, every = int(log.fits), experiment.config.refresh_every
    notes = f"a fit every {every} meta-steps; buffer: at most {experiment.config.buffer_rollouts} rollouts"
    if fits > len(curve["rollouts"]):
        notes += f"; the first {len(curve['rollouts'])} of {fits} fits"
    trajectories.model_error(
        path,
        env.dt * np.arange(1, len(errors) + 1),
        [
            panel(words.position, env.distance_unit, slice(0, size)),
            panel(words.velocity, _per_second(env), slice(size, 2 * size)),
        ],
        _over_coordinates(curve["horizon_error"][:, :size]),
        curve["rollouts"],
        unit=env.distance_unit,
        notes=notes,
    )


def _over_coordinates(errors: np.ndarray) -> np.ndarray:
    """Root mean square over the last axis."""
    return np.sqrt(np.mean(errors**2, axis=-1))


def _draw_animation(path: pathlib.Path, paths: Paths, env: envs.GoalEnv) -> None:
    """The first task; a rollout that broke down is left out."""
    shown = {trajectories.in_words(k): paths.learned[0, UPDATES.index(k)] for k in ANIMATED}
    shown = {name: states for name, states in shown.items() if np.isfinite(states).all()}
    if not shown:
        return
    fps = min(20, round(1 / env.dt))
    body = env.sketch(paths.learned[0, 0, 0], paths.goals[0]).body
    animations.save_gif(
        path, env, shown, paths.goals[0], title=f"The real {body}, learned loss; {animations.pace(env.dt, fps)}", fps=fps
    )


def _draw_loss(
    path: pathlib.Path, problem: ml3_jax.Problem, experiment: Experiment, loss_params: Any, paths: Paths, env: envs.GoalEnv
) -> None:
    """At states along the first task's path after the most updates, or before any where that one broke down."""
    states = next((one for one in paths.learned[0, ::-1] if np.isfinite(one).all()), None)
    if states is None:
        return
    goal, words = paths.goals[0], WORDS[env.name]
    at = [int(fraction * (len(states) - 1)) for fraction in WHEN]
    features = _features(problem, experiment, paths, states, env)[at]
    curves = {
        name: np.array([_over_one_action(experiment.learned_loss, loss_params, row, env.action_size, axis) for row in features])
        for axis, name in enumerate(words.actions)
    }
    unit = f" {env.distance_unit}" if env.distance_unit else ""
    others = "; the other coordinate of the action is 0" if env.action_size == 2 else ""
    target = _vector(goal[: env.position_size])
    trajectories.over_action(
        path,
        GRID,
        curves,
        [f"{t * env.dt:.2g} s: {_state_in_words(states[t], env)}" for t in at],
        title=f"The learned loss of an action, at states on\nthe way to the goal at {target}{unit}{others}",
    )


def _features(
    problem: ml3_jax.Problem, experiment: Experiment, paths: Paths, states: np.ndarray, env: envs.GoalEnv
) -> np.ndarray:
    """What the learned loss sees along a path of the first task, beside the action: [T, F - A]."""
    task = jax.tree.map(lambda leaf: leaf[0], paths.tasks).replace(states=jnp.asarray(states))
    init_key, key = jax.random.split(jax.random.key(SEED))  # of a policy whose actions are not looked at
    seen = problem.observe(problem.init(init_key, task), task, experiment.context, key, jnp.int32(0))
    return np.asarray(seen)[:, : -env.action_size]


def _over_one_action(loss: ml3_jax.LearnedLoss, loss_params: Any, seen: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The loss [P] of one sample as one coordinate of its action runs over `GRID` and the others are 0."""
    actions = np.zeros((len(GRID), 1, size))
    actions[:, 0, axis] = GRID
    batches = np.concatenate([np.tile(seen, (len(GRID), 1, 1)), actions], axis=-1).astype(np.float32)
    return np.asarray(jax.vmap(loss.apply, (None, 0))(loss_params, jnp.asarray(batches)))


def _vector(values: np.ndarray) -> str:
    numbers = [f"{value:.2f}".replace("-0.00", "0.00") for value in values]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def _state_in_words(x: np.ndarray, env: envs.GoalEnv) -> str:
    unit = f" {env.distance_unit}" if env.distance_unit else ""
    position, velocity = _vector(x[: env.position_size]), _vector(x[env.position_size :])
    return f"at {position}{unit}, moving at {velocity} {_per_second(env)}"
