"""The outer loop: meta-training of a learned loss over a batch of tasks, as pure functions.

`make_meta_learner` binds a problem, a learned loss and two optimizers into `MetaLearner(init, step, run, refresh)`. One
task's inner steps are written in `inner`, how optimizees live on in `lives`, and the gradient over a batch of tasks in
`meta_gradient`; here phi is updated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ml3_jax import estimators, sharding
from ml3_jax.guards import FirstStepCheck, ShapeGuard
from ml3_jax.inner import GRADIENT_MODES, OBJECTIVES, check_choice, make_segment
from ml3_jax.lives import check_sizes, first_ends, make_newborn, strong
from ml3_jax.meta_gradient import AuxiliaryLoss, make_meta_gradient
from ml3_jax.types import Context, LearnedLoss, MetaLearner, MetaState, Metrics, Problem


class _StepKeys(NamedTuple):
    """The keys of one meta-step."""

    gradient: jax.Array
    refresh: jax.Array


def make_meta_learner(
    problem: Problem,
    learned_loss: LearnedLoss,
    *,
    inner_optimizer: optax.GradientTransformation,
    meta_optimizer: optax.GradientTransformation,
    num_tasks: int,
    inner_steps: int,
    unroll: int | None = None,
    gradient: str = "mixed",
    estimator: str | estimators.Estimator = "backprop",
    objective: str = "last",
    collect_gradient: str = "cut",
    auxiliary_loss: AuxiliaryLoss | None = None,
    refresh_every: int | None = None,
    spread_ages: bool = True,
    donate: bool = False,
) -> MetaLearner:
    """Builds the meta-training of a learned loss (Bechtle et al. 2020, algorithms 1 to 3; arXiv:1906.05374).

    One meta-step is one update of phi, after one segment of `unroll` inner steps of each of `num_tasks` tasks. With
    unroll == inner_steps every meta-step draws fresh tasks and optimizees. With a shorter unroll the optimizees live on
    in the state for `inner_steps` (no gradient passes from one segment to the one before) and are then drawn anew; so is
    one whose parameters are no longer finite.

    `step` and `run` on concrete values share the tasks out among the devices of this process, as many of them as divide
    num_tasks: GPUs, or CPU devices where `jax_num_cpu_devices` makes several. Under a caller's jit, vmap or shard_map, with a
    default device, and where the state was put on a device (`jax.device_put`), they stay together.

    Args:
      problem: the family of tasks, written for one task.
      learned_loss: the loss to train.
      inner_optimizer: any optax optimizer of the optimizee. Adam needs eps_root > 0: the derivative of its square root
        at a zero gradient is infinite.
      meta_optimizer: any optax optimizer of phi.
      num_tasks: M, tasks a meta-step.
      inner_steps: inner steps of a life.
      unroll: inner steps that one meta-gradient spans; a divisor of inner_steps, None for all of them.
      gradient: "mixed" (forward over reverse, the least memory), "remat" or "reverse"; they agree to rounding.
      estimator: "backprop", "es", or a function as in `ml3_jax.estimators`.
      objective: "last" (task loss after the segment's last inner step) or "mean" (over its steps).
      collect_gradient: what the meta-gradient makes of data that collect draws, whose distribution depends on phi from the
        second inner step on. "cut": nothing, they are constants, which biases it; "score": the score-function term that
        makes it unbiased (`ml3_jax.estimators.score_surrogate`), from the problem's log_prob, at the price of variance.
      auxiliary_loss: (loss_params, task, context, key) -> scalar, a term of each task's objective in phi alone, past the inner
        loop: a prior on phi, or what is known of where an inner loop ends that has converged. It is in the meta-gradient and
        in its norm, and not in `Metrics.task_loss`.
      refresh_every: meta-steps between two refreshes of the context by `run`; None for never.
      spread_ages: end the first lives at staggered ages, so that from then on each meta-gradient sees every part of a
        life; only with unroll < inner_steps.
      donate: let `step` and `run` reuse the memory of the state they are given, which is then gone.

    Returns:
      MetaLearner(init, step, run, refresh): pure, to be used under jit, vmap and shard_map as they are.
      init(key, context=None) -> MetaState. step(state) -> (state, Metrics). run(state, num_steps) -> (state, Metrics
      with fields [num_steps]), one compiled scan; it refreshes the context before its steps 0, R, 2R.
      refresh(state) -> state with its context renewed now.

    Raises:
      ValueError: a size below 1, an unroll that does not divide inner_steps, an unknown mode; from init and step,
        functions of the problem that return the wrong shapes; from the first step with concrete values (step 0), a
        meta-gradient that is not finite.
    """
    sizes = check_sizes(problem, num_tasks, inner_steps, unroll, refresh_every)
    check_choice("gradient", gradient, GRADIENT_MODES)
    check_choice("objective", objective, OBJECTIVES)
    guard = ShapeGuard(problem)
    segment = make_segment(
        guard.problem,
        learned_loss,
        inner_optimizer,
        steps=sizes.unroll,
        gradient=gradient,
        objective=objective,
        collect_gradient=collect_gradient,
    )
    newborn = make_newborn(problem, inner_optimizer)
    keep_lives = not sizes.whole_lives or problem.refresh is not None
    meta_gradient = make_meta_gradient(
        guard.problem,
        learned_loss,
        segment,
        newborn,
        estimators.resolve(estimator),
        sizes,
        keep_lives=keep_lives,
        auxiliary_loss=auxiliary_loss,
    )

    def step_keys(state: MetaState) -> _StepKeys:
        return _StepKeys(*jax.random.split(jax.random.fold_in(state.key, state.step)))

    def step(state: MetaState, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
        key = step_keys(state).gradient
        (value, (lives, beside)), gradient = meta_gradient(state.loss_params, state.context, state.lives, key, mesh)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        updates, opt_state = meta_optimizer.update(gradient, state.opt_state, state.loss_params)
        loss_params = optax.apply_updates(state.loss_params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = state.replace(
            step=state.step + 1,
            loss_params=keep(loss_params, state.loss_params),
            opt_state=keep(opt_state, state.opt_state),
            lives=lives,
        )
        if beside is not None:
            value = value - jnp.mean(beside)
        return state, Metrics(value, norm, 1 - finite.astype(jnp.int32))

    def refresh(state: MetaState) -> MetaState:
        if problem.refresh is None or state.lives is None:
            raise ValueError("refresh: this problem has no refresh function")
        key = step_keys(state).refresh
        context = problem.refresh(state.context, state.loss_params, state.lives.params, state.lives.task, key)
        return state.replace(context=context)

    def refreshed(state: MetaState, mesh: Mesh | None) -> MetaState:
        state = refresh(state.replace(lives=sharding.whole(state.lives, mesh)))
        return state.replace(context=sharding.whole(state.context, mesh))

    def init(key: jax.Array, context: Context = None) -> MetaState:
        loss_key, lives_key, run_key = jax.random.split(key, 3)
        ends = first_ends(sizes, spread_ages)
        lives = jax.vmap(newborn, in_axes=(0, None, 0))(jax.random.split(lives_key, sizes.num_tasks), context, ends)
        one = jax.tree.map(lambda x: x[0], lives)
        features = guard.expect(one.params, one.task, context, lives_key)
        loss_params = strong(learned_loss.init(loss_key, features))
        return MetaState(
            step=jnp.zeros((), jnp.int32),
            loss_params=loss_params,
            opt_state=meta_optimizer.init(loss_params),
            context=context,
            key=run_key,
            lives=lives if keep_lives else None,
        )

    run = _scanned(step, refreshed, sizes.refresh_every)
    donated = (0,) if donate else ()
    check = FirstStepCheck()
    # The score function's weights are over the other tasks of the same device.
    least = 2 if collect_gradient == "score" else 1
    on_devices = functools.partial(_on_devices, num_tasks=sizes.num_tasks, least=least, donate_argnums=donated)
    return MetaLearner(
        init=jax.jit(init),
        step=check(on_devices(step, static_argnames="mesh")),
        run=_counted(check(on_devices(run, static_argnums=1, static_argnames="mesh"))),
        refresh=jax.jit(refresh),
    )


def _scanned(step: Callable[..., Any], refreshed: Callable[..., MetaState], every: int | None) -> Callable[..., Any]:
    """(state, num_steps, mesh) -> (state, Metrics [num_steps]): a scan over steps, the context renewed before each `every`."""

    def steps(state: MetaState, num_steps: int, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
        return jax.lax.scan(lambda carry, _: step(carry, mesh), state, length=num_steps)

    if every is None:
        return steps

    def run(state: MetaState, num_steps: int, mesh: Mesh | None = None) -> tuple[MetaState, Metrics]:
        blocks, rest = divmod(num_steps, every)
        parts = []
        if blocks:
            state, metrics = jax.lax.scan(lambda s, _: steps(refreshed(s, mesh), every, mesh), state, length=blocks)
            parts.append(jax.tree.map(lambda x: x.reshape(blocks * every, *x.shape[2:]), metrics))
        if rest:
            state, metrics = steps(refreshed(state, mesh), rest, mesh)
            parts.append(metrics)
        return state, jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)

    return run


def _on_devices(function: Callable[..., Any], *, num_tasks: int, least: int, **options: Any) -> Callable[..., Any]:
    """A function (state, ..., mesh) compiled, its tasks on as many devices as there are for them; options are jit's."""
    compiled = jax.jit(function, **options)

    def placed(state: MetaState, *args: int) -> Any:
        state, mesh = sharding.place(state, num_tasks, least)
        return compiled(state, *args, mesh=mesh)

    return placed


def _counted(run: Callable[..., tuple[MetaState, Metrics]]) -> Callable[..., tuple[MetaState, Metrics]]:
    """Checks the number of steps before it becomes part of a program."""

    @functools.wraps(run)
    def counted(state: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        if not isinstance(num_steps, (int, np.integer)) or isinstance(num_steps, bool) or num_steps < 1:
            raise ValueError(f"num_steps: expected a whole number of at least 1, got {num_steps!r}")
        return run(state, int(num_steps))

    return counted
