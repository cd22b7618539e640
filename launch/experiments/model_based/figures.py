"""Figures of a model-based experiment: paths on the real system, errors of the model, an animation, the learned loss."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
import ml3_jax
from launch.curves import LEARNED
from launch.experiment import Experiment, Trained
from launch.figures import rollouts, style, trajectories
from launch.figures.rollouts import Paths
from ml3_jax.problems import model_learning

PLAIN = "plain_tuned_sgd"
UPDATES, ANIMATED = (0, 1, 2, 5), (0, 1, 2)  # numbers of updates before a drawn path
TASKS, INITIALISATIONS = 3, 6  # drawn: tasks in the plane, or initialisations of the only task
REACHED = 1e-3  # distance at which a system of one position has reached its goal
WHEN = (0.0, 0.2, 0.5, 0.75)  # times of the drawn losses, in horizons
GRID = np.linspace(-1.5, 1.5, 301)  # an action, in limits


class Words(NamedTuple):
    """Names of an environment's coordinates."""

    positions: tuple[str, ...]
    actions: tuple[str, ...]
    position: str = "position"  # any one of them
    velocity: str = "velocity"


WORDS = {
    "point_mass": Words(("x", "y"), ("acceleration along x", "acceleration along y")),
    "reacher": Words(
        ("shoulder, q1", "elbow, q2"), ("torque of the shoulder", "torque of the elbow"), "angle", "angular velocity"
    ),
    "mountain_car": Words(("position",), ("force on the car",)),
}


def draw(trained: Trained, problem: ml3_jax.Problem, env: envs.GoalEnv, extra: Any, folder: pathlib.Path) -> None:
    """Writes all figures of an experiment.

    `problem` is the `control.recording_problem` on env, `extra` the information for the task loss alone.
    """
    count = TASKS if env.position_size == 2 else INITIALISATIONS
    paths = rollouts.record(trained, problem, count, plain=PLAIN, updates=UPDATES)
    config = trained.experiment.config
    learned = f"{style.label(LEARNED)},\nstep size {config.inner_lr:.3g}"
    plain = style.label(PLAIN).replace(", SGD, ", ", SGD,\n") + f" {trained.results['step_size'][PLAIN]:.3g}"
    rows = {learned: paths.learned, plain: paths.plain}
    if env.position_size == 2:
        _draw_in_plane(folder, rows, paths, env)
    else:
        _draw_phase_portrait(folder, rows, paths, env, extra)
    if config.dynamics == "learned":
        _draw_model_error(folder / "model_error.png", trained.experiment, env)
    rollouts.draw_animation(folder / "adapted.gif", env, paths, ANIMATED, "The real {body}")
    _draw_loss(folder / "loss.png", problem, trained, paths, env)


def _draw_in_plane(folder: pathlib.Path, rows: dict[str, np.ndarray], paths: Paths, env: envs.GoalEnv) -> None:
    sketch = rollouts.sketch_starts(env, paths)[0]
    linked = len(sketch.segments) > 0
    title = f"Paths of the {'tip of the ' if linked else ''}real {{body}}, new goals and policies"
    rollouts.draw_in_plane(folder / "trajectories.png", env, paths, rows, title, postures=linked)
    if not linked:
        return
    first, second = WORDS[env.name].positions
    trajectories.in_plane(
        folder / "joint_trajectories.png",
        {name: states[..., :2] for name, states in rows.items()},
        {name: rollouts.distances(env, states, paths.goals)[..., -1] for name, states in rows.items()},
        paths.goals,
        UPDATES,
        names=(f"{first} ({env.distance_unit})", f"{second} ({env.distance_unit})"),
        unit=env.distance_unit,
        title=f"The same paths in the space of the {sketch.body}'s joints, with distances in this space",
    )


def _draw_phase_portrait(
    folder: pathlib.Path, rows: dict[str, np.ndarray], paths: Paths, env: envs.GoalEnv, extra: Any
) -> None:
    assert env.state_limits is not None
    trajectories.phase_portrait(
        folder / "phase_portrait.png",
        rows,
        {name: rollouts.distances(env, states, paths.goals).min(axis=-1) for name, states in rows.items()},
        UPDATES,
        goal=float(paths.goals[0, 0]),
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


def _draw_loss(path: pathlib.Path, problem: ml3_jax.Problem, trained: Trained, paths: Paths, env: envs.GoalEnv) -> None:
    """Draws the loss at states of the first task's path, after as many updates as have a finite path."""
    states = next((one for one in paths.learned[0, ::-1] if np.isfinite(one).all()), None)
    if states is None:
        return
    goal, words = paths.goals[0], WORDS[env.name]
    at = [int(fraction * (len(states) - 1)) for fraction in WHEN]
    features = _features(problem, trained.experiment, paths, states, env)[at]
    curves = {
        name: np.array([_over_one_action(trained, row, env.action_size, axis) for row in features])
        for axis, name in enumerate(words.actions)
    }
    others = "; the other coordinate of the action is 0" if env.action_size == 2 else ""
    target = _vector(goal[: env.position_size], env.distance_unit)
    trajectories.over_action(
        path,
        GRID,
        curves,
        [f"{t * env.dt:.2g} s: {_state_in_words(states[t], env)}" for t in at],
        title=f"The learned loss of an action, at states on\nthe way to the goal at {target}{others}",
    )


def _features(
    problem: ml3_jax.Problem, experiment: Experiment, paths: Paths, states: np.ndarray, env: envs.GoalEnv
) -> np.ndarray:
    """Features [T, F - A] of the learned loss along a path of the first task, without the action."""
    task = jax.tree.map(lambda leaf: leaf[0], paths.tasks).replace(states=jnp.asarray(states))
    init_key, key = jax.random.split(jax.random.key(rollouts.SEED))  # of any policy: its actions are cut off
    seen = problem.observe(problem.init(init_key, task), task, experiment.context, key, jnp.int32(0))
    return np.asarray(seen)[:, : -env.action_size]


def _over_one_action(trained: Trained, seen: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The loss [P] of one sample with one coordinate of its action from `GRID` and the others 0."""
    actions = np.zeros((len(GRID), 1, size))
    actions[:, 0, axis] = GRID
    batches = np.concatenate([np.tile(seen, (len(GRID), 1, 1)), actions], axis=-1).astype(np.float32)
    apply = trained.experiment.learned_loss.apply
    return np.asarray(jax.vmap(apply, (None, 0))(trained.loss_params, jnp.asarray(batches)))


def _vector(values: np.ndarray, unit: str) -> str:
    numbers = [f"{value:.2f}".replace("-0.00", "0.00") for value in values]
    return (numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})") + f" {unit}".rstrip()


def _state_in_words(x: np.ndarray, env: envs.GoalEnv) -> str:
    size = env.position_size
    return f"at {_vector(x[:size], env.distance_unit)}, moving at {_vector(x[size:], _per_second(env))}"
