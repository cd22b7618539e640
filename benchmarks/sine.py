"""The sine problem of the benchmarks: one meta-step in `ml3_jax`, and the same loop in plain JAX.

Both use the functions of one problem, so that only the loops differ. `meta_step` times them; `torch_loops` has the same
meta-step in PyTorch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ml3_jax
from ml3_jax.networks import MLP
from ml3_jax.problems.supervised import Examples, SupervisedTask, make_problem
from ml3_jax.types import Context, LossParams, Params, Task

SAMPLES = 100
WIDTHS = (100, 10, 1)  # of the optimizee, from one input
HIDDEN = (50, 50)  # of the learned loss, from prediction and target
INNER_LR = 1e-3
META_LR = 1e-3
X_RANGE = (-2.0, 2.0)
AMPLITUDES = (0.2, 5.0)
PHASES = (-np.pi, np.pi)

OPTIMIZEE = MLP(WIDTHS)
LEARNED_LOSS = ml3_jax.losses.mlp(HIDDEN)


def sample_task(key: jax.Array, context: Context) -> SupervisedTask:
    """Draws amplitude, phase and inputs. Inner and outer loss share the points, as in the released code."""
    del context
    x_key, amplitude_key, phase_key = jax.random.split(key, 3)
    x = jax.random.uniform(x_key, (SAMPLES, 1), minval=X_RANGE[0], maxval=X_RANGE[1])
    amplitude = jax.random.uniform(amplitude_key, minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
    phase = jax.random.uniform(phase_key, minval=PHASES[0], maxval=PHASES[1])
    examples = Examples(x, amplitude * jnp.sin(x + phase))
    return SupervisedTask(examples, examples)


PROBLEM = make_problem(OPTIMIZEE, sample_task)


def meta_learner(num_tasks: int, inner_steps: int, **options: Any) -> ml3_jax.MetaLearner:
    """`make_meta_learner` on the sine problem; `options` replace its defaults."""
    settings = {"inner_optimizer": optax.sgd(INNER_LR), "meta_optimizer": optax.adam(META_LR), **options}
    return ml3_jax.make_meta_learner(
        settings.pop("problem", PROBLEM), LEARNED_LOSS, num_tasks=num_tasks, inner_steps=inner_steps, **settings
    )


def plain_objective(loss_params: LossParams, task: Task, params: Params, inner_steps: int) -> jax.Array:
    """The task loss of one task after `inner_steps` steps of gradient descent, unrolled by a scan."""

    def learned(params: Params) -> jax.Array:
        features = PROBLEM.observe(params, task, None, jax.random.key(0), jnp.zeros((), jnp.int32))
        return LEARNED_LOSS.apply(loss_params, features)

    def inner_step(params: Params, _: None) -> tuple[Params, None]:
        return jax.tree.map(lambda p, g: p - INNER_LR * g, params, jax.grad(learned)(params)), None

    params, _ = jax.lax.scan(inner_step, params, None, length=inner_steps)
    return PROBLEM.task_loss(params, task, None, jax.random.key(0))


class PlainState(NamedTuple):
    """The state of the plain loop."""

    loss_params: LossParams
    opt_state: optax.OptState
    key: jax.Array


def plain_loop(num_tasks: int, inner_steps: int) -> tuple[Callable[[jax.Array], PlainState], Callable[..., Any]]:
    """(init, step) of the plain loop: jit, vmap over tasks, gradient of the unrolled scan, Adam."""
    optimizer = optax.adam(META_LR)

    def init(key: jax.Array) -> PlainState:
        loss_params = LEARNED_LOSS.init(key, 2)
        return PlainState(loss_params, optimizer.init(loss_params), key)

    def one_task(loss_params: LossParams, key: jax.Array) -> jax.Array:
        task_key, init_key = jax.random.split(key)
        task = sample_task(task_key, None)
        return plain_objective(loss_params, task, PROBLEM.init(init_key, task), inner_steps)

    @jax.jit
    def step(state: PlainState) -> tuple[PlainState, jax.Array]:
        key, tasks_key = jax.random.split(state.key)
        keys = jax.random.split(tasks_key, num_tasks)
        value, gradient = jax.value_and_grad(lambda phi: jnp.mean(jax.vmap(one_task, (None, 0))(phi, keys)))(state.loss_params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.loss_params)
        return PlainState(optax.apply_updates(state.loss_params, updates), opt_state, key), value

    return init, step


class Case(NamedTuple):
    """Weights and data of one meta-step, for every implementation."""

    loss_kernels: list[np.ndarray]  # [in, out]
    x: np.ndarray  # [M, N, 1]
    y: np.ndarray  # [M, N, 1]
    layers: list[tuple[np.ndarray, np.ndarray]]  # of the optimizees: kernel [M, in, out], bias [M, out]


class Outcome(NamedTuple):
    """The results of one meta-step."""

    task_loss: float  # mean over tasks
    gradient: np.ndarray  # of the task loss with respect to the learned loss's kernels, flattened in order


def _kernels(loss_params: LossParams) -> list[np.ndarray]:
    layers = loss_params["params"]
    return [np.asarray(layers[name]["kernel"]) for name in sorted(layers)]


def _flat(kernels: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(kernel) for kernel in kernels])


def keeps_gradient() -> optax.GradientTransformation:
    """Gradient descent with the last gradient as its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return jax.tree.map(lambda g: -META_LR * g, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def library_outcome(num_tasks: int, inner_steps: int, key: jax.Array) -> tuple[Case, Outcome]:
    """Takes one step of `ml3_jax`, and returns the tasks and optimizees that it drew.

    The task holds its initial optimizee. A refresh function makes the meta-learner keep its tasks in the state. The
    meta-optimizer keeps the gradient.
    """

    def sample_with_start(key: jax.Array, context: Context) -> SupervisedTask:
        task_key, start_key = jax.random.split(key)
        task = sample_task(task_key, context)
        return task.replace(extra=PROBLEM.init(start_key, task))

    problem = PROBLEM._replace(
        sample_task=sample_with_start, init=lambda key, task: task.extra, refresh=lambda context, *_: context
    )
    meta = meta_learner(num_tasks, inner_steps, problem=problem, meta_optimizer=keeps_gradient())
    before = meta.init(key)
    after, metrics = meta.step(before)
    if after.inner_state is None:
        raise RuntimeError("expected a state with tasks, as the problem has a refresh function, got none")
    task, layers = after.inner_state.task, after.inner_state.task.extra["params"]
    case = Case(
        _kernels(before.loss_params),
        np.asarray(task.train.inputs),
        np.asarray(task.train.targets),
        [(np.asarray(layers[name]["kernel"]), np.asarray(layers[name]["bias"])) for name in sorted(layers)],
    )
    return case, Outcome(float(metrics.task_loss), _flat(_kernels(after.opt_state)))


def plain_outcome(case: Case, inner_steps: int) -> Outcome:
    """The plain loop on given weights and data."""
    loss_params = {"params": {f"Dense_{i}": {"kernel": jnp.asarray(kernel)} for i, kernel in enumerate(case.loss_kernels)}}
    params = {"params": {f"Dense_{i}": {"kernel": kernel, "bias": bias} for i, (kernel, bias) in enumerate(case.layers)}}
    examples = Examples(jnp.asarray(case.x), jnp.asarray(case.y))
    tasks = SupervisedTask(examples, examples)

    def mean(phi: LossParams) -> jax.Array:
        values = jax.vmap(lambda task, start: plain_objective(phi, task, start, inner_steps))(tasks, params)
        return jnp.mean(values)

    value, gradient = jax.jit(jax.value_and_grad(mean))(loss_params)
    return Outcome(float(value), _flat(_kernels(gradient)))
