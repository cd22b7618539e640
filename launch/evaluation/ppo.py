"""The baseline "ppo": brax.training's PPO on one task from scratch, run until its curve is flat.

`curves` trains one policy for each task, on the same system, distribution of starts, reward and count of environment steps as
the learned loss's, and keeps each curve in a folder, so that a second meta-test does not compute it again. As Brax's wrapper
has it, each of a run's environments goes back to the start that was drawn for it first; evaluations are from starts drawn anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from envs import Env, State
from launch.runtime import files, thread_pool

LAST, GAIN = 0.2, 0.1  # flat: in the last fifth the best so far gains less than a tenth of the whole
WORKERS = 4  # runs side by side at most
AXIS = "i"  # of devices, as brax.training calls it
ENDS = "best so far flat"  # when a run does; curves that were kept under another rule are not taken for those of this one


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """Arguments of `brax.training.agents.ppo.train`, and how long it runs."""

    env_steps: int = 200_000  # at least; then on until the curve is flat
    most_env_steps: int = 800_000  # or until these are taken
    evaluations: int = 41  # in them, the first before any update; as far apart from then on
    num_envs: int = 16
    unroll_length: int = 25
    batch_size: int = 16
    num_minibatches: int = 4
    num_updates_per_batch: int = 8
    learning_rate: float = 3e-4
    entropy_cost: float = 1e-3
    discounting: float = 0.97
    gae_lambda: float = 0.95
    reward_scaling: float = 1.0
    hidden: tuple[int, ...] = (64, 64)  # of the policy and of the value function


class Curve(NamedTuple):
    """One PPO run; E evaluations, the first before any update."""

    env_steps: list[int]  # [E]
    values: dict[str, list[float]]  # {METRIC: [E]}, each the mean over episodes of the mean actions
    flat: bool  # see `is_flat`


class StoppedError(Exception):
    """Nobody waits for a run any more."""


class _EndedError(Exception):
    """A run has come to its end before brax.training's."""


class OneTask(Env):
    """A system with one goal as `brax.training` wants it: actions in [-1, 1], the experiment's reward, no end but the horizon.

    The sum of its metric "distance_at_end" over an episode is the last distance.
    """

    def __init__(
        self,
        system: Any,
        goal: Array,
        *,
        sample_start: Callable[[Array], Array],
        inputs: Callable[[Array, Array], Array],
        reward: Callable[[Array, Array, Array, Array], Array],
        distance: Callable[[Array, Array], Array],
        horizon: int,
    ):
        """Arguments are those of `ml3_jax.problems.model_free.make_problem`; distance: (x, goal) -> scalar."""
        self._system, self._goal, self._horizon = system, goal, horizon
        self._sample_start, self._inputs, self._reward, self._distance = sample_start, inputs, reward, distance

    @property
    def observation_size(self) -> int:
        return jax.eval_shape(self._inputs, jnp.zeros(self._system.observation_size), self._goal).shape[0]

    @property
    def action_size(self) -> int:
        return self._system.action_size

    @property
    def backend(self) -> str:
        return self._system.backend

    def reset(self, rng: Array) -> State:
        inside = self._system.state_at(self._sample_start(rng), self._goal)
        zero = jnp.zeros(())
        # Brax's wrapper puts back pipeline_state and obs at the end of an episode, and nothing else.
        pipeline_state: Any = {"inside": inside, "time": jnp.zeros((), jnp.int32)}
        return State(pipeline_state, self._inputs(inside.obs, self._goal), zero, zero, {"distance_at_end": zero}, {})

    def step(self, state: State, action: Array) -> State:
        begun: Any = state.pipeline_state
        before = begun["inside"]
        after = self._system.step(before, self._system.action_limit * jnp.clip(action, -1.0, 1.0))
        time = begun["time"] + 1
        at_end = jnp.where(time == self._horizon, self._distance(after.obs, self._goal), 0.0)
        changed: Any = state  # pyright does not see flax's replace
        return changed.replace(
            obs=self._inputs(after.obs, self._goal),
            reward=self._reward(before.obs, action, after.obs, self._goal),
            metrics=dict(state.metrics, distance_at_end=at_end),
            pipeline_state={"inside": after, "time": time},
        )


def is_flat(values: Sequence[float]) -> bool:
    """Whether the best so far gained less than `GAIN` of its whole gain in the last fifth of a curve of returns.

    Each end is a mean of neighbouring evaluations. A curve that has just fallen is not flat for that: it may rise again.
    """
    best = np.maximum.accumulate(np.asarray(values, dtype=np.float64))
    tail = max(1, round(LAST * best.size / 2))
    final, before = best[-tail:].mean(), best[-2 * tail - 1 : -tail].mean()
    # The two means lie half of the last fifth apart.
    return bool(final - before <= GAIN / 2 * (final - best[0]))


def train(task: OneTask, settings: PPOSettings, *, horizon: int, seed: int, stop: threading.Event | None = None) -> Curve:
    """One policy from scratch, until its curve is flat; one that diverged is left at that.

    Args:
      task: the task.
      settings: of PPO.
      horizon: steps of an episode.
      seed: what everything follows from.
      stop: once set, training ends with `StoppedError` at its next evaluation.
    """
    curve = Curve([], {"return": [], "distance": []}, False)
    most = max(settings.env_steps, settings.most_env_steps)

    def evaluated(env_steps: int, metrics: Mapping[str, Any]) -> None:
        nonlocal curve
        if stop is not None and stop.is_set():
            raise StoppedError
        curve.env_steps.append(int(env_steps))
        curve.values["return"].append(float(metrics["eval/episode_reward"]))
        curve.values["distance"].append(float(metrics["eval/episode_distance_at_end"]))
        returns = curve.values["return"]
        all_taken = env_steps >= most
        curve = curve._replace(flat=(all_taken or len(returns) >= settings.evaluations) and is_flat(returns))
        if curve.flat or all_taken or not math.isfinite(returns[-1]):
            raise _EndedError

    evaluations = 1 + math.ceil((settings.evaluations - 1) * most / settings.env_steps)
    with contextlib.suppress(_EndedError):
        _train(task, settings, most, evaluations, evaluated, horizon=horizon, seed=seed)
    return curve


def curves(
    tasks: Sequence[OneTask], settings: PPOSettings, folder: pathlib.Path, *, names: Sequence[Any], horizon: int, seed: int
) -> list[Curve]:
    """One curve a task, read from the folder where it was computed before; runs go side by side, one a core.

    Args:
      tasks: the tasks.
      settings: of PPO.
      folder: where curves are kept, a file for each.
      names: a JSON value for each task that says all that it depends on.
      horizon: steps of an episode.
      seed: what all follows from.

    Raises:
      ValueError: not as many names as tasks.
    """
    if len(tasks) != len(names):
        raise ValueError(f"names: expected one for each of {len(tasks)} tasks, got {len(names)}")

    def kept_or_trained(index: int, stop: threading.Event) -> Curve:
        run = {"settings": dataclasses.asdict(settings), "ends": ENDS, "horizon": horizon, "seed": seed + index}
        about = {"task": names[index], **run}
        text = json.dumps(about, sort_keys=True)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        curve = _read(path, json.loads(text))
        if curve is None:
            print(f"ppo: task {index + 1} of {len(tasks)}", flush=True)
            curve = train(tasks[index], settings, horizon=horizon, seed=seed + index, stop=stop)
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, curve, about)
        return curve

    # What a run computes does not depend on its neighbours.
    return thread_pool.run(kept_or_trained, range(len(tasks)), most=WORKERS)


def _write(path: pathlib.Path, curve: Curve, about: Any) -> None:
    """Keeps a curve; what is not finite becomes null, as JSON has no NaN."""
    values = {name: [v if math.isfinite(v) else None for v in column] for name, column in curve.values.items()}
    files.write_json(path, {"about": about, **curve._replace(values=values)._asdict()})


def _read(path: pathlib.Path, about: Any) -> Curve | None:
    """A kept curve, or None where there is none that is whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = content["values"].items()
        values = {name: [math.nan if v is None else v for v in column] for name, column in columns}
        return Curve(content["env_steps"], values, content["flat"]) if content["about"] == about else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _train(
    task: OneTask,
    settings: PPOSettings,
    env_steps: int,
    evaluations: int,
    evaluated: Callable[[int, Mapping[str, Any]], None],
    *,
    horizon: int,
    seed: int,
) -> None:
    """Runs brax.training for so many steps and evaluations, or until `evaluated`, which gets each of these, raises."""
    from brax.training.agents.ppo import networks
    from brax.training.agents.ppo import train as ppo

    _mend_jax()
    ppo.train(
        task,
        env_steps,
        num_envs=settings.num_envs,
        episode_length=horizon,
        learning_rate=settings.learning_rate,
        entropy_cost=settings.entropy_cost,
        discounting=settings.discounting,
        gae_lambda=settings.gae_lambda,
        unroll_length=settings.unroll_length,
        batch_size=settings.batch_size,
        num_minibatches=settings.num_minibatches,
        num_updates_per_batch=settings.num_updates_per_batch,
        normalize_observations=True,
        reward_scaling=settings.reward_scaling,
        network_factory=functools.partial(
            networks.make_ppo_networks,
            policy_hidden_layer_sizes=settings.hidden,
            value_hidden_layer_sizes=settings.hidden,
        ),
        seed=seed,
        num_evals=evaluations,
        num_eval_envs=32,
        deterministic_eval=True,
        progress_fn=evaluated,
        max_devices_per_host=1,  # or it would split environments and mini-batches among the devices that there happen to be
    )


def _mend_jax() -> None:
    """Gives jax back `device_put_replicated`, which it dropped and brax.training still calls: each leaf once a device.

    What it makes is placed and typed as what brax.training's pmap returns, or all would be compiled once for the first
    update and once for the others.
    """
    if hasattr(jax, "device_put_replicated"):
        return

    def replicated(tree: Any, devices: Sequence[Any]) -> Any:
        placed = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

        def of_leaf(leaf: Any) -> Array:
            leaf = jnp.asarray(leaf)
            return jax.device_put(jnp.stack([leaf.astype(leaf.dtype)] * len(devices)), placed)

        return jax.tree.map(of_leaf, tree)

    mended: Any = jax
    mended.device_put_replicated = replicated
