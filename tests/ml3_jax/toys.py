"""Small problems, losses and meta-learners for the tests of the library, and comparisons of pytrees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ml3_jax
from ml3_jax.problems import inverse_dynamics, shaped, supervised

KEY = jax.random.key(7)


class Target(NamedTuple):
    """Task of `quadratic`: a number to reach."""

    target: jax.Array  # []
    extra: jax.Array  # [] the same number, for task_loss alone


def quadratic(start: float = 3.0, target: float = 1.0) -> ml3_jax.Problem:
    """One parameter, always the same start and target; task loss e^2 / 2 with e = params - target."""
    return ml3_jax.Problem(
        sample_task=lambda key, context: Target(jnp.asarray(target), jnp.asarray(target)),
        init=lambda key, task: jnp.asarray(start),
        observe=lambda params, task, context, key, step: jnp.stack([params, task.target])[None],
        task_loss=lambda params, task, context, key: 0.5 * (params - task.extra) ** 2,
        evaluate=lambda params, task, context, key: {"error": params - task.target},
    )


def scaled_square(scale: float = 0.5) -> ml3_jax.LearnedLoss:
    """M_phi = phi mean (prediction - target)^2 / 2, so that grad_theta M on `quadratic` is phi e."""
    return ml3_jax.LearnedLoss(
        init=lambda key, features: jnp.asarray(scale),
        apply=lambda phi, features: 0.5 * phi * jnp.mean((features[:, 0] - features[:, 1]) ** 2),
    )


class Points(NamedTuple):
    """Task of `points`: a line with outliers."""

    x: jax.Array  # [N]
    y: jax.Array  # [N], with outliers
    extra: jax.Array  # [N], without


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A tanh network of one input and one output: [N] -> [N]."""
    return jnp.tanh(x[:, None] * params["in"][None] + params["bias"][None]) @ params["out"]


def points(samples: int = 8, width: int = 3, sample_task: Callable[..., Any] | None = None) -> ml3_jax.Problem:
    """Fits `network` to points with outliers; the learned loss sees prediction, target and the step."""

    def draw(key: jax.Array, context: Any) -> Points:
        del context
        slope, offset, height = jax.random.normal(key, (3,))
        x = jnp.linspace(-1.0, 1.0, samples)
        clean = slope * x + offset
        outlier = jnp.arange(samples) % 4 == 1
        return Points(x, clean + 3.0 * height * outlier, clean)

    def init(key: jax.Array, task: Points) -> dict[str, jax.Array]:
        del task
        drawn = jax.random.normal(key, (3, width))
        return {"in": drawn[0], "bias": drawn[1], "out": 0.5 * drawn[2]}

    def observe(params, task: Points, context, key, step) -> jax.Array:
        del context, key
        age = jnp.broadcast_to(step / 10, task.y.shape)
        return jnp.stack([network(params, task.x), task.y, age.astype(task.y.dtype)], axis=-1)

    def task_loss(params, task: Points, context, key) -> jax.Array:
        del context, key
        return jnp.mean((network(params, task.x) - task.extra) ** 2)

    def evaluate(params, task: Points, context, key) -> dict[str, jax.Array]:
        return {"mse": task_loss(params, task, context, key)}

    def plain_loss(params, task: Points, context, key, step) -> jax.Array:
        del context, key, step
        return jnp.mean((network(params, task.x) - task.y) ** 2)

    return ml3_jax.Problem(sample_task or draw, init, observe, task_loss, evaluate, plain_loss)


class Stream(NamedTuple):
    """Task of `stream`: `collect` draws its data at each inner step."""

    slope: jax.Array  # []
    x: jax.Array  # [4]
    extra: jax.Array  # [] the slope, for task_loss


def stream() -> ml3_jax.Problem:
    """Fits a slope to fresh data at each step; the data depend on the parameter, as in RL."""

    def sample_task(key: jax.Array, context: Any) -> Stream:
        del context
        slope = 1.0 + jax.random.uniform(key)
        return Stream(slope, jnp.zeros(4), slope)

    def collect(params, task: Stream, context, key, step) -> Stream:
        del context
        return task._replace(x=1.0 + params + 0.1 * step + 0.3 * jax.random.normal(key, (4,)))

    def observe(params, task: Stream, context, key, step) -> jax.Array:
        del context, key, step
        return jnp.stack([params * task.x, task.slope * task.x], axis=-1)

    return ml3_jax.Problem(
        sample_task=sample_task,
        init=lambda key, task: 0.1 * jax.random.normal(key),
        observe=observe,
        task_loss=lambda params, task, context, key: (params - task.extra) ** 2,
        evaluate=lambda params, task, context, key: {"error": jnp.abs(params - task.slope)},
        plain_loss=lambda params, task, context, key, step: jnp.mean((params - task.slope) ** 2 * task.x**2),
        collect=collect,
        samples_per_step=4,
    )


def sample_sine(key: jax.Array, context: Any) -> supervised.SupervisedTask:
    """A sine of random phase: 12 samples to learn from, 12 held out."""
    del context
    k_phase, k_train, k_test = jax.random.split(key, 3)
    phase = jax.random.uniform(k_phase, maxval=jnp.pi)

    def examples(key: jax.Array) -> supervised.Examples:
        x = jax.random.uniform(key, (12, 1), minval=-2.0, maxval=2.0)
        return supervised.Examples(x, jnp.sin(x + phase))

    return supervised.SupervisedTask(train=examples(k_train), test=examples(k_test), extra=phase)


def sample_blobs(key: jax.Array, context: Any) -> supervised.SupervisedTask:
    """Three blobs in the plane, one for each class: 12 samples to learn from, 12 held out."""
    del context
    k_centre, k_train, k_test = jax.random.split(key, 3)
    centres = 2.0 * jax.random.normal(k_centre, (3, 2))
    labels = jax.nn.one_hot(jnp.arange(12) % 3, 3)

    def examples(key: jax.Array) -> supervised.Examples:
        return supervised.Examples(labels @ centres + 0.3 * jax.random.normal(key, (12, 2)), labels)

    return supervised.SupervisedTask(train=examples(k_train), test=examples(k_test))


def frequency(**options: Any) -> ml3_jax.Problem:
    """A shaped problem: finds the frequency w of sin(w x) from 16 samples; `options` go to make_problem."""
    return shaped.make_problem(
        lambda w, x: jnp.sin(w * x),
        lambda key: 2.0 + 0.1 * jax.random.normal(key),
        lambda key: jax.random.uniform(key, minval=-5.0, maxval=5.0),
        lambda key: jax.random.uniform(key, (16,), minval=-1.0, maxval=1.0),
        **options,
    )


def _measured(key: jax.Array, *shape: int) -> inverse_dynamics.Measured:
    """Random measurements of an arm of two joints."""
    return inverse_dynamics.Measured(*(jax.random.normal(k, (*shape, 2)) for k in jax.random.split(key, 5)))


def _arm_runs(loads: int = 3, samples: int = 12, held_out: int = 5) -> inverse_dynamics.Runs:
    stream_key, test_key, inertia_key = jax.random.split(KEY, 3)
    root = jax.random.normal(inertia_key, (loads, held_out, 2, 2))
    stream, test = _measured(stream_key, loads, samples), _measured(test_key, loads, held_out)
    return inverse_dynamics.Runs(stream, test, root @ jnp.swapaxes(root, -1, -2))


ARM = inverse_dynamics.Scales(
    v=jnp.array([0.5, 2.0]), a=jnp.array([1.0, 4.0]), torque=jnp.array([10.0, 0.5]), inertia=jnp.array([4.0, 0.25])
)
ARM_RUNS = jax.jit(_arm_runs)()


def arm() -> ml3_jax.Problem:
    """The inertia of an arm of two joints from three mini-batches of four samples; a task holds a mini-batch."""
    made = inverse_dynamics.make_problem(inverse_dynamics.inertia_network(ARM, (4,)), ARM, inner_steps=3, batch_size=4)

    def sample_task(key: jax.Array, context: Any) -> inverse_dynamics.DynamicsTask:
        del context
        assert made.collect is not None
        return made.collect(None, made.sample_task(key, ARM_RUNS), None, key, jnp.zeros((), jnp.int32))

    return made._replace(sample_task=sample_task)


def smooth_loss() -> ml3_jax.LearnedLoss:
    """A small learned loss without kinks."""
    return ml3_jax.losses.mlp(hidden=(4,), activation="tanh", bias=True)


def learner(problem: ml3_jax.Problem, loss: ml3_jax.LearnedLoss | str | None = "smooth", **options: Any) -> ml3_jax.MetaLearner:
    """A small meta-learner; "smooth" stands for `smooth_loss`, None for the plain loss. `options` go to make_meta_learner."""
    settings: dict[str, Any] = {
        "inner_optimizer": optax.sgd(0.1),
        "meta_optimizer": optax.sgd(0.1),
        "num_tasks": 3,
        "inner_steps": 3,
    }
    learned_loss = smooth_loss() if isinstance(loss, str) else loss
    return ml3_jax.make_meta_learner(problem, learned_loss, **{**settings, **options})


def traced_at_most(optimizer: optax.GradientTransformation, n: int) -> optax.GradientTransformation:
    """The optimizer; its n + 1st trace raises AssertionError. A meta-step traces the meta-optimizer once."""

    def update(*args: Any) -> Any:
        return optimizer.update(*args)

    chex.clear_trace_counter()
    counted: Any = chex.assert_max_traces(update, n=n)
    return optax.GradientTransformation(optimizer.init, counted)


class Start(NamedTuple):
    """One optimizee of `points` with a learned loss, drawn once for all tests."""

    problem: ml3_jax.Problem
    loss: ml3_jax.LearnedLoss
    task: Points
    params: dict[str, jax.Array]
    loss_params: Any


@functools.cache
def start() -> Start:
    """The problem `points` and `smooth_loss`, with a task, an optimizee and loss parameters."""
    problem, loss = points(), smooth_loss()

    @jax.jit
    def draw() -> Any:
        task = problem.sample_task(KEY, None)
        return task, problem.init(KEY, task), loss.init(KEY, 3)

    with jax.enable_x64(False):  # the first test to ask may be one in float64
        return Start(problem, loss, *draw())


def item(tree: Any, index: int) -> Any:
    """One element of the leading axis of each leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def flat(tree: Any) -> np.ndarray:
    """All numbers of a pytree in one float64 vector; typed keys by their data."""
    return np.concatenate([np.ravel(np.asarray(x, dtype=np.float64)) for x in jax.tree.leaves(_numbers(tree))])


def assert_same(left: Any, right: Any) -> None:
    """Two pytrees have equal structures, dtypes and numbers."""
    chex.assert_trees_all_equal(_numbers(left), _numbers(right), strict=True)


def assert_close(left: Any, right: Any, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    """Two pytrees have equal structures, dtypes and, to rounding, numbers."""
    chex.assert_trees_all_close(_numbers(left), _numbers(right), rtol=rtol, atol=atol)


def _numbers(tree: Any) -> Any:
    """The pytree as NumPy arrays; typed keys by their data."""

    def of_leaf(leaf: Any) -> np.ndarray:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return jax.tree.map(of_leaf, tree)
