"""Meta-test of one scenario: all curves on the same tasks, initialisations and data. Step sizes are tuned on other draws.

`launch.meta_test` calls `evaluate` for each scenario; `step_size_search` tunes the step sizes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

import ml3_jax
from launch import optimizers
from launch.curves import LEARNED, MAML, PRETRAINED, SAME_LR, TUNED, UNTRAINED
from launch.errors import UsageError
from launch.evaluation import step_size_search
from launch.experiment import Experiment, Scenario
from launch.runtime import thread_pool
from ml3_jax import sharding
from ml3_jax.optimizers import LearnedOptimizer

TASKS_AT_ONCE = 20  # tasks under one vmap: more exceed the cache of a CPU, and all of them may exceed its memory

# (step size, draw, ends_only=False, schedule=constant) -> {METRIC: [M, K + 1]}. With ends_only, only steps 0 and K are
# evaluated; the values between them repeat step 0.
CurveFn = Callable[..., dict[str, np.ndarray]]
# (step size, draw, learned parts as in `as_parts`, loss_params for the probe, ends_only=False, schedule=constant) -> the same
DescentFn = Callable[..., dict[str, np.ndarray]]


class Draw(NamedTuple):
    """Tasks, each with an initial optimizee and the key of its data."""

    tasks: Any  # each leaf [M, ...]
    keys: Array  # [M]
    params: Any  # each leaf [M, ...]


class Outcome(NamedTuple):
    """The result of one scenario; NAME is the name of a curve."""

    traces: dict[str, dict[str, np.ndarray]]  # {NAME: {METRIC: [M, K + 1]}}, not finite where diverged
    step_sizes: dict[str, float]
    schedules: dict[str, "Tuned"]  # of the curves that were tuned
    sweeps: dict[str, step_size_search.Sweep]
    tasks: list[Any]  # M JSON values
    tested: Any  # the tasks themselves, each leaf [M, ...]


class Tuned(NamedTuple):
    """The best step size and schedule of a curve on the tuning draw."""

    step_size: float
    schedule: str  # a name in `optimizers.SCHEDULES`
    tried: dict[str, dict[str, float | None]]  # {SCHEDULE: {"step_size", "final"}}, the best step size with each


class Watch(NamedTuple):
    """What `evaluate` reports while it works."""

    # the learned, the untrained and the plain loss at the step size of the config, without sweeps
    first: Callable[[Outcome], None]
    descent: Callable[[], None]  # one more descent of a search is done; called in several threads


def descents(scenario: Scenario) -> int:
    """How many descents the searches of a scenario take, if no range is widened."""
    controls = sum(control is not None for control in (scenario.pretrain, scenario.maml))
    losses = 2 + len(TUNED) + len(TUNED) * controls
    scheduled = (len(TUNED) + controls) * (len(optimizers.SCHEDULES) - 1)
    return losses * len(step_size_search.FIRST_RANGE) + scheduled * step_size_search.NEIGHBOURS


def draws(scenario: Scenario, key: Array, num_tasks: int) -> tuple[Draw, Draw]:
    """(the tested draw, the draw for tuning step sizes), independent of each other."""
    # The initialiser is compiled once, outside the descents: that takes longer than a descent.
    init = jax.jit(jax.vmap(scenario.problem.init))

    def draw(key: Array, sample: Callable[[Array, int], Any]) -> Draw:
        tasks_key, init_key, runs_key = jax.random.split(key, 3)
        tasks = sample(tasks_key, num_tasks)
        came = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tasks)}
        if came != {(num_tasks,)}:
            raise UsageError(
                f"sample_tasks(key, {num_tasks}) must return leaves with a leading axis of {num_tasks}, got {sorted(came)}"
            )
        params = strongly_typed(init(jax.random.split(init_key, num_tasks), tasks))
        return Draw(tasks, jax.random.split(runs_key, num_tasks), params)

    tested_key, tuning_key = jax.random.split(key)
    sample_tuning_tasks = scenario.sample_tuning_tasks or scenario.draw_tasks
    return draw(tested_key, scenario.draw_tasks), draw(tuning_key, sample_tuning_tasks)


def strongly_typed(tree: Any) -> Any:
    """The same arrays without weak types, like those from pretraining, so that both share one compiled descent."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), tree)


def evaluate(
    experiment: Experiment,
    scenario: Scenario,
    learned: Any,
    untrained: Any,
    *,
    key: Array,
    num_tasks: int,
    steps: int,
    watch: Watch | None = None,
) -> Outcome:
    """All curves of a scenario: M = `num_tasks` tasks in each draw, K = `steps` inner steps; all draws follow from `key`.

    `learned` and `untrained` are the learned parts after and before meta-training, see `as_parts`. With learned step sizes,
    the step size of a curve scales them all: at that of the config they are as learned. `watch` is told of the first curves,
    before any step size is tuned, and of the progress of the searches.
    """
    inner, config_lr = experiment.config.inner_optimizer, float(experiment.config.inner_lr)
    decay_steps = experiment.config.inner_decay_steps
    draw_key, *control_keys = jax.random.split(key, 3)
    tested, tuning_draw = draws(scenario, draw_key, num_tasks)
    by_parts = make_learned(experiment, scenario, steps)
    same = make_descent(scenario, None, inner, steps, decay_steps)
    plain = {name: make_descent(scenario, None, optimizer, steps) for name, optimizer in TUNED.items()}
    seen = as_parts(learned).loss_params

    def descending(descent: DescentFn) -> CurveFn:
        return lambda step_size, draw, *options: descent(step_size, draw, None, seen, *options)

    fns = {LEARNED: by_parts(learned), UNTRAINED: by_parts(untrained), SAME_LR: descending(same)}
    step_sizes = dict.fromkeys(fns, config_lr)
    traces = dict(zip(fns, _curves(fns, step_sizes, tested), strict=True))
    described = scenario.describe(tested.tasks) if scenario.describe else list(range(num_tasks))
    if watch is not None:
        watch.first(Outcome(traces, step_sizes, {}, {}, described, tested.tasks))
    done = None if watch is None else watch.descent
    fns |= {name: descending(descent) for name, descent in plain.items()}
    searches = {name: make_search(scenario, fn, tuning_draw, done) for name, fn in fns.items()}
    for name, optimizer in TUNED.items():
        if optimizer == inner and not decay_steps:
            searches[SAME_LR] = searches[name]  # the same loss and optimizer share one search
    controls: dict[str, list[tuple[CurveFn, step_size_search.Search]]] = {}  # each from SGD and from Adam
    for name, train, train_key in zip((PRETRAINED, MAML), (scenario.pretrain, scenario.maml), control_keys, strict=True):
        if train is not None:
            params = train(train_key)
            curves = [from_params(fns[tuned], params) for tuned in TUNED]
            controls[name] = [(curve, make_search(scenario, curve, tuning_draw, done)) for curve in curves]
    # The learned loss runs at the step size of the config. Its search widens the range to its best step size.
    searched = [searches[name] for name in (LEARNED, *TUNED)] + [search for pairs in controls.values() for _, search in pairs]
    exponents = step_size_search.common_range(searched)
    for name, pairs in controls.items():
        fns[name], searches[name] = min(pairs, key=lambda pair: pair[1].badness(pair[1].best(exponents)))

    others = {name: fns[name] for name in (*TUNED, *controls)}
    tuned = {name: tuned_schedule(scenario, fns[name], tuning_draw, searches[name], exponents, done) for name in others}
    step_sizes |= {name: found.step_size for name, found in tuned.items()}
    schedules = {name: found.schedule for name, found in tuned.items()}
    traces |= dict(zip(others, _curves(others, step_sizes, tested, schedules), strict=True))
    traces |= rival_curves(scenario, control_keys[0], tested, steps)
    step_size_search.judge_all(searches.values(), exponents)
    sweeps = {name: search.sweep(exponents) for name, search in searches.items()}
    return Outcome(traces, step_sizes, tuned, sweeps, described, tested.tasks)


def rival_curves(scenario: Scenario, key: Array, draw: Draw, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """{NAME: {METRIC: [M, steps + 1]}} of the scenario's rivals on a draw, trained with `key`."""
    wanted = (scenario.metric, *scenario.other_metrics)
    found = {name: train(key)(draw.tasks, draw.keys, steps) for name, train in scenario.rivals.items()}
    return {name: {metric: trace[metric] for metric in wanted} for name, trace in found.items()}


def tuned_schedule(
    scenario: Scenario,
    fn: CurveFn,
    draw: Draw,
    constant: step_size_search.Search,
    exponents: Sequence[int],
    done: Callable[[], None] | None = None,
) -> Tuned:
    """The best step size and schedule on a draw. `constant` is the search without a schedule, over `exponents`.

    A schedule is tried around the best constant step size; the range widens until the best one lies inside.
    """
    first = constant.best(exponents)
    found = {optimizers.CONSTANT: (constant, first)}
    for name in optimizers.SCHEDULES:
        if name != optimizers.CONSTANT:
            search = make_search(scenario, fn, draw, done, schedule=name)
            found[name] = search, step_size_search.around(search, first)
    best = min(found, key=lambda name: found[name][0].badness(found[name][1]))
    tried = {
        name: {"step_size": step_size_search.step_size(exponent), "final": search.sweep([exponent]).final[0]}
        for name, (search, exponent) in found.items()
    }
    return Tuned(step_size_search.step_size(found[best][1]), best, tried)


def as_parts(learned: Any) -> ml3_jax.MetaParams:
    """A `MetaParams`, given as itself, or as loss_params if a loss is all that is learned."""
    return learned if isinstance(learned, ml3_jax.MetaParams) else ml3_jax.MetaParams(learned, None, None)


def make_learned(experiment: Experiment, scenario: Scenario, steps: int) -> Callable[[Any], CurveFn]:
    """The curve of learned parts: their loss, from their initialisation, with their inner optimizer."""
    config = experiment.config
    learned = experiment.learned_optimizer
    optimizer = config.inner_optimizer if learned is None else Scaled(learned, float(config.inner_lr))
    descent = make_descent(scenario, experiment.learned_loss, optimizer, steps, config.inner_decay_steps)

    def of_parts(given: Any) -> CurveFn:
        parts = as_parts(given)

        def curve(step_size: float, draw: Draw, *options: Any) -> dict[str, np.ndarray]:
            return descent(step_size, draw, parts, parts.loss_params, *options)

        return curve if parts.init_params is None else from_params(curve, parts.init_params)

    return of_parts


def _curves(
    fns: Mapping[str, CurveFn], step_sizes: Mapping[str, float], draw: Draw, schedules: Mapping[str, str] | None = None
) -> list[dict[str, np.ndarray]]:
    """Each curve on a draw, at its step size and with its schedule."""

    def curve(name: str, _: Any) -> dict[str, np.ndarray]:
        return fns[name](step_sizes[name], draw, False, (schedules or {}).get(name, optimizers.CONSTANT))

    return thread_pool.run(curve, fns, most=step_size_search.WORKERS)


def from_params(fn: CurveFn, params: Any) -> CurveFn:
    """The curve with every optimizee started from the same `params`."""

    def curve(step_size: float, draw: Draw, *options: Any) -> dict[str, np.ndarray]:
        count = draw.keys.shape[0]
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), params)
        return fn(step_size, draw._replace(params=copies), *options)

    return curve


def make_search(
    scenario: Scenario,
    fn: CurveFn,
    draw: Draw,
    done: Callable[[], None] | None = None,
    schedule: str = optimizers.CONSTANT,
) -> step_size_search.Search:
    """The search over step sizes of a curve on a draw, by the metric of the scenario; `done` is called after each descent."""

    def judge(step_size: float) -> tuple[np.ndarray, np.ndarray]:
        curve = fn(step_size, draw, True, schedule)[scenario.metric]
        if done is not None:
            done()
        return curve[:, 0], curve[:, -1]

    return step_size_search.Search(judge, maximize=scenario.maximize)


class Scaled(NamedTuple):
    """A learned inner optimizer, whose updates a step size scales."""

    optimizer: LearnedOptimizer
    initial: float  # the step size at which it is as learned

    def make(self, optimizer_params: Any, step_size: Array) -> optax.GradientTransformation:
        """The optimizer at a step size."""
        return optax.chain(self.optimizer.make(optimizer_params), optax.scale(step_size / self.initial))


def make_descent(
    scenario: Scenario, learned_loss: ml3_jax.LearnedLoss | None, optimizer: str | Scaled, steps: int, decay_steps: int = 0
) -> DescentFn:
    """A descent of all tasks of a draw, compiled once for all step sizes and learned parameters.

    `learned_loss` is the descended loss; None: the plain loss. For a name and `decay_steps` see `optimizers.inner`.
    """
    compiled = _compiled(scenario.problem, scenario.probe, learned_loss, optimizer, steps, decay_steps)

    def curve(
        step_size: float,
        draw: Draw,
        learned: Any,
        seen_by_probe: Any,
        ends_only: bool = False,
        schedule: str = optimizers.CONSTANT,
    ) -> dict[str, np.ndarray]:
        if decay_steps and schedule != optimizers.CONSTANT:
            raise ValueError(
                f"schedule: expected '{optimizers.CONSTANT}' for step sizes that decay themselves, got '{schedule}'"
            )
        every = np.int32(steps if ends_only else 1)
        own = as_parts(learned).replace(init_params=None)  # a draw has the initialisations
        # Meta-training may have left them on other devices than the tasks.
        common = sharding.uncommit((scenario.context, own, seen_by_probe))
        mesh = sharding.mesh_for(draw.keys.shape[0])
        over_steps = optimizers.Schedule(*(jnp.asarray(value, jnp.float32) for value in optimizers.SCHEDULES[schedule]))
        traces = compiled(draw, np.float32(step_size), over_steps, every, *common, mesh=mesh)
        wanted = (scenario.metric, *scenario.other_metrics)
        missing = [name for name in wanted if name not in traces]
        if missing:
            raise UsageError(
                f"the problem's evaluate (with the scenario's probe) must return {', '.join(wanted)}; "
                f"{', '.join(missing)} is missing"
            )
        return {name: np.asarray(traces[name], dtype=np.float64) for name in wanted}

    return curve


@functools.lru_cache(maxsize=16)
def _compiled(
    problem: ml3_jax.Problem,
    probe: Any,
    learned_loss: ml3_jax.LearnedLoss | None,
    optimizer: str | Scaled,
    steps: int,
    decay_steps: int,
) -> Callable[..., Mapping[str, Array]]:
    """The descent of `make_descent`, cached: scenarios that differ only in their tasks share it."""

    def some_tasks(draw: Draw, step_size: Array, schedule: Any, every: Array, context: Any, parts: Any, seen_by_probe: Any):
        probed = _probed(problem, probe, seen_by_probe)
        if isinstance(optimizer, Scaled):
            descent = optimizer.make(parts.optimizer_params, step_size)
        else:
            rate = step_size if decay_steps else optimizers.scheduled(step_size, schedule, steps)
            descent = optimizers.inner(optimizer, rate, decay_steps=decay_steps)
        settings: dict[str, Any] = {"optimizer": descent, "steps": steps, "evaluate_every": every}

        def one_task(one: Draw) -> Mapping[str, Array]:
            task, key, params = one
            if learned_loss is None:
                return ml3_jax.baseline(probed, task, context, key, params=params, **settings).trace
            return ml3_jax.adapt(probed, learned_loss, parts.loss_params, task, context, key, params=params, **settings).trace

        return jax.lax.map(one_task, draw, batch_size=_tasks_at_once(draw.keys.shape[0]))

    def all_tasks(draw: Draw, *common: Any, mesh: Mesh | None):
        return sharding.shard(some_tasks, mesh)(draw, *common)

    return jax.jit(all_tasks, static_argnames="mesh")


def _tasks_at_once(num_tasks: int) -> int:
    """The largest divisor of num_tasks up to `TASKS_AT_ONCE`, unless it is small: a remainder is compiled separately."""
    best = max(n for n in range(1, TASKS_AT_ONCE + 1) if num_tasks % n == 0)
    return best if best > TASKS_AT_ONCE // 4 else min(num_tasks, TASKS_AT_ONCE)


def _probed(problem: ml3_jax.Problem, probe: Any, loss_params: Any) -> ml3_jax.Problem:
    """The problem, with the output of the probe added to its evaluate."""
    if probe is None:
        return problem

    def evaluate(params: Any, task: Any, context: Any, key: Array) -> dict[str, Array]:
        return {**problem.evaluate(params, task, context, key), **probe(loss_params, params, task, context, key)}

    return problem._replace(evaluate=evaluate)
