"""The inner loop: gradient steps of one optimizee on a learned loss, differentiable with respect to that loss.

`make_inner_gradient` builds grad_theta of the learned loss in one of three modes; `make_segment` strings inner steps
together and ends in the meta-objective. Written for one task: the task axis is added in `meta_gradient`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.types import Context, LearnedLoss, LossParams, Params, Problem, PyTree, Task

GRADIENT_MODES = ("mixed", "remat", "reverse")
OBJECTIVES = ("last", "mean")
COLLECT_GRADIENTS = ("cut", "score")

# (loss_params, params, task, context, key, step) -> scalar, or the gradient of it
InnerFn = Callable[[LossParams, Params, Task, Context, jax.Array, jax.Array], Any]


class StepKeys(NamedTuple):
    """Keys of a life or of a segment; a step's own key is folded from them and from the step's number."""

    inner: jax.Array  # collect, observe and plain_loss of one step share it
    outer: jax.Array  # the task loss


class Sampled(NamedTuple):
    """The task losses of one task's segment, and how likely the data were that led to each; n of them.

    The log-probabilities are there for their gradient; `score_surrogate` in `ml3_jax.estimators` turns both into a scalar.
    """

    losses: jax.Array  # [n] after the last inner step, or after each
    log_probs: jax.Array  # [n] of all that collect drew up to there


def split_keys(key: jax.Array) -> StepKeys:
    """Splits one key into those of the inner steps and those of the task loss."""
    inner, outer = jax.random.split(key)
    return StepKeys(inner, outer)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`; the message names the argument."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def as_scalar(value: jax.Array, name: str) -> jax.Array:
    """Returns `value` if it is a scalar array; else raises ValueError with `name`, what came and what to do."""
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must return a scalar, got shape {jnp.shape(value)}: reduce it, for example with jnp.mean")
    return value


def observed_loss(problem: Problem, learned_loss: LearnedLoss) -> InnerFn:
    """The scalar that an inner step descends: the learned loss of what the problem lets it observe."""

    def loss(
        loss_params: LossParams, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        features = problem.observe(params, task, context, key, step)
        return as_scalar(learned_loss.apply(loss_params, features), "the learned loss's apply")

    return loss


def plain_loss(problem: Problem) -> InnerFn:
    """The scalar that the baseline descends, with the signature of `observed_loss`; it ignores loss_params."""

    def loss(
        loss_params: LossParams, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array
    ) -> jax.Array:
        del loss_params
        if problem.plain_loss is None:
            return as_scalar(problem.task_loss(params, task, context, key), "the problem's task_loss")
        return as_scalar(problem.plain_loss(params, task, context, key, step), "the problem's plain_loss")

    return loss


def collected(problem: Problem, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> Task:
    """The task with this inner step's data in it."""
    if problem.collect is None:
        return task
    # Cuts d(data)/d(theta): data come from a system that has no gradient; what theta does to the *distribution* of the
    # data is the business of an estimator (log_prob), not of backpropagation.
    params = jax.lax.stop_gradient(params)
    return jax.lax.stop_gradient(problem.collect(params, task, context, key, step))


def _mixed_gradient(loss_fn: InnerFn) -> InnerFn:
    """grad_theta of `loss_fn` whose VJP is one forward-over-reverse pass (MixFlow-MG, arXiv:2505.00793).

    With g = grad_theta L and a cotangent v, d<g, v>/d(phi, theta) is the derivative of grad_{(phi, theta)} L in the
    direction (0, v), because second derivatives commute: one jvp of one gradient. The residuals are the arguments alone,
    so a scan over inner steps stores one optimizee a step and none of the activations of its second-order graph.
    """
    gradient = jax.grad(loss_fn, argnums=1)

    @jax.custom_vjp
    def mixed(loss_params, params, task, context, key, step):
        return gradient(loss_params, params, task, context, key, step)

    def forward(loss_params, params, task, context, key, step):
        residuals = (loss_params, params, task, context, key, step)
        return gradient(*residuals), residuals

    def backward(residuals, cotangent):
        loss_params, params, task, context, key, step = residuals

        def both(theta: Params) -> tuple[LossParams, Params]:
            return jax.grad(loss_fn, argnums=(0, 1))(loss_params, theta, task, context, key, step)

        _, (d_loss_params, d_params) = jax.jvp(both, (params,), (cotangent,))
        return d_loss_params, d_params, None, None, None, None

    mixed.defvjp(forward, backward)
    return mixed


def _with_gradient(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A scalar loss of (params, task, context, key) that has its gradient made with its value, on the way forward.

    What waits for the way back is then as small as params, and nothing is computed twice: a task loss that samples
    trajectories simulates them once, where rematerialisation would do it again.
    """

    @jax.custom_vjp
    def loss(params, task, context, key):
        return loss_fn(params, task, context, key)

    def forward(params, task, context, key):
        return jax.value_and_grad(loss_fn)(params, task, context, key)

    def backward(gradient, cotangent):
        return jax.tree.map(lambda g: cotangent * g, gradient), None, None, None

    loss.defvjp(forward, backward)
    return loss


def make_inner_gradient(loss_fn: InnerFn, gradient: str) -> InnerFn:
    """grad_theta of an inner loss, differentiable once more.

    Args:
      loss_fn: (loss_params, params, task, context, key, step) -> scalar.
      gradient: "mixed" (forward over reverse, the default of the library), "remat" or "reverse" (plain; under "remat"
        the segment rematerialises whole steps). All agree to rounding.

    Returns:
      A function of the same arguments that returns the gradient with respect to params.

    Raises:
      ValueError: `gradient` is unknown.
    """
    check_choice("gradient", gradient, GRADIENT_MODES)
    return _mixed_gradient(loss_fn) if gradient == "mixed" else jax.grad(loss_fn, argnums=1)


def make_segment(
    problem: Problem,
    learned_loss: LearnedLoss,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    gradient: str,
    objective: str,
    collect_gradient: str = "cut",
) -> Callable[..., tuple[Any, tuple[Params, optax.OptState]]]:
    """`steps` inner steps of one optimizee and the task loss that they lead to.

    Args:
      problem: the problem; `observe`, `collect` and `task_loss` are used.
      learned_loss: what the optimizee descends.
      optimizer: the inner optimizer.
      steps: inner steps in the segment, at least 1.
      gradient: a member of `GRADIENT_MODES`.
      objective: "last" (the task loss after the last step) or "mean" (over the steps).
      collect_gradient: "cut" (what collect draws is a constant) or "score" (the segment also tells how likely it was).

    Returns:
      segment(loss_params, params, opt_state, task, context, keys, age) -> (objective, (params, opt_state)); `age` is
      the number of inner steps already taken, int32. The objective is a scalar, or for "score" a `Sampled`.

    Raises:
      ValueError: an unknown choice, "score" for a problem without collect and log_prob, or one with collected_loss alone.
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("collect_gradient", collect_gradient, COLLECT_GRADIENTS)
    if collect_gradient == "score" and (problem.collect is None or problem.log_prob is None):
        raise ValueError(
            'collect_gradient="score" needs a problem that has collect and log_prob: give it log_prob=, the log-probability '
            'of what collect drew, or choose "cut"'
        )
    if problem.collected_loss is not None and problem.collect is None:
        raise ValueError(
            "the problem has collected_loss and no collect: expected both or neither, as it is the task loss on what collect "
            "drew; give it collect=, or leave collected_loss out"
        )
    inner_gradient = make_inner_gradient(observed_loss(problem, learned_loss), gradient)

    def descend(loss_params, params, opt_state, task, context, key, step):
        grads = inner_gradient(loss_params, params, task, context, key, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # Whether the data that judge the parameters after a step are those that the next step learns from.
    shared = problem.collected_loss is not None and objective == "mean"

    def task_loss(params: Params, task: Task, context: Context, key: jax.Array) -> jax.Array:
        """The task's, or where data are shared, that of the data that the task holds."""
        if shared and problem.collected_loss is not None:
            return as_scalar(problem.collected_loss(params, task, context), "the problem's collected_loss")
        return as_scalar(problem.task_loss(params, task, context, key), "the problem's task_loss")

    def log_prob(params: Params, data: Task, context: Context, key: jax.Array, step: jax.Array) -> jax.Array:
        if collect_gradient == "cut" or problem.log_prob is None:
            return jnp.zeros(())
        return as_scalar(problem.log_prob(params, data, context, key, step), "the problem's log_prob")

    if gradient != "reverse" and collect_gradient == "score":
        log_prob = jax.checkpoint(log_prob)
    if gradient == "remat":
        descend = jax.checkpoint(descend)
    if gradient != "reverse" and objective == "mean":
        task_loss = _with_gradient(task_loss)  # or every step's activations would wait for the way back

    def segment(loss_params, params, opt_state, task, context, keys: StepKeys, age):
        def collect(params: Params, step: jax.Array) -> Task:
            return collected(problem, params, task, context, jax.random.fold_in(keys.inner, step), step)

        def inner_step(carry: tuple[Params, optax.OptState, jax.Array, Task], step: jax.Array):
            params, opt_state, likely, data = carry
            key = jax.random.fold_in(keys.inner, step)
            data = data if shared else collect(params, step)
            likely = likely + log_prob(params, data, context, key, step)
            params, opt_state = descend(loss_params, params, opt_state, data, context, key, step)
            data = collect(params, step + 1) if shared else None
            if objective == "last":
                return (params, opt_state, likely, data), None
            seen = data if shared else task
            value = task_loss(params, seen, context, jax.random.fold_in(keys.outer, step))
            return (params, opt_state, likely, data), Sampled(value, likely)

        steps_taken = age + jnp.arange(steps, dtype=jnp.int32)
        start = (params, opt_state, jnp.zeros(()), collect(params, age) if shared else None)
        (params, opt_state, likely, _), after = jax.lax.scan(inner_step, start, steps_taken, unroll=steps == 1)
        if after is None:
            value = task_loss(params, task, context, jax.random.fold_in(keys.outer, age + steps - 1))
            after = Sampled(value[None], likely[None])
        value = after if collect_gradient == "score" else jnp.mean(after.losses)
        return value, (params, opt_state)

    return segment


def trace_features(problem: Problem, params: PyTree, task: Task, context: Context, key: jax.Array) -> PyTree:
    """Shapes of what observe returns at the first inner step, without computing it; arguments may be shapes."""

    def first(params, task, context, key):
        step = jnp.zeros((), jnp.int32)
        return problem.observe(params, collected(problem, params, task, context, key, step), context, key, step)

    return jax.eval_shape(first, params, task, context, key)
