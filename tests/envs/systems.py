"""The environments under test, one row each. An environment is built and its step is compiled once for all test files."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.reacher_mjx import ReacherMjx

B = 6  # systems in a batch


class Row(NamedTuple):
    """The facts about an environment that the tests need."""

    name: str
    options: dict[str, Any]
    extremes: list[list[float]]  # states [S] at and beyond the edges of the reachable ones
    far: list[float]  # a goal [G] out of reach
    bad: list[dict[str, Any]]  # options out of their range


REACHER = {
    "extremes": [[3.0, -3.0, 50.0, -50.0], [-3.0, 3.0, -50.0, 50.0], [3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 100.0, -100.0]],
    "far": [0.0, 3.1],
    "bad": [{"gear": 0.0}, {"armature": -1.0}, {"damping": float("nan")}, {"goal_range": 4.0}, {"start_spread": "wide"}],
}
STANDING = [0.0, 0.0, 0.55, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0]
ROWS = {
    "point_mass": Row(
        name="point_mass",
        options={"damping": 0.1},
        extremes=[[1e3, -1e3, 1e3, -1e3], [0.0, 0.0, -1e4, 1e4]],
        far=[0.0, 5.0],
        bad=[
            {"dt": 0.0},
            {"damping": 10.0},
            {"goal_radius": (1.0, 0.5)},
            {"goal_radius": (0.5, 9.0)},
            {"goal_radius": 1.0},
            {"half_plane": "top"},
            {"start_speed": -1.0},
        ],
    ),
    "mountain_car": Row(
        name="mountain_car",
        options={"start_spread": 0.1},
        extremes=[[-1.2, -1.5], [0.5, 1.5], [-1.2, 1.5], [100.0, -100.0]],
        far=[0.6, 0.0],
        bad=[{"start_spread": 0.7}, {"start_spread": -0.1}],
    ),
    "reacher": Row(name="reacher", options={}, **REACHER),
    "ant_goal": Row(
        name="ant_goal",
        options={"physics": "spring"},
        # Flat on the ground; upside down; standing, with every velocity at 10.
        extremes=[[0.0, 0.0, 0.3, 1.0, *[0.0] * 25], [0.0, 0.0, 0.5, 0.0, 1.0, *[0.0] * 24], [*STANDING, *[10.0] * 14]],
        far=[0.0, 50.0],
        bad=[{"action_limit": 2.0}, {"goal_radius": 0.0}, {"goal_radius": 100.0}, {"start_spread": -0.1}],
    ),
    "reacher, mjx": Row(name="reacher", options={"physics": "mjx"}, **REACHER),
}


class Rollout(NamedTuple):
    """States of a batch after each step."""

    obs: np.ndarray  # [B, T, S]
    reward: np.ndarray  # [B, T]
    done: np.ndarray  # [B, T]
    distance: np.ndarray  # [B, T]


class System(NamedTuple):
    """An environment, its compiled batch functions and a batch of inputs."""

    row: Row
    env: envs.GoalEnv  # `state_at` and `step` are jitted, so that all tests share their traces
    state_at: Callable[..., envs.State]  # x [B, S], goals [B, G] -> states
    step: Callable[..., envs.State]  # states, actions [B, A] -> states
    starts: np.ndarray  # [B, S]
    goals: np.ndarray  # [B, G]
    actions: np.ndarray  # [B, T, A], T the horizon

    def rollout(self, x: Any, actions: Any) -> Rollout:
        """Steps the batch from x [B, S] with actions [B, T, A]."""
        state, kept = self.state_at(x, self.goals), []
        for t in range(actions.shape[1]):
            state = self.step(state, actions[:, t])
            kept.append((state.obs, state.reward, state.done, state.metrics["distance"]))
        return Rollout(*(np.stack(column, axis=1) for column in zip(*kept, strict=True)))


@functools.cache
def build(row_name: str) -> System:
    """The system of a row of `ROWS`, in float32."""
    row = ROWS[row_name]
    env = envs.make(row.name, **row.options)
    for method in ("state_at", "step"):
        setattr(env, method, jax.jit(getattr(env, method)))

    @jax.jit
    def inputs(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start_key, goal_key, action_key = jax.random.split(key, 3)
        starts = jax.vmap(env.sample_start)(jax.random.split(start_key, B))
        goals = jax.vmap(env.sample_goal)(jax.random.split(goal_key, B))
        shape = (B, env.horizon, env.action_size)
        return starts, goals, env.action_limit * jax.random.uniform(action_key, shape, minval=-1.0)

    starts, goals, actions = (np.asarray(leaf) for leaf in inputs(jax.random.key(0)))
    return System(row, env, *batch_functions(env), starts, goals, actions)


def batch_functions(env: envs.GoalEnv) -> tuple[Callable[..., envs.State], Callable[..., envs.State]]:
    """`state_at` and `step` of a batch. All models of mjx share one program, with the numbers of the model as an argument."""
    if not isinstance(env, ReacherMjx):
        return jax.jit(jax.vmap(env.state_at)), jax.jit(jax.vmap(env.step))
    numbers = [jnp.asarray(leaf) for leaf in jax.tree.leaves(env._system)]
    return functools.partial(_mjx_state_at, numbers), functools.partial(_mjx_step, numbers)


def _mjx(numbers: list[jax.Array]) -> ReacherMjx:
    env = copy.copy(_default_mjx())
    env._system = jax.tree.unflatten(jax.tree.structure(env._system), numbers)
    return env


@functools.cache
def _default_mjx() -> ReacherMjx:
    return ReacherMjx()


@jax.jit
def _mjx_state_at(numbers: list[jax.Array], x: jax.Array, goals: jax.Array) -> envs.State:
    return jax.vmap(_mjx(numbers).state_at)(x, goals)


@jax.jit
def _mjx_step(numbers: list[jax.Array], states: envs.State, actions: jax.Array) -> envs.State:
    return jax.vmap(_mjx(numbers).step)(states, actions)


def row_of(tree: Any, b: int) -> Any:
    """Row b of every leaf of a batch."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[b], tree)
