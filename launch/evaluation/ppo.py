"""The baseline "ppo": PPO of brax.training on one task from scratch, trained until its curve is flat.

`curves` trains one policy for each task. System, distribution of starts, reward and count of environment steps are those of
the learned loss. Each curve is kept in a folder for the next meta-test. The wrapper of Brax returns each training environment
to its first start after an episode; evaluations draw new starts.
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

LAST, GAIN = 0.2, 0.1  # a curve is flat if its best value gains less than a tenth of its total gain in the last fifth
WORKERS = 4  # most runs in parallel
AXIS = "i"  # name of the device axis in brax.training
ENDS = "best so far flat"  # the stopping rule, part of the cache key


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """The length of a run, and arguments of `brax.training.agents.ppo.train`, which have the names of that function."""

    env_steps: int = 200_000  # the least; training then continues until the curve is flat
    most_env_steps: int = 800_000
    evaluations: int = 41  # in the first env_steps, one of them before any update; later ones have the same distance
    hidden: tuple[int, ...] = (64, 64)  # of the policy and of the value function
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


class Curve(NamedTuple):
    """One PPO run; E evaluations, the first before any update."""

    env_steps: list[int]  # [E]
    values: dict[str, list[float]]  # {METRIC: [E]}, mean over episodes with deterministic actions
    flat: bool  # see `is_flat`


class StoppedError(Exception):
    """The run was told to stop."""


class _EndedError(Exception):
    """The run ends before the end of brax.training."""


class OneTask(Env):
    """A system with one goal as a Brax environment: actions in [-1, 1], the experiment's reward, done only at the horizon.

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
        """Arguments as in `ml3_jax.problems.model_free.make_problem`; distance: (x, goal) -> scalar."""
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
        # The wrapper of Brax resets only pipeline_state and obs at the end of an episode.
        pipeline_state: Any = {"inside": inside, "time": jnp.zeros((), jnp.int32)}
        return State(pipeline_state, self._inputs(inside.obs, self._goal), zero, zero, {"distance_at_end": zero}, {})

    def step(self, state: State, action: Array) -> State:
        pipeline_state: Any = state.pipeline_state
        before = pipeline_state["inside"]
        after = self._system.step(before, self._system.action_limit * jnp.clip(action, -1.0, 1.0))
        time = pipeline_state["time"] + 1
        at_end = jnp.where(time == self._horizon, self._distance(after.obs, self._goal), 0.0)
        changed: Any = state  # pyright does not see flax's replace
        return changed.replace(
            obs=self._inputs(after.obs, self._goal),
            reward=self._reward(before.obs, action, after.obs, self._goal),
            metrics=dict(state.metrics, distance_at_end=at_end),
            pipeline_state={"inside": after, "time": time},
        )


def is_flat(values: Sequence[float]) -> bool:
    """Whether the best value so far gained less than `GAIN` of its total gain in the last fifth of a curve of returns.

    Each end is a mean of neighbouring evaluations. A fall does not make a curve flat: it may rise again.
    """
    best = np.maximum.accumulate(np.asarray(values, dtype=np.float64))
    tail = max(1, round(LAST * best.size / 2))
    final, before = best[-tail:].mean(), best[-2 * tail - 1 : -tail].mean()
    # The distance between the two means is half of the last fifth.
    return bool(final - before <= GAIN / 2 * (final - best[0]))


def train(task: OneTask, settings: PPOSettings, *, horizon: int, seed: int, stop: threading.Event | None = None) -> Curve:
    """Trains one policy from scratch until its curve is flat or not finite.

    Args:
      task: the task.
      settings: of PPO.
      horizon: steps of an episode.
      seed: of every random draw.
      stop: once set, training raises `StoppedError` at its next evaluation.
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
    """One curve per task, read from the folder or else trained, in parallel.

    Args:
      tasks: the tasks.
      settings: of PPO.
      folder: the cache, a file for each curve.
      names: a JSON value for each task: everything besides the other arguments that determines its run.
      horizon: steps of an episode.
      seed: of the first task; the next tasks have the next seeds.

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

    return thread_pool.run(kept_or_trained, range(len(tasks)), most=WORKERS)


def _write(path: pathlib.Path, curve: Curve, about: Any) -> None:
    """Keeps a curve; values that are not finite become null, as JSON has no NaN."""
    values = {name: [v if math.isfinite(v) else None for v in column] for name, column in curve.values.items()}
    files.write_json(path, {"about": about, **curve._replace(values=values)._asdict()})


def _read(path: pathlib.Path, about: Any) -> Curve | None:
    """The kept curve; None if it is missing, damaged or of another run."""
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
    """Runs brax.training with `evaluations` evenly spaced calls of `evaluated`, which may raise to end the run."""
    from brax.training.agents.ppo import networks
    from brax.training.agents.ppo import train as ppo

    _restore_device_put_replicated()
    arguments = dataclasses.asdict(settings)
    for name in ("env_steps", "most_env_steps", "evaluations", "hidden"):
        del arguments[name]
    sizes = {"policy_hidden_layer_sizes": settings.hidden, "value_hidden_layer_sizes": settings.hidden}
    ppo.train(
        task,
        env_steps,
        episode_length=horizon,
        normalize_observations=True,
        network_factory=functools.partial(networks.make_ppo_networks, **sizes),
        seed=seed,
        num_evals=evaluations,
        num_eval_envs=32,
        deterministic_eval=True,
        progress_fn=evaluated,
        max_devices_per_host=1,  # else the split of environments and mini-batches depends on the number of devices
        **arguments,
    )


def _restore_device_put_replicated() -> None:
    """Defines `jax.device_put_replicated`, which brax.training calls and newer versions of jax lack.

    Its arrays have the sharding and types of those from the pmap of brax.training: others cause a second compilation.
    """
    if hasattr(jax, "device_put_replicated"):
        return

    def device_put_replicated(tree: Any, devices: Sequence[Any]) -> Any:
        sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

        def replicate(leaf: Any) -> Array:
            leaf = jnp.asarray(leaf)
            return jax.device_put(jnp.stack([leaf.astype(leaf.dtype)] * len(devices)), sharding)

        return jax.tree.map(replicate, tree)

    patched: Any = jax
    patched.device_put_replicated = device_put_replicated
