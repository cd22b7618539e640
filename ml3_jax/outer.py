"""The outer loop: meta-training of a loss, an initialisation and step sizes over a batch of tasks, as pure functions.

`make_meta_learner` binds a problem, a learned loss and two optimizers into `MetaLearner(init, step, run, refresh)`. The
meta-gradient of a step is of `meta_gradient`; here phi is updated. `learned_parts` says what phi is.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ml3_jax import aliases, chunks, estimators, sharding
from ml3_jax.arguments import check_count, check_key, check_kind
from ml3_jax.checks import FirstStepCheck, ShapeCheck
from ml3_jax.compute_dtype import check_compute_dtype, computed_in
from ml3_jax.descent import all_finite, descend, in_float32
from ml3_jax.diagnosis import make_diagnose
from ml3_jax.inner import make_segment
from ml3_jax.inner_state import InitInner, Sizes, check_sizes, staggered_ends
from ml3_jax.learned_parts import LearnedParts
from ml3_jax.meta_gradient import AuxiliaryLoss, MetaGradient, make_meta_gradient
from ml3_jax.optimizers import LearnedOptimizer
from ml3_jax.options import check_kinds, check_learned, check_modes, refuse_options_without_effect
from ml3_jax.persistent import with_first_particles
from ml3_jax.types import Context, Diagnose, LearnedLoss, MetaLearner, MetaState, Metrics, Phi, Problem


class _StepKeys(NamedTuple):
    """The keys of one meta-step."""

    gradient: jax.Array  # []
    refresh: jax.Array  # []


class _Parts(NamedTuple):
    """The parts of one meta-learner."""

    problem: Problem
    learned: LearnedParts
    meta_optimizer: optax.GradientTransformation
    init_inner: InitInner
    meta_gradient: MetaGradient
    shapes: ShapeCheck
    sizes: Sizes
    staggered_resets: bool
    keep_inner_state: bool
    max_norm: float  # of a meta-gradient; a larger one has exploded
    pairs: int | None  # of perturbed copies that inner states carry; None: they carry none


@aliases.accept_old_keywords("make_meta_learner")
def make_meta_learner(
    problem: Problem,
    learned_loss: LearnedLoss | None = None,
    *,
    inner_optimizer: optax.GradientTransformation | LearnedOptimizer,
    meta_optimizer: optax.GradientTransformation,
    num_tasks: int,
    inner_steps: int,
    learn_init: bool = False,
    unroll: int | None = None,
    gradient: str = "mixed",
    estimator: str | estimators.Estimator | estimators.PersistentEvolutionStrategy = "backprop",
    objective: str = "last",
    collect_gradient: str = "cut",
    auxiliary_loss: AuxiliaryLoss | None = None,
    refresh_every: int | None = None,
    staggered_resets: bool = True,
    donate: bool = False,
    non_finite_tasks: str = "skip_update",
    max_meta_grad_norm: float = 1e10,
    compute_dtype: Any = None,
    tasks_at_once: int | None = None,
) -> MetaLearner:
    """Builds the meta-training of a learned loss (Bechtle et al. 2020, algorithms 1 to 3; arXiv:1906.05374).

    A learned initialisation and learned step sizes are trained beside the loss or without one: MAML (Finn et al. 2017,
    arXiv:1703.03400), Meta-SGD (Li et al. 2017, arXiv:1707.09835), and both with a learned loss. Phi is all that is learned.

    One meta-step is one update of phi, after `unroll` inner steps of each of `num_tasks` tasks. With unroll == inner_steps
    every meta-step draws fresh tasks and optimizees. With a shorter unroll the optimizees are carried from one meta-step to
    the next, without gradient, and reset after `inner_steps`, or once their parameters are not finite.

    `step`, `run` and `run_seeds` on concrete values share the tasks out among all devices, as many of them as divide num_tasks:
    GPUs, or CPU devices (`jax_num_cpu_devices`). After `jax.distributed.initialize` these are the devices of all processes, and
    each process makes the same calls. The caller chooses devices under a jit, vmap or shard_map of their own, inside a mesh,
    with a default device, and if a part of the state was put on devices (`jax.device_put`): it stays there, and XLA follows its
    sharding and that of the problem's `init`.

    Args:
      problem: the family of tasks, written for one task.
      learned_loss: the loss to train. None: the optimizee descends the problem's plain loss, or else its task loss.
      inner_optimizer: any optax optimizer of the optimizee, or a learned one of `ml3_jax.optimizers`. Adam needs eps_root > 0:
        the derivative of its square root at a zero gradient is infinite. A line search has a while loop, which backpropagation
        cannot pass: choose "es" or "pes".
      meta_optimizer: any optax optimizer of phi: of the loss's parameters, or of a `ml3_jax.types.MetaParams` if more is
        learned. Optimizers that ask for value, grad or value_fn get those of the objective.
      num_tasks: M, tasks a meta-step.
      inner_steps: inner steps of one training of an optimizee.
      learn_init: learn the initialisation of all optimizees. It starts as one draw of the problem's init. With unroll <
        inner_steps only optimizees at their start feed its gradient, one in inner_steps / unroll.
      unroll: inner steps that one meta-gradient spans; a divisor of inner_steps, None for all of them.
      gradient: "mixed" (forward over reverse; it stores one optimizee an inner step), "nested" (the same in blocks; it stores
        about 2 sqrt(inner steps) optimizees, takes a third more time, and runs collect twice), "remat" or "reverse". All agree
        to rounding. The first two cannot be differentiated in forward mode, and exchange the order of derivatives: a learned
        loss with a derivative rule that is not of its value (jax.custom_jvp) needs one of the others. From 1 MB of parameters
        on, "mixed" runs collect twice, too, and computes an optimizer's update again instead of storing it.
      estimator: "backprop", "es", "pes", or one of `ml3_jax.estimators` with settings, or a function as there. With
        unroll < inner_steps, the first two ignore the effect of phi in earlier unrolls, which biases the meta-gradient. "pes"
        (`ml3_jax.estimators.persistent_evolution_strategy`) carries perturbed optimizees, and estimates the gradient of the
        mean objective over all unrolls of an inner loop without this bias.
      objective: "last" (task loss after the last unrolled step) or "mean" (over the unrolled steps).
      collect_gradient: treatment of collected data, whose distribution depends on phi from the second inner step on. "cut":
        data are constants, which biases the meta-gradient. "score": the score-function term removes the bias and adds
        variance (`ml3_jax.estimators.score_surrogate`); it needs the problem's log_prob.
      auxiliary_loss: (loss_params, task, context, key) -> scalar, a term of each task's objective outside the inner loop, for
        example a prior on phi. It is in the meta-gradient and in its norm, and not in `Metrics.task_loss`.
      refresh_every: meta-steps between two refreshes of the context by `run`; None for never.
      staggered_resets: stagger the first resets, so that each meta-gradient sees every part of the inner loop; only with
        unroll < inner_steps.
      donate: let `step` and `run` reuse the memory of their input state, which is then invalid.
      non_finite_tasks: "skip_update" (one task that is not finite makes the meta-gradient so, and phi keeps its value) or
        "leave_out" (the mean is over the other tasks, and `Metrics.left_out` counts them). The second needs the gradient of
        each task: memory of num_tasks times phi, on a CPU of a chunk of tasks.
      max_meta_grad_norm: a meta-gradient with a larger norm has exploded, and counts as one that is not finite: Adam would
        remember it for thousands of meta-steps. It does not clip: for that give the meta_optimizer optax.clip_by_global_norm.
      compute_dtype: "bfloat16", "float16" or "float32", the type in which the inner loop computes observe and the learned loss.
        Parameters, updates, collected data, task loss and meta-gradient keep their types. None: all types stay.
      tasks_at_once: most tasks that a device works on at a time, the others wait for their turn: memory grows with this
        number and not with num_tasks. 1 for large optimizees. None: on a CPU as many as fit its cache, elsewhere all of them.

    Returns:
      MetaLearner(init, step, run, refresh, diagnose, run_seeds): pure functions for use under jit, vmap and shard_map.
      init(key, context=None) -> MetaState. step(state) -> (state, Metrics). run(state, num_steps) -> (state, Metrics
      with fields [num_steps]), one compiled scan; it refreshes the context before its steps 0, R, 2R.
      refresh(state) -> state with a refreshed context. diagnose(state, operation=False) -> words: which task, inner step and
      function, and on request which operation, of the state's next meta-step is not finite (not under transformations).
      run_seeds(states, num_steps) -> (states, Metrics with fields [S, num_steps]): run for S states under one vmap.

    Raises:
      TypeError: an argument of another kind, such as a number for an optimizer.
      ValueError: nothing to learn, a size or norm that is not positive, an unroll that does not divide inner_steps, an unknown
        mode, options without effect; from init and step, functions of the problem that return the wrong shapes; from the first
        step with concrete values (step 0), a meta-gradient that is not finite or explodes.
    """
    check_kinds(problem, learned_loss, inner_optimizer, meta_optimizer, auxiliary_loss)
    learned = LearnedParts(learned_loss, learn_init, inner_optimizer)
    check_learned(learned, auxiliary_loss, compute_dtype)
    sizes = check_sizes(problem, num_tasks, inner_steps, unroll, refresh_every, tasks_at_once)
    problem = problem.for_inner_steps(sizes.inner_steps)
    check_modes(gradient, objective, non_finite_tasks, max_meta_grad_norm)
    shapes = ShapeCheck(problem)
    dtype = check_compute_dtype(compute_dtype)
    checked, unchecked = (computed_in(dtype, one, learned_loss) for one in (shapes.problem, problem))
    modes = {"gradient": gradient, "objective": objective, "collect_gradient": collect_gradient}
    segment = make_segment(*checked, inner_optimizer, steps=sizes.unroll, **modes)
    one_step = make_segment(*unchecked, inner_optimizer, steps=1, **modes)
    estimate = estimators.resolve(estimator)
    pairs = estimate.pairs if isinstance(estimate, estimators.PersistentEvolutionStrategy) else None
    derivative_free = "pes" if pairs is not None else "es" if estimator == "es" else None
    refuse_options_without_effect(
        learned, sizes, derivative_free, gradient, collect_gradient, staggered_resets, non_finite_tasks
    )
    init_inner = learned.make_init_inner(problem)
    keep = not sizes.full_unroll or problem.refresh is not None
    meta_gradient = make_meta_gradient(
        checked[0],
        learned._replace(learned_loss=checked[1]),
        segment,
        init_inner,
        estimate,
        sizes,
        collect_gradient=collect_gradient,
        keep_inner_state=keep,
        auxiliary_loss=auxiliary_loss,
        leave_out=non_finite_tasks == "leave_out",
        max_norm=max_meta_grad_norm,
    )
    parts = _Parts(
        problem,
        learned,
        meta_optimizer,
        init_inner,
        meta_gradient,
        shapes,
        sizes,
        staggered_resets,
        keep,
        max_meta_grad_norm,
        None if sizes.full_unroll else pairs,
    )
    diagnose = make_diagnose(
        unchecked[0],
        learned._replace(learned_loss=unchecked[1]),
        one_step,
        segment,
        init_inner,
        estimate,
        sizes,
        lambda state: _step_keys(state).gradient,
        objective=objective,
        max_norm=max_meta_grad_norm,
    )
    return _compiled(parts, diagnose, donate=donate)


def _init(parts: _Parts, key: jax.Array, context: Context = None) -> MetaState:
    """Draws the first inner loops, and initialises the learned parts: a loss for the features that they observe."""
    check_key("key", key)
    loss_key, inner_key, run_key = jax.random.split(key, 3)
    keys, ends = jax.random.split(inner_key, parts.sizes.num_tasks), staggered_ends(parts.sizes, parts.staggered_resets)
    inner_state = jax.vmap(parts.init_inner, in_axes=(0, None, 0))(keys, context, ends)
    one = jax.tree.map(lambda x: x[0], inner_state)
    phi = parts.learned.init(
        loss_key, parts.problem, one, lambda params: parts.shapes.expect(params, one.task, context, inner_key)
    )
    inner_state = jax.vmap(parts.learned.begin, in_axes=(None, 0))(phi, inner_state)
    if parts.pairs is not None:
        inner_state = with_first_particles(inner_state, phi, parts.pairs)
    loss_params, init_params, optimizer_params = parts.learned.split(phi)
    return MetaState(
        step=jnp.zeros((), jnp.int32),
        loss_params=loss_params,
        opt_state=parts.meta_optimizer.init(phi),
        context=context,
        key=run_key,
        inner_state=inner_state if parts.keep_inner_state else None,
        init_params=init_params,
        optimizer_params=optimizer_params,
    )


def _step(parts: _Parts, state: MetaState, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
    """One meta-step: the meta-gradient over all tasks, and the update of phi unless it is not finite."""
    key = _step_keys(state).gradient
    before = parts.learned.join(state.loss_params, state.init_params, state.optimizer_params)
    (value, outputs), gradient = parts.meta_gradient(before, state.context, state.inner_state, key, mesh)
    norm = optax.tree.norm(in_float32(gradient))

    def value_fn(phi: Phi) -> jax.Array:
        return parts.meta_gradient(phi, state.context, state.inner_state, key, mesh)[0][0]

    phi, opt_state = descend(parts.meta_optimizer, gradient, state.opt_state, before, value_fn, value)

    finite = (norm <= parts.max_norm) & jnp.isfinite(value) & all_finite(phi)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    step = state.step + 1
    loss_params, init_params, optimizer_params = parts.learned.split(keep(phi, before))
    state = state.replace(
        step=step,
        loss_params=loss_params,
        opt_state=keep(opt_state, state.opt_state),
        inner_state=outputs.inner_state,
        init_params=init_params,
        optimizer_params=optimizer_params,
    )
    if outputs.auxiliary is not None:
        value = value - jnp.mean(outputs.auxiliary)
    left_out = jnp.zeros((), jnp.int32) if outputs.left_out is None else jnp.sum(outputs.left_out).astype(jnp.int32)
    return state, Metrics(value, norm, 1 - finite.astype(jnp.int32), left_out, (norm == 0.0).astype(jnp.int32))


def _run(parts: _Parts, state: MetaState, num_steps: int, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
    """`num_steps` meta-steps as a scan; the context is refreshed before each `refresh_every` of them."""

    def steps(state: MetaState, count: int) -> tuple[MetaState, Metrics]:
        return jax.lax.scan(lambda carry, _: _step(parts, carry, mesh), state, length=count)

    every = parts.sizes.refresh_every
    if every is None:
        return steps(state, num_steps)
    blocks, rest = divmod(num_steps, every)
    metrics = []
    if blocks:
        state, some = jax.lax.scan(lambda s, _: steps(_refresh(parts, s, mesh), every), state, length=blocks)
        metrics.append(jax.tree.map(lambda x: x.reshape(blocks * every, *x.shape[2:]), some))
    if rest:
        state, some = steps(_refresh(parts, state, mesh), rest)
        metrics.append(some)
    return state, jax.tree.map(lambda *xs: jnp.concatenate(xs), *metrics)


def _run_seeds(parts: _Parts, states: MetaState, num_steps: int, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
    """`_run` for the states of several seeds."""
    axis = None if mesh is None else sharding.SEEDS
    with chunks.side_by_side(states.step.shape[0] // (1 if mesh is None else mesh.shape[sharding.SEEDS])):
        states, metrics = jax.vmap(lambda state: _run(parts, state, num_steps, mesh), spmd_axis_name=axis)(states)
    if mesh is not None:  # as `place` does: else the next call would compile for other shardings
        states = jax.lax.with_sharding_constraint(states, sharding.shardings_of(states, mesh))
    return states, sharding.replicate(metrics, mesh)


def _refresh(parts: _Parts, state: MetaState, mesh: Mesh | None = None) -> MetaState:
    """The state with the context that the problem makes of the optimizees of the last meta-step."""
    if parts.problem.refresh is None or state.inner_state is None:
        raise ValueError("refresh: this problem has no refresh function")
    key = _step_keys(state).refresh
    inner_state = sharding.replicate(state.inner_state, mesh)
    context = parts.problem.refresh(state.context, state.loss_params, inner_state.params, inner_state.task, key)
    return state.replace(context=sharding.replicate(context, mesh), inner_state=inner_state)


def _step_keys(state: MetaState) -> _StepKeys:
    return _StepKeys(*jax.random.split(jax.random.fold_in(state.key, state.step)))


def _compiled(parts: _Parts, diagnose: Diagnose, *, donate: bool) -> MetaLearner:
    """The functions under jit. All but `init` and `refresh` share tasks out among devices and check the first meta-step."""
    options: dict[str, Any] = {"static_argnames": "mesh", "donate_argnums": (0,) if donate else ()}
    step_once = jax.jit(functools.partial(_step, parts), **options)
    run_many = jax.jit(functools.partial(_run, parts), static_argnums=1, **options)
    of_seeds = jax.jit(functools.partial(_run_seeds, parts), static_argnums=1, **options)
    first_step = FirstStepCheck(parts.max_norm)

    def on_devices(
        compiled: Callable[..., tuple[MetaState, Metrics]], state: MetaState, *static: int, seeds: int | None = None
    ):
        placed, mesh = sharding.place(state, parts.sizes.num_tasks, seeds)
        is_first = first_step.applies_to(state)
        with _words_for_forward_mode():
            after, metrics = sharding.finished(compiled(placed, *static, mesh=mesh))
        first_step.check(metrics, is_first)
        return after, metrics

    def step(state: MetaState) -> tuple[MetaState, Metrics]:
        check_kind("state", state, MetaState, "from init or an earlier step")
        return on_devices(step_once, state)

    def run(state: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        check_kind("state", state, MetaState, "from init or an earlier step")
        return on_devices(run_many, state, check_count("num_steps", num_steps))

    def run_seeds(states: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        check_kind("states", states, MetaState, "states from init under jax.vmap, or an earlier run_seeds")
        if jnp.ndim(states.step) != 1:
            raise ValueError(
                f"states: expected a leading axis of seeds in each leaf, got a step of shape {jnp.shape(states.step)}: "
                "jax.vmap(meta.init)(keys) makes such states, and ml3_jax.sharding.stack stacks them"
            )
        return on_devices(of_seeds, states, check_count("num_steps", num_steps), seeds=states.step.shape[0])

    init, refresh = jax.jit(functools.partial(_init, parts)), jax.jit(functools.partial(_refresh, parts))
    return MetaLearner(init, step, run, refresh, diagnose, run_seeds)


@contextlib.contextmanager
def _words_for_forward_mode() -> Iterator[None]:
    """Says what to choose where a caller or an estimator differentiates the modes "mixed" and "nested" forwards."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            'choose gradient="remat" or "reverse" for jax.jvp and jax.jacfwd: "mixed" and "nested" have no forward-mode '
            "derivative"
        ) from error
